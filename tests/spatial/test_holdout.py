import numpy as np
import pytest
from real import load, needs_data
from scipy.sparse import csr_array, csr_matrix

from neurst.spatial import holdout
from neurst.spatial.holdout import (
    deviance_explained,
    deviance_explained_per_gene,
    kernel_cv,
    kernel_rate,
    nearest_cv,
    nearest_rate,
    poisson_deviance,
    split,
    variance_explained,
    variance_explained_per_gene,
)

CONTAINERS = {"dense": np.asarray, "csr_array": csr_array, "csr_matrix": csr_matrix}


@pytest.fixture
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


def slow_deviance(counts, mean):
    total = 0.0
    for y, mu in zip(np.ravel(counts), np.ravel(mean), strict=True):
        mu = max(mu, 1e-8)
        total += 2 * ((y * np.log(y / mu) if y > 0 else 0) - y + mu)
    return total


def slow_choice(rate, settings, x, counts, size, query):
    """The setting of least deviance on a quarter of the spots, used on all of them."""
    held = np.random.default_rng(1).integers(0, 4, len(x)) == 0
    kept = x[~held], counts[~held], size[~held], x[held]
    losses = [slow_deviance(counts[held], size[held, None] * rate(*kept, *s)) for s in settings]
    return rate(x, counts, size, query, *settings[np.argmin(losses)])


@pytest.mark.parametrize("mode", ["random", "block"])
@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_split_parts_the_spots_and_repeats_itself(mode, d, fraction):
    coords = np.random.default_rng(0).random((501, d))
    train, test = split(coords, mode, random_state=3, fraction=fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(501))
    np.testing.assert_array_equal(test, split(coords, mode, random_state=3, fraction=fraction)[1])
    assert set(test) != set(split(coords, mode, random_state=4, fraction=fraction)[1])
    if mode == "random":
        assert len(test) == int(501 * fraction)
    else:  # one more block than needed
        assert 501 * fraction <= len(test) <= 501 * (fraction + 0.06)


@pytest.mark.parametrize(
    ("box", "radius"), [([4.0, 9.0], np.sqrt(0.02 * 36 / np.pi)), ([2, 3, 4], (0.36 / np.pi) ** (1 / 3))]
)
def test_a_block_is_a_ball_of_two_percent_of_the_bounding_box(box, radius):
    coords = np.random.default_rng(0).random((400, len(box)))
    coords = np.concatenate([coords, np.zeros((1, len(box))), np.ones((1, len(box)))]) * box
    first = coords[np.random.default_rng(5).integers(len(coords))]
    inside = np.flatnonzero(np.linalg.norm(coords - first, axis=1) <= radius)
    np.testing.assert_array_equal(split(coords, "block", random_state=5, fraction=1e-3)[1], inside)


def test_blocks_of_a_flat_section_in_space_are_those_of_the_plane():
    coords = np.random.default_rng(0).random((300, 2))
    flat = np.column_stack([coords, np.full(300, 7.0)])
    np.testing.assert_array_equal(split(flat, "block")[1], split(coords, "block")[1])


@pytest.mark.parametrize(
    ("mode", "fraction", "message"),
    [
        ("blocks", 0.2, "`mode` is 'blocks': choose one of 'random', 'block'"),
        ("random", 0, "`fraction` is 0: give a number between 0 and 1"),
        ("block", 1.0, "`fraction` is 1.0"),
        ("block", np.nan, "`fraction` is nan"),
    ],
)
def test_a_split_that_cannot_be_is_refused(mode, fraction, message):
    with pytest.raises(ValueError, match=message):
        split(np.zeros((9, 2)), mode, fraction=fraction)


def test_poisson_deviance_is_its_formula_elementwise():
    counts, mean = np.array([[0.0, 3.0], [7.0, 0.0]]), np.array([[0.5, 3.0], [2.0, 0.0]])
    slow = [[slow_deviance(y, mu) for y, mu in zip(*rows, strict=True)] for rows in zip(counts, mean, strict=True)]
    np.testing.assert_allclose(poisson_deviance(counts, mean), slow)


def test_deviance_explained_is_one_minus_a_ratio_of_deviances(spots, container, monkeypatch):
    monkeypatch.setattr(holdout, "CELLS", 4 * 67)  # 4 genes at a time
    _, counts, size, _ = spots
    rate = np.random.default_rng(1).random(counts.shape)
    null = np.random.default_rng(2).random(counts.shape[1])
    mean, flat = size[:, None] * rate, size[:, None] * null
    want = 1 - slow_deviance(counts, mean) / slow_deviance(counts, flat)
    genes = [1 - slow_deviance(counts[:, g], mean[:, g]) / slow_deviance(counts[:, g], flat[:, g]) for g in range(11)]
    genes[4] = 0.0  # no counts
    assert deviance_explained(container(counts), size, rate, null) == pytest.approx(want)
    assert deviance_explained(container(counts), size[:, None], rate, null) == pytest.approx(want)
    np.testing.assert_allclose(deviance_explained_per_gene(container(counts), size, rate, null), genes)


def test_the_null_explains_nothing_and_the_counts_themselves_everything(spots):
    _, counts, size, _ = spots
    null = counts.sum(0) / size.sum()
    assert deviance_explained(counts, size, null, null) == 0
    assert deviance_explained(counts, size, counts / size[:, None], null) == pytest.approx(1, abs=1e-6)
    assert (deviance_explained_per_gene(counts, size, null, null) == 0).all()


def test_variance_explained_is_one_minus_a_ratio_of_squares(spots, container):
    values = np.log1p(spots[1])
    mean, null = values + np.random.default_rng(1).normal(size=values.shape), values.mean(0)
    rest, total = ((values - mean) ** 2).sum(0), ((values - null) ** 2).sum(0)
    varies = total > 0
    assert varies.sum() == 10
    genes = np.where(varies, 1 - rest / np.where(varies, total, 1), 0)
    together = 1 - (rest[varies] / total[varies]).sum() / varies.sum()  # every gene scaled to total 1
    np.testing.assert_allclose(variance_explained_per_gene(container(values), mean, null), genes)
    assert variance_explained(container(values), mean, null) == pytest.approx(together)


def test_variance_explained_does_not_see_the_scale_of_a_gene(spots):
    values = spots[1]
    mean, null, scale = values + np.sqrt(values), values.mean(0), np.logspace(-3, 3, 11)
    want = variance_explained(values, mean, null)
    assert variance_explained(values * scale, mean * scale, null * scale) == pytest.approx(want)


def test_constant_values_explain_nothing_without_nan():
    assert variance_explained(np.ones((5, 2)), np.zeros((5, 2)), np.ones(2)) == 0.0


@pytest.mark.parametrize("bandwidth", [0.05, 0.6, 3.0])
def test_kernel_rate_is_the_loop_over_spots(spots, container, bandwidth, monkeypatch):
    monkeypatch.setattr(holdout, "QUERIES", 5)
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
