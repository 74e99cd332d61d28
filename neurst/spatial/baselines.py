r"""What simple methods predict at points without a spot: nearest spot, kernel, kriging, and Smoother where it is installed.

Letters: N spots, M queries, G genes, d coordinates. `counts` (N, G) is dense or CSR; `size` (N,) is the library size over
all genes; a rate is an expected count per unit of library size. Every method chooses its settings from the training spots.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse

from neurst.spatial.holdout import Counts, dense, loss_per_gene, poisson_deviance, squared_error
from neurst.spatial.kriging import RANK, kriged
from neurst.spatial.problem import moments
from neurst.spatial.tissue import geometry, kd_tree

QUERIES = 2048  # most queries whose kernel weights are held at once
BANDWIDTHS = (0.5, 0.8, 1.2, 1.8, 2.5, 4)  # of kernels, in pitches
PRIORS = (0.05, 0.5, 2, 8)  # of kernels, in median library sizes
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of Smoother's spatial loss


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
    return _cross_validated([_nearest_sums], [*PRIORS, 32], x, counts, size, query, random_state)


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
    return _cross_validated(_kernels(x), PRIORS, x, counts, size, query, random_state)


def _pitch(x: ArrayLike) -> float:
    """Median distance to the nearest spot; where that is 0, as most positions are duplicates, of the distinct ones."""
    return np.median(kd_tree(x).query(x, 2)[0][:, 1]) or geometry(x).pitch


def _kernels(x: ArrayLike) -> list[Callable]:
    return [partial(_kernel_sums, bandwidth=_pitch(x) * h) for h in BANDWIDTHS]


def _cross_validated(
    methods: Iterable[Callable],
    priors: ArrayLike,
    x: ArrayLike,
    counts: Counts,
    size: ArrayLike,
    query: ArrayLike,
    seed: int,
    score: Callable = poisson_deviance,
) -> NDArray:
    """Rates by the method and the prior (in median library sizes) of least loss on a held quarter of the spots."""
    x, size = np.asarray(x, float), np.ravel(size)
    held = np.random.default_rng(seed).integers(0, 4, len(x)) == 0
    kept = x[~held], counts[~held], size[~held]
    loss = {}
    for method in methods:
        sums = method(*kept, x[held])
        for prior in np.median(size) * np.asarray(priors):
            rate = _shrunk(*sums, _null_rate(*kept[1:]), prior)
            loss[method, prior] = loss_per_gene(score, counts[held], size[held], rate).sum()
    method, prior = min(loss, key=loss.get)
    return _shrunk(*method(x, counts, size, query), _null_rate(counts, size), prior)


def _null_rate(counts: Counts, size: ArrayLike) -> NDArray:
    return np.asarray(counts.sum(0)).ravel() / np.sum(size)


def _shrunk(counts: NDArray, size: NDArray, null: NDArray, prior: float) -> NDArray:
    return (counts + prior * null) / (size[:, None] + prior)


def _nearest_sums(x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike) -> tuple[NDArray, NDArray]:
    nearest = kd_tree(x).query(query)[1]
    return dense(counts[nearest]), np.ravel(size)[nearest]


def _kernel_sums(
    x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, bandwidth: float
) -> tuple[NDArray, NDArray]:
    """Weighted sums of counts (M, G) and of library sizes (M,) around each query."""
    tree, query, size = kd_tree(x), np.asarray(query, float), np.ravel(size)
    weights = (_weights(tree, query[i : i + QUERIES], bandwidth) for i in range(0, len(query), QUERIES))
    sums, sizes = zip(*((dense(w @ counts), w @ size) for w in weights), strict=True)
    return np.concatenate(sums), np.concatenate(sizes)


def _weights(tree, query: NDArray, bandwidth: float) -> csr_array:
    near = kd_tree(query).sparse_distance_matrix(tree, 4 * bandwidth, output_type="ndarray")
    weight = np.exp(-((near["v"] / bandwidth) ** 2) / 2)
    return csr_array((weight, (near["i"], near["j"])), shape=(len(query), tree.n))


def kriging_rate(
    x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, query_size: ArrayLike, *, rank: int = RANK
) -> NDArray:
    r"""Rates by :func:`neurst.spatial.kriging.kriging` of the leading components of Pearson residuals :cite:p:`Lause2021`.

    .. math::
        z_{ig} = (y_{ig} - s_i p_g) / \sqrt{s_i p_g}, \qquad p_g (1 + \hat z_{qg} / \sqrt{s_q p_g})

    and not below :math:`p_g / 20`, with p the mean rates of the spots.

    Parameters
    ----------
    x, counts, size, query
        As in :func:`nearest_rate`.
    query_size
        (M,) library sizes :math:`s_q` at the queries, in which residuals there are expressed.
    rank
        Components.

    Returns
    -------
    (M, G) rates, 0 for a gene without counts.

    Raises
    ------
    ValueError
        If there are more than 4,500 spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> size = np.full(47, 15.0)
    >>> kriging_rate(rng.random((40, 2)), rng.poisson(3.0, (40, 5)), size[:40], rng.random((7, 2)), size[40:]).shape
    (7, 5)
    """
    size, query_size, null = np.reshape(size, (-1, 1)), np.reshape(query_size, (-1, 1)), _null_rate(counts, size)
    seen = null > 0
    mean, rate = size * null[seen], null[seen]
    z = kriged(x, (dense(counts)[:, seen] - mean) / np.sqrt(mean), query, rank, pitch=_pitch(x))
    out = np.zeros((len(z), len(null)))
    out[:, seen] = np.maximum(rate * (1 + z / np.sqrt(query_size * rate)), 0.05 * rate)
    return out


def kriging_rate_log(x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, *, rank: int = RANK) -> NDArray:
    r"""Rates by :func:`neurst.spatial.kriging.kriging` of the leading components of log1p-normalised counts.

    Parameters
    ----------
    x, counts, size, query, rank
        As in :func:`kriging_rate`.

    Returns
    -------
    (M, G) rates, by :func:`rate_of_logs`.

    Raises
    ------
    ValueError
        If there are more than 4,500 spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> kriging_rate_log(rng.random((40, 2)), rng.poisson(3.0, (40, 5)), np.full(40, 15.0), rng.random((7, 2))).shape
    (7, 5)
    """
    logs = dense(log_normalised(counts, size))
    mean = logs.mean(0)
    return rate_of_logs(kriged(x, logs - mean, query, rank, pitch=_pitch(x)) + mean, _null_rate(counts, size))


def log_normalised(counts: Counts, size: ArrayLike) -> Counts:
    r"""(N, G) :math:`\log(1 + y_{ig} \tilde s / s_i)` with :math:`\tilde s` the median library size; sparse if the counts are.

    Examples
    --------
    >>> np.expm1(log_normalised(np.array([[1.0], [3.0]]), [2.0, 6.0]))
    array([[2.],
           [2.]])
    """
    factor = np.median(size) / np.reshape(size, (-1, 1))
    return csr_array(counts).multiply(factor).tocsr().log1p() if issparse(counts) else np.log1p(counts * factor)


def rate_of_logs(logs: NDArray, null_rate: NDArray) -> NDArray:
    """(M, G) rates of predicted log1p-normalised counts: expm1, and the mean of each gene over the queries set to its null.

    The mean of logs is not the log of the mean, so expm1 alone is too low.

    Examples
    --------
    >>> rate_of_logs(np.log([[2.0], [4.0]]), np.array([0.1]))
    array([[0.05],
           [0.15]])
    """
    rate = np.maximum(np.expm1(logs), 1e-4)
    return rate * (null_rate / rate.mean(0))


def smoother_rate(x: ArrayLike, counts: Counts, size: ArrayLike, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """Rates by Smoother :cite:p:`Su2023`: log1p-normalised counts imputed under an intrinsic autoregression on 6 neighbours.

    The strength of its spatial loss is the one of least deviance on a quarter of the training spots held back. Needs the
    package `smoother-omics`.

    Parameters
    ----------
    x, counts, size, query, random_state
        As in :func:`kernel_cv`.

    Returns
    -------
    (M, G) rates, by :func:`rate_of_logs`.

    Raises
    ------
    ImportError
        If `smoother-omics` is not installed.
    """
    x, size, query = np.asarray(x, float), np.ravel(size), np.asarray(query, float)
    held = np.random.default_rng(random_state).integers(0, 4, len(x)) == 0
    kept = x[~held], counts[~held], size[~held]

    def deviance(strength: float) -> float:
        rate = _smoothed(*kept, x[held], strength)
        return loss_per_gene(poisson_deviance, counts[held], size[held], rate).sum()

    return _smoothed(x, counts, size, query, min(STRENGTHS, key=deviance))


def _smoothed(x: NDArray, counts: Counts, size: NDArray, query: NDArray, strength: float) -> NDArray:
    import torch

    logs = torch.from_numpy(dense(log_normalised(counts, size)).astype(np.float32))
    with (
        warnings.catch_warnings()
    ):  # of packages it lacks, of sparse tensors, and of epochs that did not reach its tolerance
        warnings.simplefilter("ignore")
        try:
            from smoother import SpatialLoss, SpatialWeightMatrix
            from smoother.models.impute import ImputeTorch
        except ImportError as error:
            msg = "`baselines` names 'smoother', whose package is not installed: `pip install smoother-omics`, or leave it out"
            raise ImportError(msg) from error
        weights = SpatialWeightMatrix()
        weights.calc_weights_knn(np.concatenate([x, query]), k=6, verbose=False)
        options = {"lambda_spatial_loss": strength, "lr": 0.02, "max_epochs": 1000, "tol": 1e-7, "quiet": True}
        model = ImputeTorch(logs, SpatialLoss("icar", weights), fixed_obs=False, **options)
    return rate_of_logs(model.get_results()[len(x) :].double().numpy(), _null_rate(counts, size))


def nearest_mean(x: ArrayLike, values: Counts, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """Normalised values of the nearest spot, shrunk to the mean of all as in :func:`kernel_mean`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nearest_mean(rng.random((40, 2)), rng.normal(size=(40, 5)), rng.random((7, 2))).shape
    (7, 5)
    """
    return _mean_by([_nearest_sums], [*PRIORS, 32], x, values, query, random_state)


def kernel_mean(x: ArrayLike, values: Counts, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    r"""Gaussian-kernel mean :math:`(\sum_i w_i y_i + p\,\bar y) / (\sum_i w_i + p)` of normalised values.

    Bandwidth and p (0.05 to 8 spots) have the least squared error on a quarter of the training spots held back, every gene scaled
    to unit variance.

    Parameters
    ----------
    x, query
        (N, d) training spots and (M, d) points.
    values
        (N, G) normalised values, dense or CSR.
    random_state
        Seed of the quarter.

    Returns
    -------
    (M, G) means.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> kernel_mean(rng.random((40, 2)), rng.normal(size=(40, 5)), rng.random((7, 2))).shape
    (7, 5)
    """
    return _mean_by(_kernels(x), PRIORS, x, values, query, random_state)


def kriging_mean(x: ArrayLike, values: Counts, query: ArrayLike, *, rank: int = RANK) -> NDArray:
    """Means by :func:`neurst.spatial.kriging.kriging` of the leading components of normalised values, every gene scaled to unit variance.

    Parameters
    ----------
    x, values, query
        As in :func:`kernel_mean`.
    rank
        Components.

    Raises
    ------
    ValueError
        If there are more than 4,500 spots.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> kriging_mean(rng.random((40, 2)), rng.normal(size=(40, 5)), rng.random((7, 2))).shape
    (7, 5)
    """
    mean, sd = _scale(values)
    return kriged(x, (dense(values) - mean) / sd, query, rank, pitch=_pitch(x)) * sd + mean


def _mean_by(methods: Iterable[Callable], priors: ArrayLike, x, values: Counts, query, seed: int) -> NDArray:
    _, sd = _scale(values)
    scaled = csr_array(values).multiply(1 / sd).tocsr() if issparse(values) else np.asarray(values) / sd
    return sd * _cross_validated(methods, priors, x, scaled, np.ones(len(x)), query, seed, squared_error)


def _scale(values: Counts) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation of each gene, 1 for one that is constant."""
    mean, sd = moments(values)
    return mean, np.where(sd > 1e-6 * np.abs(mean), sd, 1.0)


# Methods by name, for counts: f(x, counts, size, query, query_size, *, random_state=1) -> (M, G) rates.
BASELINES: dict[str, Callable] = {
    "nearest": lambda x, y, s, q, t, *, random_state=1: nearest_cv(x, y, s, q, random_state=random_state),
    "kernel": lambda x, y, s, q, t, *, random_state=1: kernel_cv(x, y, s, q, random_state=random_state),
    "kriging": lambda x, y, s, q, t, *, random_state=1: kriging_rate(x, y, s, q, t),
    "kriging_log": lambda x, y, s, q, t, *, random_state=1: kriging_rate_log(x, y, s, q),
    "smoother": lambda x, y, s, q, t, *, random_state=1: smoother_rate(x, y, s, q, random_state=random_state),
}
# Methods by name, for normalised values: f(x, values, query, *, random_state=1) -> (M, G) means.
MEANS: dict[str, Callable] = {
    "nearest": nearest_mean,
    "kernel": kernel_mean,
    "kriging": lambda x, y, q, *, random_state=1: kriging_mean(x, y, q),
}
