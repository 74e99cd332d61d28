"""Adaptive total variations: their weights and directions vary in space and are updated from the field during the fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.arguments import FLAG, check_fields, number, whole
from neurst.core.jet import Jet
from neurst.core.lattice import Lattice, gaussian_mean
from neurst.core.penalty.base import PENALTIES, Penalty
from neurst.core.penalty.higher_order import TGV, tgv_terms
from neurst.core.penalty.tv import AnisotropicTV, DirectionalTV, IsotropicTV, VectorialTV, WeightedTV
from neurst.core.tensor_product import jet_at, value_at
from neurst.core.weight_net import pretrained_weight_net


@PENALTIES.register("space_variant")
@dataclass(frozen=True)
class SpaceVariantTV(Penalty):
    r"""Space-variant directional NeurTV: mean of :math:`w(x) \sum_c (a |D_{u(x)} f_c| + \sum_k b |D_{v_k(x)} f_c|)`.

    At each refresh the structure tensor :math:`T = \sum_c \nabla f_c \nabla f_c^\top` of the current field is averaged over neighbouring
    regularisation points, which works for any arrangement of points. Every other point takes the tensor of the nearest regularisation
    point. Its eigenvectors give the direction u across the edge and the directions v_k along it. With ``a = mean|D_v| / mean|D_u|`` (over the
    whole region) and ``b = 2 - a``, variation across edges costs less than variation along them. With ``w = c / (m + mean m)``, where m is the
    local norm of all gradients and c is such that mean(w) = 1, variation at strong edges costs less than in flat parts. The weights have no
    unit. The penalty is anisotropic TV before the first refresh, and where the field has no gradient.

    Parameters
    ----------
    neighbours
        Number of points over which a structure tensor is averaged.
    window
        Standard deviation, in nodes, of the Gaussian average that is used on a lattice instead.
    shared
        Use the norm :math:`\|M D f\|_2` over all channels instead of the sum over channels, so that channels share edges. ``M = G^(-1/4)`` up to a
        factor, where G is the Gram matrix of the gradients of all channels; this is the metric of the nuclear norm. Before the first
        refresh the penalty is then vectorial TV.
    """

    neighbours: int = 16
    window: float = 2.0
    shared: bool = False

    def __post_init__(self):
        check_fields(self, window=number(0), shared=FLAG)

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> Penalty:
        g = _gradients(field, x)
        metric = _channel_metric(g) if self.shared else None
        g = g if metric is None else torch.einsum("kc,nci->nki", metric, g)
        tensors = _structure_tensors(g, x, self.neighbours, self.window)
        size, frame = _frames(tensors)
        size, d = size.clamp_min(0).sqrt().mean(0), g.shape[-1]
        a = size[:-1].mean() / size[-1] if d > 1 and size[-1] > 0 else size.new_ones(())
        factor = torch.cat([(2 - a).expand(d - 1), a[None]])
        along, weight = factor[:, None, None] * frame.permute(2, 0, 1), _edge_weight(tensors)

        def here(points: Tensor | Lattice) -> Penalty:
            near = _nearest(points, x)
            return DirectionalTV(along[:, near], weight[near], metric)

        return Adapted(self, here)

    def at(self, x: Tensor | Lattice) -> Penalty:
        return VectorialTV() if self.shared else AnisotropicTV()

    def __call__(self, f: Jet) -> Tensor:
        raise _differs_in_space(self)


@PENALTIES.register("edge_weighted")
@dataclass(frozen=True)
class EdgeWeightedTV(Penalty):
    r"""Isotropic NeurTV with the weights of :class:`SpaceVariantTV`: mean of :math:`w(x) \sum_c \|\nabla f_c\|_2`.

    Parameters
    ----------
    neighbours, window
        As in :class:`SpaceVariantTV`.
    """

    neighbours: int = 16
    window: float = 2.0

    def __post_init__(self):
        check_fields(self, window=number(0))

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> Penalty:
        weight = _edge_weight(_structure_tensors(_gradients(field, x), x, self.neighbours, self.window))
        return Adapted(self, lambda points: WeightedTV(weight[_nearest(points, x)]))

    def at(self, x: Tensor | Lattice) -> Penalty:
        return IsotropicTV()

    def __call__(self, f: Jet) -> Tensor:
        raise _differs_in_space(self)


@dataclass(frozen=True, eq=False)
class WeightedTGV(Penalty):
    r"""Total generalised variation with weights that vary in space: mean of :math:`\sum_c w_1(x) \|\nabla f_c - w_c\|_2 + w_0(x) \|\tfrac12 (\nabla w_c + \nabla w_c^\top)\|_F`.

    As in :class:`TGV`, the network has w as additional outputs. Every point takes the weights of the nearest of `points`.

    Parameters
    ----------
    points
        (M, d) points, or a lattice, in box units.
    w1, w0
        (M,) weights of the two terms, >= 0. ``w0 / w1`` is a length in box units. With mean(w1) = 1, a strength in nats means the same as for
        constant weights.

    Examples
    --------
    >>> import torch
    >>> points = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])
    >>> penalty = WeightedTGV(points, w1=torch.tensor([1.0, 3.0]), w0=torch.tensor([0.2, 0.2]))
    >>> penalty.at(torch.tensor([[0.7, 0.1], [-0.9, 0.3]])).w1
    tensor([3., 1.])
    """

    points: Tensor | Lattice
    w1: Tensor
    w0: Tensor

    def __post_init__(self):
        for name, weight in (("w1", self.w1), ("w0", self.w0)):
            if weight.shape != (len(self.points),):
                msg = f"`{name}` has shape {tuple(weight.shape)}: expected one weight for each of the {len(self.points)} points"
                raise ValueError(msg)
            if not bool((weight >= 0).all()):
                msg = f"`{name}` has entries down to {float(weight.min()):.3g}: expected weights >= 0"
                raise ValueError(msg)

    def n_outputs(self, n_channels: int, d: int) -> int:
        return n_channels * (1 + d)

    def at(self, x: Tensor | Lattice) -> WeightedTGV:
        near = _nearest(x, self.points)
        return WeightedTGV(x, self.w1[near], self.w0[near])

    def __call__(self, f: Jet) -> Tensor:
        slope, bend = tgv_terms(f)
        return (self.w1[:, None] * slope + self.w0[:, None] * bend).sum(-1).mean()


@PENALTIES.register("learned_tgv")
@dataclass(frozen=True)
class PredictedTGV(Penalty):
    r"""Total generalised variation whose weights :math:`w_1, w_0` a network predicts from the field: mean of :math:`\sum_c w_1(x) \|\nabla f_c - w_c\|_2 + w_0(x) \|\tfrac12 (\nabla w_c + \nabla w_c^\top)\|_F`.

    At each refresh the field is read on a lattice of pitch h, as a picture. The network of the denoiser that ships with the package
    (:class:`neurst.core.weight_net.WeightNet`, :cite:p:`Vu2025`) gives weights :math:`L_1, L_0` in pixels, which are small at edges. Then

    .. math:: w_1 = L_1 / \overline{L_1}, \qquad w_0 = h\, L_0 / \overline{L_1},

    where the bar is the mean over the lattice, so that a strength in nats means the same as for constant weights. The logarithms of the weights are averaged over
    the channels, each with its variance as its weight, and over both signs of a channel, as latent channels have no sign. Before the first
    refresh the penalty is :class:`TGV` with ``a0 = 4 / nodes``. It is for two coordinates.

    Parameters
    ----------
    nodes
        Nodes of the lattice along the longest side of the box; a picture is read at its pixels instead.
    noise
        The noise that the network is told, as a share of the standard deviation of each channel. The larger it is, the higher an edge must be to be one.
    """

    nodes: int = 64
    noise: float = 0.1

    def __post_init__(self):
        check_fields(self, nodes=whole(4), noise=number(0, above=True))

    def n_outputs(self, n_channels: int, d: int) -> int:
        if d != 2:
            msg = f"`penalty='learned_tgv'` reads the field as a picture, so it needs 2 coordinates, and there are {d}: use 'tgv'"
            raise ValueError(msg)
        return n_channels * (1 + d)

    def at(self, x: Tensor | Lattice) -> Penalty:
        return TGV(1.0, 4 / self.nodes)

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> Penalty:
        lattice = x if isinstance(x, Lattice) else self._lattice(x)
        with torch.no_grad():
            values = value_at(field, lattice if isinstance(x, Lattice) else lattice.points())
            values = values[:, : values.shape[1] // (1 + lattice.ndim)]
            pictures = values.T.reshape(-1, 1, *lattice.shape).float()
            variance = pictures.std((1, 2, 3), correction=0, keepdim=True).square()
            varies = variance[:, 0, 0, 0] > 0
            if not varies.any():  # a field that is constant has no edges
                return self
            pictures, variance = pictures[varies], variance[varies]
            net, sd = pretrained_weight_net(), variance.sqrt().cpu()
            logs = sum(net(sign * pictures.cpu(), sd, self.noise * sd) for sign in (1, -1)) / 2
            share = variance.cpu() / variance.cpu().sum()
            first, second = (share * logs).sum(0).exp().flatten(1).to(values)
        weighted = WeightedTGV(lattice, first / first.mean(), _pitch(lattice) * second / first.mean())
        return Adapted(self, weighted.at)

    def __call__(self, f: Jet) -> Tensor:
        raise _differs_in_space(self)

    def _lattice(self, x: Tensor) -> Lattice:
        """The bounding box of points."""
        low, high = x.amin(0), x.amax(0)
        sides = (high - low).tolist()
        shape = [max(4, round(self.nodes * side / (max(sides) or 1.0))) for side in sides]
        return Lattice(tuple(torch.linspace(a, b, n).to(x) for a, b, n in zip(low, high, shape, strict=True)))


@dataclass(frozen=True, eq=False)
class Adapted(Penalty):
    """An adaptive penalty after a refresh.

    Parameters
    ----------
    spec
        The penalty before the refresh, from which the next refresh starts.
    here
        From points to the penalty there, with the weights and directions that were found.
    """

    spec: Penalty
    here: Callable[[Tensor | Lattice], Penalty]

    def n_outputs(self, n_channels: int, d: int) -> int:
        return self.spec.n_outputs(n_channels, d)

    def refreshed(self, field: Callable, x: Tensor | Lattice) -> Penalty:
        return self.spec.refreshed(field, x)

    def at(self, x: Tensor | Lattice) -> Penalty:
        return self.here(x)

    def __call__(self, f: Jet) -> Tensor:
        raise _differs_in_space(self.spec)


def _differs_in_space(penalty: Penalty) -> TypeError:
    return TypeError(
        f"{type(penalty).__name__} differs from point to point: use `evaluate(penalty, field, x)`, or `penalty.at(x)` first"
    )


def _pitch(lattice: Lattice) -> float:
    """Distance between neighbouring nodes along the longest side."""
    sides = [(float(axis[-1] - axis[0]), max(len(axis) - 1, 1)) for axis in lattice.axes]
    length, steps = max(sides)
    return length / steps or 1.0


def _gradients(field: Callable, x: Tensor | Lattice) -> Tensor:  # -> (N, C, d)
    with torch.no_grad():
        return jet_at(field, x, None, 1).derivative(1).permute(1, 2, 0)


def _structure_tensors(g: Tensor, x: Tensor | Lattice, neighbours: int, window: float) -> Tensor:  # -> (N, d, d)
    """``sum_c grad f_c grad f_c'`` of gradients `g` (N, C, d), averaged over near points :cite:p:`Bigun1987`.

    The average is over the nearest `neighbours` points, or on a lattice with a Gaussian `window`. A structure tensor has an orientation but
    no sign, so opposite slopes do not cancel.
    """
    tensors = torch.einsum("nci,ncj->nij", g, g)
    if isinstance(x, Lattice):
        return gaussian_mean(tensors.reshape(*x.shape, -1), window).reshape(tensors.shape)
    near = torch.cdist(x, x).topk(min(neighbours, len(x)), largest=False).indices
    return tensors[near].mean(1)


def _frames(tensors: Tensor) -> tuple[Tensor, Tensor]:  # (N, d, d) -> (N, d) ascending, (N, d, d)
    """Eigenvalues and eigenvectors (columns) of symmetric matrices."""
    if tensors.shape[-1] == 2:  # closed form, because one eigendecomposition for each pixel would be slow
        p, q, r = tensors[:, 0, 0], tensors[:, 0, 1], tensors[:, 1, 1]
        half, middle = torch.hypot((p - r) / 2, q), (p + r) / 2
        angle = torch.atan2(2 * q, p - r) / 2
        cos, sin = angle.cos(), angle.sin()
        frame = torch.stack([torch.stack([-sin, cos], -1), torch.stack([cos, sin], -1)], -1)
        return torch.stack([middle - half, middle + half], -1), frame
    size, frame = torch.linalg.eigh(tensors.cpu())  # some devices lack eigh
    return size.to(tensors), frame.to(tensors)


def _edge_weight(tensors: Tensor) -> Tensor:  # (M, d, d) -> (M,)
    """``w = c / (m + mean m)`` with mean(w) = 1 and m the norm of all gradients, one step of reweighted L1 :cite:p:`Candes2008`."""
    m = tensors.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0).sqrt()
    # m in units of its mean; a field without any gradient gets weight 1 everywhere
    weight = 1 / (m / torch.where(m.mean() > 0, m.mean(), 1.0) + 1)
    return weight / weight.mean()


def _channel_metric(g: Tensor, least: float = 1e-4) -> Tensor:  # (N, C, d) -> (C, C)
    r"""``M = c G^(-1/4)`` with ``G = sum grad f grad f'`` (C, C), where c keeps the mean square gradient as it is.

    In this metric the squared norm bounds the nuclear one, :math:`2 \|J\|_* = \min_M \|M J\|_F^2 + \mathrm{tr}\,M^{-2}` :cite:p:`Holt2014`:
    combinations of channels that vary little, such as differences between colours, are penalised more strongly.
    """
    gram = torch.einsum("nci,nki->ck", g, g)
    size, frame = (part.to(g) for part in torch.linalg.eigh(gram.cpu()))
    if not size[-1] > 0:
        return torch.eye(len(gram), dtype=g.dtype, device=g.device)
    metric = (frame * size.clamp_min(least * size[-1]) ** -0.25) @ frame.T
    return metric * (gram.trace() / (metric @ gram @ metric).trace()).sqrt()


def _nearest(x: Tensor | Lattice, points: Tensor | Lattice) -> Tensor:
    return points.nearest(x) if isinstance(points, Lattice) else torch.cdist(x, points).argmin(1)
