"""Geometry of measured positions: their lattice, the region they support, and lattices of points at which to read a field."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_POINTS = 20_000_000  # most points a query lattice may have
CHUNK = 2_000_000  # most rows of a query lattice looked at together

STEPS = {  # lattice indices of a point's neighbours, anticlockwise
    "hexagonal": np.array([[1, 0], [0, 1], [-1, 1], [-1, 0], [0, -1], [1, -1]]),
    "square": np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]),
}
UNIT = {"hexagonal": np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]]), "square": np.eye(2), "cubic": np.eye(3)}
CHOICES = {2: ("auto", "hexagonal", "square"), 3: ("auto", "cubic")}


@dataclass(frozen=True, eq=False)
class Geometry:
    """How positions are laid out, in the units of the coordinates.

    On a lattice the positions are ``origin + k @ basis`` with integer rows k, up to jitter. On irregular positions
    (all 3-d ones) `basis` is `pitch` times the identity and `origin` the lower corner of the bounding box.
    """

    kind: Literal["hexagonal", "square", "irregular"]
    pitch: float  # length of the lattice vectors; off a lattice, median distance to the nearest other position
    basis: NDArray  # (d, d), lattice vectors as rows
    origin: NDArray  # (d,)
    support_radius: float  # a point this near to a measured position counts as tissue


def kd_tree(coords: ArrayLike):
    """A scipy ``cKDTree``; imported here because `scipy.spatial` takes longer to import than all of neurst."""
    from scipy.spatial import cKDTree

    return cKDTree(coords)


def distinct(coords: ArrayLike) -> NDArray:
    """Distinct positions, each once, in lexicographic order.

    Parameters
    ----------
    coords
        (N, d) positions.

    Returns
    -------
    (U, d) positions.

    Examples
    --------
    >>> distinct([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    array([[0., 2.],
           [1., 0.]])
    """
    return np.unique(np.asarray(coords, float), axis=0)


def geometry(
    coords: ArrayLike,
    *,
    tolerance: float = 0.15,
    agreement: float = 0.8,
    concentration: float = 0.8,
    reach: float = 1.25,
    fill: float = 1.05,
) -> Geometry:
    r"""Lattice, spacing and support of measured positions; duplicates count once, orientation is free.

    Positions in the plane form a lattice when nearest-neighbour distances agree with their median, and the directions
    :math:`\theta` to near neighbours agree with m-fold symmetry, :math:`|\mathrm{mean}\,e^{im\theta}|` near 1 with m = 6
    (hexagonal) or 4 (square), no direction missing. The steps between neighbours give the lattice vectors, these the
    lattice index k of every position, and least squares over all positions the final basis B and origin o of
    :math:`x \approx o + k B`, so that errors do not add up across the tissue.

    Parameters
    ----------
    coords
        (N, d) positions.
    tolerance
        Relative difference from the median within which a nearest-neighbour distance agrees with it.
    agreement
        Share of nearest-neighbour distances that must agree.
    concentration
        Least :math:`|\mathrm{mean}\,e^{im\theta}|` of a lattice.
    reach
        Neighbours are near up to this many pitches; above 1, below the second distance of a lattice (1.41, 1.73).
    fill
        Support radius of a lattice in pitches: just above 1, a missing spot is tissue if a neighbour of it was measured, and
        the middle of a larger hole is not. On irregular positions the radius is the 99th percentile of the distance
        to the third neighbour.

    Returns
    -------
    Geometry

    Examples
    --------
    >>> spots = np.stack(np.meshgrid(np.arange(5), np.arange(4)), axis=-1).reshape(-1, 2)
    >>> geometry(spots * 100.0).kind, geometry(spots * 100.0).pitch
    ('square', 100.0)
    """
    points = distinct(coords)
    distance, index = kd_tree(points).query(points, 7)  # the point itself and as many neighbours as a lattice has
    distance, index = distance[:, 1:], index[:, 1:]
    pitch = float(np.median(distance[:, 0]))
    if points.shape[1] == 2 and (np.abs(distance[:, 0] / pitch - 1) <= tolerance).mean() >= agreement:
        at, rank = np.nonzero(np.isfinite(distance))
        steps, near = points[index[at, rank]] - points[at], distance[at, rank] <= reach * pitch
        kind, k = _symmetry(steps[near], concentration)
        if kind != "irregular":
            basis, origin = _fit_lattice(points, steps, _solve(k, steps[near]), STEPS[kind])
            pitch = float(np.linalg.norm(basis, axis=1).mean())  # jitter shortens the nearest distance, not the lattice
            return Geometry(kind, pitch, basis, origin, fill * pitch)
    radius = float(np.percentile(distance[:, 2], 99))
    return Geometry("irregular", pitch, pitch * np.eye(points.shape[1]), points.min(0), radius)


def _symmetry(steps: NDArray, concentration: float, least_share: float = 0.05) -> tuple[str, NDArray]:
    """Kind of the lattice whose neighbours stand at `steps` (P, 2), each direction a `least_share` of them; their indices."""
    angle = np.arctan2(steps[:, 1], steps[:, 0])
    for kind, neighbours in STEPS.items():
        m = len(neighbours)
        order = np.exp(1j * m * angle).mean()
        side = np.rint((m * angle - np.angle(order)) / (2 * np.pi)).astype(int) % m
        share = np.bincount(side % (m // 2), minlength=m // 2) / len(side)
        if np.abs(order) >= concentration and share.min() >= least_share:  # a direction missing: a line, a rectangle
            return kind, neighbours[side]
    return "irregular", np.zeros_like(steps)


def _fit_lattice(points: NDArray, steps: NDArray, basis: NDArray, neighbours: NDArray) -> tuple[NDArray, NDArray]:
    """Basis and origin, from a first `basis` that was fitted to the shorter steps of jittered points and so is short."""
    k = np.rint(steps @ np.linalg.inv(basis))
    near = (k[:, None] == neighbours).all(2).any(1)
    basis = _solve(k[near], steps[near])
    centre = points.mean(0)
    index = (points - centre) @ np.linalg.inv(basis)
    phase = np.angle(np.exp(2j * np.pi * index).mean(0)) / (2 * np.pi)  # circular mean
    k = np.rint(index - phase)
    fit = _solve(np.column_stack([k, np.ones(len(k))]), points - centre)
    return fit[:-1], centre + fit[-1]


def _solve(k: NDArray, y: NDArray) -> NDArray:
    """Least squares: the b of least |k b - y|."""
    return np.linalg.solve(k.T @ k, k.T @ y)


def disc_quadrature(diameter: float, d: int) -> NDArray:
    r"""Equally weighted points whose mean is that of a polynomial of degree 3 over a disc, or a ball :cite:p:`Hammer1958`.

    On the disc of radius R the 4 points :math:`(\pm R/2, \pm R/2)`, at distance :math:`R/\sqrt 2` on the diagonals: any
    rotation of them is as exact. In the ball the 6 points at :math:`\pm R \sqrt{3/5}` on the axes.

    Parameters
    ----------
    diameter
        2 R, in any unit.
    d
        2 for a disc, 3 for a ball.

    Returns
    -------
    (4, 2) or (6, 3) offsets from the centre, in the unit of the diameter.

    Examples
    --------
    >>> disc_quadrature(4.0, 2)
    array([[ 1.,  1.],
           [ 1., -1.],
           [-1.,  1.],
           [-1., -1.]])
    """
    if d == 2:
        return diameter / 4 * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    return diameter / 2 * np.sqrt(3 / 5) * np.concatenate([np.eye(3), -np.eye(3)])


def distance_to_spots(query: ArrayLike, coords: ArrayLike) -> NDArray:
    """Distance from each query point to the nearest measured position.

    Parameters
    ----------
    query
        (M, d) points.
    coords
        (N, d) measured positions.

    Returns
    -------
    (M,) distances in the units of the coordinates.

    Examples
    --------
    >>> distance_to_spots([[3.0, 4.0]], [[0.0, 0.0], [9.0, 9.0]])
    array([5.])
    """
    return kd_tree(coords).query(query)[0]


def query_lattice(
    coords: ArrayLike,
    *,
    spacing: float,
    lattice: Literal["auto", "hexagonal", "square", "cubic"] = "auto",
    radius: float | None = None,
    geometry: Geometry | None = None,
) -> NDArray:
    """Points of a lattice that lie within `radius` of a measured position, sorted by lattice index.

    Spots that form such a lattice themselves are followed: its vectors are ``basis * spacing / pitch`` and it contains
    their origin, so that with ``spacing = pitch / n`` every spot is a query point, up to jitter. Any other lattice is
    aligned with the axes and starts from the origin of the geometry. Cost grows with the tissue, not its bounding box.

    Parameters
    ----------
    coords
        (N, d) measured positions, d = 2 or 3.
    spacing
        Distance between neighbouring points, in the units of the coordinates.
    lattice
        "auto" is "hexagonal" where the spots are hexagonal, else "square" (2-d) or "cubic" (3-d).
    radius
        Largest distance to a measured position; the support radius of the geometry unless given.
    geometry
        Of these positions, where it is known already.

    Returns
    -------
    (M, d) points.

    Raises
    ------
    ValueError
        If `spacing` or `radius` is not positive and finite, the lattice unknown or of another dimension, or `spacing` so
        fine that the lattice has more than 20 million points.

    Examples
    --------
    >>> spots = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0)), axis=-1).reshape(-1, 2)
    >>> len(query_lattice(spots, spacing=0.5, radius=0.1))
    20
    """
    layout = _measured(coords, geometry)
    radius = layout.support_radius if radius is None else radius
    for name, value in {"spacing": spacing, "radius": radius}.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` is {value}: give a positive, finite length in the units of the coordinates")
    unit = _unit_basis(layout, lattice)
    at = distinct(coords) - layout.origin
    for step in sorted({max(spacing, radius / 4), spacing}, reverse=True):  # a coarse pass sizes what a fine one builds
        low, shape, start, stop = _cover(at, unit * step, radius, spacing)
        fit = step * ((stop - start + 1).sum() / MAX_POINTS) ** (1 / len(unit))
        _check_spacing(spacing, fit, f"the lattice would have more than {MAX_POINTS:,} points")
    length = stop - start + 1
    flat = np.repeat(stop + 1 - length.cumsum(), length) + np.arange(length.sum())
    index = np.stack(np.unravel_index(flat, shape), axis=1) + low
    return layout.origin + index @ (unit * spacing)


def _measured(coords: ArrayLike, known: Geometry | None) -> Geometry:
    return geometry(coords) if known is None else known


def _unit_basis(layout: Geometry, lattice: str) -> NDArray:
    """Vectors of the query lattice for spacing 1."""
    d = len(layout.origin)
    if lattice not in CHOICES[d]:
        raise ValueError(f"`lattice` is {lattice!r}: in {d}-d choose one of {', '.join(map(repr, CHOICES[d]))}")
    if lattice == "auto":
        lattice = "cubic" if d == 3 else "hexagonal" if layout.kind == "hexagonal" else "square"
    return layout.basis / layout.pitch if lattice == layout.kind else UNIT[lattice]


def _check_spacing(spacing: float, fit: float, why: str) -> None:
    if fit > spacing:  # the fit is an estimate: suggest a little more
        raise ValueError(f"`spacing` is {spacing:g}, too fine: {why}. Use {1.1 * fit:.3g} or more, or fewer positions")


def _cover(at: NDArray, basis: NDArray, radius: float, spacing: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Lattice points within `radius` of `at` as disjoint runs `start..stop` of flat indices into a box `low`, `shape`."""
    index = at @ np.linalg.inv(basis)
    reach = radius * np.sqrt(np.diag(np.linalg.inv(basis @ basis.T))) + 1
    low, high = np.floor(index.min(0) - reach), np.ceil(index.max(0) + reach)
    fit = np.linalg.norm(basis[0]) * np.prod((high - low + 1) / 2 ** (62 / len(basis))) ** (1 / len(basis))
    _check_spacing(spacing, fit, "the positions are too far apart to be numbered")
    low, shape = low.astype(int), (high - low + 1).astype(int)
    chunk = max(1, CHUNK // int(np.prod(2 * reach[:-1] + 2)))
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
    reach = radius * np.sqrt(np.diag(np.linalg.inv(schur)))
    sides = [np.arange(-np.floor(r), np.floor(r) + 2) for r in reach]
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
