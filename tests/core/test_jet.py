import pytest
import torch
import torch.nn.functional as F
from draws import normal, uniform
from torch import nn
from torch.func import jvp

from neurst.core.check import derivative_by_nesting, jet_matches_nesting
from neurst.core.jet import Jet, derivative, hessian, jacobian, laplacian, mixed, seed
from neurst.core.nets import Siren
from neurst.core.rules import RULES, rule

X = uniform(5, 3)
DIRECTIONS = normal(2, 3, seed=1)
WEIGHT = uniform(3, 3, seed=2) / 2


def inner(x, weight=WEIGHT):
    """A cubic with values in (-1, 1): no coefficient of its jet is zero before order 4."""
    return (F.linear(x, weight) + x * x * x) * 0.4


def product(u, v):
    """All products of two sets of channels, (N, C, C)."""
    return torch.unsqueeze(u, -1) * torch.unsqueeze(v, -2)


SHIFTED = 1.5  # keeps the argument positive
# op -> (function of u, centre of u)
CASES = {
    torch.floor: (lambda u: u * torch.floor(u * 4.0), 0.0),
    torch.sum: (lambda u: torch.sum(u * u, -1), 0.0),
    torch.unsqueeze: (lambda u: product(u, u * u), 0.0),
    torch.flatten: (lambda u: torch.flatten(product(u, u * u), -2), 0.0),
    torch.unflatten: (lambda u: torch.unflatten(torch.cat([u, u * u], -1), -1, (3, 2)), 0.0),
    F.linear: (lambda u: F.linear(u, normal(2, 3), normal(2)), 0.0),
    torch.einsum: (lambda u: torch.einsum("...nk,nkc->...nc", u, normal(5, 3, 2)), 0.0),
    torch.neg: (lambda u: -(u * u), 0.0),
    torch.add: (lambda u: u * u + u[..., :1], 0.0),
    torch.sub: (lambda u: 1.0 - u * u - u[..., :1], 0.0),
    torch.cat: (lambda u: torch.cat([u[..., 1:], u * u, u], -1), 0.0),
    torch.mul: (lambda u: u * u[..., :1] * u, 0.0),
    torch.div: (lambda u: u[..., :1] / u / (u * u), SHIFTED),
    torch.sin: (torch.sin, 0.0),
    torch.cos: (torch.cos, 0.0),
    torch.exp: (torch.exp, 0.0),
    torch.tanh: (nn.Tanh(), 0.0),
    torch.sigmoid: (nn.Sigmoid(), 0.0),
    F.softplus: (nn.Softplus(), 0.0),
    F.silu: (nn.SiLU(), 0.0),
    F.gelu: (nn.GELU(), 0.0),
    torch.log: (torch.log, SHIFTED),
    torch.reciprocal: (torch.reciprocal, SHIFTED),
    torch.sqrt: (torch.sqrt, SHIFTED),
    torch.pow: (lambda u: u**4, 0.0),
    torch.relu: (torch.relu, 0.0),
    F.relu: (nn.ReLU(), 0.0),
    torch.abs: (torch.abs, 0.0),
}
MAX_ORDER = {torch.relu: 1, F.relu: 1, torch.abs: 1}
# with a second operand that is a plain tensor or a number
TENSOR, COLUMN, CHANNELS = uniform(5, 3, seed=3, low=1.0, high=2.0), normal(5, 1), normal(3)
ARITHMETIC = {
    "jet + tensor": lambda u: u + TENSOR,
    "tensor + jet": lambda u: TENSOR + u,
    "jet - tensor": lambda u: u - TENSOR,
    "tensor - jet": lambda u: TENSOR - u,
    "jet * tensor": lambda u: u * TENSOR,
    "tensor * jet": lambda u: TENSOR * u,
    "jet / tensor": lambda u: u / TENSOR,
    "tensor / jet": lambda u: TENSOR / (u + 1.5),
    "jet * column": lambda u: u * COLUMN,
    "jet + channels": lambda u: u + CHANNELS,
    "one channel + tensor": lambda u: u[..., :1] + TENSOR,
    "one channel * tensor": lambda u: u[..., :1] * TENSOR,
    "2 - jet": lambda u: 2 - u,
    "2.5 * jet": lambda u: 2.5 * u,
    "1 / jet": lambda u: 1 / (u + 1.5),
    "jet / 2": lambda u: u / 2,
    "sum of jets": lambda u: sum([u, u * u, u]),
}


def network(d=2, c=3):
    return Siren(width=7, depth=2).build(d, c, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("op", "order"), [(op, k) for op in RULES for k in (1, 2, 3, 4) if k <= MAX_ORDER.get(op, 4)])
def test_every_rule_agrees_with_nested_forward_mode(op, order):
    function, centre = CASES[op]
    f = lambda x: function(inner(x) + centre)
    jet_matches_nesting(f, X, DIRECTIONS, order)
    torch.testing.assert_close(f(seed(X)).value, f(X))


@pytest.mark.parametrize("op", RULES)
def test_the_gradient_of_a_rule_is_that_of_nested_forward_mode(op):
    function, centre = CASES[op]
    order = MAX_ORDER.get(op, 3)
    weight = WEIGHT.clone().requires_grad_()
    f = lambda x: function(inner(x, weight) + centre)
    jet = f(seed(X, DIRECTIONS[:1], order))
    for found, expected in [
        (jet.value, f(X)),
        (jet.derivative(order)[0], derivative_by_nesting(f, X, DIRECTIONS[0], order)),
    ]:
        weigh = lambda part: (part * normal(*part.shape)).sum()
        slopes = [torch.autograd.grad(weigh(part), weight, retain_graph=True)[0] for part in (found, expected)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_with_tensors_and_numbers_agrees_with_nested_forward_mode(name):
    f = lambda x: ARITHMETIC[name](inner(x))
    for order in (1, 2, 3):
        jet_matches_nesting(f, X, DIRECTIONS, order)
    jet, value = f(seed(X, DIRECTIONS, 2)), f(X)
    torch.testing.assert_close(jet.value, value)
    assert jet.terms.shape == (2, 2, *value.shape)


def test_softplus_keeps_its_sharpness():
    jet_matches_nesting(lambda x: nn.Softplus(beta=3.0)(inner(x)), X, DIRECTIONS, 3)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_directions_may_differ_from_point_to_point(order):
    jet_matches_nesting(network(d=3), X, normal(4, 5, 3, seed=4), order)


def test_a_direction_counts_with_its_length():
    net = network(d=3)
    torch.testing.assert_close(derivative(net, X, 2 * DIRECTIONS, 3), 8 * derivative(net, X, DIRECTIONS, 3))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_jacobian_hessian_and_laplacian_agree_with_torch_func(d):
    net, x = network(d), uniform(5, d)
    one = lambda point: net(point[None])[0]
    second = torch.func.vmap(torch.func.hessian(one))(x)
    torch.testing.assert_close(jacobian(net, x), torch.func.vmap(torch.func.jacrev(one))(x))
    torch.testing.assert_close(hessian(net, x), second)
    torch.testing.assert_close(laplacian(net, x), second.diagonal(dim1=-2, dim2=-1).sum(-1))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_mixed_derivative_agrees_with_one_forward_mode_inside_another(k):
    net, vectors = network(d=3), normal(k, 3, seed=5)
    nested = net
    for v in vectors:
        nested = lambda x, f=nested, v=v: jvp(f, (x,), (v.expand_as(x).contiguous(),))[1]
    torch.testing.assert_close(mixed(net, X, *vectors), nested(X))


def test_gradients_of_derivatives_with_respect_to_weights_are_right():
    x, v = uniform(4, 2), normal(2, 2)
    parameters = dict(network().named_parameters())

    def loss(*values):
        f = lambda u: torch.func.functional_call(network(), dict(zip(parameters, values, strict=True)), (u,))
        jet = f(seed(x, v, 3))
        return jet.value.sum() + sum(jet.derivative(k).square().mean() / 10**k for k in (1, 2, 3))

    assert torch.autograd.gradcheck(loss, tuple(p.detach().requires_grad_() for p in parameters.values()))


def test_float32_jets_are_close_to_float64_ones():
    net = network(d=3)
    jet = net(seed(X, order=2))
    single = net.float()(seed(X.float(), order=2))
    assert single.terms.dtype == single.value.dtype == torch.float32
    torch.testing.assert_close(single.terms.double(), jet.terms, rtol=1e-4, atol=1e-4)


def test_an_op_without_a_rule_says_its_name_and_how_to_add_one():
    with pytest.raises(TypeError, match=r"no Taylor rule for `erf`.*RULES, or add a rule there with `@rule\(op\)`"):
        torch.erf(seed(X))


def test_an_added_rule_is_used(monkeypatch):
    monkeypatch.setattr("neurst.core.rules.RULES", {**RULES})

    @rule(torch.square)
    def _square(u: Jet) -> Jet:
        return u * u

    jet_matches_nesting(lambda x: torch.square(inner(x)), X, DIRECTIONS, 3)


@pytest.mark.parametrize("op", MAX_ORDER, ids=lambda op: op.__name__)
def test_piecewise_linear_ops_refuse_second_order(op):
    with pytest.raises(TypeError, match=r"(relu|abs)` is piecewise linear: its derivative of order 2"):
        op(seed(X, order=2))


@pytest.mark.parametrize("index", [0, slice(1), (slice(None), 0), ()], ids=str)
def test_only_trailing_axes_of_a_jet_can_be_indexed(index):
    with pytest.raises(TypeError, match=r"indexed as jet\[\.\.\., channels\], not with"):
        seed(X)[index]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u: torch.sum(u, 0), "`sum` of a jet needs a negative `dim`.*got 0"),
        (lambda u: torch.flatten(u, 0), "`flatten` of a jet needs a negative `dim`.*got 0"),
        (lambda u: torch.cat([u, u], 1), "`cat` of jets needs a negative `dim`.*got 1"),
        (lambda u: torch.cat([u, X], -1), "`cat` takes jets only, got .*Tensor"),
        (lambda u: u**0.5, "whole exponent >= 1, got 0.5"),
        (lambda u: u**-1, "whole exponent >= 1, got -1"),
        (lambda u: F.gelu(u, approximate="tanh"), "gelu.approximate='tanh'.*exact form"),
    ],
)
def test_a_rule_refuses_what_it_does_not_cover(call, message):
    with pytest.raises(TypeError, match=message):
        call(seed(X))


@pytest.mark.parametrize(("x", "order"), [(X[0], 1), (X, 0)])
def test_seed_names_the_shape_and_the_order_it_cannot_take(x, order):
    with pytest.raises(ValueError, match=rf"`order` is {order}: expected \(N, d\) and order >= 1"):
        seed(x, order=order)
