import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest
from heldout import CONTAINERS, scattered, slow_deviance
from real import load, needs_data

from neurst.spatial.data import SpotData
from neurst.spatial.evaluate import baselines
from neurst.spatial.evaluate import kriging as kriging_module
from neurst.spatial.evaluate.baselines import COUNT_BASELINES, VALUE_BASELINES
from neurst.spatial.evaluate.kriging import kriging
from neurst.spatial.evaluate.scores import deviance_explained
from neurst.spatial.evaluate.splits import split
from neurst.spatial.observation import Counts, Normalised

EMPTY = 4  # a gene without counts
BANDWIDTHS, PRIORS = (0.5, 0.8, 1.2, 1.8, 2.5, 4), (0.05, 0.5, 2, 8)


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


def slow_choice(rate, settings, x, values, size, query, loss):
    """The setting of least loss on a quarter of the spots, used on all of them."""
    held = np.random.default_rng(1).integers(0, 4, len(x)) == 0
    kept = x[~held], values[~held], size[~held], x[held]
    losses = [loss(values[held], size[held, None] * rate(*kept, *setting)) for setting in settings]
    return rate(x, values, size, query, *settings[np.argmin(losses)])


@pytest.mark.parametrize("bandwidth", [0.05, 0.6, 3.0])
def test_the_kernel_rate_is_the_loop_over_spots(bandwidth, monkeypatch):
    monkeypatch.setattr(baselines, "QUERIES", 5)
    x, counts, size, query = scattered()
    slow = slow_kernel_rate(x, counts, size, query, bandwidth, 30.0)
    for container in CONTAINERS.values():
        rate = baselines.kernel_rate(x, container(counts), size, query, bandwidth, 30.0)
        np.testing.assert_allclose(rate, slow, rtol=1e-10)


def test_the_nearest_rate_is_the_loop_over_spots_and_the_kernel_rate_the_mean_rate_far_from_them():
    x, counts, size, query = scattered()
    others = np.arange(len(query)) != 21  # which is a place of two spots
    slow = slow_nearest_rate(x, counts, size, query, 30.0)[others]
    for container in CONTAINERS.values():
        np.testing.assert_allclose(
            baselines.nearest_rate(x, container(counts), size, query, 30.0)[others], slow, rtol=1e-12
        )
    np.testing.assert_allclose(
        baselines.kernel_rate(x, counts, size, query[-1:], 0.5, 1e-3)[0], counts.sum(0) / size.sum()
    )


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


def test_settings_have_the_least_loss_on_a_held_quarter(signals):
    x, counts, size, query = signals
    pitch = np.median(np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1])
    kernels = [(pitch * h, np.median(size) * p) for h in BANDWIDTHS for p in PRIORS]
    shrinkage = [(np.median(size) * p,) for p in (*PRIORS, 32)]
    kernel = slow_choice(slow_kernel_rate, kernels, *signals, slow_deviance)
    nearest = slow_choice(slow_nearest_rate, shrinkage, *signals, slow_deviance)
    for container in CONTAINERS.values():
        np.testing.assert_allclose(baselines.kernel_cv(x, container(counts), size, query), kernel, rtol=1e-10)
        np.testing.assert_allclose(baselines.nearest_cv(x, container(counts), size, query), nearest, rtol=1e-12)
    values, ones = np.log1p(counts), np.ones(len(x))  # normalised values: by squared error, every gene in its unit
    squares = lambda y, mean: (((y - mean) / values.std(0)) ** 2).sum()
    kernels = [(h, p / np.median(size)) for h, p in kernels]
    means = slow_choice(slow_kernel_rate, kernels, x, values, ones, query, squares)
    np.testing.assert_allclose(baselines.kernel_mean(x, values, query), means, rtol=1e-10)


def slow_kriging(x, z, query, length, noise):
    """Prediction and negative log marginal likelihood, up to a constant, of one column."""
    r = lambda a, b: np.sqrt(3) * np.linalg.norm(a - b) / length
    k = lambda a, b: (1 + r(a, b)) * np.exp(-r(a, b))
    cov = np.array([[k(a, b) for a in x] for b in x]) + noise * np.eye(len(x))
    weights = np.linalg.solve(cov, z)
    loss = len(x) * np.log(z @ weights / len(x)) + np.linalg.slogdet(cov)[1]
    return np.array([[k(a, b) for a in x] for b in query]) @ weights, loss


def test_kriging_is_the_posterior_mean_under_the_most_likely_length_and_noise(monkeypatch):
    monkeypatch.setattr(kriging_module, "NOISES", (0.01, 0.3, 10))
    rng = np.random.default_rng(0)
    x, query = rng.random((31, 2)) * 8, rng.random((5, 2)) * 8
    z = np.column_stack([np.sin(x[:, 0]), np.sin(3 * x[:, 1]) + rng.normal(size=31), rng.normal(size=31)])
    found, chosen = kriging(x, z, query, [1.0, 4.0]), []
    for column, predicted in zip(z.T, found.T, strict=True):
        tried = {s: slow_kriging(x, column, query, *s) for s in [(h, n) for h in (1.0, 4.0) for n in (0.01, 0.3, 10)]}
        chosen.append(min(tried, key=lambda s: tried[s][1]))
        np.testing.assert_allclose(predicted, tried[chosen[-1]][0], rtol=1e-8, atol=1e-10)
    assert len(set(chosen)) > 1


# ---- by name


def count_data(container=np.asarray, d=2):
    """Spots to learn from, and spots to predict, one of them on another spot and one far away."""
    x, counts, size, query = scattered()
    if d == 3:
        x, query = (np.column_stack([part, np.random.default_rng(3).random(len(part))]) for part in (x, query))
    genes = np.array([f"g{i}" for i in range(11)])
    nothing = np.zeros((len(query), 11))
    train = SpotData(x, container(counts), genes, Counts(size))
    return train, SpotData(query, nothing, genes, Counts(np.full(len(query), 100.0)))


def value_data(container=np.asarray, d=2):
    """The same of normalised values, whose genes have units far from each other."""
    train, test = count_data(d=d)
    values = container(np.log1p(train.values) * np.logspace(-3, 3, 11))
    pairs = ((train, values), (test, test.values))
    return (dataclasses.replace(part, values=v, observation=Normalised()) for part, v in pairs)


BY_NAME = {f"{name} of counts": (count_data, predict) for name, predict in COUNT_BASELINES.items()}
BY_NAME |= {f"{name} of values": (value_data, predict) for name, predict in VALUE_BASELINES.items()}
WITHOUT_PACKAGE = {name: case for name, case in BY_NAME.items() if not name.startswith("smoother")}


@pytest.mark.parametrize(("make", "predict"), WITHOUT_PACKAGE.values(), ids=WITHOUT_PACKAGE)
def test_every_method_by_name_predicts_whatever_the_container_and_from_five_spots(make, predict):
    for d in (2, 3):
        train, test = make(d=d)
        found = predict(train, test)
        assert found.shape == (len(test.coords), 11)
        np.testing.assert_allclose(found[:, EMPTY], 0, atol=1e-12)
        for container in CONTAINERS.values():
            np.testing.assert_allclose(predict(*make(container, d=d)), found, rtol=1e-6, atol=1e-12)
        for each in (found, predict(train.take(np.arange(5, 10)), test)):
            assert np.isfinite(each).all()
            assert make is value_data or (each >= 0).all()


@pytest.mark.parametrize("predict", VALUE_BASELINES.values(), ids=VALUE_BASELINES)
def test_means_do_not_see_the_scale_of_a_gene(predict):
    train, test = value_data()
    scale = np.logspace(2, -2, 11)
    other = dataclasses.replace(train, values=train.values * scale)
    np.testing.assert_allclose(predict(other, test), predict(train, test) * scale, rtol=1e-6, atol=1e-12)


def test_kriging_of_many_spots_is_refused_before_a_matrix_is_built(monkeypatch):
    monkeypatch.setattr(kriging_module, "MOST_SPOTS", 66)
    words = r"there are 67 to learn from: expected at most 66; leave it out, e.g. `baselines=\('nearest', 'kernel'\)`"
    for name, (make, predict) in BY_NAME.items():
        if name.startswith("kriging"):
            with pytest.raises(ValueError, match=words):
                predict(*make())
    with pytest.raises(ValueError, match=words):
        kriging(*scattered()[:2], scattered()[3], [1.0])


def test_smoother_gives_rates_or_says_how_to_get_it():
    train, test = count_data()
    test = test.take(np.arange(22))
    if find_spec("smoother") is None:
        with pytest.raises(ImportError, match="`baselines` names 'smoother', .* `pip install smoother-omics`"):
            COUNT_BASELINES["smoother"](train, test)
    else:
        rate = COUNT_BASELINES["smoother"](train, test)
        assert rate.shape == (22, 11)
        assert (rate >= 0).all()


@needs_data
@pytest.mark.parametrize(
    ("name", "kernel", "kriged"), [("visium_dlpfc_151673", 0.2989, None), ("st_mob_rep11", 0.1185, 0.2429)]
)
def test_methods_reach_the_reference_figures_on_blocks_of_real_sections(name, kernel, kriged):
    coords, counts, size, _ = load(name, 300)
    train, test = split(coords, "block")
    known, rate = (coords[train], counts[train], size[train]), counts[train].sum(0) / size[train].sum()
    score = lambda predicted: deviance_explained(counts[test], size[test], predicted, rate)
    assert score(baselines.kernel_cv(*known, coords[test])) == pytest.approx(kernel, abs=1e-4)
    assert 0 < score(baselines.nearest_cv(*known, coords[test])) < kernel
    if kriged is not None:
        rates = (
            baselines.kriging_rate(*known, coords[test], size[test]),
            baselines.kriging_rate_log(*known, coords[test]),
        )
        assert max(map(score, rates)) == pytest.approx(kriged, abs=1e-4)
