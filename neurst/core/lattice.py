r"""Fields on lattices: the tensor product of one list of coordinates per axis, as pictures and cubes stand on.

A network that is a sum of Tucker products, :math:`f(x) = \mathrm{core} \times_1 U_1(x_1) \cdots \times_d U_d(x_d)`, reads a whole lattice as
d small products, one factor per axis, instead of one evaluation per node; and :math:`D^\alpha f` with the :math:`\alpha_i`-th derivative of
each factor, taken by its own jet. Other networks are read node by node.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurst.core.jet import Jet, seed

Order = tuple[int, ...]  # alpha: how often along each axis


@dataclass(frozen=True, eq=False)
class Lattice:
    """All points whose i-th coordinate is one of ``axes[i]``, in row-major order.

    Parameters
    ----------
    axes
        d ascending lists of coordinates, (n_i,).

    Examples
    --------
    >>> import torch
    >>> Lattice((torch.arange(2.0), torch.arange(3.0))).points().tolist()
    [[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]
    """

    axes: tuple[Tensor, ...]

    @classmethod
    def of_shape(cls, *shape: int) -> Lattice:
        """Nodes at whole numbers: the pixels of an image, in pixels."""
        return cls(tuple(torch.arange(n, dtype=torch.float64) for n in shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_1, ..., n_d)."""
        return tuple(len(axis) for axis in self.axes)

    @property
    def ndim(self) -> int:
        """d."""
        return len(self.axes)

    def __len__(self) -> int:
        return math.prod(self.shape)

    def map(self, function: Callable[[int, Tensor], Tensor]) -> Lattice:
        """The lattice of ``function(i, axes[i])``."""
        return Lattice(tuple(function(i, axis) for i, axis in enumerate(self.axes)))

    def points(self) -> Tensor:  # -> (N, d)
        """Its points."""
        return torch.stack(torch.meshgrid(*self.axes, indexing="ij"), -1).flatten(0, -2)

    def subset(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Indices per axis of about `n` points: the same share of each axis, at random."""
        share = min(1.0, (n / len(self)) ** (1 / self.ndim))
        return tuple(
            torch.randperm(m, generator=generator)[: max(1, round(share * m))].sort().values for m in self.shape
        )

    def flat_index(self, index: tuple[Tensor, ...]) -> Tensor:  # -> (N',)
        """Row numbers in :meth:`points` of a choice of indices per axis."""
        out = torch.zeros((), dtype=torch.long, device=index[0].device)
        for n, i in zip(self.shape, index, strict=True):
            out = out[..., None] * n + i
        return out.flatten()

    def jittered(self, n: int, generator: torch.Generator) -> Lattice:
        """About `n` points anywhere: a subset of each axis, each coordinate moved within its cell."""
        index = self.subset(n, generator)
        return self.map(lambda i, axis: _moved(axis, index[i], generator))

    def nearest(self, x: Tensor | Lattice) -> Tensor:  # (N', d) or a lattice -> (N',)
        """Row numbers in :meth:`points` of the nodes nearest to other points."""
        there = x.axes if isinstance(x, Lattice) else x.unbind(1)
        index = [torch.bucketize(b.contiguous(), (a[1:] + a[:-1]) / 2) for a, b in zip(self.axes, there, strict=True)]
        if isinstance(x, Lattice):
            return self.flat_index(tuple(index))
        out = torch.zeros_like(index[0])
        for n, i in zip(self.shape, index, strict=True):
            out = out * n + i
        return out


def _moved(axis: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    u = torch.rand(len(index), generator=generator, dtype=axis.dtype).to(axis.device) - 0.5
    index = index.to(axis.device)
    return torch.where(u < 0, axis[index] + u * _gaps(axis)[index], axis[index] + u * _gaps(axis)[index + 1])


def _gaps(axis: Tensor) -> Tensor:
    """Distances between neighbours, with zero at both ends: nothing is drawn outside the lattice."""
    return F.pad(axis.diff(), (1, 1))


@dataclass(frozen=True, eq=False)
class Taps:
    """A factor (n, r) with few entries per row: ``U[i, index[i, k]] = weight[i, k]``."""

    index: Tensor  # (n, k)
    weight: Tensor  # (n, k)

    def __matmul__(self, right: Tensor) -> Tensor:  # (r, m) -> (n, m)
        return F.embedding_bag(self.index, right, per_sample_weights=self.weight, mode="sum")


def _contract(core: Tensor, factor: Tensor | Taps, axis: int) -> Tensor:  # (.., r, .., C) -> (.., n, .., C)
    front = core.movedim(axis, 0)
    return (factor @ front.flatten(1)).unflatten(1, front.shape[1:]).movedim(0, axis)


def _tucker(term: nn.Module, lattice: Lattice, orders: Iterable[Order]) -> dict[Order, Tensor]:
    """``D^alpha`` of one Tucker product; products of leading axes are shared between orders."""
    orders = list(orders)
    highest = [max(alpha[i] for alpha in orders) for i in range(lattice.ndim)]
    partial: dict[Order, Tensor] = {(): term.tensor()}
    for i, axis in enumerate(lattice.axes):
        factors = term.along(i, axis[:, None], highest[i])
        heads = {alpha[: i + 1] for alpha in orders}
        partial = {head: _contract(partial[head[:-1]], factors[head[-1]], i) for head in sorted(heads)}
    return partial


def partials(net: Callable, lattice: Lattice, orders: Iterable[Order]) -> dict[Order, Tensor]:
    r"""Partial derivatives :math:`D^\alpha f` of a network on a lattice.

    Parameters
    ----------
    net
        A network of :mod:`neurst.core.nets`, or any function of tensors and jets.
    lattice
        In the box.
    orders
        The multi-indices :math:`\alpha`, d whole numbers each.

    Returns
    -------
    dict
        (N, C) for each of them, points in row-major order.
    """
    orders = list(orders)
    terms = getattr(net, "tucker_terms", None)
    if terms is None:
        return _partials_at_points(net, lattice.points(), orders)
    parts = [_tucker(term, lattice, orders) for term in terms()]
    bias = getattr(net, "bias", None)
    out = {alpha: sum(part[alpha] for part in parts).flatten(0, -2) for alpha in orders}
    return {alpha: f + bias if bias is not None and not any(alpha) else f for alpha, f in out.items()}


def _partials_at_points(net: Callable, x: Tensor, orders: list[Order]) -> dict[Order, Tensor]:
    if not any(map(any, orders)):
        return dict.fromkeys(orders, net(x))
    if any(sum(alpha) > 1 and max(alpha) < sum(alpha) for alpha in orders):
        msg = f"mixed derivatives {orders} are read along directions, not as partials, off Tucker networks"
        raise TypeError(msg)
    jet = net(seed(x, order=max(map(sum, orders))))
    read = {alpha: (sum(alpha), max(range(len(alpha)), key=alpha.__getitem__)) for alpha in orders}
    return {alpha: jet.derivative(k)[i] if k else jet.value for alpha, (k, i) in read.items()}


def value_at(net: Callable, x: Tensor | Lattice) -> Tensor:  # -> (N, C)
    """The network at points (N, d) or on a lattice."""
    if isinstance(x, Tensor):
        return net(x)
    zero = (0,) * x.ndim
    return partials(net, x, [zero])[zero]


def jet_at(net: Callable, x: Tensor | Lattice, directions: Tensor | None, order: int) -> Jet:
    r"""The jet of a network at points or on a lattice, (D, d) or (D, N, d) directions, the axes if None.

    On a lattice the k-th coefficient is :math:`\sum_{|\alpha| = k} \tfrac{v^\alpha}{\alpha!} D^\alpha f`.
    """
    if isinstance(x, Tensor) or getattr(net, "tucker_terms", None) is None:
        return net(seed(x if isinstance(x, Tensor) else x.points(), directions, order))
    if directions is None:
        directions = torch.eye(x.ndim, dtype=x.axes[0].dtype, device=x.axes[0].device)
    v = directions if directions.ndim == 3 else directions[:, None]  # (D, N or 1, d)
    varies = v.shape[1] > 1
    used = [alpha for alpha in _orders(x.ndim, order) if varies or bool(_monomial(v, alpha).any())]
    found = partials(net, x, [(0,) * x.ndim, *used])
    terms = []
    for k in range(1, order + 1):
        parts = [_monomial(v, a)[..., None] * found[a] for a in used if sum(a) == k]
        terms.append(sum(parts[1:], start=parts[0]))
    return Jet(found[(0,) * x.ndim], torch.stack(terms))


def _orders(d: int, order: int) -> list[Order]:
    """Multi-indices of 1 to `order`."""
    return [alpha for alpha in itertools.product(range(order + 1), repeat=d) if 1 <= sum(alpha) <= order]


def _monomial(v: Tensor, alpha: Order) -> Tensor:  # (D, N, d) -> (D, N)
    r""":math:`v^\alpha / \alpha!`."""
    powers = [v[..., i] ** a / math.factorial(a) for i, a in enumerate(alpha) if a]
    return math.prod(powers[1:], start=powers[0])


def smooth(image: Tensor, window: float) -> Tensor:  # (n_1, ..., n_d, C) -> the same
    """Gaussian mean over near nodes, of standard deviation `window` nodes, mirrored at the border."""
    if window <= 0:
        return image
    for i in range(image.ndim - 1):
        reach = min(math.ceil(3 * window), image.shape[i] - 1)
        at = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
        kernel = torch.exp(-(at**2) / (2 * window**2))
        front = image.movedim(i, -1)
        rows = F.pad(front.reshape(-1, 1, front.shape[-1]), (reach, reach), mode="reflect")
        rows = F.conv1d(rows, (kernel / kernel.sum())[None, None])
        image = rows.reshape(front.shape).movedim(-1, i)
    return image
