r"""Derivative penalties: total variation of a field's exact derivatives (NeurTV :cite:p:`Luo2025`) and its relatives.

Every penalty is the **mean over regularisation points of the sum over channels** (a norm over channels where the name says
so) of derivatives in box units, homogeneous of degree one in the field (but for :class:`Eikonal`, which fixes its scale). A penalty says which jet it wants
(:attr:`order`, :attr:`directions`) and scores it. Norms take the zero subgradient at zero: there is no hidden eps.
:data:`PENALTIES` names those that need no further input.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neurst.core.jet import Jet, pair_directions, polarise
from neurst.core.lattice import Lattice, jet_at, smooth

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

    def at(self, x: Tensor | Lattice) -> Penalty:
        """The penalty bound to points `x`: itself, unless it varies in space."""
        return self

    def channels(self, n: int, d: int) -> int:
        """Outputs the network needs for a field of `n` channels in `d` dimensions."""
        return n

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> Penalty:
        """The penalty renewed from the current field at points `x`: itself, unless it adapts."""
        return self


def score(penalty: Penalty, field: Callable, x: Tensor | Lattice) -> Tensor:  # -> ()
    """The penalty of a field (tensor or jet in, the same out) at points `x`, (N, d) or a lattice, in box units.

    Examples
    --------
    >>> import torch
    >>> plane = torch.nn.Linear(2, 1)
    >>> x = torch.rand(9, 2)
    >>> bool(torch.isclose(score(IsotropicTV(), plane, x), plane.weight.norm()))
    True
    """
    bound = penalty.at(x)
    like = x if isinstance(x, Tensor) else torch.stack([axis[:1] for axis in x.axes], 1)
    return bound(jet_at(field, x, bound.directions(like), bound.order))


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
    r"""Mean of :math:`w \sum_d \sum_c |D_{v_d} f_c|`, or of :math:`w \sum_d \|M D_{v_d} f\|_2`.

    The paper's rotation and stretch ``diag(a, b) Q(theta)`` are directions ``v_d`` that may differ from point to point.

    Parameters
    ----------
    along
        (D, d), or (D, N, d) for the N points at hand.
    weight
        (N,), or a number.
    metric
        M (C, C): one norm over all channels, so that edges are shared. None leaves each channel its own.
    """

    along: Tensor
    weight: Tensor | float = 1.0
    metric: Tensor | None = None

    def directions(self, x: Tensor) -> Tensor:
        return self.along

    def __call__(self, f: Jet) -> Tensor:
        first = f.derivative(1)
        size = first.abs().sum(-1) if self.metric is None else _norm(first @ self.metric.T, dim=-1)
        return (self.weight * size.sum(0)).mean()


@dataclass(frozen=True)
class WeightedTV(Penalty):
    r"""Mean of :math:`w \sum_c \|\nabla f_c\|_2` with one weight per point, (N,)."""

    weight: Tensor

    def __call__(self, f: Jet) -> Tensor:
        return (self.weight * _norm(f.derivative(1), dim=0).sum(-1)).mean()


def _gradients(field: Callable, x: Tensor | Lattice) -> Tensor:  # -> (N, C, d)
    with torch.no_grad():
        return jet_at(field, x, None, 1).derivative(1).permute(1, 2, 0)


def _structure_tensors(
    g: Tensor, x: Tensor | Lattice, neighbours: int, window: float
) -> Tensor:  # (N, C, d) -> (N, d, d)
    """``sum_c grad f_c grad f_c'`` averaged over near points :cite:p:`Bigun1987`: `neighbours` of them, or a Gaussian `window` of a lattice.

    Orientation without sign: opposite slopes do not cancel.
    """
    tensors = torch.einsum("nci,ncj->nij", g, g)
    if isinstance(x, Lattice):
        return smooth(tensors.reshape(*x.shape, -1), window).reshape(tensors.shape)
    near = torch.cdist(x, x).topk(min(neighbours, len(x)), largest=False).indices
    return tensors[near].mean(1)


def _frames(tensors: Tensor) -> tuple[Tensor, Tensor]:  # (N, d, d) -> (N, d) ascending, (N, d, d)
    """Eigenvalues and eigenvectors (columns) of symmetric matrices."""
    if tensors.shape[-1] == 2:  # closed form: one decomposition per pixel is slow
        p, q, r = tensors[:, 0, 0], tensors[:, 0, 1], tensors[:, 1, 1]
        half, middle = torch.hypot((p - r) / 2, q), (p + r) / 2
        angle = torch.atan2(2 * q, p - r) / 2
        cos, sin = angle.cos(), angle.sin()
        frame = torch.stack([torch.stack([-sin, cos], -1), torch.stack([cos, sin], -1)], -1)
        return torch.stack([middle - half, middle + half], -1), frame
    size, frame = torch.linalg.eigh(tensors.cpu())  # not every device has it
    return size.to(tensors), frame.to(tensors)


def _edge_weight(tensors: Tensor) -> Tensor:  # (M, d, d) -> (M,)
    """``w = c / (m + mean m)`` with mean(w) = 1, m the norm of all gradients: one step of reweighted L1 :cite:p:`Candes2008`."""
    m = tensors.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0).sqrt()
    # in units of the mean; a field without any gradient has weight 1 everywhere
    weight = 1 / (m / torch.where(m.mean() > 0, m.mean(), 1.0) + 1)
    return weight / weight.mean()


def _channel_metric(g: Tensor, least: float = 1e-4) -> Tensor:  # (N, C, d) -> (C, C)
    r"""``M = c G^(-1/4)``, ``G = sum grad f grad f'`` (C, C), c such that the mean square gradient stays as it is.

    It is the metric in which the squared norm bounds the nuclear one, :math:`2 \|J\|_* = \min_M \|M J\|_F^2 + \mathrm{tr}\,M^{-2}` :cite:p:`Holt2014`:
    combinations of channels that vary little, such as differences of colours, may vary less still.
    """
    gram = torch.einsum("nci,nki->ck", g, g)
    size, frame = (part.to(g) for part in torch.linalg.eigh(gram.cpu()))
    if not size[-1] > 0:
        return torch.eye(len(gram), dtype=g.dtype, device=g.device)
    metric = (frame * size.clamp_min(least * size[-1]) ** -0.25) @ frame.T
    return metric * (gram.trace() / (metric @ gram @ metric).trace()).sqrt()


def _nearest(x: Tensor | Lattice, points: Tensor | Lattice) -> Tensor:
    return points.nearest(x) if isinstance(points, Lattice) else torch.cdist(x, points).argmin(1)


@dataclass(frozen=True)
class SpaceVariantTV(Penalty):
    r"""Space-variant directional NeurTV: mean of :math:`w(x) \sum_c (a |D_{u(x)} f_c| + \sum_k b |D_{v_k(x)} f_c|)`.

    At each refresh the structure tensor :math:`T = \sum_c \nabla f_c \nabla f_c^\top` of the current field is averaged over
    near regularisation points, which works on any geometry; other points read the nearest of these. Its eigenvectors give the direction u across
    the edge and v_k along it; ``a = mean|D_v| / mean|D_u|`` (over the whole region) and ``b = 2 - a`` shrink less
    across edges than along them, and ``w = c / (m + mean m)``, m the local norm of all gradients and c such that mean(w) = 1,
    less at strong edges than in flat parts. The weights carry no unit. Before the first refresh, and wherever the field
    has no gradient (0/0 in the demos' rule), the penalty is anisotropic TV.

    Parameters
    ----------
    neighbours
        Points averaged in a structure tensor.
    window
        On a lattice: standard deviation of the Gaussian window of the average instead, in nodes.
    shared
        Take :math:`\|M D f\|_2` over all channels in place of the sum over them, so that edges are shared; ``M = G^(-1/4)`` up to a factor, G the
        channels' Gram matrix of all gradients, as in the nuclear norm. Before the first refresh: vectorial TV.
    """

    neighbours: int = 16
    window: float = 2.0
    shared: bool = False
    points: Tensor | Lattice | None = dataclasses.field(default=None, repr=False)  # (M, d) of the last refresh
    along: Tensor | None = dataclasses.field(default=None, repr=False)  # (d, M, d), the last direction across edges
    weight: Tensor | None = dataclasses.field(default=None, repr=False)  # (M,)
    metric: Tensor | None = dataclasses.field(default=None, repr=False)  # (C, C)

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> SpaceVariantTV:
        g = _gradients(field, x)
        metric = _channel_metric(g) if self.shared else None
        g = g if metric is None else torch.einsum("kc,nci->nki", metric, g)
        tensors = _structure_tensors(g, x, self.neighbours, self.window)
        size, frame = _frames(tensors)
        size, d = size.clamp_min(0).sqrt().mean(0), g.shape[-1]
        a = size[:-1].mean() / size[-1] if d > 1 and size[-1] > 0 else size.new_ones(())
        stretch = torch.cat([(2 - a).expand(d - 1), a[None]])
        along = stretch[:, None, None] * frame.permute(2, 0, 1)
        return dataclasses.replace(self, points=x, along=along, weight=_edge_weight(tensors), metric=metric)

    def at(self, x: Tensor | Lattice) -> Penalty:
        if self.points is None:
            return VectorialTV() if self.shared else AnisotropicTV()
        near = _nearest(x, self.points)
        return DirectionalTV(self.along[:, near], self.weight[near], self.metric)

    def __call__(self, f: Jet) -> Tensor:
        msg = "SpaceVariantTV differs from point to point: use score(penalty, field, x), or penalty.at(x)"
        raise TypeError(msg)


@dataclass(frozen=True)
class EdgeWeightedTV(Penalty):
    r"""Isotropic NeurTV with the weights of :class:`SpaceVariantTV`: mean of :math:`w(x) \sum_c \|\nabla f_c\|_2`."""

    neighbours: int = 16
    window: float = 2.0
    points: Tensor | Lattice | None = dataclasses.field(default=None, repr=False)
    weight: Tensor | None = dataclasses.field(default=None, repr=False)

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> EdgeWeightedTV:
        tensors = _structure_tensors(_gradients(field, x), x, self.neighbours, self.window)
        return dataclasses.replace(self, points=x, weight=_edge_weight(tensors))

    def at(self, x: Tensor | Lattice) -> Penalty:
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
        return _hessian_norm(f).sum(-1).mean()


def _axes(f: Jet) -> int:
    """d of a jet seeded with :func:`pair_directions`: d (d + 1) / 2 of them, the d axes first."""
    n = f.terms.shape[1]
    return next(d for d in range(1, n + 1) if d * (d + 1) // 2 == n)


def _hessian_norm(f: Jet) -> Tensor:  # -> (N, C)
    second, d = f.derivative(2), _axes(f)
    both = 2**0.5 * polarise(second, list(itertools.combinations(range(d), 2)))  # D_i D_j and D_j D_i
    return _norm(torch.cat([second[:d], both]), dim=0)


@dataclass(frozen=True)
class Eikonal(Penalty):
    r"""What makes a field a signed distance: mean of :math:`\sum_c (\|\nabla f_c\|_2 - 1)^2 + (b\,\|\nabla^2 f_c\|_F)^2` :cite:p:`Gropp2020`.

    Where :math:`\|\nabla f\| = 1` the gradient is the normal of the level sets and the Hessian is its Jacobian: the second term is their
    bending energy, the sum of the squared principal curvatures. Not homogeneous: it fixes the scale of f.

    Parameters
    ----------
    bend
        b >= 0, a length in box units.
    """

    bend: float = 0.05
    order: ClassVar[int] = 2

    def __post_init__(self):
        if not 0 <= self.bend < math.inf:
            msg = f"`Eikonal(bend={self.bend!r})`: expected a finite number >= 0"
            raise ValueError(msg)

    def directions(self, x: Tensor) -> Tensor:
        return pair_directions(x.shape[1], x)[0]

    def __call__(self, f: Jet) -> Tensor:
        slope = _norm(f.derivative(1)[: _axes(f)], dim=0)
        return ((slope - 1).square() + (self.bend * _hessian_norm(f)).square()).sum(-1).mean()


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
