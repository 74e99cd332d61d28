import math

import pytest
import torch
from draws import normal, uniform

from neurst.core.collocation import PointCollocation, typical_spacing
from neurst.core.lattice import Lattice
from neurst.core.samples import Box, Samples, rows

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


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_longest_side_becomes_the_unit_box_and_all_axes_share_one_scale(d):
    coords = COORDS[:, :d]
    box, sides = Box.of(coords), coords.amax(0) - coords.amin(0)
    x = box.to_unit(coords)
    torch.testing.assert_close(box.from_unit(x), coords)
    torch.testing.assert_close(x.amax(0), sides / sides.max())
    torch.testing.assert_close(x.amin(0), -sides / sides.max())
    torch.testing.assert_close(torch.pdist(x) * box.scale, torch.pdist(coords))


def test_coordinates_are_centred_in_float64_before_they_are_rounded():
    far = COORDS.float().double() + 5e7  # float32 coordinates of this size are multiples of 4
    box = Box.of(far)
    x = box.to_unit_like(far, torch.zeros(()))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), box.to_unit(far), rtol=0, atol=1e-7)
    axes = tuple(far[:, i].sort().values for i in range(3))
    for axis, expected in zip(box.to_unit_like(Lattice(axes), torch.zeros(())).axes, box.to_unit(far).T, strict=True):
        assert axis.dtype == torch.float32
        torch.testing.assert_close(axis.double(), expected.sort().values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sides", [(100.0, 1.0), (1e-3, 1.0), (1.0, 0.0)])
def test_very_unequal_sides_warn_about_mixed_units(sides):
    with pytest.warns(UserWarning, match=r"differ by a factor of .* \(.*\): if the axes are in different units, conv"):
        Box.of(torch.tensor([[0.0, 0.0], sides]))


@pytest.mark.parametrize(("coords", "message"), [
    (torch.ones(4, 2), "all 4 coordinates are the same point: a field needs points apart"),
    (torch.tensor([[0.0, 0.0], [math.nan, 1.0], [1.0, 1.0]]), r"not finite at 1 of 3 points \(first: 1\): drop"),
    (torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, math.inf]]), r"not finite at 1 of 3 points \(first: 2\): drop"),
])  # fmt: skip
def test_points_that_have_no_box_are_refused(coords, message):
    with pytest.raises(ValueError, match=message):
        Box.of(coords)


@pytest.mark.parametrize(("name", "part", "message"), [
    ("values", torch.zeros(4, 2), r"expected \(5, channels\), one row for each coordinate"),
    ("weight", torch.zeros(1, 2), r"expected \(5, channels\)"),
    ("offset", torch.zeros(5), r"expected \(5, channels\)"),
    ("footprint", torch.zeros(4), r"expected \(Q, 2\) with Q >= 1, one row for each offset"),
])  # fmt: skip
def test_samples_name_the_part_whose_shape_does_not_fit(name, part, message):
    parts = {"coords": torch.zeros(5, 2), "values": torch.zeros(5, 3)} | {name: part}
    with pytest.raises(ValueError, match=rf"`{name}` has shape \(.*\): {message}"):
        Samples(**parts)


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


# ---- regularisation points


@pytest.mark.parametrize("pitch", [0.05, 2.0])
def test_the_typical_spacing_of_a_grid_is_its_pitch_even_with_duplicates(pitch):
    axis = pitch * torch.arange(12).double()
    grid = torch.cartesian_prod(axis, axis)
    outliers = 1e3 * pitch * torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    for x in (grid, grid.repeat(3, 1), grid.float(), torch.cat([grid, outliers])):
        assert typical_spacing(x, generator()) == pytest.approx(pitch, rel=1e-5)


def test_regularisation_points_cover_the_bounding_box_and_the_surroundings_of_the_data():
    # data in two far corners
    data = torch.cat([uniform(30, 2, low=0.0, high=0.1), uniform(30, 2, low=0.9, high=1.0)])
    low, high = data.amin(0), data.amax(0)
    for near in (0.0, 0.3, 1.0):
        x = PointCollocation(data, jitter=0.001, near=near).draw(1001, generator())
        assert x.shape == (1001, 2)
        assert x.dtype == data.dtype
        close = torch.cdist(x, data).amin(1) < 0.005
        assert close.double().mean() == pytest.approx(near, abs=0.1 if near < 1 else 0.0)
        anywhere = x[round(1001 * near) :]
        assert ((anywhere >= low) & (anywhere <= high)).all()
        if near < 1:  # every cell of a 4 x 4 mesh is met
            cell = ((anywhere - low) / (high - low) * 4).long()
            assert len((cell[:, 0] * 4 + cell[:, 1]).unique()) == 16
