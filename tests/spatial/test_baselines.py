from importlib.util import find_spec

import numpy as np
import pytest
from heldout import CONTAINERS, slow_deviance
from heldout import spots as some_spots
from real import load, needs_data

from neurst.spatial import baselines
from neurst.spatial import kriging as kriging_module
from neurst.spatial.baselines import (
    BASELINES,
    MEANS,
    kernel_cv,
    kernel_mean,
    kernel_rate,
    kriging_mean,
    kriging_rate,
    kriging_rate_log,
    log_normalised,
    nearest_cv,
    nearest_mean,
    nearest_rate,
    rate_of_logs,
)
from neurst.spatial.holdout import deviance_explained, split, variance_explained
from neurst.spatial.kriging import kriging


@pytest.fixture
def spots():
    return some_spots()


@pytest.fixture(params=CONTAINERS)
def container(request):
    return CONTAINERS[request.param]


def slow_kernel_rate(x, counts, size, query, bandwidth, prior):
    null, rate = counts.sum(0) / size.sum(), np.zeros((len(query), counts.shape[1]))
    for m in range(len(query)):
        top, below = prior * null, prior
        for i in range(len(x)):
            r = np.hypot(*(query[m] - x[i]))
            if r <= 4 * bandwidth:
                w = np.exp(-(r**2) / (2 * bandwidth**2))
                top, below = top + w * counts[i], below + w * size[i]
        rate[m] = top / below
    return rate


def slow_nearest_rate(x, counts, size, query, prior):
    null = counts.sum(0) / size.sum()
    near = [min(range(len(x)), key=lambda i: np.hypot(*(q - x[i]))) for q in query]
    return np.array([(counts[i] + prior * null) / (size[i] + prior) for i in near])


def slow_choice(rate, settings, x, counts, size, query):
    """The setting of least deviance on a quarter of the spots, used on all of them."""
    held = np.random.default_rng(1).integers(0, 4, len(x)) == 0
    kept = x[~held], counts[~held], size[~held], x[held]
    losses = [slow_deviance(counts[held], size[held, None] * rate(*kept, *s)) for s in settings]
    return rate(x, counts, size, query, *settings[np.argmin(losses)])


@pytest.mark.parametrize("bandwidth", [0.05, 0.6, 3.0])
def test_kernel_rate_is_the_loop_over_spots(spots, container, bandwidth, monkeypatch):
    monkeypatch.setattr(baselines, "QUERIES", 5)
    x, counts, size, query = spots
    rate = kernel_rate(x, container(counts), size, query, bandwidth, 30.0)
    np.testing.assert_allclose(rate, slow_kernel_rate(*spots, bandwidth, 30.0), rtol=1e-10)


def test_nearest_rate_is_the_loop_over_spots(spots, container):
    x, counts, size, query = spots
    rate = nearest_rate(x, container(counts), size, query, 30.0)
    query_on_two_spots = 21
    others = np.arange(len(query)) != query_on_two_spots
    np.testing.assert_allclose(rate[others], slow_nearest_rate(*spots, 30.0)[others], rtol=1e-12)


def test_far_from_the_spots_the_kernel_rate_is_the_null(spots):
    x, counts, size, query = spots
    np.testing.assert_allclose(kernel_rate(x, counts, size, query[-1:], 0.5, 1e-3)[0], counts.sum(0) / size.sum())


RATES = {  # relative rate at x, for which different settings are best
    "flat": lambda x: np.ones(len(x)),
    "smooth": lambda x: 1 + np.sin(x[:, 0]),
    "rough and deep": lambda x: 200 * np.exp(3 * np.sin(5 * x[:, 0]) * np.sin(5 * x[:, 1])),
}


@pytest.fixture(params=RATES)
def signals(request):
    """No two spots at one place; with this seed the choices reach both ends of the bandwidths and of the priors."""
    rng = np.random.default_rng(2)
    x, size = rng.random((131, 2)) * 8, rng.integers(50, 200, 131).astype(float)
    counts = rng.poisson(size[:, None] * RATES[request.param](x)[:, None] * rng.random(3) / 20).astype(float)
    return x, counts, size, rng.random((9, 2)) * 8


def test_kernel_cv_is_the_best_setting_on_a_held_quarter(signals, container):
    x, counts, size, query = signals
    pitch = np.median(np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1])
    settings = [(pitch * h, np.median(size) * p) for h in (0.5, 0.8, 1.2, 1.8, 2.5, 4) for p in (0.05, 0.5, 2, 8)]
    want = slow_choice(slow_kernel_rate, settings, *signals)
    np.testing.assert_allclose(kernel_cv(x, container(counts), size, query), want, rtol=1e-10)


def test_nearest_cv_is_the_best_prior_on_a_held_quarter(signals, container):
    x, counts, size, query = signals
    settings = [(np.median(size) * p,) for p in (0.05, 0.5, 2, 8, 32)]
    want = slow_choice(slow_nearest_rate, settings, *signals)
    np.testing.assert_allclose(nearest_cv(x, container(counts), size, query), want, rtol=1e-12)


def test_kernel_cv_is_finite_where_most_spots_share_their_place(spots):
    x, counts, size, query = spots
    rate = kernel_cv(np.repeat(x[:20], 3, axis=0), counts[:60], size[:60], query)
    assert np.isfinite(rate).all()


def slow_kriging(x, z, query, length, noise):
    """Prediction and negative log marginal likelihood, up to a constant, of one column."""
    k = lambda a, b: (
        (1 + np.sqrt(3) * np.linalg.norm(a - b) / length) * np.exp(-np.sqrt(3) * np.linalg.norm(a - b) / length)
    )
    cov = np.array([[k(a, b) for a in x] for b in x]) + noise * np.eye(len(x))
    weights = np.linalg.solve(cov, z)
    loss = len(x) * np.log(z @ weights / len(x)) + np.linalg.slogdet(cov)[1]
    return np.array([[k(a, b) for a in x] for b in query]) @ weights, loss


def test_kriging_is_the_posterior_mean_under_the_most_likely_length_and_noise(monkeypatch):
    monkeypatch.setattr(kriging_module, "NOISES", (0.01, 0.3, 10))
    rng = np.random.default_rng(0)
    x, query = rng.random((31, 2)) * 8, rng.random((5, 2)) * 8
    z = np.column_stack([np.sin(x[:, 0]), np.sin(3 * x[:, 1]) + rng.normal(size=31), rng.normal(size=31)])
    found, lengths = kriging(x, z, query, [1.0, 4.0]), []
    for column, predicted in zip(z.T, found.T, strict=True):
        tried = {s: slow_kriging(x, column, query, *s) for s in [(h, n) for h in (1.0, 4.0) for n in (0.01, 0.3, 10)]}
        best = min(tried, key=lambda s: tried[s][1])
        lengths.append(best)
        np.testing.assert_allclose(predicted, tried[best][0], rtol=1e-8, atol=1e-10)
    assert len(set(lengths)) > 1


def test_kriging_of_many_spots_is_refused_before_a_matrix_is_built(monkeypatch):
    monkeypatch.setattr(kriging_module, "MOST_SPOTS", 66)
    x, counts, size, query = some_spots()
    words = r"there are 67 to learn from: expected at most 66; leave it out, e.g. `baselines=\('nearest', 'kernel'\)`"
    for refused in (
        lambda: kriging(x, counts, query, [1.0]),
        lambda: kriging_rate(x, counts, size, query, np.ones(len(query))),
        lambda: kriging_rate_log(x, counts, size, query),
        lambda: kriging_mean(x, counts, query),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


def test_log_normalised_counts_are_those_of_the_formula(spots, container):
    _, counts, size, _ = spots
    logs = log_normalised(container(counts), size)
    logs = logs.toarray() if hasattr(logs, "toarray") else logs
    np.testing.assert_allclose(logs, np.log1p(counts / size[:, None] * np.median(size)))


def test_rates_of_logs_have_the_mean_of_the_spots():
    logs, null = np.random.default_rng(0).random((20, 3)), np.array([0.1, 0.0, 2.0])
    rate = rate_of_logs(logs, null)
    np.testing.assert_allclose(rate.mean(0), null)
    np.testing.assert_allclose(rate[:, 0] / rate[0, 0], np.expm1(logs[:, 0]) / np.expm1(logs[0, 0]))


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"smoother"}))
def test_every_baseline_by_name_gives_rates_whatever_the_container(spots, container, name):
    x, counts, size, query = spots
    rate = BASELINES[name](x, counts, size, query, np.full(len(query), 100.0))
    assert rate.shape == (len(query), 11)
    assert (rate >= 0).all()
    assert not rate[:, 4].any()  # no counts
    stored = BASELINES[name](x, container(counts), size[:, None], query, np.full((len(query), 1), 100.0))
    np.testing.assert_allclose(stored, rate, rtol=1e-6)


def test_smoother_gives_rates_or_says_how_to_get_it(spots):
    x, counts, size, query = spots
    if find_spec("smoother") is None:
        with pytest.raises(ImportError, match="`baselines` names 'smoother', .* `pip install smoother-omics`"):
            BASELINES["smoother"](x, counts, size, query[:22], None)
    else:
        rate = BASELINES["smoother"](x, counts, size, query[:22], None)
        assert rate.shape == (22, 11)
        assert (rate >= 0).all()


@pytest.mark.parametrize("name", MEANS)
def test_means_do_not_see_the_scale_of_a_gene_nor_its_container(spots, container, name):
    x, counts, _, query = spots
    values, scale = np.log1p(counts), np.logspace(-3, 3, 11)
    mean = MEANS[name](x, values, query)
    assert mean.shape == (len(query), 11)
    np.testing.assert_allclose(MEANS[name](x, container(values * scale), query), mean * scale, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(mean[:, 4], 0, atol=1e-12)  # constant


def test_kernel_mean_is_the_best_setting_by_squared_error_on_a_held_quarter(signals):
    x, counts, _, query = signals
    values, ones = np.log1p(counts), np.ones(len(x))
    pitch = np.median(np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1])
    held = np.random.default_rng(1).integers(0, 4, len(x)) == 0
    known = x[~held], values[~held], ones[~held], x[held]
    settings = [(pitch * h, p) for h in (0.5, 0.8, 1.2, 1.8, 2.5, 4) for p in (0.05, 0.5, 2, 8)]
    losses = [(((slow_kernel_rate(*known, *s) - values[held]) / values.std(0)) ** 2).sum() for s in settings]
    want = slow_kernel_rate(x, values, ones, query, *settings[np.argmin(losses)])
    np.testing.assert_allclose(kernel_mean(x, values, query), want, rtol=1e-10)


def test_means_predict_smooth_values_better_than_the_nearest_spot():
    rng = np.random.default_rng(0)
    x = rng.random((200, 2)) * 8
    truth = np.sin(x @ rng.normal(size=(2, 4)))
    values, held = truth + rng.normal(0, 0.5, truth.shape), np.arange(200) % 5 == 0
    known = x[~held], values[~held], x[held]
    means = nearest_mean(*known), kernel_mean(*known), kriging_mean(*known)
    nearest, kernel, kriged = (variance_explained(truth[held], m, values[~held].mean(0)) for m in means)
    assert nearest < kernel < 1
    assert nearest < kriged < 1


@needs_data
@pytest.mark.parametrize(
    ("name", "mode", "score"),
    [
        ("visium_dlpfc_151673", "random", 0.3714),
        ("visium_dlpfc_151673", "block", 0.2989),
        ("st_mob_rep11", "random", 0.2520),
        ("st_mob_rep11", "block", 0.1185),
    ],
)
def test_kernel_cv_reaches_the_reference_figure_and_beats_the_nearest_spot(name, mode, score):
    coords, counts, size, _ = load(name, 300)
    train, test = split(coords, mode)
    known, null = (coords[train], counts[train], size[train]), counts[train].sum(0) / size[train].sum()
    kernel, nearest = (
        deviance_explained(counts[test], size[test], baseline(*known, coords[test]), null)
        for baseline in (kernel_cv, nearest_cv)
    )
    assert kernel == pytest.approx(score, abs=1e-4)
    assert 0 < nearest < kernel


@needs_data
@pytest.mark.parametrize(("mode", "score"), [("random", 0.3421), ("block", 0.2429)])
def test_kriging_reaches_the_reference_figure(mode, score):
    coords, counts, size, _ = load("st_mob_rep11", 300)
    train, test = split(coords, mode)
    known, null = (coords[train], counts[train], size[train]), counts[train].sum(0) / size[train].sum()
    rates = kriging_rate(*known, coords[test], size[test]), kriging_rate_log(*known, coords[test])
    assert max(deviance_explained(counts[test], size[test], rate, null) for rate in rates) == pytest.approx(
        score, abs=1e-4
    )
