"""Where a field may be evaluated: the region that measured positions support, and lattices of points that fill it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neurst.spatial.geometry import Geometry, distinct, geometry, kd_tree

Lattice = Literal["auto", "hexagonal", "square", "cubic"]
LATTICES: dict[int, tuple[str, ...]] = {2: ("auto", "hexagonal", "square"), 3: ("auto", "cubic")}
UNIT = {"hexagonal": np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]]), "square": np.eye(2), "cubic": np.eye(3)}
MAX_POINTS = 20_000_000  # of a query lattice, unless the caller says otherwise
LEVELS = 16  # heights of a stack at which its area is measured
LEAST_SPACING = 1e-9  # of a query lattice, in support radii
CHUNK = 2_000_000  # most rows of a query lattice in memory together
STACK_SHARE = 0.05  # 3-d positions with fewer distinct heights than this share of their number are a stack of sections
ROUNDING = 1 + 1e-9  # factor on radii, so that rounding does not exclude points at exactly that distance


class TooManyPoints(ValueError):
    """A lattice would have more points than allowed. `count` is an estimate, `most` the limit, `enough` a spacing that respects it."""

    def __init__(self, count: float, spacing: float, most: int, enough: float):
        super().__init__(
            f"a lattice of spacing {spacing:.3g} would have about {count:{',.0f' if count < 1e12 else '.3g'}} points; with a spacing of {enough:.3g} "
            f"it would have less than {most:,}"
        )
        self.count = count


class Support(ABC):
    """The region in which a field may be evaluated.

    Parameters
    ----------
    spots
        (N, d) measured positions.
    pitch
        Typical distance between neighbouring spots; in a stack, within a section.
    radius
        Largest distance of tissue from a measured position; in a stack, within a section.
    """

    spots: NDArray
    pitch: float
    radius: float

    def distance(self, points: ArrayLike) -> NDArray:  # (M, d) -> (M,)
        """Distance to the nearest measured position."""
        return kd_tree(self.spots).query(points)[0]

    @abstractmethod
    def contains(self, points: ArrayLike) -> NDArray:  # (M, d) -> (M,) bool
        """Whether points count as tissue."""

    @abstractmethod
    def restricted_to(self, spots: NDArray) -> Support:
        """The region that some of the spots support, with the same pitch and radius."""

    @abstractmethod
    def lattice(
        self, *, factor: float = 2.0, spacing: float | None = None, kind: Lattice = "auto", max_points: int = MAX_POINTS
    ) -> NDArray:  # -> (M, d)
        """Points of a lattice that lie in the region.

        Parameters
        ----------
        factor
            The spacing is the pitch divided by this.
        spacing
            Distance between neighbouring points in the units of the coordinates, instead of `factor`.
        kind
            ``"auto"`` follows the lattice of the spots if they form one; else it is square (2-d) or cubic (3-d).
        max_points
            Largest number of points.

        Raises
        ------
        TooManyPoints, ValueError
            If there would be more points than `max_points`, or an argument is not valid.
        """


def support_of(coords: ArrayLike, radius: float | None = None) -> Support:
    """The region that positions (N, d) support. If `radius` is None, it is the support radius of :class:`neurst.spatial.geometry.Geometry`.

    Positions in 3-d with few distinct heights are a stack of sections, with tissue between the sections but not above or below them.
    All others are a cloud, with tissue around every position.

    Examples
    --------
    >>> section = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), axis=-1).reshape(-1, 2)
    >>> stack = np.concatenate([np.column_stack([section, np.full(81, z)]) for z in (0.0, 5.0)])
    >>> support_of(stack).contains([[4.0, 4.0, 2.5], [4.0, 4.0, 5.5]])
    array([ True, False])
    """
    coords = np.asarray(coords, float)
    if coords.shape[1] == 3:
        heights = np.unique(coords[:, 2])
        if 2 <= len(heights) < STACK_SHARE * len(coords):
            return Stack.of(coords, heights, radius)
    layout = geometry(coords)
    return Cloud(coords, layout, layout.support_radius if radius is None else radius)


@dataclass(frozen=True, eq=False)
class Cloud(Support):
    """Tissue is within `radius` of a measured position."""

    spots: NDArray
    layout: Geometry
    radius: float

    @property
    def pitch(self) -> float:
        """Pitch of the geometry."""
        return self.layout.pitch

    def contains(self, points: ArrayLike) -> NDArray:
        return self.distance(points) <= self.radius * ROUNDING

    def restricted_to(self, spots: NDArray) -> Cloud:
        return dataclasses.replace(self, spots=spots)

    def lattice(
        self, *, factor: float = 2.0, spacing: float | None = None, kind: Lattice = "auto", max_points: int = MAX_POINTS
    ) -> NDArray:
        spacing = self.pitch / factor if spacing is None else spacing
        return query_lattice(
            self.spots, spacing=spacing, lattice=kind, radius=self.radius, layout=self.layout, max_points=max_points
        )


@dataclass(frozen=True, eq=False)
class Stack(Support):
    r"""Tissue between sections at heights :math:`z_1 < \dots < z_S`.

    A point at a height z between two neighbouring sections a and b is tissue if :math:`(1 - t)\, d_a + t\, d_b \le r`, where
    :math:`t = (z - z_a) / (z_b - z_a)`, d is the distance in the plane to the nearest spot of a section, and r the support radius of the sections
    in 2-d. This interpolates the shapes of the two sections. There is no tissue above the top section or below the bottom one.
    """

    spots: NDArray
    heights: NDArray
    layouts: tuple[Geometry, ...]
    pitch: float
    radius: float

    @classmethod
    def of(cls, coords: NDArray, heights: NDArray, radius: float | None) -> Stack:
        """The stack of 3-d positions with these distinct heights."""
        sections = [distinct(coords[coords[:, 2] == z, :2]) for z in heights]
        # the spacing cannot be measured in a section of fewer than 4 spots
        layouts = tuple(geometry(section) for section in sections if len(section) >= 4) or (geometry(coords[:, :2]),)
        pitch = float(np.median([layout.pitch for layout in layouts]))
        radius = float(np.median([layout.support_radius for layout in layouts])) if radius is None else radius
        return cls(coords, heights, layouts, pitch, radius)

    def contains(self, points: ArrayLike) -> NDArray:
        points = np.asarray(points, float)
        out, z = np.zeros(len(points), bool), points[:, 2]
        if len(self.heights) == 1:
            here = z == self.heights[0]
            out[here] = kd_tree(self.spots[:, :2]).query(points[here, :2])[0] <= self.radius * ROUNDING
            return out
        slack = 1e-9 * np.ptp(self.heights)
        inside = (z >= self.heights[0] - slack) & (z <= self.heights[-1] + slack)
        above = np.clip(np.searchsorted(self.heights, z, side="right"), 1, len(self.heights) - 1)
        trees = [kd_tree(self.spots[self.spots[:, 2] == height, :2]) for height in self.heights]
        for b in np.unique(above[inside]):
            rows = np.flatnonzero(inside & (above == b))
            t = ((z[rows] - self.heights[b - 1]) / (self.heights[b] - self.heights[b - 1])).clip(0, 1)
            below_distance, above_distance = (trees[k].query(points[rows, :2])[0] for k in (b - 1, b))
            out[rows] = (1 - t) * below_distance + t * above_distance <= self.radius * ROUNDING
        return out

    def restricted_to(self, spots: NDArray) -> Stack:
        return dataclasses.replace(self, spots=spots, heights=np.unique(spots[:, 2]))

    def lattice(
        self, *, factor: float = 2.0, spacing: float | None = None, kind: Lattice = "auto", max_points: int = MAX_POINTS
    ) -> NDArray:
        """As in :class:`Support`. `factor` divides both the pitch and the distances between sections; `spacing` applies to both."""
        check_kind(kind, 3)
        within = self.pitch / factor if spacing is None else spacing
        _check_lengths(within, self.radius)
        steps = np.diff(self.heights)

        def parts(spacing: float | None) -> NDArray:  # number of parts of each gap between two sections
            each = np.full(len(steps), factor) if spacing is None else steps / spacing
            return np.maximum(1, np.ceil(each - 1e-9))

        n_levels = parts(spacing).sum() + 1
        if n_levels > max_points:
            levels = np.linspace(*self.heights[[0, -1]], LEVELS)
        else:
            gaps = zip(self.heights, steps, parts(spacing), strict=False)
            levels = np.concatenate([z + step * np.arange(n) / n for z, step, n in gaps] + [self.heights[-1:]])
        lattice = "square" if kind == "cubic" else "auto"
        area = self._mean_area(levels, lattice)
        enough = within * (max(1.0, 1.1 * area * n_levels / (within**2 * max_points))) ** (1 / 3)
        while 1.1 * area / enough**2 * (parts(enough).sum() + 1) > max_points:
            enough *= 1.02
        count = area / within**2 * n_levels
        if count > 1.5 * max_points:  # this count is an estimate
            raise TooManyPoints(count, within, max_points, enough)
        plane = self._plane(within, lattice, 4 * max_points)
        each = (np.column_stack([plane, np.full(len(plane), z)]) for z in levels)
        out = np.concatenate([points[self.contains(points)] for points in each])
        if len(out) > max_points:
            raise TooManyPoints(len(out), within, max_points, enough)
        return out

    def _plane(self, spacing: float, lattice: Lattice, max_points: int) -> NDArray:
        """Points of a lattice in the plane, near a spot of any section."""
        layout = max(self.layouts, key=lambda layout: layout.kind != "irregular")
        at = self.spots[:, :2]
        return query_lattice(
            at, spacing=spacing, lattice=lattice, radius=self.radius, layout=layout, max_points=max_points
        )

    def _mean_area(self, levels: NDArray, lattice: Lattice) -> float:
        """Number of points of a lattice of spacing 1 in the tissue at one level, averaged over some of the levels."""
        spacing = self.radius / 4
        plane = self._plane(spacing, lattice, MAX_POINTS)
        some = levels[np.unique(np.linspace(0, len(levels) - 1, LEVELS).astype(int))]
        inside = [self.contains(np.column_stack([plane, np.full(len(plane), z)])).sum() for z in some]
        return float(spacing**2 * np.mean(inside))


def _check_lengths(spacing: float, radius: float) -> None:
    for name, value in {"spacing": spacing, "radius": radius}.items():
        if not (np.isfinite(value) and value > 0):
            msg = f"`{name}={value}`: expected a positive, finite length in the units of the coordinates"
            raise ValueError(msg)
    if not LEAST_SPACING < spacing / radius < 1 / LEAST_SPACING:
        msg = f"`spacing={spacing:.4g}` is far from the support radius of {radius:.4g}: expected a length of the same order"
        raise ValueError(msg)


def check_kind(kind: str, d: int) -> None:
    """Refuse a kind of lattice that does not exist in d dimensions."""
    if kind not in LATTICES[d]:
        msg = f"`lattice={kind!r}`: in {d}-d expected one of {', '.join(map(repr, LATTICES[d]))}"
        raise ValueError(msg)


def query_lattice(
    coords: ArrayLike,
    *,
    spacing: float,
    lattice: Lattice = "auto",
    radius: float | None = None,
    layout: Geometry | None = None,
    max_points: int = MAX_POINTS,
) -> NDArray:
    """Points of a lattice that lie within `radius` of a measured position, sorted by lattice index.

    If the spots form such a lattice themselves, the query lattice is aligned with it: its vectors are ``basis * spacing / pitch`` and it
    contains the origin of the spots, so that with ``spacing = pitch / n`` every spot is a query point, up to jitter. Any other lattice is
    aligned with the axes and starts from the origin of the geometry. The cost grows with the area of the tissue, not of its bounding box.

    Parameters
    ----------
    coords
        (N, d) measured positions, d = 2 or 3.
    spacing
        Distance between neighbouring points, in the units of the coordinates.
    lattice
        ``"auto"`` is ``"hexagonal"`` where the spots are hexagonal, else ``"square"`` (2-d) or ``"cubic"`` (3-d).
    radius
        Largest distance to a measured position; the support radius of the geometry if None.
    layout
        Geometry of these positions, if it is already known.
    max_points
        Largest number of points.

    Returns
    -------
    (M, d) points.

    Raises
    ------
    TooManyPoints, ValueError
        If there would be more points than `max_points`, `spacing` or `radius` is not positive and finite, or `lattice` is of another dimension.

    Examples
    --------
    >>> spots = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0)), axis=-1).reshape(-1, 2)
    >>> len(query_lattice(spots, spacing=0.5, radius=0.1))
    20
    """
    layout = geometry(coords) if layout is None else layout
    radius = layout.support_radius if radius is None else radius
    _check_lengths(spacing, radius)
    unit = _unit_basis(layout, lattice)
    at = distinct(coords) - layout.origin
    # a first pass with a coarse step estimates the number of points
    for step in sorted({max(spacing, radius / 4), spacing}, reverse=True):
        low, shape, start, stop = _cover(at, unit * step, radius, spacing)
        count = (stop - start + 1).sum() * (step / spacing) ** len(unit)
        if count > max_points * (1 if step == spacing else 1.1):  # the coarse count is an estimate
            raise TooManyPoints(count, spacing, max_points, 1.1 * spacing * (count / max_points) ** (1 / len(unit)))
    length = stop - start + 1
    flat = np.repeat(stop + 1 - length.cumsum(), length) + np.arange(length.sum())
    index = np.stack(np.unravel_index(flat, shape), axis=1) + low
    return layout.origin + index @ (unit * spacing)


def _unit_basis(layout: Geometry, lattice: str) -> NDArray:
    """(d, d) vectors of the query lattice for spacing 1."""
    d = len(layout.origin)
    check_kind(lattice, d)
    if lattice == "auto":
        lattice = "cubic" if d == 3 else "hexagonal" if layout.kind == "hexagonal" else "square"
    return layout.basis / layout.pitch if lattice == layout.kind else UNIT[lattice]


def _cover(at: NDArray, basis: NDArray, radius: float, spacing: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Lattice points within `radius` of `at`: disjoint runs `start..stop` of flat indices into a box with corner `low` and this `shape`."""
    index = at @ np.linalg.inv(basis)
    max_steps = radius * np.sqrt(np.diag(np.linalg.inv(basis @ basis.T))) + 1
    low, high = np.floor(index.min(0) - max_steps), np.ceil(index.max(0) + max_steps)
    nodes = np.prod(high - low + 1)
    if not nodes < 2.0**62:
        msg = f"the positions are too far apart for a lattice of spacing {spacing:.4g}: look for outliers, or use a larger spacing"
        raise ValueError(msg)
    low, shape = low.astype(int), (high - low + 1).astype(int)
    chunk = max(1, CHUNK // int(np.prod(2 * max_steps[:-1] + 2)))
    runs = [_runs(index[i : i + chunk] - low, basis, radius, shape) for i in range(0, len(index), chunk)]
    return low, shape, *_union(*np.concatenate(runs, axis=1))


def _runs(index: NDArray, basis: NDArray, radius: float, shape: NDArray) -> tuple[NDArray, NDArray]:
    r"""Runs of lattice points k, along the last lattice vector, with :math:`|(k - c) B| \le r` for a row c of `index`.

    With u = k - c split into (v, w), and :math:`B B^T = [[A, b], [b^T, g]]`, completing the square gives
    :math:`|u B|^2 = g (w + v b / g)^2 + v (A - b b^T / g) v^T`.
    """
    gram = basis @ basis.T
    b, g = gram[-1, :-1], gram[-1, -1]
    schur = gram[:-1, :-1] - np.outer(b, b) / g
    max_steps = radius * np.sqrt(np.diag(np.linalg.inv(schur)))
    sides = [np.arange(-np.floor(s), np.floor(s) + 2) for s in max_steps]
    offsets = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(sides))
    row = np.floor(index[:, None, :-1]) + offsets  # (n, rows, d - 1)
    v = row - index[:, None, :-1]
    rest = radius**2 - np.einsum("nri,ij,nrj->nr", v, schur, v)
    centre, half = index[:, -1:] - v @ b / g, np.sqrt(np.maximum(rest, 0) / g)
    first, last = np.ceil(centre - half), np.floor(centre + half)
    keep = (rest >= 0) & (first <= last)
    row = row[keep].astype(int).T
    ends = [np.ravel_multi_index((*row, end[keep].astype(int)), shape) for end in (first, last)]
    return _union(*ends)


def _union(start: NDArray, stop: NDArray) -> tuple[NDArray, NDArray]:
    """The same integers as disjoint runs in ascending order."""
    order = np.argsort(start)
    start, stop = start[order], np.maximum.accumulate(stop[order])
    new = start > np.append(-1, stop[:-1])
    return start[new], stop[np.append(new[1:], True)[: len(new)]]
