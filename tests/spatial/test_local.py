import dataclasses

import numpy as np
import pytest
from heldout import each_container, stored_as

from neurst.spatial.data import SpotData
from neurst.spatial.local import WIDTH, LocalStructure, find_structure
from neurst.spatial.observation import Counts, Normalised

SIDE, G = 15, 12
GRID = np.stack(np.meshgrid(*2 * [10.0 * np.arange(SIDE)]), -1).reshape(-1, 2)
N, PLACE = len(GRID), SIDE * 7 + 4  # of the structure
MARKERS = np.array([2, 9])
WITHIN = np.exp(-((GRID - GRID[PLACE]) ** 2).sum(1) / (2 * (WIDTH * 10) ** 2))
BASE = np.log(np.linspace(2, 6, G))


def spots(kind="counts", height=1.5, seed=0):
    """A lattice of spots that are alike, but that two genes are raised around one of them."""
    rng = np.random.default_rng(seed)
    eta = BASE + height * np.outer(WITHIN, np.isin(np.arange(G), MARKERS))
    names = np.array([f"g{i}" for i in range(G)])
    if kind == "counts":
        size = rng.uniform(0.5, 2, N)
        return SpotData(GRID, rng.poisson(size[:, None] * np.exp(eta)).astype(np.float32), names, Counts(size))
    return SpotData(GRID, (eta + 0.3 * rng.standard_normal(eta.shape)).astype(np.float32), names, Normalised())


def found_in(data, **options):
    dispersion = np.zeros(G) if data.observation.has_dispersion else None
    return find_structure(data, lambda genes: np.broadcast_to(BASE[genes], (N, len(genes))), dispersion, **options)


each_kind = pytest.mark.parametrize("kind", ["counts", "normalised values"])


@each_kind
def test_a_structure_of_a_few_spots_is_found_with_its_genes(kind):
    for seed in range(10):
        found = found_in(spots(kind, height=2.5, seed=seed))
        assert found.width == pytest.approx(WIDTH * 10)
        assert np.linalg.norm(found.centres - GRID[PLACE], axis=1).min() <= 10  # one of them or the next
        raised = (found.loadings > 0.5).any(1)
        assert raised[MARKERS].any()
        assert raised[np.setdiff1d(np.arange(G), MARKERS)].sum() <= 1


@each_container
def test_the_container_of_the_values_does_not_matter(container):
    data = spots()
    one, other = found_in(data), found_in(stored_as(container, data))
    np.testing.assert_array_equal(other.centres, one.centres)
    np.testing.assert_allclose(other.loadings, one.loadings, rtol=1e-6)


def test_a_single_spot_is_no_structure_however_large_its_counts():
    for seed in range(10):
        data = spots("counts", height=0.0, seed=seed)
        values = data.values.copy()
        values[PLACE, MARKERS] += 20 * values.mean()
        assert found_in(dataclasses.replace(data, values=values)) is None


def test_where_a_structure_is_confirmed_a_gene_that_only_one_of_its_spots_has_takes_part():
    for seed in range(10):
        data = spots("counts", height=2.5, seed=seed)
        values = data.values.copy()
        values[PLACE, 5] += 20 * values[:, 5].mean()
        found = found_in(dataclasses.replace(data, values=values))
        assert found.loadings[5].max() > 0.5


@each_kind
def test_hardly_anything_is_found_in_noise(kind):
    found = [found_in(spots(kind, height=0.0, seed=seed)) is not None for seed in range(60)]
    assert sum(found) <= 6


def test_no_more_structures_are_found_than_were_asked_for():
    data = spots(height=3.0)
    assert found_in(data, most=0) is None
    assert len(found_in(data, most=1).centres) == 1


def test_among_all_genes_the_others_have_no_loading():
    found = LocalStructure(np.zeros((1, 2)), 3.0, np.array([[1.0], [2.0]])).among(5, np.array([4, 1]))
    np.testing.assert_array_equal(found.loadings[:, 0], [0, 2, 0, 0, 1])
