import io
import json
import math

import pytest
import torch
from draws import normal, uniform

from neurst.core.check import jet_matches_nesting, state_of
from neurst.core.jet import derivative
from neurst.core.nets import NETWORKS, Fourier, LowRank, Siren, Spline, as_network, from_dict, to_dict

SPECS = {
    "siren": Siren(width=7, depth=2, omega=3.0),
    "fourier": Fourier(width=7, depth=2, n_features=3, scale=2.0),
    "lowrank": LowRank(rank=3, width=5, omega=3.0),
    "spline": Spline(cells=(2, 5)),
}


def build(spec, d=2, c=3, seed=0):
    return spec.build(d, c, torch.Generator().manual_seed(seed)).double()


def moved(net):
    """The network with weights moved from their start, which is zero for some."""
    with torch.no_grad():
        for i, weights in enumerate(net.parameters()):
            weights += 0.3 * normal(*weights.shape, seed=i)
    return net


def one_grid(d, cells=3):
    """The basis functions of one spline grid: (N, d) -> (N, (cells + 3)^d)."""
    net = build(Spline(cells=(cells,)), d, (cells + 3) ** d)
    with torch.no_grad():
        net.terms[0].coefficients.copy_(torch.eye((cells + 3) ** d))
    return net


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_jet_of_a_network_agrees_with_nested_forward_mode(name, d, order):
    net, x = moved(build(SPECS[name], d)), uniform(5, d)
    jet_matches_nesting(net, x, normal(2, d, seed=1), order)
    assert net(x).shape == (5, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_generator_settles_the_start_and_the_global_one_is_not_touched(name):
    state = torch.get_rng_state()
    first, again, other = (state_of(build(SPECS[name], seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    if name != "spline":  # starts at zero
        assert all(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_state_brings_the_network_back(name):
    net, x, file = moved(build(SPECS[name])), uniform(5, 2), io.BytesIO()
    torch.save(net.state_dict(), file)
    other = build(SPECS[name], seed=1)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_specification_comes_back_from_plain_values(name):
    stored = json.loads(json.dumps(to_dict(SPECS[name])))
    assert stored == to_dict(SPECS[name])  # no tuples: a file gives back lists
    assert stored["name"] == name
    assert from_dict(stored) == SPECS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_name_is_the_default_specification_and_a_specification_is_itself(name):
    assert as_network(name) == NETWORKS[name]()
    assert as_network(SPECS[name]) is SPECS[name]


def test_an_unknown_network_is_told_the_known_ones():
    with pytest.raises(
        ValueError, match=r"`network='mlp'` is unknown: choose one of \['fourier', 'lowrank', 'siren', 'spline'\]"
    ):
        as_network("mlp")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Siren(width=0), r"Siren\(width=0\)`: expected a positive number"),
        (lambda: Siren(depth=-1), r"Siren\(depth=-1\)"),
        (lambda: Siren(omega=math.nan), r"Siren\(omega=nan\)"),
        (lambda: Fourier(n_features=0), r"Fourier\(n_features=0\)"),
        (lambda: Fourier(scale=math.inf), r"Fourier\(scale=inf\)"),
        (lambda: LowRank(rank=0), r"LowRank\(rank=0\)"),
        (lambda: Spline(cells=()), r"Spline\(cells=\(\)\)`: expected one or more intervals"),
        (lambda: Spline(cells=(4, 0)), r"Spline\(cells=\(4, 0\)\)"),
    ],
)
def test_a_specification_names_the_number_it_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("d", [1, 2])
def test_a_spline_is_twice_continuously_differentiable_across_knots(d):
    net, eps = moved(build(Spline(cells=(4,)), d)), 1e-9
    knots = torch.cat([torch.tensor([[-0.5], [0.0], [0.5]]).double(), uniform(3, d - 1)], 1)
    axis = torch.eye(d).double()[:1]
    for order in (0, 1, 2, 3):
        read = net if order == 0 else lambda x, k=order: derivative(net, x, axis, k)[0]
        jump = (read(knots + eps * axis) - read(knots - eps * axis)).abs()
        assert jump.max() < 1e-6 if order < 3 else jump.min() > 1e-3


@pytest.mark.parametrize("d", [1, 2])
def test_a_spline_reproduces_cubic_polynomials_in_the_box_and_beyond(d):
    def polynomials(x):
        return torch.stack([torch.ones(len(x)).double(), x[:, 0], x[:, -1] ** 2, x[:, 0] ** 3 * x[:, -1]], 1)

    if d == 1:
        polynomials = lambda x: torch.cat([x**0, x, x**2, x**3], 1)
    basis, x, beyond = one_grid(d), uniform(200, d), uniform(50, d, low=-1.2, high=1.2)
    coefficients = torch.linalg.lstsq(basis(x), polynomials(x)).solution
    torch.testing.assert_close(basis(beyond) @ coefficients, polynomials(beyond))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_basis_functions_of_a_spline_sum_to_one_and_are_independent(d):
    basis = one_grid(d, cells=2)(uniform(400, d))
    torch.testing.assert_close(basis.sum(1), torch.ones(400).double())
    assert (basis >= -1e-15).all()
    assert torch.linalg.matrix_rank(basis) == 5**d


def test_the_fields_of_several_grids_add_up():
    both, x = moved(build(Spline(cells=(2, 5)))), uniform(5, 2)
    torch.testing.assert_close(both(x), both.terms[0](x) + both.terms[1](x) + both.bias)


@pytest.mark.parametrize(("d", "equation"), [(1, "ax,na->nx"), (2, "abx,na,nb->nx"), (3, "abcx,na,nb,nc->nx")])
def test_a_low_rank_function_is_its_core_times_its_factors(d, equation):
    net, x = build(SPECS["lowrank"], d), uniform(5, d)
    factors = [factor(x[:, i : i + 1]) for i, factor in enumerate(net.factors)]
    torch.testing.assert_close(net(x), torch.einsum(equation, net.core, *factors))


def test_a_factor_is_not_odd():
    factor, t = build(SPECS["lowrank"]).factors[0], uniform(5, 1)
    assert (factor(t) + factor(-t)).abs().min() > 1e-3


@pytest.mark.parametrize("depth", [2, 4])
def test_the_arguments_of_the_sines_start_with_unit_variance_at_every_depth(depth):
    net, h = build(Siren(width=256, depth=depth)), uniform(500, 2)
    for layer in list(net)[:-1]:
        argument = layer.omega * layer.linear(h)
        if layer is not net[0]:  # the first one spans omega radians
            assert 0.7 < argument.std() < 1.3
        h = layer(h)


def test_omega_is_the_frequency_of_the_first_layer():
    x = uniform(5, 2)
    slow, fast = (build(Siren(width=6, depth=1, omega=omega)) for omega in (1.0, 4.0))
    torch.testing.assert_close(fast[0](x), torch.sin(4.0 * slow[0].linear(x)))


def test_fourier_features_are_sines_and_cosines_of_random_phases():
    spec, x = Fourier(n_features=500, scale=2.0), uniform(5, 2)
    features = build(spec)[0]
    phase = x @ features.frequencies.T
    torch.testing.assert_close(features(x), torch.cat([phase.sin(), phase.cos()], 1))
    assert 1.9 < features.frequencies.std() < 2.1
