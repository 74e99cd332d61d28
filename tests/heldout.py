"""Spots whose patterns are known, small fits to them, and a slow and obviously right deviance, for tests of neurst.spatial."""

import dataclasses

import numpy as np
import pytest
from draws import NETWORKS
from scipy.sparse import csr_array, csr_matrix

from neurst.core.fit import FitConfig
from neurst.core.nets import Cosine
from neurst.core.tuning import LineSearch
from neurst.spatial.data import SpotData
from neurst.spatial.gaussian_process import spectral_variance
from neurst.spatial.observation import Counts, Normalised
from neurst.spatial.priors import named_penalties
from neurst.spatial.spec import ExpressionConfig, ExpressionSpec, named_networks
from neurst.spatial.spread import Spread

CONTAINERS = {"dense": np.asarray, "csr_array": csr_array, "csr_matrix": csr_matrix}
each_container = pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
N, G = 241, 13
EMPTY = 5  # a gene without counts; among normalised values, one that does not vary
FLAT = 12  # a gene that is the same everywhere but for noise


def log_rate(coords):  # (N, 2) in 0..40 -> (N, 13)
    """Three patterns, in four genes each, and one flat gene."""
    x, y = coords.T / 40
    patterns = np.stack([np.sin(4 * x) * np.cos(3 * y), np.where(x + y > 1, 0.8, -0.8), np.cos(5 * x + 2 * y)], 1)
    return np.concatenate([patterns, -patterns, 0.5 * patterns, patterns, np.zeros((len(x), 1))], 1)


def counted(n=N, noise="poisson"):
    """Counts of 13 genes, one of them without any."""
    rng = np.random.default_rng(0)
    coords, size = rng.uniform(0, 40, (n, 2)), rng.uniform(50, 200, n)
    counts = rng.poisson(0.03 * size[:, None] * np.exp(log_rate(coords))).astype(np.float32)
    counts[:, EMPTY] = 0
    return SpotData(coords, counts, np.array([f"g{i}" for i in range(G)]), Counts(size, noise))


def normalised(n=N):
    """Values that are not counts, of 13 genes, one of which does not vary."""
    data = counted(n)
    values = np.log1p(100 * data.values / data.observation.size[:, None]).astype(np.float32)
    values[:, EMPTY] = 5.1
    return dataclasses.replace(data, values=values, observation=Normalised())


KINDS = {"counts": counted, "normalised": normalised}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def stored_as(container, data):
    """The same spots, with their values in another container."""
    return dataclasses.replace(data, values=container(data.values))


def known(data):
    """The spots without the gene that holds nothing to fit."""
    return data.take_genes(data.informative_genes())


def small_config(**numbers):
    """Further numbers of a small fit: trials in one fold, at the learning rate of the fits."""
    return ExpressionConfig(**{"trial_learning_rate": 1e-2, "most_folds": 1} | numbers)


def small_spec(
    *,
    penalty="isotropic",
    network=NETWORKS["siren"],
    rank=4,
    members=1,
    lam=30.0,
    search=LineSearch(10.0, 4.0, 2, 0.2),
    config=None,
    **numbers,
):
    """What is fitted in a moment. Trials are as long as the fits unless told, as short ones of few steps would say little, and in one fold."""
    fit = FitConfig(**{"steps": 60, "learning_rate": 1e-2, "n_regularisation": 64, "device": "cpu"} | numbers)
    search = search.with_defaults(LineSearch(10.0, 4.0, 2, 0.2, fit.steps))
    config = config or small_config(trial_learning_rate=fit.learning_rate)
    networks = named_networks(network, ())
    return ExpressionSpec(named_penalties(penalty), networks, rank, members, lam, search, fit, config)


def spread_of(d=2, n_genes=7, seed=0):
    """The variance of predictors that no fit made: two channels of one length and one of another; numbers that float32 holds exactly."""
    rng, network = np.random.default_rng(seed), Cosine(waves=5, margin=0.25)
    m, lengths = network.n_weights(d, 1), np.array([0.25, 1.0])
    channels = np.array([[True, False, True], [False, True, False]])
    prior = [np.sqrt(spectral_variance(network, d, length).numpy()) for length in lengths]
    frames = [p[:, None] * np.linalg.qr(rng.standard_normal((m, k)))[0] for p, k in zip(prior, (4, 3), strict=True)]
    informed = [rng.uniform(0.1, 0.9, (f.shape[1], 3)) * each for f, each in zip(frames, channels, strict=True)]
    numbers = {
        "coefficients": rng.standard_normal((m, 3)),
        "lengths": lengths,
        "variance": np.array([0.5, 2.0, 1.0]),
        "loadings": rng.standard_normal((n_genes, 3)),
        "axes": np.linalg.qr(rng.standard_normal((3, 3)))[0],
        "information": np.array([0.5, 1.0, 2.0]),
        "gene_information": rng.uniform(10, 1000, n_genes),
        "gene_unit": rng.uniform(0.5, 2, n_genes),
    }
    exact = lambda x: x.astype(np.float32).astype(float)
    parts = {"frames": tuple(map(exact, frames)), "informed": tuple(map(exact, informed))}
    return Spread(
        network=network, channels=channels, **parts, **{name: exact(value) for name, value in numbers.items()}
    )


def scattered():
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
    """Poisson deviance, one value after the other."""
    total = 0.0
    for y, mu in zip(np.ravel(counts), np.ravel(mean), strict=True):
        mu = max(mu, 1e-8)
        total += 2 * ((y * np.log(y / mu) if y > 0 else 0) - y + mu)
    return total
