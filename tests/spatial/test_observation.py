import numpy as np
import pytest
import torch
from heldout import CONTAINERS, N, each_container, each_kind, known, stored_as
from scipy import sparse

from neurst.core.likelihood import NegativeBinomial
from neurst.spatial.loadings import count_loadings
from neurst.spatial.observation import LINKS, Counts, Normalised

G, R = 7, 2
X = np.random.default_rng(1).uniform(0, 6, (N, 2))
LATENT = np.column_stack([np.sin(X[:, 0]), np.cos(X[:, 1])])
LOADINGS = np.random.default_rng(2).normal(0, 0.6, (G, R))
INTERCEPT = np.linspace(-3, -1, G)
PREDICTOR = LATENT @ LOADINGS.T + INTERCEPT
SIZE = np.random.default_rng(0).uniform(200, 800, N)
OBSERVATIONS = {
    "counts": Counts(SIZE),
    "over-dispersed counts": Counts(SIZE, "negative_binomial"),
    "normalised": Normalised(),
}
each = pytest.mark.parametrize("observation", OBSERVATIONS.values(), ids=OBSERVATIONS)


def expected(observation):
    """What is expected at spots, from the definition of each model."""
    return PREDICTOR if isinstance(observation, Normalised) else SIZE[:, None] * np.exp(PREDICTOR)


def drawn(observation):
    """Values around what is expected; counts may be over-dispersed by 0.1."""
    rng, mean = np.random.default_rng(3), expected(observation)
    if isinstance(observation, Normalised):
        return mean + 0.2 * rng.standard_normal(mean.shape)
    over = rng.gamma(10, 0.1, mean.shape) if observation.noise == "negative_binomial" else 1.0
    return rng.poisson(mean * over).astype(float)


@each
@each_container
def test_the_mean_rate_is_the_null_model_whose_score_is_zero(observation, container):
    values = drawn(observation)
    rate = observation.mean_rate(container(values))
    np.testing.assert_allclose(rate, values.sum(0) / (N if isinstance(observation, Normalised) else SIZE.sum()))
    assert observation.score(container(values), rate, rate) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(observation.gene_scores(container(values), rate, rate), 0, atol=1e-12)
    assert observation.correlation(container(values), rate) == 0


@each
def test_the_loss_is_lowest_at_the_predictor_that_made_the_values(observation):
    values, rng, h = expected(observation), np.random.default_rng(4), 1e-4
    loss = lambda eta: observation.loss(values, eta)[0]
    np.testing.assert_allclose(observation.loss(values, PREDICTOR)[1], 0, atol=1e-10)
    for _ in range(5):
        step = rng.standard_normal(PREDICTOR.shape)
        down, lowest, up = (loss(PREDICTOR + s * step) for s in (-h, 0, h))
        assert min(up, down, loss(PREDICTOR + step)) > lowest
        slope, curvature = (up - down) / (2 * h), (up + down - 2 * lowest) / h**2
        assert abs(slope) < 1e-3 * curvature  # the lowest point is within 0.001 steps


@each
@each_container
def test_the_slope_of_the_loss_is_its_derivative(observation, container):
    values, rng, h = container(drawn(observation)), np.random.default_rng(4), 1e-5
    eta = PREDICTOR + 0.3 * rng.standard_normal(PREDICTOR.shape)
    slope = observation.loss(values, eta)[1]
    assert slope.shape == eta.shape
    for step in rng.standard_normal((5, *eta.shape)):
        (up, _), (down, _) = (observation.loss(values, eta + s * h * step) for s in (1, -1))
        assert np.vdot(slope, step) == pytest.approx((up - down) / (2 * h), rel=1e-6)


def test_a_gene_that_does_not_vary_has_no_loss_among_normalised_values():
    values = drawn(Normalised())
    values[:, 2] = 1.5
    loss, slope = Normalised().loss(values, PREDICTOR)
    others = Normalised().loss(np.delete(values, 2, 1), np.delete(PREDICTOR, 2, 1))
    assert loss == pytest.approx(others[0])
    np.testing.assert_allclose(slope, np.insert(others[1], 2, 0, axis=1))


@each
@each_container
def test_the_information_of_a_gene_is_the_curvature_of_its_loss_along_the_intercept(observation, container):
    values, h = drawn(observation), 1e-3
    at = observation.intercept(observation.mean_rate(values))
    assert observation.gene_information(container(values)).shape == (G,)
    for g, found in enumerate(observation.gene_information(container(values))):
        shift = h * (np.arange(G) == g)
        up, middle, down = (
            observation.loss(values, np.broadcast_to(at + s * shift, values.shape))[0] for s in (1, 0, -1)
        )
        assert found == pytest.approx((up + down - 2 * middle) / h**2, rel=1e-3)


@each
def test_the_link_gives_what_is_expected_at_the_target_sum_and_its_slope_the_spread(observation):
    target = observation.target_sum()
    assert target == (1 if isinstance(observation, Normalised) else np.median(SIZE))
    link, likelihood = observation.link(target), observation.likelihood(drawn(observation))
    assert LINKS[link.name](link.target_sum) == link
    mean = lambda eta: link.mean(torch.from_numpy(eta)).numpy()
    np.testing.assert_allclose(mean(PREDICTOR), target * observation.prediction(PREDICTOR), rtol=1e-12)
    np.testing.assert_allclose(mean(PREDICTOR), target * likelihood.mean(torch.from_numpy(PREDICTOR)), rtol=1e-12)
    slope = (mean(PREDICTOR + 1e-5) - mean(PREDICTOR - 1e-5)) / 2e-5
    np.testing.assert_allclose(link.slope(PREDICTOR), slope, rtol=1e-6)
    np.testing.assert_allclose(link.spread(PREDICTOR, np.full_like(PREDICTOR, 0.3)), 0.3 * slope, rtol=1e-6)


@each
def test_before_the_fit_the_head_is_at_the_mean_rate_and_loads_on_the_directions(observation):
    values = drawn(observation)
    directions = observation.directions(values, R, 0)
    head = observation.head(values, directions)
    at_rest = head(torch.zeros(1, R, dtype=torch.float64)).detach()[0]
    np.testing.assert_allclose(at_rest, observation.intercept(observation.mean_rate(values)), rtol=1e-6)
    unit = np.reshape(observation.gene_unit(values), (-1, 1))
    np.testing.assert_allclose(head.loadings().detach(), unit * directions, rtol=1e-6)


@each
def test_loadings_on_known_latents_are_found(observation):
    values = drawn(observation)
    for container in CONTAINERS.values():
        v, b = observation.solve_loadings(LATENT, container(values), observation.likelihood(values))
        np.testing.assert_allclose(v, LOADINGS, atol=0.1)
        np.testing.assert_allclose(b, INTERCEPT, atol=0.1)


def test_loadings_of_over_dispersed_counts_are_found_under_the_typical_dispersion_of_the_fit():
    observation = OBSERVATIONS["over-dispersed counts"]
    values, fitted = drawn(observation), NegativeBinomial(torch.tensor([100.0, 0.5, 2.0]))
    expected = count_loadings(LATENT, values, SIZE, observation.mean_rate(values), np.full(G, 0.5))
    for a, b in zip(observation.solve_loadings(LATENT, values, fitted), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_counts_have_something_to_fit_where_there_are_any_and_values_where_they_vary():
    counts = np.array([[1.0, 0, 2], [1, 0, 0], [1, 0, 0]])
    for container in CONTAINERS.values():
        np.testing.assert_array_equal(Counts(np.ones(3)).informative_genes(container(counts)), [0, 2])
        for dtype in (np.float32, float):
            values = np.random.default_rng(0).standard_normal((10_001, 5)).astype(dtype)
            values[:, [0, 1, 3]] = [0.1, 5.1, -3.3]  # whose means are rounded
            np.testing.assert_array_equal(Normalised().informative_genes(container(values)), [2, 4])


def test_log_normalised_values_are_offered_for_counts_only():
    counts = drawn(OBSERVATIONS["counts"])
    logs = np.log1p(counts / SIZE[:, None] * np.median(SIZE))
    np.testing.assert_allclose(OBSERVATIONS["counts"].normalised(counts), logs)
    assert [("lognorm" in kind.variants) for kind in (Counts, Normalised)] == [True, False]


def standardised_residuals(data):
    y = np.asarray(data.values, dtype=float)
    if isinstance(data.observation, Normalised):
        return (y - y.mean(0)) / y.std(0)
    mean = np.outer(data.observation.size, y.sum(0) / data.observation.size.sum())
    return (y - mean) / np.sqrt(mean)


def refuse_to_be_made_dense(*_, **__):
    msg = "a sparse matrix was made dense"
    raise AssertionError(msg)


@each_kind
@pytest.mark.parametrize(("n_spots", "rank"), [(N, 3), (N, 11), (9, 8)], ids=["iterative", "rank of genes", "of spots"])
def test_fits_start_from_singular_vectors_of_standardised_residuals(make, n_spots, rank, monkeypatch):
    data = known(known(make()).take(np.arange(n_spots)))
    _, s, vt = np.linalg.svd(standardised_residuals(data), full_matrices=False)
    gap = np.append(s, 0)[: rank + 1]
    assert (gap[:-1] - gap[1:] > 1e-6 * s[0]).all()  # otherwise the vectors are not defined
    leading = vt[:rank].T
    leading = leading * np.sign(leading[np.abs(leading).argmax(0), np.arange(rank)])
    containers = [stored_as(container, data) for container in CONTAINERS.values()]
    if min(data.values.shape) > rank + 1:  # by an iterative solver
        for kind in (sparse.csr_array, sparse.csr_matrix):
            monkeypatch.setattr(kind, "toarray", refuse_to_be_made_dense)
            monkeypatch.setattr(kind, "todense", refuse_to_be_made_dense)
    for stored in containers:
        np.testing.assert_allclose(stored.observation.directions(stored.values, rank, 0), leading, atol=1e-6)


@each
def test_balanced_predictors_have_the_mean_rates_of_the_values(observation):
    values = drawn(observation)
    values[:, 2] = 0
    rate = observation.mean_rate(values)
    shift = observation.balance(rate, PREDICTOR)
    mean = observation.prediction(PREDICTOR + shift)
    total = mean.mean(0) if isinstance(observation, Normalised) else SIZE @ mean / SIZE.sum()
    np.testing.assert_allclose(total, rate, rtol=1e-9, atol=1e-12)
    _, slope = observation.loss(values, PREDICTOR + shift)
    np.testing.assert_allclose(slope.sum(0), 0, atol=1e-6 * N)  # so the shift minimises the loss
