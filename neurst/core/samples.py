r"""Samples: where images, point clouds and tissue meet; and the box between users' units and the network's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.lattice import Lattice


@dataclass(frozen=True)
class Box:
    """Users' units <-> the unit box: the longest side of the bounding box becomes [-1, 1], one scale for all axes.

    Parameters
    ----------
    center
        (d,) float64, users' units.
    scale
        Users' units per box unit. A k-th derivative in users' units is the box one divided by ``scale**k``.
    """

    center: Tensor
    scale: float

    @classmethod
    def of(cls, coords: Tensor | Lattice) -> Box:
        """The box around coordinates (N, d). Warns if one axis is over 50 times longer than another."""
        if isinstance(coords, Lattice):
            coords = torch.stack([torch.stack([axis.min(), axis.max()]) for axis in coords.axes], 1)
        coords = coords.double()
        bad = torch.nonzero(~coords.isfinite().all(1))
        if len(bad):
            msg = f"coordinates are not finite at {len(bad)} of {len(coords)} points (first: {int(bad[0])}): drop them before fitting"
            raise ValueError(msg)
        low, high = coords.min(0).values, coords.max(0).values
        sides = high - low
        if not sides.max() > 0:
            msg = f"all {len(coords)} coordinates are the same point: a field needs points apart from each other"
            raise ValueError(msg)
        ratio = float(sides.max() / sides.min())
        if ratio > 50:
            sizes = ", ".join(f"{s:.3g}" for s in sides.tolist())
            warnings.warn(
                f"the sides of the coordinates' bounding box differ by a factor of {ratio:.3g} ({sizes}): if the axes are "
                "in different units, convert them to one unit first",
                UserWarning,
                stacklevel=2,
            )
        return cls((low + high) / 2, float(sides.max()) / 2)

    def inward(self, coords: Tensor | Lattice) -> Tensor | Lattice:  # (N, d) users' units -> box
        """Coordinates in the box."""
        if isinstance(coords, Lattice):
            return coords.map(lambda i, axis: (axis - self.center[i].to(axis)) / self.scale)
        return (coords - self.center.to(coords)) / self.scale

    def outward(self, x: Tensor) -> Tensor:  # (N, d) box -> users' units
        """Coordinates in users' units."""
        return x * self.scale + self.center.to(x)


@dataclass(frozen=True)
class Samples:
    """Observed values at points.

    Parameters
    ----------
    coords
        (N, d) in users' units, or a lattice.
    values
        (N, C), dense, or sparse CSR: only the rows of a batch are ever made dense.
    weight
        None, or (N, 1) or (N, C): 0 marks a missing entry, other values weigh it.
    offset
        None or (N, 1): a known part of the predictor, such as the log of an exposure or a library size.
    footprint
        None, or (Q, d) in users' units: offsets of equally weighted quadrature points around every coordinate. A value is then
        the mean of the field over them, that of an area, instead of its value at the coordinate.
    """

    coords: Tensor | Lattice
    values: Tensor
    weight: Tensor | None = None
    offset: Tensor | None = None
    footprint: Tensor | None = None

    def __post_init__(self):
        n = len(self.coords)
        for name in ("values", "weight", "offset"):
            part = getattr(self, name)
            if part is not None and (part.ndim != 2 or len(part) != n):
                msg = f"`{name}` has shape {tuple(part.shape)}: expected ({n}, channels), one row for each coordinate"
                raise ValueError(msg)
        spread, d = self.footprint, self.n_dims
        if spread is not None and isinstance(self.coords, Lattice):
            msg = "`footprint` serves coordinates (N, d), not a lattice: pass `lattice.points()`"
            raise ValueError(msg)
        if spread is not None and (spread.ndim != 2 or len(spread) == 0 or spread.shape[1] != d):
            msg = f"`footprint` has shape {tuple(spread.shape)}: expected (Q, {d}) with Q >= 1, one row for each offset"
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def n_dims(self) -> int:
        """d."""
        return self.coords.ndim if isinstance(self.coords, Lattice) else self.coords.shape[1]

    @property
    def n_channels(self) -> int:
        """C."""
        return self.values.shape[1]


def rows(values: Tensor, index: Tensor | None) -> Tensor:
    """Dense rows of a dense or CSR matrix; all of them if `index` is None."""
    if values.layout != torch.sparse_csr:
        return values if index is None else values[index]
    if index is None:
        return values.to_dense()
    start, stop = values.crow_indices()[index], values.crow_indices()[index + 1]
    count = stop - start
    row = torch.repeat_interleave(torch.arange(len(index), device=index.device), count)
    # position of each entry in the stored arrays: the start of its row plus its rank within it
    rank = torch.arange(len(row), device=index.device) - (count.cumsum(0) - count)[row]
    entry = start[row] + rank
    out = torch.zeros(len(index), values.shape[1], dtype=values.dtype, device=values.device)
    out[row, values.col_indices()[entry]] = values.values()[entry]
    return out


def typical_spacing(x: Tensor, generator: torch.Generator, *, n_probe: int = 256) -> float:
    """Median distance to the nearest other position, from a random subset of points (N, d)."""
    probe = x[torch.randint(len(x), (n_probe,), generator=generator)]
    distance = torch.cat(
        [torch.cdist(part, x).masked_fill_(_same(part, x), torch.inf).amin(1) for part in probe.split(32)]
    )
    finite = distance[torch.isfinite(distance)]
    return float(finite.median()) if len(finite) else 1.0


def _same(part: Tensor, x: Tensor) -> Tensor:
    return (part[:, None, :] == x[None, :, :]).all(-1)


@dataclass(frozen=True)
class Region:
    """Where a field may be read, as the distribution that regularisation points are drawn from.

    A share `near` of the points lies at a data point plus Gaussian jitter, the rest anywhere in the bounding box: drawn only
    near data, gaps would not be regularised.

    Parameters
    ----------
    points
        (N, d) data points in the box.
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

    def survey(self, n: int, generator: torch.Generator) -> Tensor:  # -> (n, d)
        """The points an adaptive penalty looks at."""
        return self.draw(n, generator)


@dataclass(frozen=True)
class Cells:
    """Where a field on a lattice may be read: the region between its nodes, even where some of them are not observed.

    Parameters
    ----------
    lattice
        In the box.
    """

    lattice: Lattice

    def draw(self, n: int, generator: torch.Generator) -> Lattice:
        """About `n` regularisation points: some rows and columns, each moved within its cell."""
        return self.lattice.jittered(n, generator)

    def survey(self, n: int, generator: torch.Generator) -> Lattice:
        """The points an adaptive penalty looks at: all nodes."""
        return self.lattice
