r"""One step of a relaxed primal-dual method, for solvers and for networks that unroll it.

It finds a saddle point of :math:`G(x) + S(x) + \langle K x, y \rangle - F^*(y)`, where S is smooth :cite:p:`Condat2013`; without S it is the method of
Chambolle and Pock :cite:p:`Chambolle2011`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Block = tuple[Tensor, ...]


@dataclass(frozen=True)
class Saddle:
    """The maps of a saddle-point problem in blocks.

    Parameters
    ----------
    forward, adjoint
        K from primal to dual blocks, and its adjoint.
    prox_primal, prox_dual
        From blocks and step sizes to the proximal points of G and F*.
    slope
        Gradient of S; None if there is no S.
    """

    forward: Callable[[Block], Block]
    adjoint: Callable[[Block], Block]
    prox_primal: Callable[[Block, Sequence], Block]
    prox_dual: Callable[[Block, Sequence], Block]
    slope: Callable[[Block], Block] | None = None


def step(
    saddle: Saddle, primal: Block, dual: Block, primal_steps: Sequence, dual_steps: Sequence, relaxation: Tensor | float
) -> tuple[Block, Block]:
    r"""The next primal and dual blocks.

    With x the primal and y the dual blocks, step sizes t and s, and relaxation :math:`0 < \rho < 2`,

    .. math::

        x' = \mathrm{prox}_{tG}(x - t (K^\top y + \nabla S(x))), \quad
        y' = \mathrm{prox}_{sF^*}(y + s K (2 x' - x)), \quad z + \rho (z' - z).
    """
    slope = saddle.adjoint(dual)
    if saddle.slope is not None:
        slope = tuple(a + b for a, b in zip(slope, saddle.slope(primal), strict=True))
    moved = tuple(x - t * g for x, t, g in zip(primal, primal_steps, slope, strict=True))
    new = saddle.prox_primal(moved, primal_steps)
    ahead = saddle.forward(tuple(2 * a - b for a, b in zip(new, primal, strict=True)))
    raised = tuple(y + s * k for y, s, k in zip(dual, dual_steps, ahead, strict=True))
    new_dual = saddle.prox_dual(raised, dual_steps)
    relax = lambda old, to: tuple(a + relaxation * (b - a) for a, b in zip(old, to, strict=True))
    return relax(primal, new), relax(dual, new_dual)
