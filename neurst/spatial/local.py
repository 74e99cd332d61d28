r"""Structures of one or two spots that the members of an average are too smooth for, such as a small nucleus or a vessel.

At each spot c, with Gaussian weights :math:`k_{ci}` of one pitch and residuals of variance :math:`v_{ig}` about the average, the score of a gene

.. math::
    S_{cg} = \sum_i k_{ci} (y_{ig} - \mu_{ig}) \Big/ \sqrt{\textstyle\sum_i k_{ci}^2 v_{ig}}

is about standard normal where nothing is missing. A bump is placed where :math:`|S|` of a gene is larger than :math:`\sqrt{2 \log(N G)}`, which is
hardly ever reached by chance :cite:p:`Donoho1994`, and where the score of that gene is still above 3 without the spot that contributes most: a single
spot cannot be told from noise. All genes whose own score there is above :math:`\sqrt{2 \log G}` get a loading on the bump, with a standard normal prior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from neurst.spatial.data import SpotData
from neurst.spatial.geometry import kd_tree
from neurst.spatial.matrix import by_column, dense, gene_chunks

WIDTH = 0.7  # standard deviation of a bump in pitches
REACH = 2.5  # distance from the centre at which a bump ends, in widths
LEAST_REST = 3.0  # least score without the spot that contributes most
STEPS = 12  # Newton steps for the loadings of a gene


@dataclass(frozen=True, eq=False)
class LocalStructure:
    """Bumps: centres (P, d), standard deviation in the units of the coordinates, and loadings (G, P)."""

    centres: NDArray
    width: float
    loadings: NDArray

    def among(self, n_genes: int, index: NDArray) -> LocalStructure:
        """The same among G genes, where these genes have the indices `index`."""
        loadings = np.zeros((n_genes, self.loadings.shape[1]))
        loadings[index] = self.loadings
        return LocalStructure(self.centres, self.width, loadings)


Predictor = Callable[[NDArray], NDArray]  # indices of genes (g,) -> predictors at all spots (N, g)


def find_structure(
    data: SpotData, predictor: Predictor, dispersion: NDArray | None, *, most: int = 64
) -> LocalStructure | None:
    """The bumps that an average lacks; None if there is none.

    Parameters
    ----------
    data
        All spots and genes; every gene must be informative.
    predictor
        Predictors of the average at the spots.
    dispersion
        (G,) over-dispersion of counts; None for normalised values, whose noise is then measured by their residuals.
    most
        Largest number of bumps.
    """
    n, n_genes = data.values.shape
    tree = kd_tree(data.coords)
    gaps = tree.query(data.coords, k=2)[0][:, 1]
    if most == 0 or not (gaps > 0).any():
        return None
    width = WIDTH * float(np.median(gaps[gaps > 0]))
    scatter = _noise(data, predictor) if dispersion is None else dispersion
    kernel = _kernel(data.coords, width)
    top, least = np.zeros(n), np.sqrt(2 * np.log(n * n_genes))
    for genes, _, score, several in _scores(data, predictor, scatter, kernel, least):
        if len(genes):
            np.maximum(top, np.where(several, score, 0.0).max(1), out=top)
    chosen: list[int] = []
    for spot in np.argsort(-top, kind="stable"):
        if top[spot] <= least or len(chosen) == most:
            break
        if not chosen or np.linalg.norm(data.coords[chosen] - data.coords[spot], axis=1).min() > 2 * width:
            chosen.append(int(spot))
    if not chosen:
        return None
    near = np.unique(kernel[chosen].indices)  # the spots that these bumps reach
    few, reach, loadings = data.take(near), kernel[chosen][:, near], np.zeros((n_genes, len(chosen)))
    least = np.sqrt(2 * np.log(max(n_genes, 2)))
    for genes, eta, score, _ in _scores(few, lambda genes: predictor(genes)[near], scatter, reach, least):
        latent = reach.T.toarray()
        for g, own, used in zip(genes, eta.T, (score > least).T, strict=True):
            if used.any():
                loadings[g, used] = _loadings(few, g, own, scatter, latent[:, used])
    return LocalStructure(data.coords[chosen], width, loadings)


def _noise(data: SpotData, predictor: Predictor) -> NDArray:
    """(G,) mean square of the residuals of normalised values."""
    columns, found = by_column(data.values), []
    for part in gene_chunks(data.values.shape):
        genes = np.arange(data.values.shape[1])[part]
        found.append(((dense(columns[:, genes]) - predictor(genes)) ** 2).mean(0))
    return np.concatenate(found) + 1e-300


def _kernel(coords: NDArray, width: float) -> csr_array:
    """Gaussian weights between near spots, 1 for a spot itself."""
    tree = kd_tree(coords)
    pairs = tree.query_pairs(REACH * width, output_type="ndarray")
    weight = np.exp(-(((coords[pairs[:, 0]] - coords[pairs[:, 1]]) ** 2).sum(1)) / (2 * width**2))
    rows, columns = np.concatenate([pairs, pairs[:, ::-1]]).T
    n = len(coords)
    diagonal = np.arange(n)
    entries = np.concatenate([weight, weight, np.ones(n)])
    return csr_array((entries, (np.concatenate([rows, diagonal]), np.concatenate([columns, diagonal]))), shape=(n, n))


def _scores(
    data: SpotData, predictor: Predictor, scatter: NDArray, kernel: csr_array, least: float
) -> Iterator[tuple[NDArray, NDArray, NDArray, NDArray]]:
    """For chunks of genes, those whose score is above `least` somewhere.

    Indices (g,), predictors (N, g), absolute scores (P, g), and whether more than one spot makes a score (P, g). `kernel` (P, N) are the weights of
    spots around P places.
    """
    n, n_genes = data.values.shape
    columns, squares = by_column(data.values), kernel.power(2)
    for part in gene_chunks((n, n_genes)):
        genes = np.arange(n_genes)[part]
        eta, phi = predictor(genes), scatter[genes]
        residual, variance, slope = data.observation.residuals(columns[:, genes], eta, phi)
        variance = data.observation.cautious_variance(residual, variance, slope)
        total, spread = kernel @ residual, squares @ variance
        score = np.abs(total) / np.sqrt(spread)
        kept = score.max(0) > least
        residual, variance, total, spread, score = (
            each[:, kept] for each in (residual, variance, total, spread, score)
        )
        sign = np.sign(total)
        largest, its_variance = _largest_part(kernel, residual, variance, sign)
        rest = np.maximum(spread - its_variance, 1e-300)
        yield genes[kept], eta[:, kept], score, sign * total - largest > LEAST_REST * np.sqrt(rest)


def _largest_part(
    kernel: csr_array, residual: NDArray, variance: NDArray, sign: NDArray
) -> tuple[NDArray, NDArray]:  # -> (N, g), (N, g)
    """The largest contribution of one spot to each score, in the direction of its sign, and the variance of that contribution."""
    weight, starts = kernel.data[:, None], kernel.indptr[:-1]
    parts = weight * residual[kernel.indices] * np.repeat(sign, np.diff(kernel.indptr), axis=0)
    largest = np.maximum.reduceat(parts, starts, axis=0)
    is_largest = parts == np.repeat(largest, np.diff(kernel.indptr), axis=0)
    return largest, np.maximum.reduceat(is_largest * weight**2 * variance[kernel.indices], starts, axis=0)


def _loadings(data: SpotData, gene: int, eta: NDArray, scatter: NDArray, latent: NDArray) -> NDArray:
    """Loadings (P,) of a gene on bumps (N, P), with a standard normal prior, by Newton steps on the quasi-likelihood."""
    spots = data.take_genes(np.array([gene]))
    phi, found = scatter[[gene]], np.zeros(latent.shape[1])
    for _ in range(STEPS):
        now = (eta + latent @ found)[:, None]
        residual, variance, slope = spots.observation.residuals(spots.values, now, phi)
        weight = (slope**2 / variance)[:, 0]
        gradient = latent.T @ (residual * slope / variance)[:, 0] - found
        step = np.linalg.solve(latent.T @ (weight[:, None] * latent) + np.eye(len(found)), gradient)
        found = found + np.clip(step, -1.0, 1.0)
    return found
