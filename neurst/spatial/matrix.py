"""Matrices of spots x genes, dense or sparse: moments, chunks, and conversions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Matrix = NDArray | sparse.csr_array | sparse.csr_matrix
DENSE_VALUES = 4_000_000  # most values of a sparse matrix that are dense in memory together


def library_size(values: Matrix) -> NDArray:
    """(N,) totals of the rows."""
    return np.asarray(values.sum(1), dtype=float).ravel()


def stored_values(values: Matrix) -> NDArray:
    """The values of a matrix as a 1-d array; for a sparse matrix without the implicit zeros."""
    return values.data if sparse.issparse(values) else np.ravel(values)


def holds_counts(values: Matrix) -> bool:
    """Whether a matrix holds whole numbers >= 0."""
    v = stored_values(values)
    return bool(np.all(v >= 0) and np.all(v == np.round(v)))


def moments(values: Matrix) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation of each column, in float64 whatever type the values have."""
    mean = column_means(values)
    if not sparse.issparse(values):
        return mean, np.std(values, axis=0, dtype=float)
    # squares about the mean: the difference E[y^2] - E[y]^2 would not be exactly 0 for a constant column
    n, column = values.shape[0], values.indices
    zeros = n - np.bincount(column, minlength=len(mean))
    squares = np.bincount(column, (values.data - mean[column]) ** 2, minlength=len(mean))
    return mean, np.sqrt((squares + zeros * mean**2) / n)


def column_means(values: Matrix) -> NDArray:  # (N, G) -> (G,)
    """Means of the columns in float64; scipy would sum float32 values in float32."""
    if not sparse.issparse(values):
        return values.mean(0, dtype=float)
    return np.bincount(values.indices, values.data, minlength=values.shape[1]) / values.shape[0]


def dense(values: Matrix) -> NDArray:
    """The values as a dense array."""
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


def by_column(values: Matrix) -> Matrix:
    """The values in a form whose columns are read quickly."""
    return values.tocsc() if sparse.issparse(values) else np.asarray(values)


def gene_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of columns that hold at most 4 million values each."""
    return spot_chunks(shape[1], shape[0])


def spot_chunks(n: int, width: int) -> Iterator[slice]:
    """Slices of n rows that hold at most 4 million values each."""
    step = max(1, DENSE_VALUES // max(1, width))
    return (slice(start, start + step) for start in range(0, n, step))


def to_tensor(values: Matrix) -> Tensor:
    """The matrix as a float32 tensor, sparse if the matrix is."""
    if not sparse.issparse(values):
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    csr = sparse.csr_array(values)
    parts = (csr.indptr.astype(np.int64), csr.indices.astype(np.int64), csr.data.astype(np.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(*map(torch.from_numpy, parts), csr.shape, check_invariants=False)
