import numpy as np
import pytest
from heldout import each_container
from scipy import stats

from neurst.spatial import matrix
from neurst.spatial.evaluate.calibration import GRID, calibration, over_dispersion, randomised_pit

N, G = 900, 7


def means(scale=8.0):
    return scale * np.random.default_rng(11).uniform(0.3, 2, (N, G))


def drawn(mean, phi, seed=1):
    """Negative binomial counts of variance mean + phi mean^2."""
    rng = np.random.default_rng(seed)
    return rng.poisson(mean * rng.gamma(1 / phi, phi, mean.shape) if phi else mean).astype(np.float32)


@pytest.mark.parametrize("phi", [0.03, 0.5, 10.0])
def test_over_dispersion_is_that_of_the_counts(phi):
    found = np.log(over_dispersion(drawn(means(), phi), means()) / phi)
    step = np.log(GRID[1] / GRID[0])  # genes that are alike share a value of the grid
    assert np.abs(found).max() < step
    assert abs(found.mean()) < step / 2


def test_each_gene_has_an_over_dispersion_of_its_own_and_poisson_counts_the_least():
    phi = np.geomspace(0.05, 3, G)
    counts = np.column_stack([drawn(means()[:, [g]], phi[g], seed=g)[:, 0] for g in range(G)])
    np.testing.assert_allclose(over_dispersion(counts, means()), phi, rtol=0.35)
    poisson = over_dispersion(drawn(means(100.0), 0), means(100.0))
    assert (GRID[0] * (1 - 1e-9) <= poisson).all()
    assert poisson.max() < 3 * GRID[0]


def test_a_gene_of_few_counts_takes_the_value_of_the_other_genes():
    counts, mean = drawn(means(), 0.5), means()
    counts[:, 3], mean[:, 3] = 0, 1e-3
    counts[0, 3] = 1
    assert over_dispersion(counts, mean)[3] == pytest.approx(0.5, rel=0.3)


@each_container
def test_neither_the_container_nor_the_division_of_the_work_matters(container, monkeypatch):
    counts = drawn(means(), 0.5)
    whole = over_dispersion(counts, means())
    for values in (1, 2 * N):
        monkeypatch.setattr(matrix, "DENSE_VALUES", values)
        np.testing.assert_allclose(over_dispersion(container(counts), means()), whole, rtol=1e-10)


def test_an_expectation_of_nothing_makes_no_nan():
    assert np.isfinite(over_dispersion(drawn(means(), 0.5), np.zeros((N, G)))).all()
    assert np.isfinite(randomised_pit(drawn(means(), 0.5), np.zeros((N, G)), 0.0)).all()


@pytest.mark.parametrize(("phi", "scale"), [(0.0, 0.5), (0.2, 8.0), (1.5, 0.5), (1.5, 8.0)])
def test_transformed_counts_are_uniform_if_they_are_of_the_model(phi, scale):
    pit = randomised_pit(drawn(means(scale), phi), means(scale), phi)
    assert pit.shape == (N, G)
    assert stats.kstest(pit.ravel(), "uniform").pvalue > 1e-3
    distance, share = calibration(pit)
    assert distance < 0.03
    assert share == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize(("phi", "assumed"), [(1.5, 0.2), (0.2, 1.5), (0.5, 0.0)])
def test_transformed_counts_are_not_uniform_under_another_over_dispersion(phi, assumed):
    distance, share = calibration(randomised_pit(drawn(means(), phi), means(), assumed))
    assert distance > 0.05
    assert (share < 0.87) == (phi > assumed)  # too sure of itself, or not sure enough


def test_transformed_counts_lie_between_the_steps_of_the_distribution_of_each_gene():
    counts, mean, phi = drawn(means(), 0.5), means(), np.linspace(0.1, 1, G)
    pit = randomised_pit(counts, mean, phi)
    at = stats.nbinom(1 / phi, 1 / (1 + phi * mean))
    assert ((at.cdf(counts - 1) - 1e-12 <= pit) & (pit <= at.cdf(counts) + 1e-12)).all()
    np.testing.assert_array_equal(pit, randomised_pit(counts, mean, np.broadcast_to(phi, (N, G))))
    assert (pit != randomised_pit(counts, mean, phi, random_state=1)).mean() > 0.9


EVEN = (np.arange(2000) + 0.5) / 2000
CALIBRATION = {  # transformed counts, central range, distance, share
    "uniform": (EVEN, 0.9, 0.0, 0.9),
    "uniform, half": (EVEN.reshape(40, 50), 0.5, 0.0, 0.5),
    "all in the middle": (np.full(100, 0.5), 0.9, 0.5, 1.0),
    "all at the ends": (np.repeat([0.01, 0.99], 50), 0.9, 0.49, 0.0),
    "the lower half": (EVEN / 2, 0.9, 0.5, 0.9),
}


@pytest.mark.parametrize(("pit", "central", "distance", "share"), CALIBRATION.values(), ids=CALIBRATION)
def test_calibration_of_known_values(pit, central, distance, share):
    assert calibration(pit, central) == pytest.approx((distance, share), abs=2e-3)
