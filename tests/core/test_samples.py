import math

import pytest
import torch
from draws import normal, uniform

from neurst.core.samples import Box, Region, Samples, rows, typical_spacing

SIDES = torch.tensor([137.0, 60.0, 3.0]).double()
COORDS = uniform(50, 3, low=0.0, high=1.0) * SIDES + torch.tensor([5000.0, -30.0, 0.1])
COORDS[:2] = torch.stack([COORDS.amin(0), COORDS.amax(0)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def csr(dense):
    """Dense as CSR; torch has no entry at zeros."""
    index = dense.nonzero()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (dense != 0).sum(1).cumsum(0)])
    return torch.sparse_csr_tensor(starts, index[:, 1], dense[tuple(index.T)], size=dense.shape, check_invariants=True)


def test_a_box_goes_in_and_out():
    box = Box.of(COORDS)
    torch.testing.assert_close(box.outward(box.inward(COORDS)), COORDS)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_longest_side_becomes_the_unit_box_and_all_axes_share_one_scale(d):
    coords = COORDS[:, :d]
    box = Box.of(coords)
    x, sides = box.inward(coords), coords.amax(0) - coords.amin(0)
    torch.testing.assert_close(x.amax(0), sides / sides.max())
    torch.testing.assert_close(x.amin(0), -sides / sides.max())
    torch.testing.assert_close(torch.pdist(x) * box.scale, torch.pdist(coords))


@pytest.mark.parametrize("sides", [(100.0, 1.0), (1e-3, 1.0), (1.0, 0.0)])
def test_very_unequal_sides_warn_about_mixed_units(sides):
    with pytest.warns(
        UserWarning, match=r"differ by a factor of .* \(.*\): if the axes are in different units, convert"
    ):
        Box.of(torch.tensor([[0.0, 0.0], sides]))


def test_moderately_unequal_sides_do_not_warn():
    assert Box.of(torch.tensor([[0.0, 0.0], [49.0, 1.0]])).scale == 24.5


def test_points_at_one_place_have_no_box():
    with pytest.raises(ValueError, match="all 4 coordinates are the same point"):
        Box.of(torch.ones(4, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_coordinate_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=r"coordinates are not finite at 1 of 3 points \(first: 1\)"):
        Box.of(torch.tensor([[0.0, 0.0], [bad, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("values", torch.zeros(4, 2)),
        ("values", torch.zeros(5)),
        ("weight", torch.zeros(1, 2)),
        ("offset", torch.zeros(5)),
    ],
)
def test_samples_name_the_part_whose_shape_does_not_fit(name, part):
    parts = {"coords": torch.zeros(5, 2), "values": torch.zeros(5, 3)} | {name: part}
    with pytest.raises(ValueError, match=rf"`{name}` has shape \(.*\): expected \(5, channels\)"):
        Samples(**parts)


@pytest.mark.parametrize("shape", [(4,), (0, 2), (4, 3)], ids=str)
def test_offsets_of_a_footprint_have_as_many_coordinates_as_the_points(shape):
    with pytest.raises(ValueError, match=r"`footprint` has shape \(.*\): expected \(Q, 2\) with Q >= 1"):
        Samples(torch.zeros(5, 2), torch.zeros(5, 3), footprint=torch.zeros(shape))


def test_samples_know_their_size():
    samples = Samples(torch.zeros(5, 2), torch.zeros(5, 3))
    assert (len(samples), samples.n_channels) == (5, 3)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(
    "index",
    [None, torch.tensor([3, 0, 3]), torch.tensor([1, 4, 6]), torch.arange(7), torch.tensor([], dtype=torch.long)],
    ids=str,
)
def test_rows_of_a_sparse_matrix_are_those_of_the_dense_one(index):
    dense = torch.where(uniform(7, 5) > 0.3, normal(7, 5), 0.0)
    dense[1] = dense[4] = dense[6] = 0  # empty rows, the last one too
    assert torch.equal(rows(csr(dense), index), dense if index is None else dense[index])
    assert torch.equal(rows(dense, index), dense if index is None else dense[index])


@pytest.mark.parametrize("pitch", [0.05, 2.0])
def test_the_typical_spacing_of_a_grid_is_its_pitch_even_with_duplicates(pitch):
    axis = pitch * torch.arange(12).double()
    grid = torch.cartesian_prod(axis, axis)
    outliers = 1e3 * pitch * torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    for x in (grid, grid.repeat(3, 1), grid.float(), torch.cat([grid, outliers])):
        assert typical_spacing(x, generator()) == pytest.approx(pitch, rel=1e-5)


def test_the_typical_spacing_is_the_median_of_nearest_distances():
    x = uniform(300, 2)
    nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).amin(1)
    assert typical_spacing(x, generator(), n_probe=5000) == pytest.approx(nearest.median().item(), rel=0.03)


def test_points_all_at_one_place_have_a_spacing_of_one():
    assert typical_spacing(torch.ones(5, 2), generator()) == 1.0


def test_regularisation_points_cover_the_bounding_box_and_the_surroundings_of_the_data():
    # data in two far corners
    data = torch.cat([uniform(30, 2, low=0.0, high=0.1), uniform(30, 2, low=0.9, high=1.0)])
    low, high = data.amin(0), data.amax(0)
    for near in (0.0, 0.3, 1.0):
        x = Region(data, jitter=0.001, near=near).draw(1001, generator())
        assert x.shape == (1001, 2)
        assert x.dtype == data.dtype
        close = torch.cdist(x, data).amin(1) < 0.005
        assert close.double().mean() == pytest.approx(near, abs=0.1 if near < 1 else 0.0)
        anywhere = x[round(1001 * near) :]
        assert ((anywhere >= low) & (anywhere <= high)).all()
        if near < 1:  # every cell of a 4 x 4 mesh is met
            cell = ((anywhere - low) / (high - low) * 4).long()
            assert len((cell[:, 0] * 4 + cell[:, 1]).unique()) == 16


def test_the_jitter_is_the_standard_deviation_around_data():
    x = Region(torch.zeros(3, 2), jitter=0.25, near=1.0).draw(4000, generator())
    torch.testing.assert_close(x.std(0), torch.tensor([0.25, 0.25]), rtol=0.05, atol=0.0)


def test_regularisation_points_are_settled_by_the_generator():
    region = Region(uniform(9, 3), jitter=0.1)
    assert torch.equal(region.draw(11, generator()), region.draw(11, generator()))
    assert not torch.equal(region.draw(11, generator()), region.draw(11, generator(1)))
