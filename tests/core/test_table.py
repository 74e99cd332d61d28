import math

import pytest
import torch
import torch.nn.functional as F
from draws import uniform
from torch import nn
from torch.func import jvp

from neurst.core.nets import Siren, Spline
from neurst.core.table import Table, multi_indices, partials, table

X = uniform(5, 3)


def siren(d=2, c=3):
    return Siren(width=7, depth=2).build(d, c, torch.Generator().manual_seed(0)).double()


def spline(d=2, c=3):
    net = Spline(cells=(2, 5)).build(d, c, torch.Generator()).double()
    for i, term in enumerate(net.terms):
        nn.init.normal_(term.coefficients, generator=torch.Generator().manual_seed(i))
    return net


def nested_partial(f, x, alpha):
    """``D^alpha f`` by one forward mode inside another: slow and right."""
    for axis, times in enumerate(alpha):
        e = torch.eye(x.shape[1], dtype=x.dtype)[axis].expand_as(x).contiguous()
        for _ in range(times):
            f = lambda u, f=f, e=e: jvp(f, (u,), (e,))[1]
    return f(x)


@pytest.mark.parametrize(("d", "order"), [(1, 4), (2, 0), (2, 3), (3, 1), (3, 4)])
def test_multi_indices_are_distinct_graded_and_as_many_as_there_are_partial_derivatives(d, order):
    alphas = multi_indices(d, order)
    assert len(set(alphas)) == len(alphas) == math.comb(d + order, order)
    assert all(len(alpha) == d and min(alpha) >= 0 for alpha in alphas)
    # by rising sum, and within one sum from the first axis to the last
    assert alphas == sorted(alphas, key=lambda alpha: (sum(alpha), *(-a for a in alpha)))
    assert (alphas[0], sum(alphas[-1])) == ((0,) * d, order)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("make", [siren, spline])
def test_partial_derivatives_agree_with_nested_forward_mode(make, d):
    net, x = make(d), uniform(4, d)
    for order in range(3 if make is spline else 5):  # third derivatives of a spline jump at its knots
        found, alphas = partials(net, x, order)
        assert alphas == multi_indices(d, order)
        assert found.shape == (4, 3, len(alphas))
        for values, alpha in zip(found.unbind(-1), alphas, strict=True):
            expected = nested_partial(net, x, alpha)
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9 * float(expected.detach().abs().max()))


def test_partial_derivatives_are_right_up_to_the_highest_order_that_is_allowed():
    for d in (1, 2, 3):
        a = torch.tensor([0.7, -1.3, 0.9][:d]).double()
        found, alphas = partials(lambda x, a=a: torch.exp(F.linear(x, a[None])), torch.zeros(1, d).double(), 16)
        expected = torch.stack([(a ** torch.tensor(alpha)).prod() for alpha in alphas])
        torch.testing.assert_close(found[0, 0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("d", "order"), [(7, 3), (10, 2), (16, 2)])
def test_partial_derivatives_in_many_dimensions_take_no_longer_than_their_number_requires(d, order):
    x = uniform(2, d)
    found, alphas = partials(lambda u: torch.exp(F.linear(u, torch.ones(1, d).double())), x, order)
    assert len(alphas) == math.comb(d + order, order)
    torch.testing.assert_close(found[:, 0], torch.exp(x.sum(1))[:, None].expand(-1, len(alphas)), rtol=1e-8, atol=0)


# ---- tables


def layer(u):
    """A layer with products, quotients and functions of channels."""
    first, second = u[..., :2], u[..., 1:]
    return torch.sin(first) * second + torch.exp(first) / (second * second + 2) - F.linear(u, torch.ones(2, 3).double())


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("order", [0, 1, 4])
def test_a_layer_on_a_table_gives_the_table_of_the_composition(d, order):
    net, x = siren(d), uniform(4, d)
    found, expected = layer(table(net, x, order)), table(lambda u: layer(net(u)), x, order)
    assert (type(found), found.order, found.shape) == (Table, order, (4, 2))
    torch.testing.assert_close(found.coefs, expected.coefs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_derivative_of_a_table_is_the_table_of_the_derivative(d):
    net, x = siren(d), uniform(4, d)
    found = table(net, x, 4)
    for alpha in multi_indices(d, 3):
        below = found.derivative(alpha)
        assert below.order == 4 - sum(alpha)
        for beta, values in zip(below.indices, below.derivatives(), strict=True):
            both = tuple(map(sum, zip(alpha, beta, strict=True)))
            torch.testing.assert_close(values, nested_partial(net, x, both), rtol=1e-7, atol=1e-9)


def test_a_table_is_differentiated_between_two_layers():
    """Layers that differentiate the layer before: the derivative of a nonlinear function of a derivative."""
    x, f = uniform(4, 2), siren(2, 1)
    found = torch.sin(table(f, x, 3).derivative((1, 0))).derivative((0, 1)).value
    expected = nested_partial(lambda u: torch.sin(nested_partial(f, u, (1, 0))), x, (0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_jets_and_tables_hold_the_same_and_other_units_scale_each_order(d):
    found = table(siren(d), uniform(4, d), 4)
    torch.testing.assert_close(Table.of_jet(found.jet(), d).coefs, found.coefs, rtol=1e-12, atol=1e-12)
    net = siren(d)
    half = table(lambda u: net(u * 0.5), 2 * uniform(4, d), 4)
    torch.testing.assert_close(half.scaled(2.0).coefs, found.coefs, rtol=1e-9, atol=1e-12)


def test_tables_of_other_orders_are_combined_to_the_lower_one():
    x = uniform(4, 2)
    one, other = table(siren(), x, 2), table(siren(), x, 4)
    assert (one * other).order == (other - one).order == 2
    torch.testing.assert_close((other - one).coefs, torch.zeros_like(one.coefs), atol=1e-12, rtol=0)


def test_a_gradient_of_a_table_reaches_the_weights():
    net = siren()
    table(net, uniform(4, 2), 3).coefs.square().sum().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in net.parameters() if weight.ndim > 1)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: partials(siren(d=3), X, 17), ValueError, "`order=17`"),
    (lambda: partials(siren(d=3), X, 1.0), TypeError, "`order=1.0`"),
    (lambda: partials(siren(d=3), X[0], 1), TypeError, r"`x=.*`: expected a floating-point tensor \(N, d\)"),
    (lambda: partials(X, X, 1), TypeError, r"`f=.*`: expected a function of points"),
    (lambda: table(torch.relu, X, 2), TypeError, "`relu` is piecewise linear"),
    (lambda: table(siren(d=3), X, 2).derivative((2, 1, 0)), ValueError, r"`alpha=\(2, 1, 0\)`: expected 3 whole numbers with a sum of at most 2"),
    (lambda: table(siren(d=3), X, 2).derivative((1,)), ValueError, "expected 3 whole numbers"),
    (lambda: table(siren(d=3), X, 2)[0], TypeError, r"indexed as table\[\.\.\., channels\]"),
    (lambda: table(siren(d=3), X, 2) + table(siren(d=2), X[:, :2], 2), ValueError, r"tables of \[2, 3\] variables"),
])  # fmt: skip
def test_what_a_table_refuses_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
