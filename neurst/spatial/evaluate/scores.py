r"""Agreement between predictions and measured values of held-out spots.

Letters: N spots, G genes. `counts` (N, G) is dense or CSR; `size` (N,) is the library size over all genes; a rate is an expected count per
unit of library size, so that the expected counts are ``size[:, None] * rate``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

from neurst.spatial.matrix import Matrix, by_column, dense, gene_chunks


def poisson_deviance(counts: ArrayLike, mean: ArrayLike) -> NDArray:
    r"""Poisson deviance :math:`2 (y \log(y / \mu) - y + \mu)`, elementwise; means below 1e-8 are set to 1e-8.

    Parameters
    ----------
    counts, mean
        Matrix y and expected counts :math:`\mu`, dense, of shapes that broadcast.

    Examples
    --------
    >>> poisson_deviance([0, 2], [1.5, 2.0])
    array([3., 0.])
    """
    counts, mean = np.asarray(counts, float), np.maximum(mean, 1e-8)
    return 2 * (xlogy(counts, counts / mean) - (counts - mean))


def deviance_explained(counts: Matrix, size: ArrayLike, rate: ArrayLike, mean_rate: ArrayLike) -> float:
    r"""Share of the Poisson deviance that `rate` explains, over all genes: :math:`1 - D(rate) / D(null)`, with `mean_rate` as the null.

    Parameters
    ----------
    counts, size
        Counts and library sizes of the held-out spots.
    rate
        (N, G) or (G,) predicted rates.
    mean_rate
        (G,) mean rates of the training spots.

    Examples
    --------
    >>> deviance_explained(np.array([[4.0], [0.0]]), [2.0, 2.0], [[2.0], [0.0]], [1.0]) > 0.99
    True
    """
    loss, null = (loss_per_gene(poisson_deviance, counts, size, p).sum(keepdims=True) for p in (rate, mean_rate))
    return float(_explained(loss, null)[0])


def deviance_explained_per_gene(counts: Matrix, size: ArrayLike, rate: ArrayLike, mean_rate: ArrayLike) -> NDArray:
    """Share of Poisson deviance explained gene by gene; arguments as in :func:`deviance_explained`.

    Returns
    -------
    (G,) shares, never NaN: 0 for a gene that cannot be scored, without counts in these spots or with a null deviance of 0.

    Examples
    --------
    >>> deviance_explained_per_gene(np.array([[4.0, 0.0]]), [2.0], [[2.0, 1.0]], [1.0, 1.0])
    array([1., 0.])
    """
    loss, null = (loss_per_gene(poisson_deviance, counts, size, p) for p in (rate, mean_rate))
    return np.where(np.asarray(counts.sum(0)).ravel() > 0, _explained(loss, null), 0.0)


def variance_explained(values: Matrix, mean: ArrayLike, train_mean: ArrayLike) -> float:
    r"""Share of variance explained in normalised data, over all genes, each scaled to unit null variance.

    With this scaling, :math:`1 - \sum RSS / \sum TSS` is the mean of :func:`variance_explained_per_gene` over the genes
    that differ from their null mean (0 where none does).

    Examples
    --------
    >>> variance_explained(np.array([[0.0, 8.0], [2.0, 12.0]]), [[0.0, 10.0], [2.0, 10.0]], [1.0, 10.0])
    0.5
    """
    loss, null = (loss_per_gene(squared_error, values, np.ones(values.shape[0]), p) for p in (mean, train_mean))
    varies = null > 0
    return float(_explained(loss, null)[varies].mean()) if varies.any() else 0.0


def variance_explained_per_gene(values: Matrix, mean: ArrayLike, train_mean: ArrayLike) -> NDArray:
    r"""Share of variance explained gene by gene, :math:`1 - \sum (y - mean)^2 / \sum (y - null)^2`.

    Parameters
    ----------
    values
        (N, G) normalised values of the held-out spots, dense or CSR.
    mean
        (N, G) or (G,) predictions.
    train_mean
        (G,) means of the training spots.

    Returns
    -------
    (G,) shares, never NaN: 0 for a gene that does not differ from its null mean.

    Examples
    --------
    >>> variance_explained_per_gene(np.array([[0.0, 8.0], [2.0, 12.0]]), [[0.0, 10.0], [2.0, 10.0]], [1.0, 10.0])
    array([1., 0.])
    """
    return _explained(*(loss_per_gene(squared_error, values, np.ones(values.shape[0]), p) for p in (mean, train_mean)))


def median_gene_correlation(values: Matrix, prediction: ArrayLike) -> float:
    """Median over genes of Pearson's r between prediction and value.

    Parameters
    ----------
    values
        (N, G) values of the held-out spots, dense or CSR.
    prediction
        (N, G) or (G,).

    Returns
    -------
    The median. A gene whose values are all equal is skipped; a constant prediction has r = 0. 0 if all genes are skipped.

    Examples
    --------
    >>> median_gene_correlation(np.array([[4.0], [0.0], [2.0]]), [[3.0], [1.0], [2.0]])
    1.0
    """
    return _median_correlation(values, prediction, lambda y: y, lambda p: p)


def median_log_rate_correlation(counts: Matrix, size: ArrayLike, rate: ArrayLike) -> float:
    r"""Median over genes of Pearson's r between :math:`\log(1 + \tilde s\, rate)` and :math:`\log(1 + \tilde s\, y / s)`.

    :math:`\tilde s` is the median library size of the held-out spots.

    Parameters
    ----------
    counts, size, rate
        As in :func:`deviance_explained`.

    Returns
    -------
    As :func:`median_gene_correlation`.

    Examples
    --------
    >>> counts = np.array([[4.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    >>> median_log_rate_correlation(counts, [2.0, 2.0, 2.0], [[2.0, 1.0], [0.1, 0.0], [1.0, 1.0]]) > 0.99
    True
    """
    size = np.reshape(size, (-1, 1))
    typical = np.median(size)
    return _median_correlation(counts, rate, lambda y: np.log1p(y * typical / size), lambda p: np.log1p(p * typical))


def _median_correlation(values: Matrix, prediction: ArrayLike, of_value: Callable, of_prediction: Callable) -> float:
    values, prediction = by_column(values), np.broadcast_to(prediction, values.shape)
    r = [
        _pearson(of_value(dense(values[:, genes])), of_prediction(prediction[:, genes]))
        for genes in gene_chunks(values.shape)
    ]
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


def loss_per_gene(score: Callable, values: Matrix, size: ArrayLike, prediction: ArrayLike) -> NDArray:
    """Sum over spots of ``score(values, size * prediction)``: (G,). Only a chunk of genes is made dense at a time."""
    values = by_column(values)
    size, prediction = np.reshape(size, (-1, 1)), np.broadcast_to(prediction, values.shape)
    genes = gene_chunks(values.shape)
    return np.concatenate([score(dense(values[:, g]), size * prediction[:, g]).sum(0) for g in genes])
