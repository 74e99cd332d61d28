import numpy as np
import pytest
from heldout import each_container, scattered, slow_deviance

from neurst.spatial import matrix
from neurst.spatial.evaluate import scores

EMPTY = 4  # a gene without counts


@pytest.fixture
def spots(monkeypatch):
    """Counts (67, 11) and library sizes, of which 4 genes are made dense at a time."""
    monkeypatch.setattr(matrix, "DENSE_VALUES", 4 * 67)
    _, counts, size, _ = scattered()
    return counts, size


def test_poisson_deviance_is_its_formula_elementwise():
    counts, mean = np.array([[0.0, 3.0], [7.0, 0.0]]), np.array([[0.5, 3.0], [2.0, 0.0]])
    slow = [[slow_deviance(y, mu) for y, mu in zip(*rows, strict=True)] for rows in zip(counts, mean, strict=True)]
    np.testing.assert_allclose(scores.poisson_deviance(counts, mean), slow)


@each_container
def test_deviance_explained_is_one_minus_a_ratio_of_deviances(spots, container):
    counts, size = spots
    rate, null = np.random.default_rng(1).random(counts.shape), np.random.default_rng(2).random(counts.shape[1])
    mean, flat = size[:, None] * rate, size[:, None] * null
    expected = 1 - slow_deviance(counts, mean) / slow_deviance(counts, flat)
    genes = [
        1 - slow_deviance(y, mu) / slow_deviance(y, at_rest)
        for y, mu, at_rest in zip(counts.T, mean.T, flat.T, strict=True)
    ]
    genes[EMPTY] = 0.0
    for sizes in (size, size[:, None]):
        assert scores.deviance_explained(container(counts), sizes, rate, null) == pytest.approx(expected)
    np.testing.assert_allclose(scores.deviance_explained_per_gene(container(counts), size, rate, null), genes)


def test_the_mean_rate_explains_nothing_and_the_counts_themselves_everything(spots):
    counts, size = spots
    null = counts.sum(0) / size.sum()
    assert scores.deviance_explained(counts, size, null, null) == 0
    assert not scores.deviance_explained_per_gene(counts, size, null, null).any()
    assert scores.deviance_explained(counts, size, counts / size[:, None], null) == pytest.approx(1, abs=1e-6)


@each_container
def test_variance_explained_is_one_minus_a_ratio_of_squares_of_genes_of_one_scale(spots, container):
    values = np.log1p(spots[0])
    mean, null = values + np.random.default_rng(1).normal(size=values.shape), values.mean(0)
    rest, total = ((values - mean) ** 2).sum(0), ((values - null) ** 2).sum(0)
    varies = np.arange(11) != EMPTY
    genes = np.where(varies, 1 - rest / np.where(varies, total, 1), 0)
    together = 1 - (rest[varies] / total[varies]).sum() / varies.sum()  # every gene scaled to total 1
    np.testing.assert_allclose(scores.variance_explained_per_gene(container(values), mean, null), genes)
    assert scores.variance_explained(container(values), mean, null) == pytest.approx(together)
    scale = np.logspace(-3, 3, 11)
    assert scores.variance_explained(container(values * scale), mean * scale, null * scale) == pytest.approx(together)


def test_constant_values_explain_nothing_without_nan():
    assert scores.variance_explained(np.ones((5, 2)), np.zeros((5, 2)), np.ones(2)) == 0.0


@each_container
def test_the_median_correlation_is_that_of_the_genes_one_by_one(spots, container):
    counts, size = spots
    rate = np.random.default_rng(1).random(counts.shape) + counts / size[:, None]
    logs = np.log1p(rate * np.median(size)), np.log1p(counts / size[:, None] * np.median(size))
    r = [np.corrcoef(*(part[:, g] for part in logs))[0, 1] for g in range(11) if g != EMPTY]
    for sizes in (size, size[:, None]):
        assert scores.median_log_rate_correlation(container(counts), sizes, rate) == pytest.approx(np.median(r))
    r = [np.corrcoef(counts[:, g], rate[:, g])[0, 1] for g in range(11) if g != EMPTY]
    assert scores.median_gene_correlation(container(counts), rate) == pytest.approx(np.median(r))


def test_a_constant_prediction_has_no_correlation_and_a_constant_gene_none_to_have(spots):
    counts, size = spots
    null = counts.sum(0) / size.sum()
    for correlation in (lambda y, p: scores.median_log_rate_correlation(y, size, p), scores.median_gene_correlation):
        assert correlation(counts, null) == 0
        assert correlation(counts[:, [EMPTY]], np.random.default_rng(0).random((67, 1))) == 0
    assert scores.median_log_rate_correlation(counts, size, counts / size[:, None]) == pytest.approx(1)
    assert scores.median_gene_correlation(counts, counts) == pytest.approx(1)
