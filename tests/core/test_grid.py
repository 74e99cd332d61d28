"""Differences on a grid: adjoints, norms, and what costs nothing."""

import numpy as np
import pytest
import torch
from draws import normal

from neurst.core.check import adjoints_match
from neurst.core.grid import GRAD_NORM, grad, grad_adjoint, symgrad, symgrad_adjoint

SHAPES = [(1, 1), (1, 5), (4, 1), (2, 2), (2, 3), (5, 4), (9, 11)]
PAIRS = {"grad": (grad, grad_adjoint, (), (2,)), "symgrad": (symgrad, symgrad_adjoint, (2,), (3,))}


def numbers(*shape, seed, kind):
    return (
        torch.complex(normal(*shape, seed=seed), normal(*shape, seed=seed + 9))
        if kind == "complex"
        else normal(*shape, seed=seed)
    )


def exists(w):
    """The field without the entries that `grad` sets to 0, which do not exist."""
    return existing(w) * w


def existing(w):
    keep = torch.ones(w.shape[-3:], dtype=w.real.dtype)
    keep[0, -1], keep[1, :, -1] = 0, 0
    return keep


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_an_adjoint_passes_the_dot_test(name, shape, kind):
    forward, adjoint, inside, outside = PAIRS[name]
    x = numbers(3, *inside, *shape, seed=0, kind=kind)
    adjoints_match(forward, adjoint, x, numbers(3, *outside, *shape, seed=1, kind=kind), rtol=1e-13)


def test_the_dot_test_sees_a_wrong_adjoint():
    with pytest.raises(AssertionError, match="dot test: <A x, y> = "):
        adjoints_match(grad, lambda p: 1.001 * grad_adjoint(p), normal(5, 4), normal(2, 5, 4, seed=1))


@pytest.mark.parametrize("name", PAIRS)
def test_the_norm_is_below_its_bound_and_near_it(name):
    forward, adjoint, inside, _ = PAIRS[name]
    x = normal(*inside, 64, 64)
    for _ in range(60):
        x = adjoint(forward(x / x.norm()))
    assert 0.98 * GRAD_NORM < x.norm() ** 0.5 <= GRAD_NORM


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_an_affine_picture_has_no_symmetrised_gradient_also_at_the_border(shape):
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in shape)
    slope = grad(0.7 * rows[:, None] - 1.3 * columns + 2.0)
    torch.testing.assert_close(slope[0, :-1], torch.full((shape[0] - 1, shape[1]), 0.7).double())
    torch.testing.assert_close(symgrad(slope), torch.zeros(3, *shape).double())


def test_the_components_are_those_of_the_symmetric_matrix_in_the_interior():
    n = 7
    rows, columns = (x.double() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    w = exists(torch.stack([2.0 * rows + 3.0 * columns, 5.0 * rows - 4.0 * columns]))
    e = symgrad(w)[:, 2:-2, 2:-2]
    for part, expected in zip(e, (2.0, -4.0, 2**0.5 * (3.0 + 5.0) / 2), strict=True):
        np.testing.assert_allclose(part, expected)


def test_a_flip_and_a_transposition_keep_the_sum_of_squared_differences():
    u = normal(6, 6)
    size = lambda v: grad(v)[..., :-1, :-1].square().sum()
    flipped = u.flip(
        -1
    ).mT  # a transposition keeps forward differences; a flip makes them backward, so compare the sums of squares
    assert grad(u).square().sum() == pytest.approx(grad(flipped).square().sum())
    assert size(u) == pytest.approx(size(u.mT))
