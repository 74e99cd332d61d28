r"""Derivative penalties: total variation of a field's exact derivatives (NeurTV :cite:p:`Luo2025`) and its relatives.

Every penalty is the **mean over regularisation points of the sum over channels** (a norm over channels where the name says
so) of derivatives in box units, homogeneous of degree one in the field. A penalty says which jet it wants
(:attr:`order`, :attr:`directions`) and scores it. Norms take the zero subgradient at zero: there is no hidden eps.
:data:`PENALTIES` names those that need no further input.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neurst.core.jet import Jet, jacobian, pair_directions, polarise, seed

_norm = torch.linalg.vector_norm


class Penalty(ABC):
    """Scores a jet; the hooks below have defaults that serve most penalties."""

    order: ClassVar[int] = 1

    @abstractmethod
    def __call__(self, f: Jet) -> Tensor:  # -> ()
        """The penalty of a jet seeded with :attr:`order` and :meth:`directions`."""

    def directions(self, x: Tensor) -> Tensor | None:
        """Seed directions at points `x` (N, d): (D, d) or (D, N, d); None for the coordinate axes."""
        return None

    def at(self, x: Tensor) -> Penalty:
        """The penalty bound to points `x`: itself, unless it varies in space."""
        return self

    def channels(self, n: int, d: int) -> int:
        """Outputs the network needs for a field of `n` channels in `d` dimensions."""
        return n

    def refreshed(self, field: Callable, x: Tensor) -> Penalty:
        """The penalty renewed from the current field at points `x`: itself, unless it adapts."""
        return self


def score(penalty: Penalty, field: Callable, x: Tensor) -> Tensor:  # -> ()
    """The penalty of a field (tensor or jet in, the same out) at points `x` (N, d) in box units.

    Examples
    --------
    >>> import torch
    >>> plane = torch.nn.Linear(2, 1)
    >>> x = torch.rand(9, 2)
    >>> bool(torch.isclose(score(IsotropicTV(), plane, x), plane.weight.norm()))
    True
    """
    bound = penalty.at(x)
    return bound(field(seed(x, bound.directions(x), bound.order)))


@dataclass(frozen=True)
class AnisotropicTV(Penalty):
    r"""Mean of :math:`\sum_c \sum_i |D_i f_c|`."""

    def __call__(self, f: Jet) -> Tensor:
        return f.derivative(1).abs().sum((0, -1)).mean()


@dataclass(frozen=True)
class IsotropicTV(Penalty):
    r"""Mean of :math:`\sum_c \|\nabla f_c\|_2`: each channel has its own edges."""

    def __call__(self, f: Jet) -> Tensor:
        return _norm(f.derivative(1), dim=0).sum(-1).mean()


@dataclass(frozen=True)
class VectorialTV(Penalty):
    r"""Mean of :math:`\|\nabla f\|_F`, one root over all channels: edges are shared."""

    def __call__(self, f: Jet) -> Tensor:
        return _norm(f.derivative(1), dim=(0, -1)).mean()


@dataclass(frozen=True)
class NuclearTV(Penalty):
    r"""Total nuclear variation: mean of :math:`\|J f\|_*`, the singular values of the Jacobian (C, d) summed :cite:p:`Holt2014`.

    Convex, and the same in every rotated frame of the coordinates and of the channels. Among fields of the same :math:`\|J f\|_F` it
    is least where all channels vary along one direction: edges and layers are shared.
    """

    def __call__(self, f: Jet) -> Tensor:
        return _nuclear_norms(f.derivative(1)).mean()


def _nuclear_norms(derivative: Tensor, least: float = 1e-3) -> Tensor:  # (d, N, C) -> (N,)
    """``tr G^(1/2)``, ``G = J'J``, whose slope is ``G^(-1/2) / 2``; a singular value below `least` of the largest takes slope 0."""
    gram = torch.einsum("inc,jnc->nij", derivative, derivative)
    size, frame = (part.to(gram) for part in torch.linalg.eigh(gram.detach().cpu()))  # not every device has it
    root = size.clamp_min(0).sqrt()
    inverse = torch.where(root > least * root[:, -1:], 1 / root, 0.0)
    slope = (frame * inverse[:, None]) @ frame.mT / 2
    return root.sum(-1) + ((gram - gram.detach()) * slope).sum((-2, -1))


@dataclass(frozen=True)
class DirectionalTV(Penalty):
    r"""Mean of :math:`w \sum_c \sum_d |D_{v_d} f_c|`.

    The paper's rotation and stretch ``diag(a, b) Q(theta)`` are directions ``v_d`` that may differ from point to point.

    Parameters
    ----------
    along
        (D, d), or (D, N, d) for the N points at hand.
    weight
        (N,), or a number.
    """

    along: Tensor
    weight: Tensor | float = 1.0

    def directions(self, x: Tensor) -> Tensor:
        return self.along

    def __call__(self, f: Jet) -> Tensor:
        return (self.weight * f.derivative(1).abs().sum((0, -1))).mean()


@dataclass(frozen=True)
class WeightedTV(Penalty):
    r"""Mean of :math:`w \sum_c \|\nabla f_c\|_2` with one weight per point, (N,)."""

    weight: Tensor

    def __call__(self, f: Jet) -> Tensor:
        return (self.weight * _norm(f.derivative(1), dim=0).sum(-1)).mean()


def _structure_tensors(field: Callable, x: Tensor, neighbours: int) -> Tensor:  # -> (M, d, d)
    """``sum_c grad f_c grad f_c'`` at points `x` (M, d), averaged over the nearest of them :cite:p:`Bigun1987`.

    Orientation without sign: opposite slopes do not cancel.
    """
    with torch.no_grad():
        g = jacobian(field, x)
        near = torch.cdist(x, x).topk(min(neighbours, len(x)), largest=False).indices
        return torch.einsum("nci,ncj->nij", g, g)[near].mean(1)


def _edge_weight(tensors: Tensor) -> Tensor:  # (M, d, d) -> (M,)
    """``w = c / (m + mean m)`` with mean(w) = 1, m the norm of all gradients: one step of reweighted L1 :cite:p:`Candes2008`."""
    m = tensors.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0).sqrt()
    # in units of the mean; a field without any gradient has weight 1 everywhere
    weight = 1 / (m / torch.where(m.mean() > 0, m.mean(), 1.0) + 1)
    return weight / weight.mean()


def _nearest(x: Tensor, points: Tensor) -> Tensor:
    return torch.cdist(x, points).argmin(1)


@dataclass(frozen=True)
class SpaceVariantTV(Penalty):
    r"""Space-variant directional NeurTV: mean of :math:`w(x) \sum_c (a |D_{u(x)} f_c| + \sum_k b |D_{v_k(x)} f_c|)`.

    At each refresh the structure tensor :math:`T = \sum_c \nabla f_c \nabla f_c^\top` of the current field is averaged over
    the `neighbours` nearest regularisation points, which works on any geometry; other points read the nearest of these. Its eigenvectors give the direction u across
    the edge and v_k along it; ``a = mean|D_v| / mean|D_u|`` (over the whole region) and ``b = 2 - a`` shrink less
    across edges than along them, and ``w = c / (m + mean m)``, m the local norm of all gradients and c such that mean(w) = 1,
    less at strong edges than in flat parts. The weights carry no unit. Before the first refresh, and wherever the field
    has no gradient (0/0 in the demos' rule), the penalty is anisotropic TV.

    Parameters
    ----------
    neighbours
        Points averaged in a structure tensor.
    """

    neighbours: int = 16
    points: Tensor | None = dataclasses.field(default=None, repr=False)  # (M, d) of the last refresh
    along: Tensor | None = dataclasses.field(default=None, repr=False)  # (d, M, d), the last direction across edges
    weight: Tensor | None = dataclasses.field(default=None, repr=False)  # (M,)

    def refreshed(self, field: Callable, x: Tensor) -> SpaceVariantTV:
        tensors = _structure_tensors(field, x, self.neighbours)
        size, frame = (part.to(x) for part in torch.linalg.eigh(tensors.cpu()))  # ascending; not every device has it
        size, d = size.clamp_min(0).sqrt().mean(0), x.shape[1]
        a = size[:-1].mean() / size[-1] if d > 1 and size[-1] > 0 else size.new_ones(())
        stretch = torch.cat([(2 - a).expand(d - 1), a[None]])
        along = stretch[:, None, None] * frame.permute(2, 0, 1)
        return dataclasses.replace(self, points=x, along=along, weight=_edge_weight(tensors))

    def at(self, x: Tensor) -> Penalty:
        if self.points is None:
            return AnisotropicTV()
        near = _nearest(x, self.points)
        return DirectionalTV(self.along[:, near], self.weight[near])

    def __call__(self, f: Jet) -> Tensor:
        msg = "SpaceVariantTV differs from point to point: use score(penalty, field, x), or penalty.at(x)"
        raise TypeError(msg)


@dataclass(frozen=True)
class EdgeWeightedTV(Penalty):
    r"""Isotropic NeurTV with the weights of :class:`SpaceVariantTV`: mean of :math:`w(x) \sum_c \|\nabla f_c\|_2`."""

    neighbours: int = 16
    points: Tensor | None = dataclasses.field(default=None, repr=False)
    weight: Tensor | None = dataclasses.field(default=None, repr=False)

    def refreshed(self, field: Callable, x: Tensor) -> EdgeWeightedTV:
        return dataclasses.replace(self, points=x, weight=_edge_weight(_structure_tensors(field, x, self.neighbours)))

    def at(self, x: Tensor) -> Penalty:
        return IsotropicTV() if self.points is None else WeightedTV(self.weight[_nearest(x, self.points)])

    def __call__(self, f: Jet) -> Tensor:
        msg = "EdgeWeightedTV differs from point to point: use score(penalty, field, x), or penalty.at(x)"
        raise TypeError(msg)


@dataclass(frozen=True)
class HigherOrderTV(Penalty):
    r"""Mean of :math:`\sum_c \sum_i |D_i^k f_c|`, k-th derivatives along the axes.

    Parameters
    ----------
    order
        k >= 1; 2 removes the staircase on ramps.
    """

    order: int = 2

    def __post_init__(self):
        if not (isinstance(self.order, int) and self.order >= 1):
            msg = f"`HigherOrderTV(order={self.order!r})`: expected a whole number >= 1"
            raise ValueError(msg)

    def __call__(self, f: Jet) -> Tensor:
        return f.derivative(self.order).abs().sum((0, -1)).mean()


@dataclass(frozen=True)
class HessianTV(Penalty):
    r"""Mean of :math:`\sum_c \|\nabla^2 f_c\|_F`: second order, the same in every rotated frame."""

    order: ClassVar[int] = 2

    def directions(self, x: Tensor) -> Tensor:
        return pair_directions(x.shape[1], x)[0]

    def __call__(self, f: Jet) -> Tensor:
        second = f.derivative(2)
        pairs = _pairs_of(len(second))
        d = len(second) - len(pairs)
        both = 2**0.5 * polarise(second, pairs)  # D_i D_j and D_j D_i
        return _norm(torch.cat([second[:d], both]), dim=0).sum(-1).mean()


def _pairs_of(n_directions: int) -> list[tuple[int, int]]:
    d = next(d for d in range(1, n_directions + 1) if d * (d + 1) // 2 == n_directions)
    return [(i, j) for i in range(d) for j in range(i + 1, d)]


@dataclass(frozen=True)
class MixedTV(Penalty):
    r"""NeurSSTV for cubes: mean of :math:`\sum_c \sum_{i<d} (|D_i D_d f_c| + \epsilon |D_i f_c|)`, axis d the spectrum.

    Parameters
    ----------
    first_order
        :math:`\epsilon`, the share of the plain spatial variation; 0.1 in the paper.
    """

    first_order: float = 0.1
    order: ClassVar[int] = 2

    def directions(self, x: Tensor) -> Tensor:
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return torch.cat([eye, eye[:-1] + eye[-1]])

    def __call__(self, f: Jet) -> Tensor:
        first, second = f.derivative(1), f.derivative(2)
        d = (len(first) + 1) // 2
        mixed = (second[d:] - second[: d - 1] - second[d - 1]) / 2  # polarisation against the last axis
        return (mixed.abs() + self.first_order * first[: d - 1].abs()).sum((0, -1)).mean()


@dataclass(frozen=True)
class TGV(Penalty):
    r"""Neural total generalised variation of second order :cite:p:`Bredies2010`.

    Mean of :math:`\sum_c a_1 \|\nabla f_c - w_c\|_2 + a_0 \|\tfrac12 (\nabla w_c + \nabla w_c^\top)\|_F`, minimised over a second
    field :math:`w_c: R^d \to R^d` that the network gives as further channels: outputs are f (C), then w (C d, channel-major).

    Parameters
    ----------
    a1, a0
        Weights of the two terms; ``a0 / a1`` is a length in box units below which slopes may bend freely.
    """

    a1: float = 1.0
    a0: float = 0.2

    def channels(self, n: int, d: int) -> int:
        return n * (1 + d)

    def __call__(self, f: Jet) -> Tensor:
        d = len(f.terms[0])
        n = f.shape[-1] // (1 + d)
        first = f.derivative(1)
        w = f.value[..., n:].unflatten(-1, (n, d))  # (N, C, d)
        grad_w = first[..., n:].unflatten(-1, (n, d)).permute(1, 2, 0, 3)  # (N, C, d, d)
        slope = _norm(first[..., :n].permute(1, 2, 0) - w, dim=-1)
        bend = _norm((grad_w + grad_w.mT) / 2, dim=(-2, -1))
        return (self.a1 * slope + self.a0 * bend).sum(-1).mean()


PENALTIES: dict[str, type[Penalty]] = {
    "nuclear": NuclearTV,
    "isotropic": IsotropicTV,
    "anisotropic": AnisotropicTV,
    "vectorial": VectorialTV,
    "space_variant": SpaceVariantTV,
    "edge_weighted": EdgeWeightedTV,
    "second_order": HigherOrderTV,
    "hessian": HessianTV,
    "mixed": MixedTV,
    "tgv": TGV,
}


def as_penalty(penalty: str | Penalty) -> Penalty:
    """The penalty behind a name, or the penalty itself.

    Raises
    ------
    ValueError
        If the name is none of :data:`PENALTIES`.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if penalty not in PENALTIES:
        msg = f"`penalty={penalty!r}` is unknown: choose one of {sorted(PENALTIES)}, or pass a Penalty"
        raise ValueError(msg)
    return PENALTIES[penalty]()
