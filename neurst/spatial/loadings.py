r"""Gene loadings: the directions that a fit starts from, and loadings on a latent field that is held fixed.

With features ``f_i = (1, z_i)`` (N, 1 + r) and the predictor ``eta_ig = b_g + V_g . z_i``, loadings of a gene on a fixed latent field minimise
``sum_i -log p(y_ig | eta_ig) + |V_g|^2 / 2``, with the prior of :class:`neurst.core.heads.Loadings`. This is a convex problem for each
gene; many genes are solved together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurst.spatial.matrix import Matrix, by_column, dense, gene_chunks, moments

SPOTS_AT_ONCE = 8192  # spots whose products of features are in memory together


def signs(columns: NDArray) -> NDArray:  # (G, r) -> (r,)
    """The sign of the largest entry of each column."""
    return np.sign(columns[np.abs(columns).argmax(0), np.arange(columns.shape[1])])


def singular_directions(
    values: Matrix, outer: tuple[NDArray, NDArray], scales: tuple[NDArray, NDArray], rank: int, random_state: int = 0
) -> NDArray:  # -> (G, r)
    """Leading right singular vectors of residuals ``scale_i (y_ig - left_i right_g) scale_g``, without making the values dense.

    The largest entry of each vector is positive: the signs that solvers return depend on rounding, and a fit depends on its starting signs.

    Parameters
    ----------
    values
        (N, G), dense or CSR.
    outer
        ``left`` (N,) and ``right`` (G,), whose outer product is subtracted.
    scales
        Factors of the rows (N,) and of the columns (G,).
    rank
        Number r of vectors.
    random_state
        Seed of the iterative solver.
    """
    n, g = values.shape
    (left, right), (rows, columns) = outer, scales
    if min(n, g) <= rank + 1:  # too few rows or columns for an iterative solver
        residual = rows[:, None] * (dense(values) - np.outer(left, right)) * columns
        directions = np.linalg.svd(residual, full_matrices=False)[2][:rank].T
        return directions * signs(directions)

    def forward(v):
        v = columns * v.ravel()
        return rows * (values @ v - left * (right @ v))

    def adjoint(u):
        u = rows * u.ravel()
        return columns * (values.T @ u - right * (left @ u))

    from scipy.sparse.linalg import LinearOperator, svds  # slow to import

    start = np.random.default_rng(random_state).standard_normal(min(n, g))
    operator = LinearOperator((n, g), matvec=forward, rmatvec=adjoint, dtype=float)
    _, s, vt = svds(operator, k=rank, v0=start, solver="arpack")
    directions = vt[np.argsort(-s)].T
    return directions * signs(directions)


def count_loadings(
    latent: NDArray, counts: Matrix, size: NDArray, rate: NDArray, over_dispersion: NDArray | None = None
) -> tuple[NDArray, NDArray]:
    r"""Loadings and intercepts of genes with counts, log link and offset ``log size``, on a latent field.

    Parameters
    ----------
    latent
        (N, r) values of the field at the spots.
    counts
        (N, G), dense or CSR. Every gene must have counts.
    size
        (N,) library sizes.
    rate
        (G,) mean rates, the starting point of the iteration.
    over_dispersion
        (G,) :math:`\phi = 1 / \theta` of a negative binomial; 0, or None, is Poisson.

    Returns
    -------
    V (G, r) and b (G,).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.standard_normal((500, 1))
    >>> counts = rng.poisson(10 * np.exp(0.5 * z)).astype(float)
    >>> v, b = count_loadings(z, counts, np.ones(500), np.array([11.0]))
    >>> bool(abs(v[0, 0] - 0.5) < 0.05), bool(abs(b[0] - np.log(10)) < 0.05)
    (True, True)
    """
    features = np.column_stack([np.ones(len(latent)), latent])
    f, size = torch.from_numpy(features).float(), torch.from_numpy(size).float()[:, None]
    phi = np.zeros(counts.shape[1]) if over_dispersion is None else over_dispersion
    columns, found = by_column(counts), []
    for genes in gene_chunks(counts.shape):
        y = torch.from_numpy(np.ascontiguousarray(dense(columns[:, genes]), dtype=np.float32))
        found.append(_newton(f, size, y, torch.from_numpy(rate[genes]), torch.from_numpy(phi[genes]).float()))
    beta = torch.cat(found).numpy()
    return beta[:, 1:], beta[:, 0]


def _newton(
    f: Tensor, size: Tensor, y: Tensor, rate: Tensor, phi: Tensor, *, most: int = 50, tolerance: float = 1e-4
) -> Tensor:
    """Coefficients (C, 1 + r), float64, by Newton steps (Fisher scoring) from the mean rates.

    The step of a gene is halved while it would raise the objective.
    """
    k = f.shape[1]
    prior = torch.ones(k, dtype=torch.double)
    prior[0] = 0.0
    best = torch.zeros(len(rate), k, dtype=torch.double)
    best[:, 0] = rate.log()
    lowest, slope, curve = _objective(f, size, y, phi, best, prior)
    move = torch.linalg.solve(curve, slope)
    length, active = torch.ones(len(rate), dtype=torch.double), torch.arange(len(rate))
    for _ in range(most):
        # genes for which a full step is expected to lower the objective by more than the tolerance, in nats
        active = active[((move[active] * slope[active]).sum(1) / 2 > tolerance) & (length[active] > 1e-3)]
        if not len(active):
            break
        trial = best[active] - length[active, None] * move[active]
        now, new_slope, new_curve = _objective(f, size, y[:, active], phi[active], trial, prior)
        better = now < lowest[active]
        taken = active[better]
        best[taken], lowest[taken], slope[taken] = trial[better], now[better], new_slope[better]
        move[taken], length[taken] = torch.linalg.solve(new_curve[better], new_slope[better]), 1.0
        length[active[~better]] /= 2
    return best


def _objective(
    f: Tensor, size: Tensor, y: Tensor, phi: Tensor, beta: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective (C,), its gradient (C, k) and its Fisher matrix (C, k, k) at coefficients `beta`."""
    c, k = beta.shape
    value, slope = (prior * beta**2).sum(1) / 2, prior * beta
    curve = torch.diag(prior).repeat(c, 1, 1)
    linear = beta.T.float()
    for start in range(0, len(f), SPOTS_AT_ONCE):
        at = slice(start, start + SPOTS_AT_ONCE)
        eta = f[at] @ linear
        mean = size[at] * eta.exp()
        shrink = 1 / (1 + phi * mean)
        weights = mean * shrink
        # negative binomial (y + 1/phi) log(1 + phi mu) - y log mu; Poisson where phi = 0
        spread = torch.where(phi > 0, (y[at] + 1 / phi) * torch.log1p(phi * mean), mean)
        value += (spread - y[at] * eta).sum(0, dtype=torch.double)
        slope += ((weights - y[at] * shrink).T @ f[at]).double()
        products = (f[at, :, None] * f[at, None, :]).flatten(1)
        curve += (weights.T @ products).view(c, k, k).double()
    return value, slope, curve


def gaussian_loadings(latent: NDArray, values: Matrix, rounds: int = 5) -> tuple[NDArray, NDArray]:
    """Loadings V (G, r) and intercepts b (G,) of normalised values with Gaussian noise, on a latent field (N, r).

    This is ridge regression in units of each gene's standard deviation. The coefficients and the noise of a gene are updated in turn for a
    few `rounds`, which needs only moments of the data.
    """
    features = np.column_stack([np.ones(len(latent)), latent])
    mean, sd = moments(values)
    gram, n = features.T @ features, len(features)
    cross = np.asarray((values.T @ features) - np.outer(mean, features.sum(0))) / sd[:, None]
    noise, ridge = np.ones(len(mean)), np.diag(np.append(0.0, np.ones(features.shape[1] - 1)))
    for _ in range(rounds):
        beta = np.linalg.solve(gram / noise[:, None, None] + ridge, (cross / noise[:, None])[..., None])[..., 0]
        fitted = np.einsum("gk,kl,gl->g", beta, gram, beta)
        noise = np.maximum(1 - (2 * (beta * cross).sum(1) - fitted) / n, 1e-6)
    return sd[:, None] * beta[:, 1:], mean + sd * beta[:, 0]
