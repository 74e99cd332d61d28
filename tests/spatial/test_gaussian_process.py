import dataclasses
import math

import numpy as np
import pytest
import torch
from heldout import CONTAINERS, KINDS, counted, each_kind, known, normalised, stored_as
from scipy.stats import spearmanr

from neurst.core.nets import Cosine
from neurst.spatial.data import SpotData
from neurst.spatial.gaussian_process import (
    RATIOS,
    conjugate_gradients,
    cosine_series,
    features_at,
    learn_process,
    spectral_variance,
)
from neurst.spatial.member import Member
from neurst.spatial.observation import Counts
from neurst.spatial.priors import GaussianProcess
from neurst.spatial.spread import posterior_spread

PRIOR = dataclasses.asdict(GaussianProcess())


def matern(distance, length):
    """The Matern-3/2 kernel of unit variance."""
    scaled = math.sqrt(3) * distance / length
    return (1 + scaled) * np.exp(-scaled)


# ---- conjugate gradients


@pytest.mark.parametrize("shape", [(12,), (12, 3)], ids=["a vector", "several columns at once"])
def test_conjugate_gradients_solve_a_system_whose_matrix_is_symmetric_and_positive(shape):
    rng = np.random.default_rng(0)
    n = math.prod(shape)
    root = rng.standard_normal((n, n))
    matrix = torch.from_numpy(root @ root.T + np.diag(np.geomspace(0.1, 1000, n)))
    right = torch.from_numpy(rng.standard_normal(shape))
    product = lambda x: (matrix @ x.flatten()).reshape(shape)
    expected = torch.linalg.solve(matrix, right.flatten()).reshape(shape)
    found = conjugate_gradients(product, right, matrix.diagonal().reshape(shape), most=10 * n, tolerance=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    rough = conjugate_gradients(product, right, matrix.diagonal().reshape(shape), most=10 * n)
    assert 1e-9 < (rough - expected).norm() < 0.1 * expected.norm()


def test_conjugate_gradients_stop_after_as_many_steps_as_they_may_take_and_at_once_if_nothing_is_asked():
    calls = []
    product = lambda x: calls.append(1) or torch.arange(1.0, 51.0) * x
    conjugate_gradients(product, torch.ones(50), torch.ones(50), most=7, tolerance=0.0)
    assert len(calls) == 7
    assert not conjugate_gradients(product, torch.zeros(50), torch.ones(50)).any()
    assert len(calls) == 7


# ---- the series


SERIES = {  # coordinates, series, length of the kernel
    "a line": (1, Cosine(waves=200, margin=1.0), 0.3),
    "a square": (2, Cosine(waves=64, margin=0.8), 0.5),
    "a long and narrow box": (2, Cosine(waves=80, sides=(1.0, 0.4), margin=0.8), 0.4),
}


@pytest.mark.parametrize(("d", "network", "length"), SERIES.values(), ids=SERIES)
def test_the_covariance_of_the_series_is_the_kernel_away_from_the_border(d, network, length):
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.5, 0.5, (60, d)) * (network.sides or 1.0)
    phi = features_at(network, torch.from_numpy(x)).double().numpy()
    found = (phi * spectral_variance(network, d, length).numpy()) @ phi.T
    expected = matern(np.linalg.norm(x[:, None] - x, axis=2), length)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)
    assert expected.min() < 0.5  # also of points far from each other


@pytest.mark.parametrize("shape", [(1.0,), (1.0, 1.0), (1.0, 0.3), (0.2, 1.0, 0.6)], ids=str)
def test_a_series_covers_the_points_with_as_many_functions_as_it_may_have(shape):
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (500, len(shape))) * shape)
    for functions in (30, 400):
        found = cosine_series(x, functions, 0.1)
        d = len(shape)
        assert found.n_weights(d, 1) <= functions or found.waves == 2
        assert dataclasses.replace(found, waves=found.waves + 1).n_weights(d, 1) > functions
        np.testing.assert_allclose(found.sides, shape, atol=0.05)
        spacing = [2 * half / n for half, n in zip(found.half_sides(d), found.sizes(d), strict=True)]
        assert max(spacing) < 2 * min(spacing)  # as fine along each axis


def test_the_functions_of_a_series_are_in_the_order_of_its_coefficients():
    network, x = (
        Cosine(waves=5, sides=(1.0, 0.6)),
        torch.from_numpy(np.random.default_rng(1).uniform(-0.6, 0.6, (7, 2))),
    )
    net = network.build(2, 3, torch.Generator()).double()
    coefficients = torch.randn(network.n_weights(2, 1), 3, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        net.core.copy_(coefficients.unflatten(0, net.core.shape[:-1]))
        torch.testing.assert_close(features_at(network, x).double() @ coefficients, net(x), rtol=1e-5, atol=1e-5)


# ---- what is learnt


def simulated(n=1200, pitches=8.0, counts=4.0, seed=0, n_genes=20, amplitude=0.7, hole=0.0):
    """Counts of genes on one channel that is a Gaussian process of a length in pitches, and their log-rates."""
    rng = np.random.default_rng(seed)
    coords = rng.uniform(0, 100, (n, 2))
    coords = coords[np.linalg.norm(coords - 50, axis=1) > hole]
    distance = np.linalg.norm(coords[:, None] - coords, axis=2)
    kernel = matern(distance, pitches * 100 / np.sqrt(n)) + 1e-9 * np.eye(len(coords))
    z = np.linalg.cholesky(kernel) @ rng.standard_normal(len(coords))
    size = rng.uniform(0.5, 2, len(coords))
    log_rate = np.log(counts) + amplitude * np.outer(z - z.mean(), rng.choice([-1, 1], n_genes))
    values = rng.poisson(size[:, None] * np.exp(log_rate)).astype(np.float32)
    return SpotData(coords, values, np.arange(n_genes).astype(str), Counts(size)), log_rate


def learnt(data, rank=1, **prior):
    directions = data.observation.directions(data.values, rank, 0)
    return learn_process(data, directions, data.box, **PRIOR | prior)


def in_pitches(process):
    x = process.box.to_unit(torch.from_numpy(process.data.coords)).numpy()
    return process.lengths / np.sqrt(np.prod(np.ptp(x, axis=0)) / len(x))


@pytest.mark.parametrize("pitches", [4.0, 8.0, 16.0])
def test_the_length_of_a_simulated_process_is_found_within_the_neighbouring_candidate(pitches):
    data, log_rate = simulated(pitches=pitches)
    process = learnt(data)
    assert pitches / 2.01 < in_pitches(process)[0] < 2.01 * pitches
    field, loadings, intercept = process.fit(1.0)
    eta = Member(field, loadings, intercept).predictor(data)
    left = ((eta - log_rate) ** 2).sum() / ((log_rate - log_rate.mean(0)) ** 2).sum()
    assert left < 0.1


def test_channels_have_lengths_of_their_own_and_one_of_noise_has_little_variance():
    (fine, _), (coarse, _) = simulated(pitches=3.0, amplitude=0.5), simulated(pitches=24.0, amplitude=0.6)
    noise = np.random.default_rng(3).permutation(fine.values)
    data = SpotData(
        fine.coords,
        np.concatenate([fine.values, coarse.values, noise], 1),
        np.arange(60).astype(str),
        Counts(np.ones(len(fine.coords))),
    )
    directions = np.repeat(np.eye(3), 20, axis=0) / np.sqrt(20)
    signs = [np.sign(np.corrcoef(part.T)[0]) for part in (fine.values, coarse.values)]
    directions[:40] *= np.concatenate(signs)[:, None]
    process = learn_process(data, directions, data.box, **PRIOR)
    lengths = in_pitches(process)
    assert 1.4 < lengths[0] < 6.1
    assert lengths[1] > 8
    assert process.variance[2] * process.noise[2] < 0.05 * (process.variance * process.noise)[:2].min()


def test_the_noise_of_poisson_counts_is_one_and_that_of_over_dispersed_counts_is_larger():
    data, _ = simulated(amplitude=0.2)
    assert learnt(data).noise[0] == pytest.approx(1, abs=0.2)
    over = np.random.default_rng(5).gamma(2, 0.5, data.values.shape)
    values = np.random.default_rng(6).poisson(data.values * over).astype(np.float32)
    assert learnt(dataclasses.replace(data, values=values)).noise[0] > 1.5 * learnt(data).noise[0]


def test_variance_and_noise_maximise_the_marginal_likelihood_of_the_scores():
    data, _ = simulated(n=150)
    process = learnt(data, lengths=(8.0,), functions=100)
    # the first stage by dense matrices: score / precision has the covariance  noise (variance K + diag(1 / precision))
    phi, weight = process.features.double().numpy(), process.precision.numpy()
    kernel = (phi * spectral_variance(process.network, 2, process.lengths[0]).numpy()) @ phi.T
    mean = data.observation.size[:, None] * data.mean_rate()
    z = ((data.values - mean) @ process.loadings[:, 0]) / weight
    found = {}
    for ratio in RATIOS:
        covariance = ratio * kernel + np.diag(1 / weight)
        noise = z @ np.linalg.solve(covariance, z) / len(z)
        found[ratio] = (len(z) * np.log(noise) + np.linalg.slogdet(covariance)[1], noise)
    best = min(found, key=found.get)
    assert process.variance[0] == best
    assert process.noise[0] == pytest.approx(found[best][1], rel=1e-4)
    covariance = best * kernel + np.diag(1 / weight)
    expected = best * kernel @ np.linalg.solve(covariance, z)  # the posterior mean
    np.testing.assert_allclose(phi @ process.coefficients[:, 0].numpy(), expected, rtol=1e-3, atol=1e-4)


# ---- the fit


@each_kind
def test_a_fit_explains_most_of_what_is_smooth_on_other_spots(make):
    data = known(make(1201))
    test = data.take(np.arange(0, 1201, 5))
    train = data.take(np.setdiff1d(np.arange(1201), np.arange(0, 1201, 5)))
    process = learn_process(train, train.observation.directions(train.values, 3, 0), data.box, **PRIOR)
    member = Member(*process.fit(1.0))
    prediction = test.observation.prediction(member.predictor(test))
    assert test.observation.score(test.values, prediction, train.mean_rate()) > (0.45 if make is counted else 0.35)


def test_the_coefficients_are_stationary_points_of_their_posterior():
    data, _ = simulated(n=300)
    process = learnt(data, rank=2, functions=60)
    field, loadings, intercept = process.fit(1.0)
    unit = process.unit(1.0)
    phi = process.features.double()
    w = field.net.core.detach().double().flatten(0, -2).requires_grad_()
    prior = process.prior() * torch.from_numpy(unit**2)
    eta = phi @ w @ torch.from_numpy(loadings).T + torch.from_numpy(intercept) + data.observation.offset()
    objective = process.likelihood.double()(eta, torch.from_numpy(data.values).double())
    objective = objective + (w.square() / prior).sum() / 2
    (slope,) = torch.autograd.grad(objective, w)
    start = process.coefficients * torch.from_numpy(unit)
    assert (slope * prior.sqrt()).norm() < 0.05 * (start / prior.sqrt()).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stronger_prior_gives_a_smoother_field_and_an_infinite_one_the_mean(kind):
    data = known(KINDS[kind]())
    process = learn_process(data, data.observation.directions(data.values, 3, 0), data.box, **PRIOR)
    spread = [Member(*process.fit(lam)).predictor(data).std(0).mean() for lam in (0.1, 1.0, 10.0, 1e6)]
    assert (np.diff(spread) < 0).all()
    assert spread[-1] < 0.02 * spread[1]


@pytest.mark.parametrize("noise", ["poisson", "negative_binomial"])
def test_the_container_of_the_counts_does_not_matter(noise):
    found = []
    for container in CONTAINERS.values():
        data = stored_as(container, known(counted(noise=noise)))
        process = learn_process(data, data.observation.directions(data.values, 2, 0), data.box, **PRIOR)
        assert not any(p.requires_grad for p in process.likelihood.parameters())
        found.append(Member(*process.fit(1.0)).predictor(data))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_units_of_normalised_values_do_not_matter(unit):
    data = known(normalised())
    units = np.where(np.arange(len(data.genes)) % 3, 1.0, unit)
    other = dataclasses.replace(data, values=(data.values * units).astype(np.float32))
    a, b = (
        Member(*learn_process(each, each.observation.directions(each.values, 3, 0), data.box, **PRIOR).fit(1.0))
        for each in (data, other)
    )
    np.testing.assert_allclose(b.predictor(other) / units, a.predictor(data), rtol=1e-3, atol=1e-3)


# ---- the spread


def spread_at(data, x, rank=1):
    process = learnt(data, rank)
    field, loadings, intercept = process.fit(1.0)
    information = data.observation.gene_information(data.values)
    unit = np.broadcast_to(data.observation.gene_unit(data.values), information.shape)
    spread = posterior_spread(process, field.net, loadings, information, unit)
    return spread.predictor_variance(data.box.to_unit(torch.from_numpy(x)))


def test_the_variance_grows_with_the_distance_to_the_spots():
    data, _ = simulated(hole=20.0)
    x = np.random.default_rng(1).uniform(30, 70, (400, 2))
    x = x[np.linalg.norm(x - 50, axis=1) < 20]  # inside the hidden disc
    away = np.linalg.norm(x[:, None] - data.coords, axis=2).min(1)
    variance = spread_at(data, x)
    assert min(spearmanr(away, each).statistic for each in variance.T) > 0.5
    assert variance.mean() > 2 * spread_at(data, data.coords).mean()


def test_the_variance_shrinks_with_more_counts():
    few, many = (spread_at(simulated(counts=c)[0], np.full((1, 2), 50.0)) for c in (1.0, 30.0))
    assert (many < few / 2).all()


def test_the_variance_of_a_channel_is_that_of_the_posterior_by_dense_matrices():
    data, _ = simulated(n=200)
    process = learnt(data, lengths=(8.0,), functions=100)
    field, loadings, _ = process.fit(1.0)
    certain, one = np.full(len(data.genes), 1e30), np.ones(len(data.genes))  # the loadings and intercepts are known
    spread = posterior_spread(process, field.net, loadings, certain, one)
    x = data.box.to_unit(torch.from_numpy(np.random.default_rng(2).uniform(0, 100, (9, 2))))
    here, there = (
        features_at(process.network, each).double().numpy()
        for each in (x, data.box.to_unit(torch.from_numpy(data.coords)))
    )
    prior = spectral_variance(process.network, 2, process.lengths[0]).numpy()
    ratio, noise = process.variance[0], process.noise[0]
    cross, kernel = (here * prior) @ there.T, (there * prior) @ there.T
    inside = ratio * kernel + np.diag(1 / process.precision.numpy())
    variance = ratio * (here**2 @ prior) - ratio**2 * np.einsum("ij,ji->i", cross, np.linalg.solve(inside, cross.T))
    expected = spread.scale * noise * process.unit(1.0)[0] ** 2 * np.outer(variance, loadings[:, 0] ** 2)
    np.testing.assert_allclose(spread.predictor_variance(x), expected, rtol=0.03)
