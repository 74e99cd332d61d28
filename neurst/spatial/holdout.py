r"""Held-out prediction: which spots are hidden, how a prediction of them is scored, and what simple methods reach.

Letters: N spots, M queries, G genes, d coordinates. `counts` (N, G) is dense or CSR; `size` (N,) is the library size over
all genes; a rate is an expected count per unit of library size, so that the expected counts are ``size[:, None] * rate``.
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import gamma, pi
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse
from scipy.special import xlogy

from neurst.spatial.tissue import geometry, kd_tree

Counts = NDArray | csr_array
CELLS = 4_000_000  # most entries of a sparse matrix made dense at once
QUERIES = 2048  # most queries whose kernel weights are held at once


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
    loss, null = (_loss(poisson_deviance, counts, size, p).sum(keepdims=True) for p in (rate, null_rate))
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
    loss, null = (_loss(poisson_deviance, counts, size, p) for p in (rate, null_rate))
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
    loss, null = (_loss(_squared_error, values, np.ones(values.shape[0]), p) for p in (mean, null_mean))
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
    return _explained(*(_loss(_squared_error, values, np.ones(values.shape[0]), p) for p in (mean, null_mean)))


def _squared_error(values: NDArray, mean: NDArray) -> NDArray:
    return (values - mean) ** 2


def _explained(loss: NDArray, null: NDArray) -> NDArray:
    return np.where(null > 0, 1 - loss / np.where(null > 0, null, 1), 0.0)


def _loss(score: Callable, values: Counts, size: ArrayLike, prediction: ArrayLike) -> NDArray:
    """Sum over spots of `score` of values and size * prediction: (G,). Dense only a chunk of genes at a time."""
    values = values.tocsc() if issparse(values) else np.asarray(values)
    size, prediction = np.reshape(size, (-1, 1)), np.broadcast_to(prediction, values.shape)
    step = max(1, CELLS // max(1, len(size)))
    genes = [slice(g, g + step) for g in range(0, values.shape[1], step)]
    return np.concatenate([score(_dense(values[:, g]), size * prediction[:, g]).sum(0) for g in genes])


def _dense(values: Counts) -> NDArray:
    return values.toarray() if issparse(values) else values


def nearest_rate(x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, prior: float) -> NDArray:
    r"""Rate of the nearest spot i, :math:`(y_i + p\,null) / (s_i + p)`, null the mean rate of all spots.

    Parameters
    ----------
    x, counts, size
        Positions (N, d), counts and library sizes of the training spots.
    query
        (M, d) points.
    prior
        Weight p of the null in units of library size; above 0 it keeps log-rates finite.

    Returns
    -------
    (M, G) rates.

    Examples
    --------
    >>> nearest_rate([[0.0], [9.0]], np.array([[8.0], [0.0]]), [9.0, 7.0], [[1.0]], prior=1.0)
    array([[0.85]])
    """
    return _shrunk(*_nearest_sums(x, counts, size, query), _null_rate(counts, size), prior)


def nearest_cv(x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """:func:`nearest_rate` with the prior chosen as in :func:`kernel_cv`, of 0.05 to 32 median library sizes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nearest_cv(rng.random((40, 2)), rng.poisson(3.0, (40, 5)), np.full(40, 15.0), rng.random((7, 2))).shape
    (7, 5)
    """
    return _cross_validated([_nearest_sums], [0.05, 0.5, 2, 8, 32], x, counts, size, query, random_state)


def kernel_rate(
    x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, bandwidth: float, prior: float
) -> NDArray:
    r"""Gaussian-kernel rate :math:`(\sum_i w_i y_i + p\,null) / (\sum_i w_i s_i + p)`.

    The weight of a spot at distance r is :math:`w = e^{-r^2 / 2 h^2}`, 0 beyond r = 4 h.

    Parameters
    ----------
    x, counts, size, query, prior
        As in :func:`nearest_rate`.
    bandwidth
        h, in the units of the coordinates.

    Examples
    --------
    >>> kernel_rate([[0.0], [2.0]], np.array([[8.0], [0.0]]), [4.0, 4.0], [[1.0]], bandwidth=1.0, prior=2.0)
    array([[1.]])
    """
    return _shrunk(*_kernel_sums(x, counts, size, query, bandwidth), _null_rate(counts, size), prior)


def kernel_cv(x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """:func:`kernel_rate` with bandwidth and prior of least deviance on a quarter of the training spots held back.

    Bandwidths are 0.5 to 4 times the median distance to the nearest spot, priors 0.05 to 8 median library sizes.

    Parameters
    ----------
    x, counts, size, query
        As in :func:`nearest_rate`.
    random_state
        Seed of the quarter.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> kernel_cv(rng.random((40, 2)), rng.poisson(3.0, (40, 5)), np.full(40, 15.0), rng.random((7, 2))).shape
    (7, 5)
    """
    pitch = np.median(kd_tree(x).query(x, 2)[0][:, 1]) or geometry(x).pitch  # 0 where most positions are duplicates
    kernels = [partial(_kernel_sums, bandwidth=pitch * h) for h in (0.5, 0.8, 1.2, 1.8, 2.5, 4)]
    return _cross_validated(kernels, [0.05, 0.5, 2, 8], x, counts, size, query, random_state)


def _cross_validated(
    methods: Iterable[Callable],
    priors: ArrayLike,
    x: ArrayLike,
    counts: Counts,
    size: ArrayLike,
    query: ArrayLike,
    seed: int,
) -> NDArray:
    """Rates by the method and the prior (in median library sizes) of least deviance on a held quarter of the spots."""
    x, size = np.asarray(x, float), np.ravel(size)
    held = np.random.default_rng(seed).integers(0, 4, len(x)) == 0
    kept = x[~held], counts[~held], size[~held]
    loss = {}
    for method in methods:
        sums = method(*kept, x[held])
        for prior in np.median(size) * np.asarray(priors):
            rate = _shrunk(*sums, _null_rate(*kept[1:]), prior)
            loss[method, prior] = _loss(poisson_deviance, counts[held], size[held], rate).sum()
    method, prior = min(loss, key=loss.get)
    return _shrunk(*method(x, counts, size, query), _null_rate(counts, size), prior)


def _null_rate(counts: Counts, size: ArrayLike) -> NDArray:
    return np.asarray(counts.sum(0)).ravel() / np.sum(size)


def _shrunk(counts: NDArray, size: NDArray, null: NDArray, prior: float) -> NDArray:
    return (counts + prior * null) / (size[:, None] + prior)


def _nearest_sums(x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike) -> tuple[NDArray, NDArray]:
    nearest = kd_tree(x).query(query)[1]
    return _dense(counts[nearest]), np.ravel(size)[nearest]


def _kernel_sums(
    x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, bandwidth: float
) -> tuple[NDArray, NDArray]:
    """Weighted sums of counts (M, G) and of library sizes (M,) around each query."""
    tree, query, size = kd_tree(x), np.asarray(query, float), np.ravel(size)
    weights = (_weights(tree, query[i : i + QUERIES], bandwidth) for i in range(0, len(query), QUERIES))
    sums, sizes = zip(*((_dense(w @ counts), w @ size) for w in weights), strict=True)
    return np.concatenate(sums), np.concatenate(sizes)


def _weights(tree, query: NDArray, bandwidth: float) -> csr_array:
    near = kd_tree(query).sparse_distance_matrix(tree, 4 * bandwidth, output_type="ndarray")
    weight = np.exp(-((near["v"] / bandwidth) ** 2) / 2)
    return csr_array((weight, (near["i"], near["j"])), shape=(len(query), tree.n))
