"""Spots with counts, and a slow and obviously right deviance, for tests of held-out prediction."""

import numpy as np
from scipy.sparse import csr_array, csr_matrix

CONTAINERS = {"dense": np.asarray, "csr_array": csr_array, "csr_matrix": csr_matrix}


def spots():
    """67 spots, two at one place, 11 genes of which one has no counts, and 23 queries, one on a spot and one far away."""
    rng = np.random.default_rng(0)
    x = rng.random((67, 2)) * 8
    x[1] = x[0]
    size = rng.integers(50, 200, 67).astype(float)
    counts = rng.poisson(size[:, None] * rng.random(11) * (1 + np.sin(x[:, :1])) / 20).astype(float)
    counts[:, 4] = 0
    query = np.concatenate([rng.random((21, 2)) * 8, x[:1], [[500.0, 500.0]]])
    return x, counts, size, query


def slow_deviance(counts, mean):
    total = 0.0
    for y, mu in zip(np.ravel(counts), np.ravel(mean), strict=True):
        mu = max(mu, 1e-8)
        total += 2 * ((y * np.log(y / mu) if y > 0 else 0) - y + mu)
    return total
