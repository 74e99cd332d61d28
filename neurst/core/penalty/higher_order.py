"""Penalties on second and higher derivatives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neurst.core.arguments import check_fields, number
from neurst.core.jet import Jet, pair_directions, polarise
from neurst.core.penalty.base import PENALTIES, Penalty, norm


@PENALTIES.register("second_order")
@dataclass(frozen=True)
class HigherOrderTV(Penalty):
    r"""Mean of :math:`\sum_c \sum_i |D_i^k f_c|`, k-th derivatives along the axes.

    Parameters
    ----------
    order
        k >= 1. With k = 2, ramps do not turn into staircases.
    """

    order: int = 2

    def __post_init__(self):
        check_fields(self)

    def __call__(self, f: Jet) -> Tensor:
        return f.derivative(self.order).abs().sum((0, -1)).mean()


@PENALTIES.register("hessian")
@dataclass(frozen=True)
class HessianTV(Penalty):
    r"""Mean of :math:`\sum_c \|\nabla^2 f_c\|_F`: it does not change when the coordinates are rotated."""

    order: ClassVar[int] = 2

    def directions(self, x: Tensor) -> Tensor:
        return pair_directions(x.shape[1], x)[0]

    def __call__(self, f: Jet) -> Tensor:
        return _hessian_norm(f).sum(-1).mean()


def _axes(f: Jet) -> int:
    """The number d of coordinates, for a jet along :func:`pair_directions`, of which there are d (d + 1) / 2."""
    n = f.terms.shape[1]
    return next(d for d in range(1, n + 1) if d * (d + 1) // 2 == n)


def _hessian_norm(f: Jet) -> Tensor:  # -> (N, C)
    second, d = f.derivative(2), _axes(f)
    both = 2**0.5 * polarise(second, list(itertools.combinations(range(d), 2)))  # D_i D_j and D_j D_i
    return norm(torch.cat([second[:d], both]), dim=0)


@dataclass(frozen=True)
class Eikonal(Penalty):
    r"""A penalty that makes a field a signed distance: mean of :math:`\sum_c (\|\nabla f_c\|_2 - 1)^2 + (b\,\|\nabla^2 f_c\|_F)^2` :cite:p:`Gropp2020`.

    Where :math:`\|\nabla f\| = 1` the gradient is the normal of the level sets and the Hessian is the Jacobian of the normal. The second term
    is then the bending energy of the level sets, the sum of their squared principal curvatures. Unlike the other penalties it is not
    homogeneous: it fixes the scale of f.

    Parameters
    ----------
    bending_length
        b >= 0, in box units.
    """

    bending_length: float = 0.05
    order: ClassVar[int] = 2

    def __post_init__(self):
        check_fields(self, bending_length=number(0))

    def directions(self, x: Tensor) -> Tensor:
        return pair_directions(x.shape[1], x)[0]

    def __call__(self, f: Jet) -> Tensor:
        slope = norm(f.derivative(1)[: _axes(f)], dim=0)
        return ((slope - 1).square() + (self.bending_length * _hessian_norm(f)).square()).sum(-1).mean()


@PENALTIES.register("mixed")
@dataclass(frozen=True)
class MixedTV(Penalty):
    r"""NeurSSTV for cubes: mean of :math:`\sum_c \sum_{i<d} (|D_i D_d f_c| + \epsilon |D_i f_c|)`, where axis d is the spectrum.

    Parameters
    ----------
    first_order
        :math:`\epsilon`, the weight of the plain spatial variation; 0.1 in the paper.
    """

    first_order: float = 0.1
    order: ClassVar[int] = 2
    needs_spectrum: ClassVar[bool] = True

    def __post_init__(self):
        check_fields(self, first_order=number(0))

    def directions(self, x: Tensor) -> Tensor:
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return torch.cat([eye, eye[:-1] + eye[-1]])

    def __call__(self, f: Jet) -> Tensor:
        first, second = f.derivative(1), f.derivative(2)
        d = (len(first) + 1) // 2
        mixed = (second[d:] - second[: d - 1] - second[d - 1]) / 2  # polarisation against the last axis
        return (mixed.abs() + self.first_order * first[: d - 1].abs()).sum((0, -1)).mean()


@PENALTIES.register("tgv")
@dataclass(frozen=True)
class TGV(Penalty):
    r"""Neural total generalised variation of second order :cite:p:`Bredies2010`.

    Mean of :math:`\sum_c a_1 \|\nabla f_c - w_c\|_2 + a_0 \|\tfrac12 (\nabla w_c + \nabla w_c^\top)\|_F`, minimised over a second
    field :math:`w_c: R^d \to R^d`. The network has w as additional outputs: first f (C), then w (C d, channel by channel).

    Parameters
    ----------
    a1, a0
        Weights of the two terms. ``a0 / a1`` is a length in box units; slopes may change freely over longer distances.
    """

    a1: float = 1.0
    a0: float = 0.2

    def __post_init__(self):
        check_fields(self, a1=number(0), a0=number(0))

    def n_outputs(self, n_channels: int, d: int) -> int:
        return n_channels * (1 + d)

    def __call__(self, f: Jet) -> Tensor:
        slope, bend = tgv_terms(f)
        return (self.a1 * slope + self.a0 * bend).sum(-1).mean()


def tgv_terms(f: Jet) -> tuple[Tensor, Tensor]:  # -> (N, C), (N, C)
    r"""The sizes :math:`\|\nabla f_c - w_c\|_2` and :math:`\|\tfrac12 (\nabla w_c + \nabla w_c^\top)\|_F` at each point, of outputs as in :class:`TGV`."""
    d = len(f.terms[0])
    n = f.shape[-1] // (1 + d)
    first = f.derivative(1)
    w = f.value[..., n:].unflatten(-1, (n, d))  # (N, C, d)
    grad_w = first[..., n:].unflatten(-1, (n, d)).permute(1, 2, 0, 3)  # (N, C, d, d)
    slope = norm(first[..., :n].permute(1, 2, 0) - w, dim=-1)
    return slope, norm((grad_w + grad_w.mT) / 2, dim=(-2, -1))
