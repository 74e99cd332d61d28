import pytest
import torch
from draws import normal, uniform

from neurst.core.collocation import LatticeCollocation
from neurst.core.fit import FitConfig, fit_field
from neurst.core.jet import derivative
from neurst.core.lattice import Lattice, gaussian_mean
from neurst.core.likelihood import Gaussian
from neurst.core.nets import LowRank, Siren, Spline
from neurst.core.penalty import PENALTIES, IsotropicTV, evaluate
from neurst.core.samples import Samples
from neurst.core.table import multi_indices
from neurst.core.table import partials as partials_at
from neurst.core.tensor_product import jet_at, lattice_partials

TENSOR_PRODUCTS = {
    "lowrank": LowRank(rank=3, width=5, omega=3.0),
    "spline": Spline(cells=(2, 5)),
    "spline, one side short": Spline(cells=(2, 5), sides=(1.0, 0.6, 0.8)),
}
SPECS = TENSOR_PRODUCTS | {"siren": Siren(width=5, depth=2)}  # the last one is evaluated node by node


def lattice(d=2, seed=0):
    axes = (uniform(n, seed=seed + n, low=-0.5, high=0.5).sort().values for n in (5, 7, 3)[:d])
    return Lattice(tuple(axes))


def network(name, d=2, c=3):
    spec = SPECS[name]
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
    grid, index = lattice(3), (2, 4, 1)
    row = (index[0] * 7 + index[1]) * 3 + index[2]
    assert_equal(grid.points()[row], torch.stack([axis[k] for axis, k in zip(grid.axes, index, strict=True)]))
    assert grid.flat_index(tuple(torch.tensor([k]) for k in index)).tolist() == [row]
    assert (len(grid), grid.ndim, grid.shape) == (105, 3, (5, 7, 3))


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("name", SPECS)
def test_partial_derivatives_on_a_lattice_are_those_at_its_points(name, d):
    net, grid = network(name, d), lattice(d)
    expected, alphas = partials_at(net, grid.points(), 3)
    found = lattice_partials(net, grid, reversed(alphas))
    assert set(found) == set(multi_indices(d, 3))
    for alpha, values in zip(alphas, expected.unbind(-1), strict=True):
        assert_equal(found[alpha], values)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("directions", [None, normal(3, 2), normal(3, 35, 2)], ids=["axes", "fixed", "varying"])
def test_a_jet_on_a_lattice_is_the_jet_at_its_points(name, directions):
    net, grid = network(name), lattice()
    jet = jet_at(net, grid, directions, 3)
    along = torch.eye(2, dtype=torch.float64) if directions is None else directions
    assert_equal(jet.value, net(grid.points()))
    for k in (1, 2, 3):
        assert_equal(jet.derivative(k), derivative(net, grid.points(), along, k))


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_a_penalty_on_a_lattice_is_that_at_its_points(name):
    penalty = PENALTIES[name]()
    field, grid = network("spline", c=penalty.n_outputs(3, 2)), lattice()
    assert_equal(evaluate(penalty, field, grid), evaluate(penalty, field, grid.points()))
    adapted = penalty.refreshed(field, lattice(seed=9))
    assert_equal(evaluate(adapted, field, grid), evaluate(adapted, field, grid.points()))


def test_drawn_points_stay_in_the_cells_of_the_nodes_they_come_from():
    grid, generator, moved = Lattice.of_shape(9, 6), torch.Generator().manual_seed(0), []
    for _ in range(20):
        drawn = LatticeCollocation(grid).draw(54, generator)
        for axis, node in zip(drawn.axes, grid.axes, strict=True):
            assert (axis - node).abs().max() <= 0.5
            assert axis.min() >= node[0]
            assert axis.max() <= node[-1]
            moved.append(axis - node)
    assert torch.cat(moved).abs().max() > 0.45
    assert LatticeCollocation(grid).refresh_points(5, generator) is grid


@pytest.mark.parametrize("window", [0.0, 0.7, 2.0, 30.0])
def test_a_gaussian_mean_keeps_constants_and_the_range_of_values(window):
    image = normal(9, 7, 2)
    out = gaussian_mean(image, window)
    assert_equal(gaussian_mean(torch.full_like(image, 3.0), window), torch.full_like(image, 3.0))
    assert out.amax() <= image.amax() + 1e-12
    assert torch.equal(out, image) if window == 0 else out.var() < image.var()


def test_a_gaussian_window_has_the_width_it_says():
    impulse = torch.zeros(61, 1, 1, dtype=torch.float64)
    impulse[30] = 1
    profile, at = gaussian_mean(impulse, 3.0)[:, 0, 0], torch.arange(-30.0, 31.0, dtype=torch.float64)
    assert float((profile * at**2).sum()) == pytest.approx(9, rel=0.05)


# ---- fits


def fit(samples, batch=0, network=Spline(cells=(3, 6))):
    config = FitConfig(steps=25, device="cpu", double=True, learning_rate=0.05, batch_points=batch)
    return fit_field(samples, network=network, likelihood=Gaussian(0.1), penalty=IsotropicTV(), lam=0.0, config=config)


def wave(grid):
    x = grid.points()
    return torch.stack([torch.sin(3 * x[:, 0] + x[:, 1]), x[:, 0] * x[:, 1]], 1)


@pytest.mark.parametrize("network", [LowRank(rank=3, width=5), Spline(cells=(2, 5))], ids=repr)
def test_a_fit_on_a_lattice_is_the_fit_at_its_points(network):
    grid, weight = lattice(seed=1), (uniform(35, 2, seed=5) > 0).double()
    fields = [fit(Samples(coords, wave(grid), weight), network=network) for coords in (grid, grid.points())]
    finer = Lattice(tuple(torch.linspace(axis[0], axis[-1], 6, dtype=torch.float64) for axis in grid.axes))
    assert_equal(fields[0].on_lattice(finer), fields[1](finer.points()))


def test_batches_of_a_lattice_see_its_values():
    grid = Lattice.of_shape(24, 31)
    y = wave(grid.map(lambda i, axis: axis / 31))
    whole, batches = ((fit(Samples(grid, y), batch).on_lattice(grid) - y).square().mean() for batch in (0, 200))
    assert batches < 2 * whole + 1e-4 < 0.5 * y.square().mean()
