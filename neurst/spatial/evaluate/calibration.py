r"""Scatter of counts around a field: over-dispersion measured on held-out spots, and a check of its calibration.

A held-out count is modelled as negative binomial with mean :math:`\mu` and variance :math:`\mu + \phi_g \mu^2`. :math:`\phi_g` covers variation
from spot to spot and errors of the field between spots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, logsumexp

from neurst.spatial.matrix import Matrix, by_column, dense, gene_chunks

GRID = np.geomspace(1e-3, 30, 24)  # candidate over-dispersions


def over_dispersion(counts: Matrix, mean: NDArray, *, rounds: int = 20) -> NDArray:
    r"""Over-dispersion :math:`\phi_g` of each gene about known means: the exponential of the posterior mean of its logarithm.

    The prior over :data:`GRID` is estimated from all genes together (empirical Bayes by a few rounds of EM), so that a gene with few
    counts gets a value that is typical of all genes.

    Parameters
    ----------
    counts
        (N, G), dense or CSR.
    mean
        (N, G) expected counts.

    Returns
    -------
    (G,) over-dispersions.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> mean = np.full((400, 5), 6.0)
    >>> phi = over_dispersion(rng.poisson(mean * rng.gamma(2, 1 / 2, mean.shape)), mean)
    >>> bool(np.all(np.abs(phi - 0.5) < 0.2))
    True
    """
    g, columns, parts = mean.shape[1], by_column(counts), []
    for genes in gene_chunks(mean.shape):
        y = np.asarray(dense(columns[:, genes]), dtype=float)
        parts.append(_log_likelihoods(y, np.maximum(mean[:, genes], 1e-8)))
    each = np.concatenate(parts, axis=1)  # (K, G)
    prior = np.full(len(GRID), -np.log(len(GRID)))
    for _ in range(rounds):
        posterior = prior[:, None] + each
        posterior -= logsumexp(posterior, axis=0)
        prior = logsumexp(posterior, axis=1) - np.log(g)
    return np.exp(np.exp(posterior).T @ np.log(GRID))


def _log_likelihoods(y: NDArray, mean: NDArray) -> NDArray:
    """Negative binomial log-likelihood of each gene at each dispersion of the grid, (K, G), without the constant log y!."""
    ones, at = np.ones(len(y)), y > 0
    out = np.empty((len(GRID), y.shape[1]))
    for k, phi in enumerate(GRID):
        theta = 1 / phi
        # log Gamma(y + theta) - log Gamma(theta) is 0 where y is 0, so it is computed only for y > 0
        rising = np.zeros_like(y)
        rising[at] = gammaln(y[at] + theta) - gammaln(theta)
        out[k] = ones @ (rising - (y + theta) * np.log1p(phi * mean) + y * np.log(phi * mean))
    return out


def randomised_pit(counts: ArrayLike, mean: ArrayLike, phi: ArrayLike, *, random_state: int = 0) -> NDArray:
    r"""Randomised probability integral transform :cite:p:`Czado2009`: :math:`F(y - 1) + u (F(y) - F(y - 1))`, u uniform.

    It is uniform on [0, 1] if the counts are negative binomial with mean :math:`\mu` and variance :math:`\mu + \phi \mu^2`.

    Parameters
    ----------
    counts, mean, phi
        Held-out counts, their predicted means, and over-dispersions: arrays whose shapes broadcast.
    random_state
        Seed of u.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> pit = randomised_pit(rng.poisson(np.full((300, 4), 2.0)), 2.0, 1e-6)
    >>> bool(calibration(pit)[0] < 0.05)
    True
    """
    from scipy.stats import nbinom  # slow to import

    counts, mean, phi = np.broadcast_arrays(np.asarray(counts, float), np.maximum(mean, 1e-8), np.maximum(phi, 1e-9))
    theta = 1 / phi
    chance = 1 / (1 + phi * mean)
    below, at = nbinom.cdf(counts - 1, theta, chance), nbinom.pmf(counts, theta, chance)
    return below + np.random.default_rng(random_state).random(counts.shape) * at


def calibration(pit: NDArray, central: float = 0.9) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of transformed counts from the uniform distribution, and the share of them in the `central` range.

    Examples
    --------
    >>> distance, share = calibration(np.linspace(0.0005, 0.9995, 1000))
    >>> bool(distance < 0.01), bool(abs(share - 0.9) < 0.01)
    (True, True)
    """
    from scipy.stats import kstest  # slow to import

    pit = np.ravel(pit)
    tail = (1 - central) / 2
    return float(kstest(pit, "uniform").statistic), float(((pit >= tail) & (pit <= 1 - tail)).mean())
