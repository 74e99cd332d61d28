"""Lattices: all combinations of one list of coordinates for each axis, such as the pixels of a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
        """Nodes at whole numbers: the centres of the pixels of a picture, in pixels."""
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
        """All nodes, in row-major order."""
        return torch.stack(torch.meshgrid(*self.axes, indexing="ij"), -1).flatten(0, -2)

    def subset(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random indices for each axis that select about `n` nodes. The selected share is the same for every axis."""
        share = min(1.0, (n / len(self)) ** (1 / self.ndim))
        return tuple(
            torch.randperm(m, generator=generator)[: max(1, round(share * m))].sort().values for m in self.shape
        )

    def flat_index(self, index: tuple[Tensor, ...]) -> Tensor:  # -> (N',)
        """Row numbers in :meth:`points` of the nodes that are selected by indices for each axis."""
        out = torch.zeros((), dtype=torch.long, device=index[0].device)
        for n, i in zip(self.shape, index, strict=True):
            out = out[..., None] * n + i
        return out.flatten()

    def jittered(self, n: int, generator: torch.Generator) -> Lattice:
        """About `n` points between the nodes: a random subset of each axis, with each coordinate moved by up to half a cell."""
        index = self.subset(n, generator)
        return self.map(lambda i, axis: _moved(axis, index[i], generator))

    def nearest(self, x: Tensor | Lattice) -> Tensor:  # (N', d) or a lattice -> (N',)
        """Row numbers in :meth:`points` of the nodes nearest to the points `x`."""
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
    """Distances between neighbours, with a zero added at both ends, so that no point is moved outside the lattice."""
    return F.pad(axis.diff(), (1, 1))


def gaussian_mean(image: Tensor, window: float) -> Tensor:  # (n_1, ..., n_d, C) -> the same
    """Gaussian mean over neighbouring nodes, with a standard deviation of `window` nodes, mirrored at the border."""
    if window <= 0:
        return image
    for i in range(image.ndim - 1):
        radius = min(math.ceil(3 * window), image.shape[i] - 1)
        at = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
        kernel = torch.exp(-(at**2) / (2 * window**2))
        front = image.movedim(i, -1)
        rows = F.pad(front.reshape(-1, 1, front.shape[-1]), (radius, radius), mode="reflect")
        rows = F.conv1d(rows, (kernel / kernel.sum())[None, None])
        image = rows.reshape(front.shape).movedim(-1, i)
    return image
