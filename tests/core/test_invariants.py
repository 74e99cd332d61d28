import math

import pytest
import torch
from draws import uniform

from neurst.core.invariants import invariants
from neurst.core.nets import Siren
from neurst.core.table import Table, table


def net(d):
    return Siren(width=7, depth=2).build(d, 2, torch.Generator().manual_seed(0)).double()


def turned(f, turn):
    """The function x -> f(turn x)."""
    return lambda u: f(torch.nn.functional.linear(u, turn))


def rotation(d, seed=0):
    turn, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return (
        turn * torch.linalg.det(turn).sign()
        if d == 3
        else turn @ torch.diag(torch.tensor([1.0, torch.linalg.det(turn)]))
    )


@pytest.mark.parametrize(("d", "order"), [(2, 0), (2, 1), (2, 2), (2, 5), (3, 1), (3, 2)])
def test_invariants_of_a_turned_function_are_the_same(d, order):
    f, x, turn = net(d), uniform(6, d), rotation(d)
    found = invariants(table(turned(f, turn), x @ turn, order))
    torch.testing.assert_close(found, invariants(table(f, x, order)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_in_the_plane_there_is_one_invariant_less_than_derivatives_and_they_tell_functions_apart(order):
    f, x = net(2), uniform(1, 2)
    coefs = table(f, x, order).coefs.detach()
    flat = lambda c: invariants(Table(c.reshape(-1, 1, 1), 2)).flatten()
    slopes = torch.autograd.functional.jacobian(flat, coefs[:, 0, 0])
    count = math.comb(order + 2, 2)
    assert slopes.shape == (count - 1, count)
    assert torch.linalg.matrix_rank(slopes) == count - 1  # all but the angle


def test_a_reflection_changes_the_sign_of_some_invariants():
    f, x = net(2), uniform(6, 2)
    mirror = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    found, other = (invariants(table(g, y, 3)) for g, y in ((f, x), (turned(f, mirror), x @ mirror)))
    torch.testing.assert_close(found.abs(), other.abs(), rtol=1e-7, atol=1e-9)
    assert not torch.allclose(found, other)


def test_norms_of_the_distinct_derivatives_of_an_order_are_not_invariant():
    """The list of derivatives of the paper counts mixed ones once; counted as often as they occur, the norm is invariant."""
    f, x = net(2), uniform(50, 2)
    angle = math.radians(33)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    one, other = (table(g, y, 2).derivatives()[3:] for g, y in ((f, x), (turned(f, turn), x @ turn)))
    distinct = lambda h: h.square().sum(0).sqrt()
    full = lambda h: (h[0] ** 2 + 2 * h[1] ** 2 + h[2] ** 2).sqrt()
    assert ((distinct(one) / distinct(other) - 1).abs().median()) > 0.01
    torch.testing.assert_close(full(one), full(other), rtol=1e-9, atol=0)


def test_where_there_is_no_gradient_invariants_and_their_slopes_are_finite():
    coefs = torch.zeros(6, 1, 1, dtype=torch.float64, requires_grad=True)
    found = invariants(Table(coefs, 2))
    assert found.isfinite().all()


@pytest.mark.parametrize(("d", "order"), [(1, 2), (3, 3)])
def test_other_tables_are_refused(d, order):
    with pytest.raises(ValueError, match=f"the table has {d} variables and the order {order}: expected"):
        invariants(table(net(d), uniform(2, d), order))
