r"""Held-out prediction: which spots are hidden, and how a prediction of them is scored.

Letters: N spots, G genes, d coordinates. `counts` (N, G) is dense or CSR; `size` (N,) is the library size over
all genes; a rate is an expected count per unit of library size, so that the expected counts are ``size[:, None] * rate``.
"""

from collections.abc import Callable
from math import gamma, pi
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse
from scipy.special import xlogy

from neurst.spatial.tissue import kd_tree

Counts = NDArray | csr_array
CELLS = 4_000_000  # most entries of a sparse matrix made dense at once


def split(
    coords: ArrayLike, mode: Literal["random", "block"] = "random", *, random_state: int = 0, fraction: float = 0.2
) -> tuple[NDArray, NDArray]:
    """Training and test spots.

    Parameters
    ----------
    coords
        (N, d) positions.
    mode
        "random" hides spots one by one; "block" hides discs (3-d: balls) of 2 % of the bounding box each, around random spots,
        until `fraction` is covered, which asks for prediction away from the spots.
    random_state
        Seed.
    fraction
        Share of the spots to hide.

    Returns
    -------
    Indices of the training spots, ascending, and of the test spots.

    Examples
    --------
    >>> train, test = split(np.random.default_rng(0).normal(size=(50, 2)), "block")
    >>> len(train) + len(test), len(test) >= 10
    (50, True)
    """
    if mode not in SPLITS:
        raise ValueError(f"`mode` is {mode!r}: choose one of {', '.join(map(repr, SPLITS))}")
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction` is {fraction}: give a number between 0 and 1")
    test = SPLITS[mode](np.asarray(coords, float), np.random.default_rng(random_state), fraction)
    return np.setdiff1d(np.arange(len(coords)), test), test


def _random_spots(coords: NDArray, rng: np.random.Generator, fraction: float) -> NDArray:
    return rng.permutation(len(coords))[: int(len(coords) * fraction)]


def _blocks(coords: NDArray, rng: np.random.Generator, fraction: float, share: float = 0.02) -> NDArray:
    extent = np.ptp(coords, axis=0)
    extent = extent[extent > 0]
    d = len(extent)
    radius = (np.prod(extent) * share / (pi ** (d / 2) / gamma(d / 2 + 1))) ** (1 / d)  # a d-ball of that volume
    hidden, tree = np.zeros(len(coords), bool), kd_tree(coords)
    while hidden.mean() < fraction:
        hidden[tree.query_ball_point(coords[rng.integers(len(coords))], radius)] = True
    return np.flatnonzero(hidden)


SPLITS = {"random": _random_spots, "block": _blocks}


def poisson_deviance(counts: ArrayLike, mean: ArrayLike) -> NDArray:
    r"""Poisson deviance :math:`2 (y \log(y / \mu) - y + \mu)`, elementwise; means are kept above 1e-8.

    Parameters
    ----------
    counts, mean
        Counts y and expected counts :math:`\mu`, dense, of shapes that broadcast.

    Examples
    --------
    >>> poisson_deviance([0, 2], [1.5, 2.0])
    array([3., 0.])
    """
    counts, mean = np.asarray(counts, float), np.maximum(mean, 1e-8)
    return 2 * (xlogy(counts, counts / mean) - (counts - mean))


def deviance_explained(counts: Counts, size: ArrayLike, rate: ArrayLike, null_rate: ArrayLike) -> float:
    r"""Share of the null's Poisson deviance that `rate` explains, over all genes: :math:`1 - D(rate) / D(null)`.

    Parameters
    ----------
    counts, size
        Of the held-out spots.
    rate
        (N, G) or (G,) predicted rates.
    null_rate
        (G,) mean rates of the training spots.

    Examples
    --------
    >>> deviance_explained(np.array([[4.0], [0.0]]), [2.0, 2.0], [[2.0], [0.0]], [1.0]) > 0.99
    True
    """
    loss, null = (loss_per_gene(poisson_deviance, counts, size, p).sum(keepdims=True) for p in (rate, null_rate))
    return float(_explained(loss, null)[0])


def deviance_explained_per_gene(counts: Counts, size: ArrayLike, rate: ArrayLike, null_rate: ArrayLike) -> NDArray:
    """Share of Poisson deviance explained gene by gene; arguments as in :func:`deviance_explained`.

    Returns
    -------
    (G,) shares, never NaN: 0 for a gene without counts in these spots or without null deviance, which cannot be judged.

    Examples
    --------
    >>> deviance_explained_per_gene(np.array([[4.0, 0.0]]), [2.0], [[2.0, 1.0]], [1.0, 1.0])
    array([1., 0.])
    """
    loss, null = (loss_per_gene(poisson_deviance, counts, size, p) for p in (rate, null_rate))
    return np.where(np.asarray(counts.sum(0)).ravel() > 0, _explained(loss, null), 0.0)


def variance_explained(values: Counts, mean: ArrayLike, null_mean: ArrayLike) -> float:
    r"""Share of variance explained in normalised data, every gene scaled to unit null variance, over genes together.

    With genes so scaled, :math:`1 - \sum RSS / \sum TSS` is the mean of :func:`variance_explained_per_gene` over the genes
    that differ from their null mean (0 where none does).

    Examples
    --------
    >>> variance_explained(np.array([[0.0, 8.0], [2.0, 12.0]]), [[0.0, 10.0], [2.0, 10.0]], [1.0, 10.0])
    0.5
    """
    loss, null = (loss_per_gene(squared_error, values, np.ones(values.shape[0]), p) for p in (mean, null_mean))
    varies = null > 0
    return float(_explained(loss, null)[varies].mean()) if varies.any() else 0.0


def variance_explained_per_gene(values: Counts, mean: ArrayLike, null_mean: ArrayLike) -> NDArray:
    r"""Share of variance explained gene by gene, :math:`1 - \sum (y - mean)^2 / \sum (y - null)^2`.

    Parameters
    ----------
    values
        (N, G) normalised values of the held-out spots, dense or CSR.
    mean
        (N, G) or (G,) predictions.
    null_mean
        (G,) means of the training spots.

    Returns
    -------
    (G,) shares, never NaN: 0 for a gene that does not differ from its null mean.

    Examples
    --------
    >>> variance_explained_per_gene(np.array([[0.0, 8.0], [2.0, 12.0]]), [[0.0, 10.0], [2.0, 10.0]], [1.0, 10.0])
    array([1., 0.])
    """
    return _explained(*(loss_per_gene(squared_error, values, np.ones(values.shape[0]), p) for p in (mean, null_mean)))


def median_gene_correlation(values: Counts, size: ArrayLike | None, prediction: ArrayLike) -> float:
    r"""Median over genes of Pearson's r between :math:`\log(1 + \tilde s\, rate)` and :math:`\log(1 + \tilde s\, y / s)`.

    With :math:`\tilde s` the median library size of the held-out spots. For normalised data, of r between prediction and value.

    Parameters
    ----------
    values, size
        Of the held-out spots: counts and library sizes; or normalised values and None.
    prediction
        (N, G) or (G,) predicted rates, or means.

    Returns
    -------
    The median; a gene whose values are all equal is skipped, a prediction that is has r = 0. 0 if all genes are skipped.

    Examples
    --------
    >>> median_gene_correlation(
    ...     np.array([[4.0, 1.0], [0.0, 1.0], [2.0, 1.0]]), [2.0, 2.0, 2.0], [[2.0, 1.0], [0.1, 0.0], [1.0, 1.0]]
    ... ) > 0.99
    True
    """
    size = None if size is None else np.reshape(size, (-1, 1))
    values, prediction = _sliceable(values), np.broadcast_to(prediction, values.shape)

    def logs(y: NDArray, unit: ArrayLike) -> NDArray:
        return y if size is None else np.log1p(y * np.median(size) / unit)

    r = [_pearson(logs(dense(values[:, g]), size), logs(prediction[:, g], 1.0)) for g in _gene_chunks(values.shape)]
    r = np.concatenate(r)
    return float(np.nanmedian(r)) if np.isfinite(r).any() else 0.0


def _pearson(measured: NDArray, predicted: NDArray) -> NDArray:
    """Correlation of each column; NaN if `measured` is constant there, 0 if `predicted` is."""
    a, b = (_unit_columns(y) for y in (measured, predicted))
    return np.where(a.any(0), (a * b).sum(0), np.nan)


def _unit_columns(y: NDArray) -> NDArray:
    """Columns centred and of norm 1; 0 where they are constant up to rounding."""
    centred = y - y.mean(0)
    norm = np.linalg.norm(centred, axis=0)
    varies = norm > 1e-9 * np.linalg.norm(y, axis=0)
    return np.where(varies, centred / np.where(varies, norm, 1), 0)


def squared_error(values: NDArray, mean: NDArray) -> NDArray:
    """Squared differences, elementwise."""
    return (values - mean) ** 2


def _explained(loss: NDArray, null: NDArray) -> NDArray:
    return np.where(null > 0, 1 - loss / np.where(null > 0, null, 1), 0.0)


def loss_per_gene(score: Callable, values: Counts, size: ArrayLike, prediction: ArrayLike) -> NDArray:
    """Sum over spots of `score` of values and size * prediction: (G,). Dense only a chunk of genes at a time."""
    values = _sliceable(values)
    size, prediction = np.reshape(size, (-1, 1)), np.broadcast_to(prediction, values.shape)
    genes = _gene_chunks(values.shape)
    return np.concatenate([score(dense(values[:, g]), size * prediction[:, g]).sum(0) for g in genes])


def _sliceable(values: Counts) -> Counts:
    """The values such that columns are taken quickly."""
    return values.tocsc() if issparse(values) else np.asarray(values)


def _gene_chunks(shape: tuple[int, int]) -> list[slice]:
    step = max(1, CELLS // max(1, shape[0]))
    return [slice(g, g + step) for g in range(0, shape[1], step)]


def dense(values: Counts) -> NDArray:
    """The values as a dense array."""
    return values.toarray() if issparse(values) else values
