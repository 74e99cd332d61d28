"""Spots to fit, as arrays: their moments, their null model, and the directions a fit starts from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from neurst.spatial.tissue import disc_quadrature

Matrix = NDArray | sparse.csr_array | sparse.csr_matrix


@dataclass(frozen=True, eq=False)
class Problem:
    """Spots to fit: coordinates (N, d), values (N, G), library sizes (N,) (None for normalised data), names (G,).

    `footprint` is the diameter of a spot in the units of the coordinates, over which it averages; None for values at points.
    """

    coords: NDArray
    values: Matrix
    size: NDArray | None
    genes: NDArray
    footprint: float | None = None

    def take(self, spots: NDArray, genes: NDArray | None = None) -> Problem:
        """Some spots and genes of it."""
        values = self.values[spots] if genes is None else self.values[spots][:, genes]
        size = None if self.size is None else self.size[spots]
        genes = self.genes if genes is None else self.genes[genes]
        return Problem(self.coords[spots], values, size, genes, self.footprint)

    def null(self) -> NDArray:
        """(G,) mean rate per unit of library, or mean value."""
        mean = _mean(self.values)
        return mean if self.size is None else mean * (len(self.coords) / self.size.sum())

    def active(self) -> NDArray:
        """Indices of genes that hold anything to fit: counts, or values that vary by more than float32 rounds."""
        mean, sd = moments(self.values)
        return np.flatnonzero(sd > 1e-6 * np.abs(mean) if self.size is None else mean > 0)

    def offset(self) -> Tensor | None:
        """(N, 1) log library sizes."""
        return None if self.size is None else torch.from_numpy(np.log(self.size))[:, None]

    def quadrature(self) -> Tensor | None:
        """(Q, d) offsets over which a spot averages."""
        if self.footprint is None:
            return None
        return torch.from_numpy(disc_quadrature(self.footprint, self.coords.shape[1]))

    def most_variable(self, n: int) -> NDArray:
        """Indices of the `n` genes with the largest variance (over the mean, for counts)."""
        mean, sd = moments(self.values)
        return np.sort(np.argsort(-(sd**2 / mean if self.size is not None else sd), kind="stable")[:n])


def library_size(values: Matrix) -> NDArray:
    """(N,) totals of the rows."""
    return np.asarray(values.sum(1), dtype=float).ravel()


def entries(values: Matrix) -> NDArray:
    """The stored values of a matrix, flat: those of a sparse one that are not implicit zeros."""
    return values.data if sparse.issparse(values) else np.ravel(values)


def holds_counts(values: Matrix) -> bool:
    """Whether a matrix holds whole numbers >= 0."""
    v = entries(values)
    return bool(np.all(v >= 0) and np.all(v == np.round(v)))


def moments(values: Matrix) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation of each column, in float64 whatever the values are stored as."""
    mean = _mean(values)
    if not sparse.issparse(values):
        return mean, np.std(values, axis=0, dtype=float)
    # about the mean: a difference of mean squares would give a constant column a standard deviation
    n, at = values.shape[0], values.indices
    zeros = n - np.bincount(at, minlength=len(mean))
    stored = np.bincount(at, (values.data - mean[at]) ** 2, minlength=len(mean))
    return mean, np.sqrt((stored + zeros * mean**2) / n)


def _mean(values: Matrix) -> NDArray:  # (N, G) -> (G,); scipy's own sums float32 in float32
    if not sparse.issparse(values):
        return values.mean(0, dtype=float)
    return np.bincount(values.indices, values.data, minlength=values.shape[1]) / values.shape[0]


def residual_directions(problem: Problem, rank: int, random_state: int = 0) -> NDArray:  # -> (G, r)
    r"""Leading right singular vectors of Pearson residuals :cite:p:`Lause2021`, the values never made dense.

    Counts: :math:`(y_{ig} - t_i p_g) / \sqrt{t_i p_g}`; normalised data: :math:`(y_{ig} - m_g) / s_g`. The largest entry of each is
    positive: the solvers' own signs follow the rounding, and a fit follows the signs it starts from.
    """
    y = problem.values
    n, g = y.shape
    left, right, rows, columns = _standardisation(problem)
    if min(n, g) <= rank + 1:  # too few rows or columns for an iterative solver
        dense = y.toarray() if sparse.issparse(y) else y
        residual = rows[:, None] * (dense - np.outer(left, right)) * columns
        directions = np.linalg.svd(residual, full_matrices=False)[2][:rank].T
        return directions * signs(directions)

    def forward(v):
        v = columns * v.ravel()
        return rows * (y @ v - left * (right @ v))

    def adjoint(u):
        u = rows * u.ravel()
        return columns * (y.T @ u - right * (left @ u))

    from scipy.sparse.linalg import LinearOperator, svds  # slow to import

    start = np.random.default_rng(random_state).standard_normal(min(n, g))
    operator = LinearOperator((n, g), matvec=forward, rmatvec=adjoint, dtype=float)
    _, s, vt = svds(operator, k=rank, v0=start, solver="arpack")
    directions = vt[np.argsort(-s)].T
    return directions * signs(directions)


def signs(columns: NDArray) -> NDArray:  # (G, r) -> (r,)
    """The sign of the largest entry of each column."""
    return np.sign(columns[np.abs(columns).argmax(0), np.arange(columns.shape[1])])


def _standardisation(problem: Problem) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """The null model as an outer product (N,), (G,), and the scales of rows and columns."""
    if problem.size is None:
        mean, sd = moments(problem.values)
        ones = np.ones(len(problem.coords))
        return ones, mean, ones, 1 / sd
    rate = problem.null()
    return problem.size, rate, 1 / np.sqrt(problem.size), 1 / np.sqrt(rate)


def to_tensor(values: Matrix) -> Tensor:
    """The matrix as a float32 tensor, sparse if it is."""
    if not sparse.issparse(values):
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    csr = sparse.csr_array(values)
    parts = (csr.indptr.astype(np.int64), csr.indices.astype(np.int64), csr.data.astype(np.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(*map(torch.from_numpy, parts), csr.shape, check_invariants=False)
