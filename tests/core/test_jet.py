import pytest
import torch
import torch.nn.functional as F
from draws import normal, uniform
from torch import nn
from torch.func import jvp

from neurst.core.check import derivative_by_nesting, jet_matches_nesting
from neurst.core.jet import (
    RULES,
    Jet,
    derivative,
    hessian,
    jacobian,
    laplacian,
    mixed,
    rule,
    seed,
)
from neurst.core.nets import Siren, Spline

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
    F.softplus: (nn.Softplus(beta=3.0), 0.0),
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
TENSOR = uniform(5, 3, seed=3, low=1.0, high=2.0)
ARITHMETIC = {
    "jet + tensor": lambda u: u + TENSOR,
    "tensor + jet": lambda u: TENSOR + u,
    "jet - tensor": lambda u: u - TENSOR,
    "tensor - jet": lambda u: TENSOR - u,
    "jet * tensor": lambda u: u * TENSOR,
    "tensor * jet": lambda u: TENSOR * u,
    "jet / tensor": lambda u: u / TENSOR,
    "tensor / jet": lambda u: TENSOR / (u + 1.5),
    "one channel * tensor": lambda u: u[..., :1] * TENSOR,
    "1 / jet": lambda u: 1 / (u + 1.5),
    "sum of jets": lambda u: sum([u, u * u, u]),
}


def siren(d=2, c=3):
    return Siren(width=7, depth=2).build(d, c, torch.Generator().manual_seed(0)).double()


def spline(d=2, c=3):
    net = Spline(cells=(2, 5)).build(d, c, torch.Generator()).double()
    for i, term in enumerate(net.terms):
        nn.init.normal_(term.coefficients, generator=torch.Generator().manual_seed(i))
    return net


@pytest.mark.parametrize("op", RULES)
def test_every_rule_and_its_gradient_agree_with_nested_forward_mode(op):
    (function, centre), highest = CASES[op], MAX_ORDER.get(op, 4)
    weight = WEIGHT.clone().requires_grad_()
    f = lambda x: function(inner(x, weight) + centre)
    for order in range(1, highest + 1):
        jet_matches_nesting(f, X, DIRECTIONS, order)
    order = min(highest, 3)
    jet, nested = f(seed(X, DIRECTIONS[:1], order)), derivative_by_nesting(f, X, DIRECTIONS[0], order)
    torch.testing.assert_close(jet.value, f(X))
    for found, expected in [(jet.value, f(X)), (jet.derivative(order)[0], nested)]:
        weigh = lambda part: (part * normal(*part.shape)).sum()
        slopes = [torch.autograd.grad(weigh(part), weight, retain_graph=True)[0] for part in (found, expected)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_with_tensors_and_numbers_agrees_with_nested_forward_mode(name):
    f = lambda x: ARITHMETIC[name](inner(x))
    for order in (1, 3):
        jet_matches_nesting(f, X, DIRECTIONS, order)
    jet, value = f(seed(X, DIRECTIONS, 2)), f(X)
    torch.testing.assert_close(jet.value, value)
    assert jet.terms.shape == (2, 2, *value.shape)


def test_directions_may_differ_from_point_to_point_and_count_with_their_length():
    net, varying = siren(d=3), normal(4, 5, 3, seed=4)
    jet_matches_nesting(net, X, varying, 3)
    torch.testing.assert_close(derivative(net, X, 2 * varying, 3), 8 * derivative(net, X, varying, 3))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_jacobian_hessian_and_laplacian_agree_with_torch_func(d):
    net, x = siren(d), uniform(5, d)
    one = lambda point: net(point[None])[0]
    second = torch.func.vmap(torch.func.hessian(one))(x)
    torch.testing.assert_close(jacobian(net, x), torch.func.vmap(torch.func.jacrev(one))(x))
    torch.testing.assert_close(hessian(net, x), second)
    torch.testing.assert_close(laplacian(net, x), second.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_a_mixed_derivative_agrees_with_one_forward_mode_inside_another():
    net, nested, vectors = siren(d=3), siren(d=3), normal(4, 3, seed=5)
    for k, v in enumerate(vectors, start=1):
        nested = lambda x, f=nested, v=v: jvp(f, (x,), (v.expand_as(x).contiguous(),))[1]
        torch.testing.assert_close(mixed(net, X, *vectors[:k]), nested(X))


# ---- all partial derivatives


# ---- what is refused


def test_an_op_without_a_rule_says_its_name_and_how_to_add_one():
    with pytest.raises(TypeError, match=r"no Taylor rule for `erf`.*RULES, or add a rule with `@neurst.core.jet.rule"):
        torch.erf(seed(X))


def test_an_added_rule_is_used(monkeypatch):
    monkeypatch.setattr("neurst.core.jet.RULES", {**RULES})

    @rule(torch.square)
    def _square(u: Jet) -> Jet:
        return u * u

    jet_matches_nesting(lambda x: torch.square(inner(x)), X, DIRECTIONS, 3)
    assert torch.square not in RULES


@pytest.mark.parametrize(("call", "message"), [
    (lambda u: torch.sum(u, 0), "`sum` of a jet needs a negative `dim`.*got 0"),
    (lambda u: torch.cat([u, X], -1), "`cat` takes jets only, got .*Tensor"),
    (lambda u: u**0.5, "whole exponent >= 1, got 0.5"),
    (lambda u: u**-1, "whole exponent >= 1, got -1"),
    (lambda u: F.gelu(u, approximate="tanh"), "gelu.approximate='tanh'.*exact form"),
    (torch.relu, "relu` is piecewise linear: its derivative of order 2 .* use a smooth activation"),
    (lambda u: u[0], r"indexed as jet\[\.\.\., channels\], not with 0: select points before seeding"),
    (lambda u: u[:, 0], r"not with \(slice"),
])  # fmt: skip
def test_a_jet_refuses_what_its_rules_do_not_cover(call, message):
    with pytest.raises(TypeError, match=message):
        call(seed(X, order=2))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: seed(X[0]), ValueError, r"`x` has shape \(3,\) and `order` is 1: expected \(N, d\) and order >= 1"),
])  # fmt: skip
def test_points_and_orders_that_cannot_be_taken_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
