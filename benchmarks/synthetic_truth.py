"""What only a known truth can tell: coverage of the standard deviation, ripples in smooth genes, and a small nucleus.

``python benchmarks/synthetic_truth.py [seeds, e.g. 0,1,2]`` writes the table "synthetic-truth" of docs/benchmarks_tables.md. The standard deviation was scaled on
the sections of seeds 10, 11 and 12 (``--scale`` prints what they say), and is judged on others.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.stats import norm, spearmanr
from tables import write

import neurst
from neurst.datasets.synthetic import SyntheticTissue
from neurst.spatial.evaluate.splits import split
from neurst.spatial.geometry import kd_tree

LEVELS = (0.5, 0.8, 0.95)
N_GENES = 200


def hidden_errors(seed: int, mode: str = "random") -> dict[str, np.ndarray]:
    """Errors of log-rates at hidden spots (N, G), their standard deviations (N, G), and the distance of each hidden spot to the nearest other one."""
    adata, tissue = neurst.datasets.synthetic_visium(n_genes=N_GENES, random_state=seed), SyntheticTissue(N_GENES, seed)
    coords = adata.obsm["spatial"].astype(float)
    train, test = split(coords, mode, random_state=seed)
    part = adata[train].copy()
    neurst.tl.neurtv_fit(part, size_factors=np.asarray(part.X.sum(1)).ravel(), progress=False)
    field = neurst.get.field(part)
    log_rate = np.log(field(coords[test]) / field.target_sum)
    distance = kd_tree(coords[train]).query(coords[test])[0] / tissue.pitch
    sd = np.sqrt(field.predictor_variance(coords[test]))
    return {"error": log_rate - np.log(tissue.spot_rate(coords[test])), "sd": sd, "distance": distance}


def coverage(found: dict[str, np.ndarray], factor: float = 1.0) -> list[float]:
    """Share of hidden rates within nominal intervals, for each level."""
    size = np.abs(found["error"]) / (np.sqrt(factor) * found["sd"])
    return [float((size < norm.ppf((1 + level) / 2)).mean()) for level in LEVELS]


def structure(seed: int) -> dict[str, float]:
    """Total variation of genes relative to the truth, and how much of the contrast of the nucleus is found."""
    adata, tissue = neurst.datasets.synthetic_visium(n_genes=N_GENES, random_state=seed), SyntheticTissue(N_GENES, seed)
    neurst.tl.neurtv_fit(adata, progress=False)
    field, coords, origin = neurst.get.field(adata), adata.obsm["spatial"].astype(float), tissue.origin
    points = coords + np.random.default_rng(seed).normal(0, 0.3 * tissue.pitch, coords.shape)
    points = points[tissue.inside(points)]
    own = np.linalg.norm(field.jacobian(points) / field(points)[..., None], axis=2).mean(0)
    steps = np.eye(2)
    slopes = [(tissue.log_rate(points + h) - tissue.log_rate(points - h)) / 2 for h in steps]
    true = np.linalg.norm(np.stack(slopes, 2), axis=2).mean(0)
    gradient = origin == "Gradient"
    inside = tissue.layer(coords) == "Nucleus"
    around = ~inside & (np.linalg.norm(coords - coords[inside].mean(0), axis=1) < 8 * tissue.pitch)
    marker = np.flatnonzero(origin == "Nucleus")[np.argmax(np.asarray(adata.X[:, origin == "Nucleus"].mean(0)))]
    contrast = [
        values[inside].mean() - values[around].mean()
        for values in (np.log(field(coords)[:, marker]), tissue.log_rate(coords)[:, marker])
    ]
    return {
        "variation": float(own[gradient].sum() / true[gradient].sum()),
        "spots": int(inside.sum()),
        "counts": float(adata.X[:, marker].mean()),
        "found": float(contrast[0] / contrast[1]),
    }


def main(seeds: list[int]) -> None:
    lines = []
    for seed in seeds:
        random, block, more = hidden_errors(seed), hidden_errors(seed, "block"), structure(seed)
        grows = spearmanr(block["distance"], block["sd"].mean(1)).statistic
        cells = [" / ".join(f"{share:.3f}" for share in coverage(each)) for each in (random, block)]
        rmse = [f"{np.sqrt((each['error'] ** 2).mean()):.3f}" for each in (random, block)]
        lines.append(
            f"| {seed} | {rmse[0]} | {cells[0]} | {rmse[1]} | {cells[1]} | {grows:.2f} | {more['variation']:.2f} | {more['spots']} | {more['counts']:.1f} | {more['found']:.2f} |"
        )
        print(lines[-1], flush=True)
    header = [
        "| seed | RMSE, random | coverage, random | RMSE, discs | coverage, discs | standard deviation against distance | variation of gradient genes | spots of the nucleus "
        "| counts of its marker | contrast found |",
        "|---" * 10 + "|",
    ]
    setting = (
        f"Synthetic section of {N_GENES} genes, defaults. Root mean square error of log-rates at hidden spots, and the share of them within nominal 50 / 80 / 95 % intervals of the "
        "standard deviation; Spearman correlation of the standard deviation with the distance to the nearest spot, in discs; total variation of the genes "
        "that have a gradient and no layers, over the truth's; the nucleus: its spots, mean counts of its strongest marker, and the share of its contrast to the surroundings (log-rate) that the field shows."
    )
    write("synthetic-truth", __file__, setting, [*header, *lines])


def scale() -> None:
    """Coverage for several factors of the variance, on the sections that the factor was chosen on."""
    found = [hidden_errors(seed) for seed in (10, 11, 12)]
    for factor in (0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6):
        print(
            factor,
            [np.round(coverage(each, factor), 3).tolist() for each in found],
            np.mean([coverage(each, factor) for each in found], axis=0).round(3),
        )


if __name__ == "__main__":
    if "--scale" in sys.argv:
        scale()
    else:
        main([int(seed) for seed in (sys.argv[1] if len(sys.argv) > 1 else "0,1,2").split(",")])
