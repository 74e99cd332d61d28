"""Observed values and their coordinates, in one form for pictures, point clouds and tissue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.arguments import warn
from neurst.core.lattice import Lattice

MAX_SIDE_RATIO = 50  # of a bounding box; above it, a warning says that the axes may be in different units


@dataclass(frozen=True)
class Box:
    """The map between users' units and the unit box, in which the longest side of the bounding box is [-1, 1]. All axes share one scale.

    Parameters
    ----------
    center
        (d,) float64, in users' units.
    scale
        Length of one box unit in users' units. A k-th derivative in users' units is the one in box units divided by ``scale**k``.
    """

    center: Tensor
    scale: float

    @classmethod
    def of(cls, coords: Tensor | Lattice) -> Box:
        """The box around coordinates (N, d). Warns if one side is over 50 times longer than another."""
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
        if ratio > MAX_SIDE_RATIO:
            sizes = ", ".join(f"{s:.3g}" for s in sides.tolist())
            warn(
                f"the sides of the coordinates' bounding box differ by a factor of {ratio:.3g} ({sizes}): if the axes are "
                "in different units, convert them to one unit first"
            )
        return cls((low + high) / 2, float(sides.max()) / 2)

    def to_unit(self, coords: Tensor | Lattice) -> Tensor | Lattice:  # (N, d) users' units -> box
        """Coordinates in the box."""
        if isinstance(coords, Lattice):
            return coords.map(lambda i, axis: (axis - self.center[i].to(axis)) / self.scale)
        return (coords - self.center.to(coords)) / self.scale

    def from_unit(self, x: Tensor) -> Tensor:  # (N, d) box -> users' units
        """Coordinates in users' units."""
        return x * self.scale + self.center.to(x)

    def to_unit_like(self, coords: Tensor | Lattice, like: Tensor) -> Tensor | Lattice:
        """Coordinates in the box, computed in float64, then converted to the type and the device of the tensor `like`."""
        if isinstance(coords, Lattice):
            return self.to_unit(coords.map(lambda i, axis: axis.double())).map(lambda i, axis: axis.to(like))
        return self.to_unit(coords.double()).to(like)


@dataclass(frozen=True)
class Samples:
    """Observed values at points.

    Parameters
    ----------
    coords
        (N, d) in users' units, or a lattice.
    values
        (N, C), dense or sparse CSR. Of a sparse matrix, only the rows of one batch are made dense at a time.
    weight
        None, or (N, 1) or (N, C): the weight of each entry in the likelihood, 0 for a missing entry.
    offset
        None or (N, 1): a known part of the predictor, such as the logarithm of an exposure or a library size.
    footprint
        None, or (Q, d) in users' units: offsets of equally weighted quadrature points around every coordinate. A value is then
        the mean of the field over these points, such as the area of a spot, instead of the field at the coordinate.
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
        footprint, d = self.footprint, self.n_dims
        if footprint is not None and isinstance(self.coords, Lattice):
            msg = "`footprint` needs coordinates (N, d), not a lattice: pass `lattice.points()`"
            raise ValueError(msg)
        if footprint is not None and (footprint.ndim != 2 or len(footprint) == 0 or footprint.shape[1] != d):
            msg = f"`footprint` has shape {tuple(footprint.shape)}: expected (Q, {d}) with Q >= 1, one row for each offset"
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def n_dims(self) -> int:
        """d, the number of coordinates."""
        return self.coords.ndim if isinstance(self.coords, Lattice) else self.coords.shape[1]

    @property
    def n_channels(self) -> int:
        """C, the number of channels."""
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
    # position of each entry in the stored arrays: the start of its row plus its rank within the row
    rank = torch.arange(len(row), device=index.device) - (count.cumsum(0) - count)[row]
    entry = start[row] + rank
    out = torch.zeros(len(index), values.shape[1], dtype=values.dtype, device=values.device)
    out[row, values.col_indices()[entry]] = values.values()[entry]
    return out


def around(x: Tensor, footprint: Tensor) -> Tensor:  # (N, d), (Q, d) -> (Q N, d)
    """The quadrature points around every point: first those of the first offset, and so on."""
    return (footprint.to(x)[:, None] + x).flatten(0, 1)
