"""Reading the counts of a section as latents, at positions in units of its typical spacing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neurst.spatial.data import SpotData
from neurst.spatial.geometry import distinct, kd_tree
from neurst.spatial.matrix import column_means

TIE = 1e-6  # relative difference of distances that count as equal
RIDGE = 0.03  # for sections that measure a part of the genes


def spacing(coords: NDArray) -> float:
    """Typical spacing of positions (N, d): the side of the square (cube) that one of them has to itself, from the distance to the sixth neighbour."""
    points = distinct(coords)
    d, count = points.shape[1], min(7, len(points))
    far = kd_tree(points).query(points, count)[0][:, -1]
    ball = math.pi ** (d / 2) / math.gamma(d / 2 + 1)
    return float((ball * np.median(far) ** d / count) ** (1 / d))


@dataclass(frozen=True, eq=False)
class Encoded:
    """A section as local fields see it.

    Parameters
    ----------
    coords
        (N, d) in units of `pitch`, the typical spacing.
    latent
        (N, r + 1): latents of unit variance with the noise of the counts, and the log library size relative to the median.
    precision
        (N,) size of the noise, as the number of counts that tell a latent.
    size
        (N,) expected total over the genes from which latents are read.
    log_rate
        (G,) log of the mean rates of the genes of the section.
    """

    coords: NDArray
    pitch: float
    latent: NDArray
    precision: NDArray
    size: NDArray
    log_rate: NDArray

    @cached_property
    def tree(self):
        """A tree of the positions."""
        return kd_tree(self.coords)

    def neighbours(
        self, query: NDArray, k: int, centre: NDArray | None, radius: NDArray | float
    ) -> tuple[NDArray, NDArray]:
        """The nearest spots of points (M, d) farther than `radius` from `centre`: indices (M, k), and which of them are not to be used (M, k).

        On a lattice many spots are equally far. Of those as far as the next spot that is left out none is used, so that the order of the spots does not matter.
        """
        tree, n, hidden_most = self.tree, len(self.coords), 0
        if centre is not None:
            hidden_most = int(tree.query_ball_point(centre, radius, return_length=True).max())
        away, index = (part.reshape(len(query), -1) for part in tree.query(query, min(k + 1 + hidden_most, n)))
        hidden = np.zeros(index.shape, dtype=bool)
        if centre is not None:
            reach = np.reshape(np.broadcast_to(radius, len(query)), (-1, 1))
            hidden = np.linalg.norm(self.coords[index] - centre[:, None], axis=2) <= reach
        order = np.argsort(hidden, axis=1, kind="stable")[:, : k + 1]
        index, hidden, away = (np.take_along_axis(part, order, 1) for part in (index, hidden, away))
        if index.shape[1] > k:
            next_one = np.where(hidden[:, k:], np.inf, away[:, k:])
            tied = away >= next_one * (1 - TIE)
            few = (hidden | tied)[:, :k].sum(1, keepdims=True) > k // 2  # many spots at one position
            hidden = hidden | (tied & ~few)
        return index[:, :k], hidden[:, :k]


def section_rates(data: SpotData) -> NDArray:
    """(G,) mean rates of a section; half a count is added to each gene, so that none is zero."""
    n, size = len(data.coords), data.observation.size.sum()
    return (column_means(data.values) * n + 0.5) / size


@dataclass(frozen=True, eq=False)
class Encoder:
    """Reads the counts of a spot as latents: projections of Pearson residuals on directions that neighbouring spots share.

    Parameters
    ----------
    genes
        (G,) names.
    share
        (G,) share of each gene in the counts, over all sections.
    directions
        (G, r) orthonormal.
    variance
        (r,) variance of a latent between spots, without the noise of the counts.
    precision
        Typical precision of a spot.
    """

    genes: NDArray
    share: NDArray
    directions: NDArray
    variance: NDArray
    precision: float

    def columns(self, genes: NDArray) -> tuple[NDArray, NDArray]:
        """Indices of the genes in common: here, and in `genes`."""
        _, here, there = np.intersect1d(self.genes, genes, return_indices=True)
        order = np.argsort(here)
        return here[order], there[order]

    def sizes(self, data: SpotData) -> tuple[NDArray, NDArray]:
        """(N,) expected totals over all genes of the encoder, and (C,) shares of the genes in common, as the section has them."""
        here, there = self.columns(data.genes)
        rate = section_rates(data)[there]
        factor = rate.sum() / self.share[here].sum()
        return data.observation.size * factor, rate / factor

    def read(self, data: SpotData, limit: float) -> Encoded:
        """The latents of a section."""
        here, there = self.columns(data.genes)
        size, share = self.sizes(data)
        basis = self.directions[here]
        mixed = np.linalg.inv(
            basis.T @ basis + RIDGE * np.eye(len(self.variance))
        )  # is diagonal if all genes are measured
        weight = (basis @ mixed) / np.sqrt(self.share[here])[:, None]
        latent = (data.values[:, there] @ weight) / size[:, None] - share @ weight
        precision = size / np.mean(np.diag(mixed))
        latent = latent / np.sqrt(self.variance)
        bound = limit * np.sqrt(1 + 1 / (precision[:, None] * self.variance))
        depth = np.log(size / np.median(size))[:, None]
        pitch = spacing(data.coords)
        return Encoded(
            data.coords / pitch,
            pitch,
            np.hstack([bound * np.tanh(latent / bound), depth]),
            precision,
            size,
            np.log(section_rates(data)),
        )
