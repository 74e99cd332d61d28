r"""Gene loadings on a latent field that is held fixed: a convex problem for each gene, solved for many genes together.

With features ``f_i = (1, z_i)`` (N, 1 + r) and ``eta_ig = log t_i + b_g + V_g . z_i`` a gene's objective is
``sum_i -log p(y_ig | eta_ig) + |V_g|^2 / 2``, the prior of :class:`neurst.core.fit.Loadings`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from neurst.spatial.problem import Problem, moments

CELLS = 4_000_000  # most entries of the matrix made dense at once
ROWS = 8192  # spots whose products of features are held at once


def solve_loadings(
    latent: NDArray, problem: Problem, *, inverse_dispersion: NDArray | None = None
) -> tuple[NDArray, NDArray]:
    r"""Loadings and intercepts of all genes of a problem on a latent field.

    Parameters
    ----------
    latent
        (N, r) values of the field at the spots.
    problem
        Spots and genes, each of which holds something to fit (:meth:`Problem.active`).
    inverse_dispersion
        (G,) :math:`\phi = 1 / \theta` of a negative binomial; 0, or None, is Poisson. Not used for normalised data.

    Returns
    -------
    V (G, r) and b (G,).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.standard_normal((500, 1))
    >>> counts = rng.poisson(10 * np.exp(0.5 * z)).astype(float)
    >>> v, b = solve_loadings(z, Problem(z, counts, np.ones(500), np.array(["a"])))
    >>> bool(abs(v[0, 0] - 0.5) < 0.05), bool(abs(b[0] - np.log(10)) < 0.05)
    (True, True)
    """
    features = np.column_stack([np.ones(len(latent)), latent])
    if problem.size is None:
        return _gaussian(features, problem)
    f, size = torch.from_numpy(features).float(), torch.from_numpy(problem.size).float()[:, None]
    null, g = problem.null(), len(problem.genes)
    phi = np.zeros(g) if inverse_dispersion is None else inverse_dispersion
    columns = problem.values.tocsc() if sparse.issparse(problem.values) else problem.values
    step, found = max(1, CELLS // len(latent)), []
    for start in range(0, g, step):
        part = slice(start, start + step)
        y = columns[:, part].toarray() if sparse.issparse(columns) else columns[:, part]
        y = torch.from_numpy(np.ascontiguousarray(y, dtype=np.float32))
        found.append(_newton(f, size, y, torch.from_numpy(null[part]), torch.from_numpy(phi[part]).float()))
    beta = torch.cat(found).numpy()
    return beta[:, 1:], beta[:, 0]


def _newton(
    f: Tensor, size: Tensor, y: Tensor, null: Tensor, phi: Tensor, *, most: int = 50, tolerance: float = 1e-4
) -> Tensor:
    """Newton steps (Fisher scoring) from the null, a gene's step halved while its objective rises: (C, 1 + r) float64."""
    k = f.shape[1]
    prior = torch.ones(k, dtype=torch.double)
    prior[0] = 0.0
    best = torch.zeros(len(null), k, dtype=torch.double)
    best[:, 0] = null.log()
    lowest, slope, curve = _objective(f, size, y, phi, best, prior)
    move = torch.linalg.solve(curve, slope)
    length, open_ = torch.ones(len(null), dtype=torch.double), torch.arange(len(null))
    for _ in range(most):
        # what a full step would gain, in nats
        open_ = open_[((move[open_] * slope[open_]).sum(1) / 2 > tolerance) & (length[open_] > 1e-3)]
        if not len(open_):
            break
        trial = best[open_] - length[open_, None] * move[open_]
        now, new_slope, new_curve = _objective(f, size, y[:, open_], phi[open_], trial, prior)
        better = now < lowest[open_]
        taken = open_[better]
        best[taken], lowest[taken], slope[taken] = trial[better], now[better], new_slope[better]
        move[taken], length[taken] = torch.linalg.solve(new_curve[better], new_slope[better]), 1.0
        length[open_[~better]] /= 2
    return best


def _objective(
    f: Tensor, size: Tensor, y: Tensor, phi: Tensor, beta: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Objective (C,), its gradient (C, k) and its Fisher matrix (C, k, k) at coefficients `beta`."""
    c, k = beta.shape
    value, slope = (prior * beta**2).sum(1) / 2, prior * beta
    curve = torch.diag(prior).repeat(c, 1, 1)
    linear = beta.T.float()
    for rows in range(0, len(f), ROWS):
        at = slice(rows, rows + ROWS)
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


def _gaussian(features: NDArray, problem: Problem, rounds: int = 5) -> tuple[NDArray, NDArray]:
    """Ridge regression in units of each gene's standard deviation, its noise scale found in a few rounds from moments alone."""
    mean, sd = moments(problem.values)
    gram, n = features.T @ features, len(features)
    cross = np.asarray((problem.values.T @ features) - np.outer(mean, features.sum(0))) / sd[:, None]
    noise, ridge = np.ones(len(mean)), np.diag(np.append(0.0, np.ones(features.shape[1] - 1)))
    for _ in range(rounds):
        beta = np.linalg.solve(gram / noise[:, None, None] + ridge, (cross / noise[:, None])[..., None])[..., 0]
        fitted = np.einsum("gk,kl,gl->g", beta, gram, beta)
        noise = np.maximum(1 - (2 * (beta * cross).sum(1) - fitted) / n, 1e-6)
    return sd[:, None] * beta[:, 1:], mean + sd * beta[:, 0]
