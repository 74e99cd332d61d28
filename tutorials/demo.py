"""The main job on a synthetic section with a known answer: fit, super-resolve, compare, save.

``python tutorials/demo.py --output demo_output`` writes ``superres.h5ad`` and pictures there and prints a table. The section
(`neurst.datasets.synthetic_visium`) is drawn from a continuous field with sharp layers, smooth gradients and a structure
near the spot pitch, so the error between the spots can be measured.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData

import neurst
from neurst.spatial.evaluate.baselines import kernel_cv, nearest_cv

GENES = ["Layer2_01", "Nucleus_01", "Gradient_01"]


def errors_between_spots(adata: AnnData, dense: AnnData, truth: np.ndarray) -> dict[str, float]:
    """Root mean square error of the log-rate over dense points and genes."""
    spots = adata.obsm["spatial"], adata.X, np.asarray(adata.X.sum(1)).ravel()
    rates = {
        "field": dense.X / neurst.get.field(dense).target_sum,
        "kernel": kernel_cv(*spots, dense.obsm["spatial"]),
        "nearest": nearest_cv(*spots, dense.obsm["spatial"]),
    }
    return {name: float(np.sqrt(np.mean((np.log(rate) - truth) ** 2))) for name, rate in rates.items()}


def draw(adata: AnnData, dense: AnnData, output: Path) -> None:
    """Pictures: measured | field | truth, boundaries and gradients, how the fit went, and held-out scores."""
    fig, axes = plt.subplots(len(GENES), 3, figsize=(11, 3.1 * len(GENES)), layout="constrained")
    neurst.pl.superres(dense, GENES, spots=adata, ax=axes[:, :2])
    for (_, field, truth), gene in zip(axes, GENES, strict=True):
        vmin, vmax = field.collections[0].get_clim()
        neurst.pl.superres(dense, gene, layer="truth", vmin=vmin, vmax=vmax, ax=truth).set_title(f"{gene}, truth")
    fig.savefig(output / "superres.png", dpi=100)

    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    neurst.pl.gradient(dense, ax=axes[0])
    neurst.pl.gradient(adata, GENES[-1], ax=axes[1])
    fig.savefig(output / "gradient.png", dpi=100)

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    neurst.pl.history(adata, ax=axes)
    fig.savefig(output / "history.png", dpi=100)

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    neurst.pl.holdout_score(adata, ax=axes)
    fig.savefig(output / "holdout_score.png", dpi=100)


def main(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    adata = neurst.datasets.synthetic_visium()
    dense = neurst.tl.neurtv_superres(adata, factor=3)  # fits with the defaults first
    seconds = time.perf_counter() - begin
    neurst.tl.neurtv_gradient(adata)
    neurst.tl.neurtv_gradient(dense)

    tissue = neurst.datasets.SyntheticTissue(**adata.uns["synthetic"])
    truth = tissue.log_rate(dense.obsm["spatial"])
    dense.layers["truth"] = (neurst.get.field(dense).target_sum * np.exp(truth)).astype(np.float32)
    dense.write_h5ad(output / "superres.h5ad")
    neurst.tl.holdout_score(adata)  # hides a fifth of the spots from every method
    draw(adata, dense, output)

    errors = errors_between_spots(adata, dense, truth)
    scores = adata.uns["holdout_score"].set_index("method")["score"]
    lam = ", ".join(f"{name.replace('_', '-')} {value:.3g}" for name, value in adata.uns["neurtv"]["lam"].items())
    print(f"{adata.n_obs:,} spots x {adata.n_vars} genes -> {dense.n_obs:,} points; lam: {lam}\n")
    print(f"{'':14s}{'held-out deviance explained':>30s}{'RMSE of log-rate between spots':>34s}")
    for name, error in errors.items():
        print(f"{name:14s}{scores[name]:30.3f}{error:34.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    total = time.perf_counter() - begin
    print(
        f"\nfit and super-resolution {seconds:.0f} s, everything {total:.0f} s, peak memory {peak:.2f} GB; results in {output}/"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    main(parser.parse_args().output)
