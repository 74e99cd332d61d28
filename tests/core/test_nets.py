import math

import pytest
import torch
from draws import NETWORKS, normal, uniform

from neurst.core.check import jet_matches_nesting, state_of
from neurst.core.jet import derivative
from neurst.core.nets import NETWORKS as REGISTRY
from neurst.core.nets import Bumps, Cosine, Fourier, Siren, Spline


def build(spec, d=2, c=3, seed=0):
    return spec.build(d, c, torch.Generator().manual_seed(seed)).double()


def moved(net):
    """The network with weights moved from their start, which is zero for some."""
    with torch.no_grad():
        for i, weights in enumerate(net.parameters()):
            weights += 0.3 * normal(*weights.shape, seed=i)
    return net


def one_grid(d, cells):
    """The basis functions of one spline grid: (N, d) -> (N, (cells + 3)^d)."""
    net = build(Spline(cells=(cells,)), d, (cells + 3) ** d)
    with torch.no_grad():
        net.terms[0].coefficients.copy_(torch.eye((cells + 3) ** d))
    return net


def test_every_registered_network_is_tested_here():
    assert NETWORKS.keys() == REGISTRY.keys()


@pytest.mark.parametrize(("d", "order"), [(1, 4), (2, 3), (3, 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_jet_of_a_network_agrees_with_nested_forward_mode(name, d, order):
    net, x = moved(build(NETWORKS[name], d)), uniform(5, d)
    for k in range(1, order + 1):
        jet_matches_nesting(net, x, normal(2, d, seed=1), k)
    assert net(x).shape == (5, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_generator_settles_the_start_and_the_global_one_is_not_touched(name):
    state = torch.get_rng_state()
    first, again, other = (state_of(build(NETWORKS[name], seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    if name not in ("spline", "cosine"):  # which start at zero
        assert all(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_float32_whatever_the_default_type_is(name):
    before = torch.get_default_dtype()
    plain = state_of(NETWORKS[name].build(2, 3, torch.Generator().manual_seed(0)))
    torch.set_default_dtype(torch.float64)
    try:
        found = state_of(NETWORKS[name].build(2, 3, torch.Generator().manual_seed(0)))
    finally:
        torch.set_default_dtype(before)
    assert {value.dtype for value in found.values()} == {torch.float32}
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


COUNTED = [
    *NETWORKS.values(),
    Siren(width=5, depth=1),
    Fourier(width=5, depth=1, n_features=2),
    Spline(cells=(1, 2, 8), sides=(1.0, 0.3, 0.02)),
    Cosine(waves=9, sides=(1.0, 0.3, 0.02)),
]


@pytest.mark.parametrize("spec", COUNTED, ids=repr)
def test_the_number_of_weights_is_known_without_building_the_network(spec):
    for d, c in [(3, 4)] if getattr(spec, "sides", ()) else [(1, 1), (2, 3), (3, 4)]:
        assert spec.n_weights(d, c) == sum(value.numel() for value in build(spec, d, c).state_dict().values())


# ---- splines


def slices(net, at, axis, order):
    """Value or derivative along one axis."""
    direction = torch.eye(at.shape[1], dtype=at.dtype)[axis : axis + 1]
    return net(at) if order == 0 else derivative(net, at, direction, order)[0]


@pytest.mark.parametrize("d", [1, 2])
def test_a_spline_is_twice_continuously_differentiable_across_knots(d):
    net, eps = moved(build(Spline(cells=(4,)), d)), 1e-9 * torch.eye(d).double()[:1]
    knots = torch.cat([torch.tensor([[-0.5], [0.0], [0.5]]).double(), uniform(3, d - 1)], 1)
    for order in (0, 1, 2, 3):
        jump = (slices(net, knots + eps, 0, order) - slices(net, knots - eps, 0, order)).abs()
        assert jump.max() < 1e-6 if order < 3 else jump.min() > 1e-3


@pytest.mark.parametrize("sides", [(), (1.0, 0.3)], ids=["square", "long and narrow"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_spline_is_continued_linearly_beyond_the_box(axis, sides):
    net = moved(build(Spline(cells=(2, 5), sides=sides)))
    border, out = 0.2 * uniform(6, 2, seed=1), torch.eye(2).double()[axis]
    side = (sides or (1.0, 1.0))[axis]
    border[:, axis] = side * torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    out = out * border[:, axis, None].sign()  # points out of the box
    for order in (0, 1):
        inside, outside = (slices(net, border + eps * out, axis, order) for eps in (-1e-9, 1e-9))
        torch.testing.assert_close(outside, inside, rtol=0, atol=1e-6)
    value, slope = net(border), derivative(net, border - 1e-12 * out, out[None], 1)[0]
    for distance in (1e-3, 0.4, 30.0):
        torch.testing.assert_close(net(border + distance * out), value + distance * slope, rtol=1e-8, atol=1e-8)
        for order in (2, 3):
            assert (slices(net, border + distance * out, axis, order) == 0).all()


def test_the_border_of_the_box_belongs_to_the_box_in_float32_too():
    for side in torch.linspace(0.1, 1.0, 31).tolist():
        net = moved(build(Spline(cells=(8, 32), sides=(1.0, side)))).float()
        border = torch.tensor([[0.3, side], [0.3, -side]])
        at_border, inside = (slices(net, border * torch.tensor([1.0, k]), 1, 2) for k in (1, 1 - 1e-5))
        torch.testing.assert_close(at_border, inside, rtol=0.01, atol=0.01 * float(inside.detach().abs().max()))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_basis_functions_of_a_spline_sum_to_one_and_reproduce_cubic_polynomials_in_the_box(d):
    cubics = lambda x: torch.cat([x[:, :1] ** 0, x, x[:, :1] * x**2, x**3], 1)
    basis, x, elsewhere = one_grid(d, cells=2), uniform(400, d), uniform(50, d, seed=1)
    torch.testing.assert_close(basis(x).sum(1), torch.ones(400).double())
    assert (basis(x) >= -1e-15).all()
    assert torch.linalg.matrix_rank(basis(x)) == 5**d
    coefficients = torch.linalg.lstsq(basis(x), cubics(x)).solution
    torch.testing.assert_close(basis(elsewhere) @ coefficients, cubics(elsewhere))


def test_a_short_axis_has_fewer_cells_and_wrong_sides_are_refused():
    sizes = [term.core_tensor().shape for term in Spline(cells=(8, 2), sides=(1.0, 0.25)).build(2, 1, None).terms]
    assert sizes == [(8 + 3, 2 + 3, 1), (2 + 3, 1 + 3, 1)]
    with pytest.raises(ValueError, match=r"sides=\(1.0, 0.25\).* has 2 axes: expected one for each of the 3"):
        Spline(sides=(1.0, 0.25)).build(3, 1, None)


# ---- cosine series


COSINES = {  # coordinates, series
    "a line": (1, Cosine(waves=6, margin=0.3)),
    "a square": (2, Cosine(waves=4)),
    "a long and narrow box": (2, Cosine(waves=7, sides=(0.4, 1.0), margin=0.1)),
    "a box": (3, Cosine(waves=3, sides=(1.0, 0.5, 0.7), margin=0.0)),
}
each_cosine = pytest.mark.parametrize(("d", "spec"), COSINES.values(), ids=COSINES)


def each_function(spec, d):
    """All functions of a series: (N, d) -> (N, m)."""
    m = spec.n_weights(d, 1)
    net = build(spec, d, m)
    with torch.no_grad():
        net.core.copy_(torch.eye(m).reshape(net.core.shape))
    return net


@each_cosine
def test_a_cosine_series_is_its_coefficients_times_products_of_cosines(d, spec):
    net, x = moved(build(spec, d)), uniform(5, d)
    assert not build(spec, d)(x).any()  # it starts at zero
    expected = torch.zeros(5, 3).double()
    halves = [side + spec.margin for side in (spec.sides or (1.0,) * d)]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in net.core.shape[:-1])).reshape(-1, d):
        waves = [
            torch.cos(math.pi * k * (x[:, i] + L) / (2 * L))
            for i, (k, L) in enumerate(zip(index.tolist(), halves, strict=True))
        ]
        expected += math.prod(waves)[:, None] * net.core[tuple(index)]
    torch.testing.assert_close(net(x), expected)


@each_cosine
def test_frequencies_and_norms_are_those_of_the_functions(d, spec):
    halves, n = spec.half_sides(d), 2 * max(spec.sizes(d))
    function = each_function(spec, d)
    # the midpoint rule is exact for products of two cosines whose waves it resolves
    axes = [L * ((torch.arange(n) + 0.5).double() * 2 / n - 1) for L in halves]
    x = torch.cartesian_prod(*axes).reshape(-1, d)
    products = function(x).T @ function(x) * math.prod(2 * L / n for L in halves)
    torch.testing.assert_close(products, torch.diag(spec.squared_norms(d)), atol=1e-10, rtol=1e-10)
    laplacian = sum(derivative(function, x[:5], axis, 2)[0] for axis in torch.eye(d).double()[:, None])
    torch.testing.assert_close(laplacian, -spec.squared_frequencies(d) * function(x[:5]), atol=1e-9, rtol=1e-9)


@each_cosine
def test_no_function_of_a_series_rises_across_the_border_of_its_box(d, spec):
    function, halves = each_function(spec, d), torch.tensor(spec.half_sides(d), dtype=torch.float64)
    for axis in range(d):
        border = uniform(4, d) * halves
        border[:, axis] = halves[axis] * torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
        torch.testing.assert_close(slices(function, border, axis, 1), torch.zeros(4, spec.n_weights(d, 1)).double())


def test_a_short_axis_has_fewer_waves_but_two_and_wrong_sides_are_refused():
    assert Cosine(waves=10, sides=(1.0, 0.5, 0.0), margin=0.0).sizes(3) == [10, 5, 2]
    with pytest.raises(ValueError, match=r"`Cosine\(sides=\(1.0, 0.25\)\)` has 2 axes: expected one for each of the 3"):
        Cosine(sides=(1.0, 0.25)).build(3, 1, None)


# ---- the other networks


@pytest.mark.parametrize("d", [1, 3])
def test_a_bump_is_a_gaussian_about_its_centre(d):
    net, x = build(Bumps(width=0.3), d), uniform(5, d)
    square = (x[:, None] - net.centres).square().sum(-1)
    torch.testing.assert_close(net(x), torch.exp(-square / (2 * 0.3**2)))
    torch.testing.assert_close(net(net.centres).diagonal(), torch.ones(3).double())


@pytest.mark.parametrize(("d", "equation"), [(1, "ax,na->nx"), (2, "abx,na,nb->nx"), (3, "abcx,na,nb,nc->nx")])
def test_a_low_rank_function_is_its_core_times_its_factors(d, equation):
    net, x = build(NETWORKS["lowrank"], d), uniform(5, d)
    factors = [factor(x[:, i : i + 1]) for i, factor in enumerate(net.factors)]
    torch.testing.assert_close(net(x), torch.einsum(equation, net.core, *factors))


@pytest.mark.parametrize("depth", [2, 4])
def test_the_arguments_of_the_sines_span_omega_at_first_and_have_unit_variance_at_every_depth(depth):
    net, h = build(Siren(width=256, depth=depth, omega=20.0)), uniform(500, 2)
    for layer in list(net)[:-1]:
        argument = layer.omega * layer.linear(h)
        if layer is net[0]:
            assert 20 / 2 < argument.abs().max() < 2 * 20  # with the bias
        else:
            assert 0.7 < argument.std() < 1.3
        h = layer(h)


def test_a_spline_at_no_points_gives_no_values_and_at_unknown_ones_unknown_values():
    net = moved(build(Spline(cells=(2, 5))))
    assert net(torch.zeros(0, 2).double()).shape == (0, net(uniform(1, 2)).shape[1])
    assert net(torch.full((3, 2), math.nan).double()).isnan().all()
