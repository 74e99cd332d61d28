"""Held-out scores of the default fit beside baselines, and what a large fit and a large query cost.

``NEURST_DATA=folder python benchmarks/spatial_fit.py`` reads ``spatial/*.h5ad`` of that folder and writes two tables of
docs/benchmarks.md. Every fit and query runs in a process of its own, so that its peak memory can be told.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from anndata import AnnData, read_h5ad
from scipy import sparse
from tables import write

import neurst
from neurst.spatial import holdout

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from real import load  # the protocol's genes and spots

SECTIONS = [
    ("visium_dlpfc_151673", 300, "random", 0.375),
    ("visium_dlpfc_151673", 300, "block", 0.305),
    ("st_mob_rep11", 300, "random", 0.38),
]
LARGE = "visium_dlpfc_151673"


def section(name: str, n_genes: int) -> AnnData:
    """A section as a user would hold it, the total over all genes of the file in `obs`."""
    coords, counts, size, genes = load(name, n_genes)
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    adata.var_names, adata.obsm["spatial"], adata.obs["total"] = genes, coords, size
    return adata


def score(name: str, n_genes: int, mode: str) -> dict:
    """Deviance explained on held-out spots by the default fit and the baselines."""
    adata = section(name, int(n_genes))
    size, coords = adata.obs["total"].to_numpy(), adata.obsm["spatial"]
    train, test = holdout.split(coords, mode, random_state=0)
    part = adata[train].copy()
    counts, null = adata.X.toarray(), np.asarray(part.X.sum(0)).ravel() / size[train].sum()
    begin = time.perf_counter()
    neurst.tl.neurtv_fit(part, size_factors="total", progress=False)
    seconds = time.perf_counter() - begin
    field = neurst.get.field(part)
    rates = {
        "nearest": holdout.nearest_cv(coords[train], counts[train], size[train], coords[test]),
        "kernel": holdout.kernel_cv(coords[train], counts[train], size[train], coords[test]),
        "neurst": field(coords[test]) / field.target_sum,
    }
    found = {k: holdout.deviance_explained(counts[test], size[test], rate, null) for k, rate in rates.items()}
    return found | {"lam": part.uns["neurtv"]["lam"], "seconds": seconds}


def large_fit() -> dict:
    """All genes of the file, defaults."""
    adata = read_h5ad(Path(os.environ["NEURST_DATA"]) / "spatial" / f"{LARGE}.h5ad")
    adata.X = sparse.csr_matrix(adata.X)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    neurst.tl.neurtv_fit(adata, progress=False)
    return {
        "what": f"fit, {adata.n_obs:,} spots x {adata.n_vars:,} genes",
        "seconds": time.perf_counter() - begin,
        "before": before,
    }


def large_query() -> dict:
    """A million points of a few genes."""
    adata = neurst.datasets.synthetic_visium()
    neurst.tl.neurtv_fit(adata, lam=400, steps=50, progress=False)
    low, high = adata.obsm["spatial"].min(0), adata.obsm["spatial"].max(0)
    points = np.random.default_rng(0).uniform(low, high, (1_000_000, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    out = neurst.tl.neurtv_query(adata, points, genes=list(adata.var_names[:5]), outside="extrapolate")
    assert np.isfinite(out.X).all()
    return {"what": "query, 1,000,000 points x 5 genes", "seconds": time.perf_counter() - begin, "before": before}


def in_own_process(function: str, *arguments: str) -> dict:
    """A function of this file in a new process: its result and its peak memory in GB."""
    command = [sys.executable, __file__, function, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    lines = [
        "| section | genes | split | nearest | kernel | **neurst** | lam | seconds | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    low = []
    for name, genes, mode, floor in SECTIONS:
        r = in_own_process("score", name, str(genes), mode)
        lines.append(
            f"| {name} | {genes} | {mode} | {r['nearest']:.4f} | {r['kernel']:.4f} | **{r['neurst']:.4f}** | {r['lam']:.0f} "
            f"| {r['seconds']:.0f} | {r['peak']:.2f} |"
        )
        print(lines[-1], flush=True)
        low += [(name, mode, r["neurst"])] if r["neurst"] < floor else []
    write(
        "held-out",
        __file__,
        "Poisson deviance explained on held-out spots, seed 0, defaults (the choice of lam included).",
        lines,
    )
    lines = ["| what | seconds | peak GB of the process | of it before the call |", "|---|---|---|---|"]
    for function in ("large_fit", "large_query"):
        r = in_own_process(function)
        lines.append(f"| {r['what']} | {r['seconds']:.0f} | {r['peak']:.2f} | {r['before'] / 1e6:.2f} |")
        print(lines[-1], flush=True)
    write("size", __file__, "Defaults, the choice of lam included.", lines)
    assert not low, f"below the floor: {low}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        result = {"score": score, "large_fit": large_fit, "large_query": large_query}[sys.argv[1]](*sys.argv[2:])
        print(json.dumps(result | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
    else:
        main()
