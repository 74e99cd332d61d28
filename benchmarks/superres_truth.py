"""Super-resolution with a truth: cells binned into round spots, the field fitted to those, and read where the cells are known.

``NEURST_DATA=folder python benchmarks/superres_truth.py`` reads three imaging-based single-cell files of that folder and writes a
table of docs/benchmarks_tables.md; diameters in pitches may follow, instead of all. Spots stand on a hexagonal lattice and take the cells whose centres lie within them; cells in the
gaps between spots are seen by no route. The truth is the cells in square bins of half and of a quarter pitch. A bin that meets a
spot shares cells with the data of the fit, noise and all, so bins without any such cell are scored on their own as well.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from protocol import load
from scipy import sparse
from tables import write

import neurst
from neurst.spatial.evaluate import baselines
from neurst.spatial.evaluate.scores import deviance_explained
from neurst.spatial.geometry import kd_tree
from neurst.spatial.support import support_of

# name, genes, window, cells in an area of one spot and its gap
FILES = [
    ("xenium_breast_sampled_2023", 300, "bulbasaur", 10),
    ("osmfish_sscortex", 33, None, 8),
    ("starmap_visual_cortex_BY3_1k", 200, None, 4),
]
DIAMETERS = (0.5, 0.55, 0.75, 1.0)  # of spots, in pitches
DIVISIONS = (2, 4)  # bins in a pitch


@dataclass(frozen=True, eq=False)
class Counted:
    """Places (N, 2) with counts (N, G), library sizes (N,), and whether a cell of theirs went into a spot (N,)."""

    coords: NDArray
    counts: NDArray
    size: NDArray
    seen: NDArray

    def where(self, mask: NDArray) -> Counted:
        return Counted(self.coords[mask], self.counts[mask], self.size[mask], self.seen[mask])


def pitch_of(coords: NDArray, cells: float) -> float:
    """The pitch at which an area of one spot and its gap holds `cells`, on average over the bounding box."""
    return np.sqrt(cells * np.prod(np.ptp(coords, axis=0)) / len(coords) / np.sqrt(0.75))


def hexagonal(low: NDArray, high: NDArray, pitch: float) -> NDArray:
    """A hexagonal lattice over a box."""
    row, column = np.indices(np.ceil((high - low) / pitch / [1, np.sqrt(0.75)]).astype(int)[::-1] + 1)
    x = pitch * np.stack([column + row % 2 / 2, np.sqrt(0.75) * row], axis=-1)
    return low + x.reshape(-1, 2)


def pooled(member: NDArray, coords: NDArray, counts: NDArray, size: NDArray, seen: NDArray) -> Counted:
    """Sums over the cells of each place; `member` (N,) is the place of every cell, -1 for none."""
    cell = np.flatnonzero(member >= 0)
    pool = sparse.csr_array((np.ones(len(cell)), (member[cell], cell)), shape=(len(coords), len(member)))
    sums = Counted(coords, pool @ counts, pool @ size, pool @ seen > 0)
    return sums.where(sums.size > 0)


def spots_and_bins(coords: NDArray, counts: NDArray, size: NDArray, pitch: float, diameter: float):
    """Round spots of a diameter in pitches, and for each division the square bins of cells inside their support."""
    centres = hexagonal(coords.min(0), coords.max(0), pitch)
    away, nearest = kd_tree(centres).query(coords)
    seen = away <= diameter * pitch / 2
    spots = pooled(np.where(seen, nearest, -1), centres, counts, size, seen)
    np.testing.assert_allclose(spots.counts.sum(0), counts[seen].sum(0))
    bins = {}
    for division in DIVISIONS:
        side, low = pitch / division, coords.min(0)
        at, member = np.unique(np.floor((coords - low) / side), axis=0, return_inverse=True)
        found = pooled(member.ravel(), low + (at + 0.5) * side, counts, size, seen)
        np.testing.assert_allclose(found.counts.sum(0), counts.sum(0))
        bins[division] = found.where(support_of(spots.coords).contains(found.coords))
    return spots, bins


def fit(spots: Counted, footprint: float | None, lam: float | str = "auto"):
    """The default field of the spots, as a function of positions: rates."""
    adata = AnnData(sparse.csr_matrix(spots.counts.astype(np.float32)))
    adata.obsm["spatial"], adata.obs["total"] = spots.coords, spots.size
    neurst.tl.neurtv_fit(adata, size_factors="total", footprint=footprint, lam=lam, progress=False)
    field = neurst.get.field(adata)
    return lambda query: field(query) / field.target_sum


def routes(spots: Counted, diameter: float, lam: float | str = "auto") -> dict:
    """Rates as functions of positions."""
    known = spots.coords, spots.counts, spots.size
    return {
        "nearest": lambda query: baselines.nearest_cv(*known, query),
        "kernel": lambda query: baselines.kernel_cv(*known, query),
        "point": fit(spots, None, lam),
        "footprint": fit(spots, diameter, lam),
    }


def correlation(truth: Counted, rate: NDArray) -> float:
    """Mean over genes of Pearson's r between log(1 + counts at the median library size) of the bins and of their rates."""
    observed, expected = (np.log1p(np.median(truth.size) * r) for r in (truth.counts / truth.size[:, None], rate))
    a, b = ((v - v.mean(0)) / np.where(v.std(0) > 0, v.std(0), np.inf) for v in (observed, expected))
    return float((a * b).mean(0)[truth.counts.any(0)].mean())


def scores(spots: Counted, bins: Counted, rate: NDArray) -> tuple[float, float]:
    """Deviance explained, all genes together, and the correlation."""
    null = spots.counts.sum(0) / spots.size.sum()
    return deviance_explained(bins.counts, bins.size, rate, null), correlation(bins, rate)


def compare(
    name: str, n_genes: int, window: str | None, cells: int, diameter: float, lam: float | str = "auto"
) -> list:
    """Rows of the table: one for each division, of all bins and of those without a cell of the data."""
    coords, counts, size, _ = load(name, n_genes, window, column="window")
    pitch = pitch_of(coords, cells)
    spots, bins = spots_and_bins(coords, counts, size, pitch, diameter)
    reads, rows = routes(spots, diameter * pitch, lam), []
    for division, every in bins.items():
        rates = {route: read(every.coords) for route, read in reads.items()}
        for kind, mask in {"all": every.seen | True, "unseen": ~every.seen}.items():
            if mask.sum() < 50:  # too few to tell
                continue
            found = [scores(spots, every.where(mask), rate[mask]) for rate in rates.values()]
            rows.append(
                (
                    name,
                    diameter,
                    len(spots.size),
                    f"1/{division}",
                    kind,
                    int(mask.sum()),
                    dict(zip(reads, found, strict=True)),
                )
            )
    return rows


def line(row: tuple) -> str:
    """A row of the table, the best route of each score in bold."""
    *head, found = row
    cells = []
    for values in zip(*found.values(), strict=True):
        cells += [f"**{v:.3f}**" if v == max(values) else f"{v:.3f}" for v in values]
    return "| " + " | ".join([*map(str, head), *cells]) + " |"


def main(diameters: tuple[float, ...]) -> None:
    names = ("nearest", "kernel", "point", "footprint")
    columns = ["file", "diameter", "spots", "bin", "cells", "bins", *names, *(f"{n}, r" for n in names)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    low = []
    for file in FILES:
        for diameter in diameters:
            for row in compare(*file, diameter):
                lines.append(line(row))
                print(lines[-1], flush=True)
                low += [row] if row[4] == "unseen" and row[-1]["point"][0] <= row[-1]["nearest"][0] else []
    write(
        "superres-truth",
        __file__,
        "Cells binned into round spots on a hexagonal lattice (diameter in pitches), read at the centres of bins of half and of a quarter "
        "pitch: Poisson deviance explained over genes together, and mean per-gene Pearson r, against the cells of the bins. "
        "`unseen`: bins without a cell that went into a spot. Seed 0, defaults, the choice of lam included.",
        lines,
    )
    assert not low, f"no better than the nearest spot: {low}"


if __name__ == "__main__":
    main(tuple(map(float, sys.argv[1:])) or DIAMETERS)
