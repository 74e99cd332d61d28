r"""Kriging: the posterior mean of a Gaussian process whose kernel has the largest marginal likelihood."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_SPOTS = 4500  # largest N for which an N x N matrix is built
LENGTHS = (3, 6, 10, 16, 28, 50)  # candidate lengths, in pitches
NOISES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # candidate noise variances, relative to the signal
RANK = 30  # principal components that are kriged


def kriging(x: ArrayLike, z: ArrayLike, query: ArrayLike, lengths: Iterable[float]) -> NDArray:
    r"""Kriging of each column of `z`: the posterior mean :math:`k_q (K + \eta I)^{-1} z` of a Gaussian process.

    .. math::
        K_{ij} = (1 + r)\, e^{-r}, \quad r = \sqrt3\, |x_i - x_j| / \ell, \qquad
        \min_{\ell, \eta} \; N \log \tfrac1N z^\top (K + \eta I)^{-1} z + \log \det (K + \eta I)

    This is a Matern-3/2 kernel. Its length and noise maximise the marginal likelihood, in which the variance is profiled out.

    Parameters
    ----------
    x, query
        (N, d) spots and (M, d) points.
    z
        (N, C) columns with a mean of about 0.
    lengths
        Candidates for the length, in the units of the coordinates. The candidates for the noise are :data:`NOISES`.

    Returns
    -------
    (M, C) predictions.

    Raises
    ------
    ValueError
        If there are more than 4,500 spots: K is N x N.

    Examples
    --------
    >>> x = np.linspace(0, 6, 40)[:, None]
    >>> kriging(x, np.sin(x), [[1.0], [2.5]], lengths=[1, 3]).round(2)
    array([[0.84],
           [0.6 ]])
    """
    from scipy.linalg import eigh
    from scipy.spatial.distance import cdist

    x, z, query = (np.asarray(a, float) for a in (x, z, query))
    check_spots(len(x))
    among, across = cdist(x, x), cdist(query, x)
    best, out = np.full(z.shape[1], np.inf), np.zeros((len(query), z.shape[1]))
    for length in lengths:
        w, u = eigh(_matern(among, length))  # one decomposition serves every noise and column
        p, variance = u.T @ z, np.maximum(w, 0) + np.reshape(NOISES, (-1, 1))  # (N, C), (noises, N)
        loss = np.stack([len(x) * np.log((p**2 / v[:, None]).mean(0)) + np.log(v).sum() for v in variance])
        better = loss.min(0) < best
        best = np.minimum(best, loss.min(0))
        chosen = variance[loss.argmin(0)[better]].T
        out[:, better] = _matern(across, length) @ (u @ (p[:, better] / chosen))
    return out


def _matern(distance: NDArray, length: float) -> NDArray:
    r = np.sqrt(3) * distance / length
    return (1 + r) * np.exp(-r)


def check_spots(n: int) -> None:
    """Refuse more spots than an N x N matrix is built for."""
    if n > MOST_SPOTS:
        msg = (
            f"kriging needs a matrix of spots x spots, and there are {n:,} to learn from: expected at most {MOST_SPOTS:,}; leave it "
            "out, e.g. `baselines=('nearest', 'kernel')`, or take part of the section"
        )
        raise ValueError(msg)


def kriged(x: ArrayLike, z: NDArray, query: ArrayLike, rank: int, *, pitch: float) -> NDArray:
    """(M, G) :func:`kriging` of the leading principal components of `z` (N, G)."""
    check_spots(len(x))
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    r = max(1, min(rank, len(s) - 1))
    return kriging(x, u[:, :r] * s[:r], query, pitch * np.array(LENGTHS)) @ vt[:r]
