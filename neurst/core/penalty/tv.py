"""First-order penalties: total variations of a field's exact derivatives (NeurTV :cite:p:`Luo2025`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.jet import Jet
from neurst.core.penalty.base import PENALTIES, Penalty, norm


@PENALTIES.register("anisotropic")
@dataclass(frozen=True)
class AnisotropicTV(Penalty):
    r"""Mean of :math:`\sum_c \sum_i |D_i f_c|`."""

    def __call__(self, f: Jet) -> Tensor:
        return f.derivative(1).abs().sum((0, -1)).mean()


@PENALTIES.register("isotropic")
@dataclass(frozen=True)
class IsotropicTV(Penalty):
    r"""Mean of :math:`\sum_c \|\nabla f_c\|_2`: each channel has its own edges."""

    def __call__(self, f: Jet) -> Tensor:
        return norm(f.derivative(1), dim=0).sum(-1).mean()


@PENALTIES.register("vectorial")
@dataclass(frozen=True)
class VectorialTV(Penalty):
    r"""Mean of :math:`\|\nabla f\|_F`, one norm over all channels, so that they share edges."""

    def __call__(self, f: Jet) -> Tensor:
        return norm(f.derivative(1), dim=(0, -1)).mean()


@PENALTIES.register("nuclear")
@dataclass(frozen=True)
class NuclearTV(Penalty):
    r"""Total nuclear variation: mean of :math:`\|J f\|_*`, the sum of the singular values of the Jacobian (C, d) :cite:p:`Holt2014`.

    It is convex, and does not change when the coordinates or the channels are rotated. Among fields of the same :math:`\|J f\|_F` it is
    smallest where all channels vary along one direction, so that channels share edges and layers.
    """

    def __call__(self, f: Jet) -> Tensor:
        return _nuclear_norms(f.derivative(1)).mean()


def _nuclear_norms(derivative: Tensor, least: float = 1e-3) -> Tensor:  # (d, N, C) -> (N,)
    """``tr G^(1/2)`` with ``G = J'J`` and its gradient ``G^(-1/2) / 2``, which is zero for singular values below `least` times the largest."""
    gram = torch.einsum("inc,jnc->nij", derivative, derivative)
    size, frame = (part.to(gram) for part in torch.linalg.eigh(gram.detach().cpu()))  # some devices lack eigh
    root = size.clamp_min(0).sqrt()
    inverse = torch.where(root > least * root[:, -1:], 1 / root, 0.0)
    slope = (frame * inverse[:, None]) @ frame.mT / 2
    return root.sum(-1) + ((gram - gram.detach()) * slope).sum((-2, -1))


@dataclass(frozen=True)
class DirectionalTV(Penalty):
    r"""Mean of :math:`w \sum_d \sum_c |D_{v_d} f_c|`, or of :math:`w \sum_d \|M D_{v_d} f\|_2`.

    The rotation and stretch of the paper, ``diag(a, b) Q(theta)``, are directions ``v_d`` that may differ from point to point.

    Parameters
    ----------
    along
        Directions (D, d), or (D, N, d) if they differ between the N points.
    weight
        w, (N,) or a number.
    metric
        M (C, C), for one norm over all channels, so that they share edges. With None, each channel has its own absolute value.
    """

    along: Tensor
    weight: Tensor | float = 1.0
    metric: Tensor | None = None

    def directions(self, x: Tensor) -> Tensor:
        return self.along

    def __call__(self, f: Jet) -> Tensor:
        first = f.derivative(1)
        size = first.abs().sum(-1) if self.metric is None else norm(first @ self.metric.T, dim=-1)
        return (self.weight * size.sum(0)).mean()


@dataclass(frozen=True)
class WeightedTV(Penalty):
    r"""Mean of :math:`w \sum_c \|\nabla f_c\|_2` with one weight for each point, (N,)."""

    weight: Tensor

    def __call__(self, f: Jet) -> Tensor:
        return (self.weight * norm(f.derivative(1), dim=0).sum(-1)).mean()
