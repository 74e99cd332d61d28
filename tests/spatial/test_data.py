import dataclasses

import numpy as np
import pytest
import torch
from heldout import CONTAINERS, N, counted, each_container, each_kind, stored_as

from neurst.spatial import matrix
from neurst.spatial.data import SpotData
from neurst.spatial.geometry import disc_quadrature
from neurst.spatial.matrix import dense, gene_chunks, holds_counts, library_size, moments, spot_chunks, to_tensor
from neurst.spatial.observation import Counts, Normalised


@each_container
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_moments_and_totals_are_computed_in_float64_whatever_the_type(container, dtype):
    values = np.random.default_rng(0).integers(0, 250, (101, 7)).astype(dtype)
    values = values / dtype(10) if dtype == np.float32 else values
    mean, sd = moments(container(values))
    np.testing.assert_allclose(mean, values.mean(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(sd, values.std(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(library_size(container(values)), values.sum(1, dtype=float), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "expected"), [(3.0, True), (0.0, True), (1e7, True), (3.5, False), (-1.0, False), (np.nan, False)]
)
def test_counts_are_whole_numbers_from_zero(value, expected):
    for container in CONTAINERS.values():
        assert holds_counts(container(np.array([[0, value], [0, 2]]))) is expected


@pytest.mark.parametrize(("n", "g"), [(10, 7), (30, 4), (1, 50), (10, 0)])
def test_chunks_hold_every_column_or_row_once_and_no_more_values_than_allowed(n, g, monkeypatch):
    monkeypatch.setattr(matrix, "DENSE_VALUES", 20)
    for chunks, total, width in ((gene_chunks((n, g)), g, n), (spot_chunks(n, g), n, g)):
        parts = [np.arange(total)[chunk] for chunk in chunks]
        assert [i for part in parts for i in part] == list(range(total))
        assert all(len(part) == 1 or len(part) * width <= 20 for part in parts)


@each_container
def test_a_tensor_holds_the_values_and_is_sparse_if_they_are(container):
    tensor = to_tensor(container(counted().values.astype(float)))
    assert tensor.dtype == torch.float32
    assert (tensor.layout == torch.sparse_csr) == (container is not np.asarray)
    np.testing.assert_array_equal(tensor.to_dense().numpy(), counted().values)


@each_container
@each_kind
def test_a_selection_takes_the_same_spots_and_genes_of_all_parts(make, container):
    data = dataclasses.replace(stored_as(container, make()), footprint=3.0)
    spots, genes = np.random.default_rng(0).permutation(N)[:50], np.array([7, 2, 9])
    some = data.take(spots, genes)
    np.testing.assert_array_equal(dense(some.values), make().values[np.ix_(spots, genes)])
    np.testing.assert_array_equal(some.coords, data.coords[spots])
    assert (list(some.genes), some.footprint) == (["g7", "g2", "g9"], 3.0)
    if isinstance(data.observation, Counts):
        np.testing.assert_array_equal(some.observation.size, data.observation.size[spots])
    np.testing.assert_array_equal(dense(data.take_genes(genes).values), make().values[:, genes])
    np.testing.assert_array_equal(dense(data.take(spots).values), make().values[spots])


@each_container
def test_the_most_variable_genes_vary_most_about_their_mean_rate(container):
    rng = np.random.default_rng(0)
    factor = np.where(np.arange(6) % 2, rng.gamma(2, 0.5, (300, 1)), 1)  # every other gene is over-dispersed
    values = container(rng.poisson(factor * [90, 3, 150, 20, 3, 60]).astype(np.float32))
    data = SpotData(np.zeros((300, 2)), values, np.array(list("abcdef")), Counts(np.ones(300)))
    np.testing.assert_array_equal(data.most_variable(3), [1, 3, 5])
    np.testing.assert_array_equal(data.most_variable(99), range(6))
    # of values as such, those with the largest variance
    np.testing.assert_array_equal(dataclasses.replace(data, observation=Normalised()).most_variable(3), [2, 3, 5])


def test_a_spot_with_a_footprint_averages_over_a_disc_and_one_without_does_not():
    assert counted().quadrature() is None
    offsets = dataclasses.replace(counted(), footprint=8.0).quadrature()
    np.testing.assert_array_equal(offsets, disc_quadrature(8.0, 2))
