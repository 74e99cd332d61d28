r"""Total variation and total generalised variation of pictures as a saddle-point problem, and the step that solver and network share.

.. math:: J(u, w) = \tfrac12 \|A u - f\|^2 + \sum_x L_1(x)\, \|D u - w\|(x) + \sum_x L_0(x)\, \|E w\|(x)

with D and E of :mod:`neurst.core.grid`. Total variation has w = 0 and no second term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from neurst.core.grid import grad, grad_adjoint, symgrad, symgrad_adjoint
from neurst.core.primal_dual import Block, Saddle, step
from neurst.core.prox import ball, box, squares
from neurst.imaging.operators import Operator

BOUND = 0.999  # squared norm of the scaled operator, which must be below 1
PARTS = -3  # axis of the components of differences (B, C, 2 or 3, H, W)
# size of differences at each pixel, and projection to the ball of its dual norm
NORMS: dict[str, tuple[Callable, Callable]] = {
    "joint": (lambda p: squares(p, (1, PARTS)).sqrt(), lambda p, radius: ball(p, radius, (1, PARTS))),
    "isotropic": (lambda p: squares(p, PARTS).sqrt(), lambda p, radius: ball(p, radius, PARTS)),
    "anisotropic": (torch.abs, box),
}


class Ratios(NamedTuple):
    """Ratios of step sizes, which decide how fast a solution is reached, but not which. Numbers, or tensors (B,)."""

    u: Tensor | float  # first dual step / step of the picture
    w: Tensor | float  # first dual step / step of the slopes
    q: Tensor | float  # second dual step / first dual step


class State(NamedTuple):
    """All variables: picture u (B, C, H, W), slopes w (B, C, 2, H, W), duals p (B, C, 2, H, W) and q (B, C, 3, H, W). TV has no w and q."""

    u: Tensor
    w: Tensor | None
    p: Tensor
    q: Tensor | None

    @property
    def primal(self) -> Block:
        """The picture, and the slopes if any."""
        return (self.u,) if self.w is None else (self.u, self.w)

    @property
    def dual(self) -> Block:
        """One dual variable for each term."""
        return (self.p,) if self.q is None else (self.p, self.q)

    @classmethod
    def of_blocks(cls, primal: Block, dual: Block) -> State:
        """The inverse of `primal` and `dual`."""
        (u, w), (p, q) = ((*block, None)[:2] for block in (primal, dual))
        return cls(u, w, p, q)


@dataclass(frozen=True, eq=False)
class Problem:
    r"""The data of a batch of pictures, and the weights.

    Parameters
    ----------
    data
        (B, C, \*data_shape).
    operator
        A.
    first
        :math:`L_1`, which broadcasts to (B, 1, 1, H, W).
    second
        :math:`L_0` in the same way; None for total variation.
    norm
        ``"joint"``: one Euclidean norm over differences and channels; ``"isotropic"``: over the differences of each channel; ``"anisotropic"``: the
        sum of their absolute values.
    """

    data: Tensor
    operator: Operator
    first: Tensor
    second: Tensor | None
    norm: str = "joint"

    def start(self) -> State:
        """A'f, and zeros."""
        u = self.operator.adjoint(self.data)
        w = torch.zeros_like(grad(u))
        return State(u, None, w, None) if self.second is None else State(u, w, w, torch.zeros_like(symgrad(w)))

    def saddle(self) -> Saddle:
        """The maps of one step."""
        project, prox, smooth = NORMS[self.norm][1], self.operator.prox, None
        if prox is None:
            prox = lambda x, data, t: x
            smooth = lambda x: (self._slope(x[0]), *map(torch.zeros_like, x[1:]))
        forward, adjoint = (lambda x: (grad(x[0]),)), (lambda y: (grad_adjoint(y[0]),))
        if self.second is not None:
            forward = lambda x: (grad(x[0]) - x[1], symgrad(x[1]))
            adjoint = lambda y: (grad_adjoint(y[0]), symgrad_adjoint(y[1]) - y[0])
        return Saddle(
            forward,
            adjoint,
            lambda x, t: (prox(x[0], self.data, t[0]), *x[1:]),
            lambda y, s: tuple(project(part, r) for part, r in zip(y, (self.first, self.second), strict=False)),
            smooth,
        )

    @cached_property
    def _seen(self) -> Tensor:  # (B, C, H, W)
        return self.operator.adjoint(self.data)

    def _slope(self, u: Tensor) -> Tensor:
        """A'(A u - f)."""
        if self.operator.normal is None:
            return self.operator.adjoint(self.operator.forward(u) - self.data)
        return self.operator.normal(u) - self._seen

    def advance(self, state: State, sizes: tuple[tuple, tuple], relaxation: Tensor | float) -> State:
        """One relaxed primal-dual step, with the sizes that :meth:`step_sizes` gives."""
        return State.of_blocks(*step(self.saddle(), state.primal, state.dual, *sizes, relaxation))

    def step_sizes(self, ratios: Ratios, relaxation: Tensor | float) -> tuple[tuple, tuple]:
        r"""Step sizes of the primal and the dual blocks, inside the bound within which the method converges.

        With the ratios fixed, the steps share one factor. It sets the squared norm of
        :math:`\begin{pmatrix} \sqrt{8 s_p t_u} & \sqrt{s_p t_w} \\ 0 & \sqrt{8 s_q t_w} \end{pmatrix}`, which bounds that of the scaled operator, to 0.999. If A has
        no proximal map, :math:`1 / t_u` grows by :math:`\|A\|^2 / (2 (2 - \rho))`, as in :cite:p:`Condat2013`.
        """
        ru, rw, rq = (torch.as_tensor(r, dtype=torch.float64, device=self.data.device) for r in ratios)
        if self.second is None:
            first = (BOUND * ru / 8).sqrt()
        else:
            trace = 8 / ru + (1 + 8 * rq) / rw
            largest = (trace + (trace**2 - 256 * rq / (ru * rw)).clamp_min(0).sqrt()) / 2
            first = (BOUND / largest).sqrt()
        u = first / ru
        if self.operator.prox is None:
            u = 1 / (1 / u + self.operator.norm**2 / (2 * (2 - relaxation)))
        shaped = lambda value, n_axes: value.to(self.first.dtype).reshape(-1, *[1] * (n_axes - 1))
        if self.second is None:
            return (shaped(u, 4),), (shaped(first, 5),)
        return (shaped(u, 4), shaped(first / rw, 5)), (shaped(first, 5), shaped(first * rq, 5))

    def energy(self, u: Tensor, w: Tensor | None) -> Tensor:  # -> (B,)
        """J of each picture."""
        size = NORMS[self.norm][0]
        terms = [(self.operator.forward(u) - self.data).abs().square() / 2]
        terms += [self.first * size(grad(u) if w is None else grad(u) - w)]
        terms += [] if w is None else [self.second * size(symgrad(w))]
        return sum(term.flatten(1).sum(1) for term in terms)

    def lower_bound(self, state: State) -> Tensor:  # -> (B,)
        """A lower bound on the smallest energy of each picture: the dual energy of a feasible point near the state; for A = I only."""
        p = state.p if state.q is None else symgrad_adjoint(state.q)
        excess = self._excess(p, self.first)
        if state.q is not None:
            excess = torch.maximum(excess, self._excess(state.q, self.second))
        flow = grad_adjoint(p / excess.clamp_min(1).reshape(-1, 1, 1, 1, 1))
        product = (flow.conj() * self.data).real if flow.is_complex() else flow * self.data
        return (product - flow.abs().square() / 2).flatten(1).sum(1)

    def _excess(self, p: Tensor, radius: Tensor) -> Tensor:  # -> (B,)
        """How far a dual variable is outside its ball: its largest size in units of the radius."""
        return (NORMS[self.norm][0](p) / radius).flatten(1).amax(1)


def distance(a: Block, b: Block) -> list[Tensor]:  # each (B,)
    """The distance between two states of each block, for each picture."""
    return [squares((x - y).flatten(1), 1)[:, 0].sqrt() for x, y in zip(a, b, strict=True)]


def balanced(ratios: Ratios, moved: State, since: State, share: float, least: float = 1e-4) -> Ratios:
    r"""Ratios drawn towards those at which primal and dual variables move equally far in the metric of their steps.

    The steps t and s of two blocks that moved by a and b are balanced if :math:`a^2 / t = b^2 / s`. A `share` of the way is gone, on a logarithmic
    scale; a block that has not moved keeps its ratio.
    """
    primal, dual = distance(moved.primal, since.primal), distance(moved.dual, since.dual)
    u, p = primal[0], dual[0]
    pairs = [(p, u)] if len(dual) == 1 else [(p, u), (p, primal[1]), (dual[1], p)]
    out = []
    for ratio, (over, under) in zip(ratios, pairs, strict=False):
        ratio = torch.as_tensor(ratio, dtype=torch.float64, device=u.device)
        wanted = (over.double() / under.double()).square()
        usable = torch.isfinite(wanted) & (wanted > 0)
        new = ratio * (torch.where(usable, wanted, ratio) / ratio) ** share
        out.append(new.clamp(least, 1 / least))
    return Ratios(*out, *ratios[len(out) :])
