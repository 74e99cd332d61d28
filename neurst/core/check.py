r"""The laws of the core as functions: for our tests, and for layers and penalties that users write.

Each raises :class:`AssertionError` with the largest deviation if the law does not hold, and returns None otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import jvp

from neurst.core.jet import Jet, derivative


def derivative_by_nesting(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, order: int) -> Tensor:  # -> (N, C)
    """`order`-th derivative of `f` along `v` (d,) or (N, d) by nested forward-mode differentiation, a slow reference."""
    tangent = v.expand_as(x).contiguous()

    def nested(g: Callable, k: int) -> Callable:
        return g if k == 0 else nested(lambda y: jvp(g, (y,), (tangent,))[1], k - 1)

    return nested(f, order)(x)


def jet_matches_nesting(net: Callable, x: Tensor, directions: Tensor, order: int, *, rtol: float = 1e-7) -> None:
    """Law: a network's jet holds the derivatives that nested forward mode gives, at float64."""
    jet = derivative(net, x, directions, order)
    for found, v in zip(jet, directions, strict=True):
        expected = derivative_by_nesting(net, x, v, order)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.detach().abs().max()))


def adjoints_match(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    rtol: float = 1e-12,
) -> None:
    r"""Law: :math:`\langle A x, y \rangle = \langle x, A^* y \rangle` (the dot test), up to `rtol` of the larger of :math:`\|A x\| \|y\|` and :math:`\|x\| \|A^* y\|`."""
    image, back = forward(x), adjoint(y)
    left, right = torch.vdot(image.flatten(), y.flatten()), torch.vdot(x.flatten(), back.flatten())
    scale = max(float(image.norm() * y.norm()), float(x.norm() * back.norm()))
    if not abs(complex(left - right)) <= rtol * scale:  # also if one is NaN
        msg = f"the adjoint fails the dot test: <A x, y> = {complex(left):.6g} but <x, A* y> = {complex(right):.6g}"
        raise AssertionError(msg)


def is_homogeneous(penalty: Callable[[Jet], Tensor], jet: Jet, *, factor: float = 3.7, rtol: float = 1e-9) -> None:
    """Law: ``penalty(c f) = |c| penalty(f)``, that is degree one, with the weights of the penalty held fixed."""
    for c in (factor, -factor):
        scaled = penalty(Jet(c * jet.value, c * jet.terms))
        torch.testing.assert_close(scaled, abs(c) * penalty(jet), rtol=rtol, atol=0.0)


def vanishes_on_constants(penalty: Callable[[Jet], Tensor], jet: Jet) -> None:
    """Law: the penalty of a field without derivatives is zero, and its gradient is zero rather than NaN."""
    terms = torch.zeros_like(jet.terms).requires_grad_()
    cost = penalty(Jet(torch.ones_like(jet.value), terms))
    (slope,) = torch.autograd.grad(cost, terms, allow_unused=False)
    torch.testing.assert_close(cost.detach(), torch.zeros_like(cost))
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A detached copy of a module's weights, to compare two fits bit by bit."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def units_do_not_matter(fit: Callable[[Tensor], Callable[[Tensor], Tensor]], x: Tensor, *, rtol: float = 1e-4) -> None:
    """Law: a field fitted and evaluated at ``s x + t`` has the same values as one fitted and evaluated at `x`.

    `fit` takes coordinates (N, d) and returns the fitted field as a function of coordinates in the same units.
    """
    shift = torch.linspace(-300.0, 500.0, x.shape[1], dtype=x.dtype)
    moved = 137.0 * x + shift
    here, there = fit(x)(x), fit(moved)(moved)
    torch.testing.assert_close(there, here, rtol=rtol, atol=rtol * float(here.detach().abs().max()))
