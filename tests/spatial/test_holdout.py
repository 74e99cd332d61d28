import numpy as np
import pytest
from heldout import CONTAINERS, slow_deviance
from heldout import spots as some_spots

from neurst.spatial import holdout
from neurst.spatial.holdout import (
    deviance_explained,
    deviance_explained_per_gene,
    median_gene_correlation,
    poisson_deviance,
    split,
    variance_explained,
    variance_explained_per_gene,
)


@pytest.fixture
def spots():
    return some_spots()


@pytest.fixture(params=CONTAINERS)
def container(request):
    return CONTAINERS[request.param]


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


def test_the_median_correlation_is_that_of_the_genes_one_by_one(spots, container, monkeypatch):
    monkeypatch.setattr(holdout, "CELLS", 4 * 67)  # 4 genes at a time
    _, counts, size, _ = spots
    rate = np.random.default_rng(1).random(counts.shape) + counts / size[:, None]
    logs = np.log1p(rate * np.median(size)), np.log1p(counts / size[:, None] * np.median(size))
    varies = np.arange(11) != 4  # gene 4 has no counts
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(logs[0].T[varies], logs[1].T[varies], strict=True)]
    assert median_gene_correlation(container(counts), size, rate) == pytest.approx(np.median(r))
    assert median_gene_correlation(container(counts), size[:, None], rate) == pytest.approx(np.median(r))


def test_the_median_correlation_of_normalised_values_is_of_the_values(spots):
    values = np.log1p(spots[1])[:, :2]
    mean = values + np.random.default_rng(1).normal(size=values.shape)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(values.T, mean.T, strict=True)]
    assert median_gene_correlation(values, None, mean) == pytest.approx(np.mean(r))


def test_a_constant_prediction_has_no_correlation_and_a_constant_gene_none_to_have(spots):
    _, counts, size, _ = spots
    null = counts.sum(0) / size.sum()
    assert median_gene_correlation(counts, size, null) == 0
    assert median_gene_correlation(counts, size, counts / size[:, None]) == pytest.approx(1)
    assert median_gene_correlation(counts[:, [4]], size, np.random.default_rng(0).random((67, 1))) == 0
