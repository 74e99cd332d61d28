import itertools

import pytest
import torch
from draws import normal, uniform

from neurst.core.fit import FitConfig, fit_field
from neurst.core.jet import derivative, mixed
from neurst.core.lattice import Lattice, jet_at, partials, smooth, value_at
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Fourier, LowRank, Siren, Spline
from neurst.core.penalty import PENALTIES, IsotropicTV, SpaceVariantTV, score
from neurst.core.samples import Cells, Samples

TUCKER = {
    "lowrank": LowRank(rank=3, width=5, omega=3.0),
    "spline": Spline(cells=(2, 5)),
    "spline, one side short": Spline(cells=(2, 5), sides=(1.0, 0.6, 0.8)),
}
OTHER = {"siren": Siren(width=5, depth=2), "fourier": Fourier(width=5, n_features=3)}


def lattice(d=2, seed=0):
    axes = (uniform(n, seed=seed + n, low=-0.5, high=0.5).sort().values for n in (5, 7, 3)[:d])
    return Lattice(tuple(axes))


def network(name, d=2, c=3):
    spec = (TUCKER | OTHER)[name]
    if isinstance(spec, Spline):
        spec = Spline(spec.cells, spec.sides[:d])
    net = spec.build(d, c, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for i, weights in enumerate(net.parameters()):
            weights += 0.3 * normal(*weights.shape, seed=i)
    return net


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_points_of_a_lattice_are_in_the_order_of_its_rows():
    grid = lattice(3)
    i = (2, 4, 1)
    row = (i[0] * 7 + i[1]) * 3 + i[2]
    assert_equal(grid.points()[row], torch.stack([axis[k] for axis, k in zip(grid.axes, i, strict=True)]))
    assert grid.flat_index(tuple(torch.tensor([k]) for k in i)).tolist() == [row]


@pytest.mark.parametrize("name", TUCKER)
@pytest.mark.parametrize("d", [2, 3])
def test_partial_derivatives_of_a_tucker_network_are_those_at_its_points(name, d):
    net, grid = network(name, d), lattice(d)
    x, eye = grid.points(), torch.eye(d, dtype=torch.float64)
    orders = [a for a in itertools.product(range(3), repeat=d) if sum(a) <= 3]
    for alpha, found in partials(net, grid, orders).items():
        axes = [eye[i] for i, k in enumerate(alpha) for _ in range(k)]
        assert_equal(found, mixed(net, x, *axes) if axes else net(x))


@pytest.mark.parametrize("name", TUCKER | OTHER)
@pytest.mark.parametrize("directions", [None, normal(3, 2), normal(3, 35, 2)], ids=["axes", "fixed", "varying"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_jet_on_a_lattice_is_the_jet_at_its_points(name, directions, order):
    net, grid = network(name), lattice()
    jet = jet_at(net, grid, directions, order)
    along = torch.eye(2, dtype=torch.float64) if directions is None else directions
    assert_equal(jet.value, net(grid.points()))
    for k in range(1, order + 1):
        assert_equal(jet.derivative(k), derivative(net, grid.points(), along, k))


def test_mixed_partials_are_refused_where_only_directions_can_be_read():
    with pytest.raises(TypeError, match="mixed derivatives"):
        partials(network("siren"), lattice(), [(1, 1)])


@pytest.mark.parametrize("name", sorted(PENALTIES))
@pytest.mark.parametrize("net", ["spline", "siren"])
def test_a_penalty_on_a_lattice_is_that_at_its_points(name, net):
    penalty = PENALTIES[name]()
    field, grid = network(net, c=penalty.channels(3, 2)), lattice()
    assert_equal(score(penalty, field, grid), score(penalty, field, grid.points()))
    seen = penalty.refreshed(field, lattice(seed=9))
    assert_equal(score(seen, field, grid), score(seen, field, grid.points()))


@pytest.mark.parametrize("shared", [False, True])
def test_weights_of_a_lattice_are_read_at_the_nearest_node(shared):
    field, grid = network("spline"), lattice()
    penalty = SpaceVariantTV(shared=shared).refreshed(field, grid)
    near = grid.map(lambda i, axis: axis + 1e-6)
    assert_equal(penalty.at(near).along, penalty.along)
    assert_equal(score(penalty, field, near), score(penalty, field, near.points()))


def test_the_nearest_node_of_a_point_is_nearest():
    grid, x = lattice(), uniform(40, 2, seed=3, low=-0.7, high=0.7)
    distance = torch.cdist(grid.points(), x)
    assert_equal(distance[grid.nearest(x), torch.arange(40)], distance.amin(0))


def test_drawn_points_stay_in_the_cells_of_the_nodes_they_come_from():
    grid, generator = Lattice.of_shape(9, 6), torch.Generator().manual_seed(0)
    for _ in range(20):
        drawn = Cells(grid).draw(54, generator)
        for axis, node in zip(drawn.axes, grid.axes, strict=True):
            assert (axis - node).abs().max() <= 0.5
            assert axis.min() >= node[0]
            assert axis.max() <= node[-1]
    moved = torch.cat([axis - axis.round() for axis in drawn.axes])
    assert moved.abs().max() > 0.2


def test_a_draw_of_few_points_takes_the_same_share_of_each_axis():
    assert Lattice.of_shape(40, 20).jittered(200, torch.Generator().manual_seed(0)).shape == (20, 10)


@pytest.mark.parametrize("window", [0.0, 0.7, 2.0, 30.0])
def test_smoothing_keeps_constants_and_the_order_of_values(window):
    image = normal(9, 7, 2)
    out = smooth(image, window)
    assert_equal(smooth(torch.full_like(image, 3.0), window), torch.full_like(image, 3.0))
    assert out.shape == image.shape
    assert out.amax() <= image.amax() + 1e-12
    assert window == 0 or out.var() < image.var()


def test_a_gaussian_window_has_the_width_it_says():
    impulse = torch.zeros(61, 1, 1, dtype=torch.float64)
    impulse[30] = 1
    profile, at = smooth(impulse, 3.0)[:, 0, 0], torch.arange(-30.0, 31.0, dtype=torch.float64)
    assert float((profile * at**2).sum()) == pytest.approx(9, rel=0.05)


def fit(samples, batch=0, **kinds):
    config = FitConfig(steps=25, device="cpu", double=True, learning_rate=0.05, batch_points=batch)
    kinds = {"network": Spline(cells=(3, 6)), "penalty": IsotropicTV(), "lam": 0.0} | kinds
    return fit_field(samples, likelihood=Gaussian(0.1), config=config, **kinds)


def wave(grid):
    x = grid.points()
    return torch.stack([torch.sin(3 * x[:, 0] + x[:, 1]), x[:, 0] * x[:, 1]], 1)


@pytest.mark.parametrize("name", TUCKER | OTHER)
def test_a_fit_on_a_lattice_is_the_fit_at_its_points(name):
    grid = Lattice(lattice(seed=1).axes)
    spec = Spline(cells=(2, 5)) if "short" in name else (TUCKER | OTHER)[name]
    weight = (uniform(35, 2, seed=5) > 0).double()
    fields = [fit(Samples(coords, wave(grid), weight), network=spec) for coords in (grid, grid.points())]
    assert_equal(fields[0](grid), fields[1](grid.points()))


def test_batches_of_a_lattice_see_its_values():
    grid = Lattice.of_shape(24, 31)
    y = wave(Lattice.of_shape(24, 31).map(lambda i, axis: axis / 31))
    whole, batches = (fit(Samples(grid, y), batch) for batch in (0, 200))
    assert (batches(grid) - y).square().mean() < 2 * (whole(grid) - y).square().mean() + 1e-4


def test_a_field_on_a_lattice_is_read_as_at_its_points():
    grid = Lattice.of_shape(6, 5)
    field = fit(Samples(grid, normal(30, 2)), lam=1.0)
    finer = Lattice(tuple(torch.linspace(0, n - 1, 7, dtype=torch.float64) for n in grid.shape))
    assert_equal(field(finer), field(finer.points()))
    assert_equal(value_at(field.net, field.box.inward(grid)), field.latent(grid.points()))


def test_a_lattice_has_no_footprint():
    with pytest.raises(ValueError, match="`footprint` serves coordinates"):
        Samples(Lattice.of_shape(3, 3), normal(9, 1), footprint=normal(4, 2))
