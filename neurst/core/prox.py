"""Projections, which are the proximal maps of the duals of norms. Their gradients are finite everywhere, also for a radius of 0."""

from __future__ import annotations

import torch
from torch import Tensor


def squares(p: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum of the squared moduli over `dim`, which is kept with size 1."""
    parts = p.real.square() + p.imag.square() if p.is_complex() else p.square()
    return parts.sum(dim, keepdim=True)  # several times faster than `vector_norm` along an axis that is not the last


def ball(p: Tensor, radius: Tensor | float, dim: int | tuple[int, ...]) -> Tensor:
    r"""The projection to Euclidean balls: :math:`p \min(1, r / \|p\|_2)` with the norm over `dim`, of complex numbers too.

    It commutes with rotations of the components; `radius` >= 0 is broadcast against `p`.
    """
    size = squares(p, dim)
    outside = size > radius * radius
    return p * torch.where(outside, radius * torch.where(outside, size, 1.0).rsqrt(), 1.0)


def box(p: Tensor, radius: Tensor | float) -> Tensor:
    """The projection of each component to an interval of half width `radius`; of a complex number to a disc, which keeps its phase."""
    if p.is_complex():
        return ball(p[..., None], radius[..., None] if isinstance(radius, Tensor) else radius, -1)[..., 0]
    radius = torch.as_tensor(radius, dtype=p.dtype, device=p.device)
    return torch.minimum(torch.maximum(p, -radius), radius)
