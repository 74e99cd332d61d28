r"""Simple methods that predict expression between spots: nearest spot, kernel, kriging, and Smoother if it is installed.

Letters: N spots, M queries, G genes, d coordinates. `counts` (N, G) is dense or CSR; `size` (N,) is the library size over
all genes; a rate is an expected count per unit of library size. Every method chooses its settings from the training spots.
:data:`COUNT_BASELINES` and :data:`VALUE_BASELINES` list the methods by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse

from neurst.spatial.evaluate.kriging import RANK, kriged
from neurst.spatial.evaluate.scores import loss_per_gene, poisson_deviance, squared_error
from neurst.spatial.geometry import geometry, kd_tree
from neurst.spatial.matrix import Matrix, dense, moments

QUERIES = 2048  # most queries whose kernel weights are in memory together
BANDWIDTHS = (0.5, 0.8, 1.2, 1.8, 2.5, 4)  # candidates for kernels, in pitches
PRIORS = (0.05, 0.5, 2, 8)  # candidates for kernels, in median library sizes
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # candidates for Smoother's spatial loss


def nearest_rate(x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, prior: float) -> NDArray:
    r"""Rate of the nearest spot i, :math:`(y_i + p\,null) / (s_i + p)`, where null is the mean rate of all spots.

    Parameters
    ----------
    x, counts, size
        Positions (N, d), counts and library sizes of the training spots.
    query
        (M, d) points.
    prior
        Weight p of the mean rate, in units of library size. With p > 0 the log-rates are finite.

    Returns
    -------
    (M, G) rates.

    Examples
    --------
    >>> nearest_rate([[0.0], [9.0]], np.array([[8.0], [0.0]]), [9.0, 7.0], [[1.0]], prior=1.0)
    array([[0.85]])
    """
    return _shrunk(*_nearest_sums(x, counts, size, query), _mean_rate(counts, size), prior)


def nearest_cv(x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """:func:`nearest_rate` with the prior chosen as in :func:`kernel_cv`, from 0.05 to 32 median library sizes.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nearest_cv(rng.random((40, 2)), rng.poisson(3.0, (40, 5)), np.full(40, 15.0), rng.random((7, 2))).shape
    (7, 5)
    """
    return _cross_validated([_nearest_sums], [*PRIORS, 32], x, counts, size, query, random_state)


def kernel_rate(
    x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, bandwidth: float, prior: float
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
    return _shrunk(*_kernel_sums(x, counts, size, query, bandwidth), _mean_rate(counts, size), prior)


def kernel_cv(x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """:func:`kernel_rate` with the bandwidth and prior that have the least deviance on a held-out quarter of the training spots.

    Bandwidths are 0.5 to 4 times the median distance to the nearest spot, priors 0.05 to 8 median library sizes.

    Parameters
    ----------
    x, counts, size, query
        As in :func:`nearest_rate`.
    random_state
        Seed for the choice of this quarter.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> kernel_cv(rng.random((40, 2)), rng.poisson(3.0, (40, 5)), np.full(40, 15.0), rng.random((7, 2))).shape
    (7, 5)
    """
    return _cross_validated(_kernels(x), PRIORS, x, counts, size, query, random_state)


def _pitch(x: ArrayLike) -> float:
    """Median distance to the nearest spot. If most positions are duplicates, so that it is 0, the pitch of the distinct positions."""
    return np.median(kd_tree(x).query(x, 2)[0][:, 1]) or geometry(x).pitch


def _kernels(x: ArrayLike) -> list[Callable]:
    pitch = _pitch(x)
    return [partial(_kernel_sums, bandwidth=pitch * h) for h in BANDWIDTHS]


def _cross_validated(
    methods: Iterable[Callable],
    priors: ArrayLike,
    x: ArrayLike,
    counts: Matrix,
    size: ArrayLike,
    query: ArrayLike,
    seed: int,
    score: Callable = poisson_deviance,
) -> NDArray:
    """Rates by the method and prior (in median library sizes) that have the least loss on a held-out quarter of the spots."""
    x, size = np.asarray(x, float), np.ravel(size)
    held = _held_quarter(len(x), seed)
    kept = x[~held], counts[~held], size[~held]
    loss = {}
    for method in methods:
        sums = method(*kept, x[held])
        for prior in np.median(size) * np.asarray(priors):
            rate = _shrunk(*sums, _mean_rate(*kept[1:]), prior)
            loss[method, prior] = loss_per_gene(score, counts[held], size[held], rate).sum()
    method, prior = min(loss, key=loss.get)
    return _shrunk(*method(x, counts, size, query), _mean_rate(counts, size), prior)


def _held_quarter(n: int, seed: int) -> NDArray:
    """About a quarter of n spots: at least one, and not all of them."""
    held = np.random.default_rng(seed).integers(0, 4, n) == 0
    return np.arange(n) == 0 if held.all() or not held.any() else held


def _mean_rate(counts: Matrix, size: ArrayLike) -> NDArray:
    return np.asarray(counts.sum(0)).ravel() / np.sum(size)


def _shrunk(counts: NDArray, size: NDArray, null: NDArray, prior: float) -> NDArray:
    return (counts + prior * null) / (size[:, None] + prior)


def _nearest_sums(x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike) -> tuple[NDArray, NDArray]:
    nearest = kd_tree(x).query(query)[1]
    return dense(counts[nearest]), np.ravel(size)[nearest]


def _kernel_sums(
    x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, bandwidth: float
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
    x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, query_size: ArrayLike, *, rank: int = RANK
) -> NDArray:
    r"""Rates by :func:`neurst.spatial.evaluate.kriging.kriging` of the leading components of Pearson residuals :cite:p:`Lause2021`.

    .. math::
        z_{ig} = (y_{ig} - s_i p_g) / \sqrt{s_i p_g}, \qquad p_g (1 + \hat z_{qg} / \sqrt{s_q p_g})

    Here p are the mean rates of the spots. Predicted rates are at least :math:`p_g / 20`.

    Parameters
    ----------
    x, counts, size, query
        As in :func:`nearest_rate`.
    query_size
        (M,) library sizes :math:`s_q` at the queries, which convert residuals to rates.
    rank
        Number of components.

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
    size, query_size, null = np.reshape(size, (-1, 1)), np.reshape(query_size, (-1, 1)), _mean_rate(counts, size)
    seen = null > 0
    mean, rate = size * null[seen], null[seen]
    z = kriged(x, (dense(counts)[:, seen] - mean) / np.sqrt(mean), query, rank, pitch=_pitch(x))
    out = np.zeros((len(z), len(null)))
    out[:, seen] = np.maximum(rate * (1 + z / np.sqrt(query_size * rate)), 0.05 * rate)
    return out


def kriging_rate_log(x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, *, rank: int = RANK) -> NDArray:
    r"""Rates by :func:`neurst.spatial.evaluate.kriging.kriging` of the leading components of log1p-normalised counts.

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
    return rate_of_logs(kriged(x, logs - mean, query, rank, pitch=_pitch(x)) + mean, _mean_rate(counts, size))


def log_normalised(counts: Matrix, size: ArrayLike) -> Matrix:
    r"""(N, G) :math:`\log(1 + y_{ig} \tilde s / s_i)` with :math:`\tilde s` the median library size; sparse if the counts are.

    Examples
    --------
    >>> np.expm1(log_normalised(np.array([[1.0], [3.0]]), [2.0, 6.0]))
    array([[2.],
           [2.]])
    """
    factor = np.median(size) / np.asarray(size, float).ravel()
    if not issparse(counts):
        return np.log1p(counts * factor[:, None])
    logs = csr_array(counts, dtype=float, copy=True)
    logs.data = np.log1p(logs.data * factor.repeat(np.diff(logs.indptr)))
    return logs


def rate_of_logs(logs: NDArray, mean_rate: NDArray) -> NDArray:
    """(M, G) rates from predicted log1p-normalised counts: expm1, then scaled so that each gene has its mean rate over the queries.

    Without the scaling, rates are too low: the mean of logarithms is below the logarithm of the mean.

    Examples
    --------
    >>> rate_of_logs(np.log([[2.0], [4.0]]), np.array([0.1]))
    array([[0.05],
           [0.15]])
    """
    rate = np.maximum(np.expm1(logs), 1e-4)
    return rate * (mean_rate / rate.mean(0))


def smoother_rate(x: ArrayLike, counts: Matrix, size: ArrayLike, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """Rates by Smoother :cite:p:`Su2023`: log1p-normalised counts imputed under an intrinsic autoregression on 6 neighbours.

    The strength of its spatial loss has the least deviance on a held-out quarter of the training spots. Needs the package
    `smoother-omics`.

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
    held = _held_quarter(len(x), random_state)
    kept = x[~held], counts[~held], size[~held]

    def deviance(strength: float) -> float:
        rate = _smoothed(*kept, x[held], strength)
        return loss_per_gene(poisson_deviance, counts[held], size[held], rate).sum()

    return _smoothed(x, counts, size, query, min(STRENGTHS, key=deviance))


def _smoothed(x: NDArray, counts: Matrix, size: NDArray, query: NDArray, strength: float) -> NDArray:
    import torch

    logs = torch.from_numpy(dense(log_normalised(counts, size)).astype(np.float32))
    with warnings.catch_warnings():
        # Smoother warns of optional packages, of sparse tensors, and if it stops above its tolerance
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
    return rate_of_logs(model.get_results()[len(x) :].double().numpy(), _mean_rate(counts, size))


def nearest_mean(x: ArrayLike, values: Matrix, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    """Normalised values of the nearest spot, shrunk to the mean of all as in :func:`kernel_mean`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nearest_mean(rng.random((40, 2)), rng.normal(size=(40, 5)), rng.random((7, 2))).shape
    (7, 5)
    """
    return _mean_by([_nearest_sums], [*PRIORS, 32], x, values, query, random_state)


def kernel_mean(x: ArrayLike, values: Matrix, query: ArrayLike, *, random_state: int = 1) -> NDArray:
    r"""Gaussian-kernel mean :math:`(\sum_i w_i y_i + p\,\bar y) / (\sum_i w_i + p)` of normalised values.

    Bandwidth and p (0.05 to 8 spots) have the least squared error on a held-out quarter of the training spots, with every gene scaled
    to unit variance.

    Parameters
    ----------
    x, query
        (N, d) training spots and (M, d) points.
    values
        (N, G) normalised values, dense or CSR.
    random_state
        Seed for the choice of this quarter.

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


def kriging_mean(x: ArrayLike, values: Matrix, query: ArrayLike, *, rank: int = RANK) -> NDArray:
    """Means by :func:`neurst.spatial.evaluate.kriging.kriging` of the leading components of normalised values, with every gene scaled to unit variance.

    Parameters
    ----------
    x, values, query
        As in :func:`kernel_mean`.
    rank
        Number of components.

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


def _mean_by(methods: Iterable[Callable], priors: ArrayLike, x, values: Matrix, query, seed: int) -> NDArray:
    _, sd = _scale(values)
    scaled = csr_array(values).multiply(1 / sd).tocsr() if issparse(values) else np.asarray(values) / sd
    return sd * _cross_validated(methods, priors, x, scaled, np.ones(len(x)), query, seed, squared_error)


def _scale(values: Matrix) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation of each gene; 1 is the standard deviation of a constant gene."""
    mean, sd = moments(values)
    return mean, np.where(sd > 1e-6 * np.abs(mean), sd, 1.0)


# Methods by name, as functions of training spots and test spots (:class:`neurst.spatial.data.SpotData`).
COUNT_BASELINES: dict[str, Callable] = {
    "nearest": lambda train, test: nearest_cv(*_counts(train), test.coords),
    "kernel": lambda train, test: kernel_cv(*_counts(train), test.coords),
    "kriging": lambda train, test: kriging_rate(*_counts(train), test.coords, test.observation.size),
    "kriging_log": lambda train, test: kriging_rate_log(*_counts(train), test.coords),
    "smoother": lambda train, test: smoother_rate(*_counts(train), test.coords),
}
VALUE_BASELINES: dict[str, Callable] = {
    "nearest": lambda train, test: nearest_mean(train.coords, train.values, test.coords),
    "kernel": lambda train, test: kernel_mean(train.coords, train.values, test.coords),
    "kriging": lambda train, test: kriging_mean(train.coords, train.values, test.coords),
}


def _counts(spots) -> tuple[NDArray, Matrix, NDArray]:
    return spots.coords, spots.values, spots.observation.size
