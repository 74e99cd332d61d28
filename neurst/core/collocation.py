"""Regularisation points, at which penalties are evaluated. New points are drawn for every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.lattice import Lattice


@dataclass(frozen=True)
class PointCollocation:
    """Regularisation points for scattered data.

    A share `near` of the points lies at a data point plus Gaussian jitter. The others lie anywhere in the bounding box, so that the
    field is also regularised in gaps between data points.

    Parameters
    ----------
    points
        (N, d) data points in box units.
    jitter
        Standard deviation in box units.
    near
        Share of points near data.
    """

    points: Tensor
    jitter: float
    near: float = 0.5

    def draw(self, n: int, generator: torch.Generator) -> Tensor:  # -> (n, d)
        """`n` regularisation points in box units."""
        d, m = self.points.shape[1], round(n * self.near)
        kind = {"generator": generator, "dtype": self.points.dtype}
        low, high = self.points.amin(0).cpu(), self.points.amax(0).cpu()
        pick = torch.randint(len(self.points), (m,), generator=generator)
        near = self.points[pick.to(self.points.device)] + self.jitter * torch.randn(m, d, **kind).to(self.points)
        anywhere = low + (high - low) * torch.rand(n - m, d, **kind)
        return torch.cat([near, anywhere.to(self.points)])

    def refresh_points(self, n: int, generator: torch.Generator) -> Tensor:  # -> (n, d)
        """Points at which an adaptive penalty evaluates the field when it is refreshed."""
        return self.draw(n, generator)


@dataclass(frozen=True)
class LatticeCollocation:
    """Regularisation points for data on a lattice. They cover the whole lattice, including nodes without data.

    Parameters
    ----------
    lattice
        Nodes in box units.
    """

    lattice: Lattice

    def draw(self, n: int, generator: torch.Generator) -> Lattice:
        """About `n` regularisation points: some rows and columns, each moved at random towards the next one."""
        return self.lattice.jittered(n, generator)

    def refresh_points(self, n: int, generator: torch.Generator) -> Lattice:
        """Points at which an adaptive penalty evaluates the field when it is refreshed: all nodes."""
        return self.lattice


def typical_spacing(x: Tensor, generator: torch.Generator, *, n_probe: int = 256) -> float:
    """Median distance from a point to the nearest point at another position, estimated from `n_probe` of the points (N, d)."""
    probe = x[torch.randint(len(x), (n_probe,), generator=generator)]
    nearest = []
    for part in probe.split(32):
        same = (part[:, None] == x).all(-1)
        nearest.append(torch.cdist(part, x).masked_fill_(same, torch.inf).amin(1))
    distance = torch.cat(nearest)
    finite = distance[torch.isfinite(distance)]
    return float(finite.median()) if len(finite) else 1.0
