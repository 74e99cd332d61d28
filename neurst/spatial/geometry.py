"""Geometry of measured positions: their lattice and their spacing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

STEPS = {  # lattice indices of a point's neighbours, anticlockwise
    "hexagonal": np.array([[1, 0], [0, 1], [-1, 1], [-1, 0], [0, -1], [1, -1]]),
    "square": np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]),
}


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
    support_radius: float  # a point at most this far from a measured position counts as tissue


def kd_tree(coords: ArrayLike):
    """A scipy ``cKDTree``, imported here because `scipy.spatial` takes longer to import than all of neurst."""
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
    r"""Lattice, spacing and support radius of measured positions. Duplicates count once; the lattice may have any orientation.

    Positions in the plane form a lattice when nearest-neighbour distances agree with their median, and the directions
    :math:`\theta` to near neighbours agree with m-fold symmetry: :math:`|\mathrm{mean}\,e^{im\theta}|` is near 1 with m = 6
    (hexagonal) or 4 (square), and no direction is missing. The steps between neighbours give the lattice vectors. These give the
    lattice index k of every position, and least squares over all positions gives the final basis B and origin o of
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
        Neighbours up to this many pitches away are near: more than 1, less than the second distance of a lattice (1.41, 1.73).
    fill
        Support radius of a lattice in pitches. Just above 1, a missing spot counts as tissue if one of its neighbours was measured, but
        the middle of a larger hole does not. On irregular positions the radius is the 99th percentile of the distance
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
    known = np.where(np.isfinite(distance), distance, -np.inf)  # few positions have fewer neighbours
    radius = float(np.percentile(known[:, :3].max(1), 99))
    return Geometry("irregular", pitch, pitch * np.eye(points.shape[1]), points.min(0), radius)


def _symmetry(steps: NDArray, concentration: float, least_share: float = 0.05) -> tuple[str, NDArray]:
    """Kind of the lattice with the neighbour steps `steps` (P, 2), and their lattice indices.

    Each direction must have at least a `least_share` of the steps.
    """
    angle = np.arctan2(steps[:, 1], steps[:, 0])
    for kind, neighbours in STEPS.items():
        m = len(neighbours)
        order = np.exp(1j * m * angle).mean()
        side = np.rint((m * angle - np.angle(order)) / (2 * np.pi)).astype(int) % m
        share = np.bincount(side % (m // 2), minlength=m // 2) / len(side)
        # a direction is missing on a line and on a rectangular lattice
        if np.abs(order) >= concentration and share.min() >= least_share:
            return kind, neighbours[side]
    return "irregular", np.zeros_like(steps)


def _fit_lattice(points: NDArray, steps: NDArray, basis: NDArray, neighbours: NDArray) -> tuple[NDArray, NDArray]:
    """Basis and origin. The first `basis` is too short, because only the shorter ones of the jittered steps were used for it."""
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
    """Least squares: the b that minimises |k b - y|."""
    return np.linalg.solve(k.T @ k, k.T @ y)


def disc_quadrature(diameter: float, d: int) -> NDArray:
    r"""Points whose unweighted mean is exact for polynomials of degree 3 over a disc, or a ball :cite:p:`Hammer1958`.

    On a disc of radius R they are the 4 points :math:`(\pm R/2, \pm R/2)`; any rotation of them is equally exact. In a ball they are the
    6 points at :math:`\pm R \sqrt{3/5}` on the axes.

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


def spacing_ratio(coords: ArrayLike, neighbours: int = 64) -> float:
    r"""Median distance to the nearest other position, divided by the spacing of a lattice of the same local density.

    The local density is that of the nearest `neighbours` positions in the disc (ball) that holds them. The ratio is about 1 on a
    lattice and 0.47 for random positions. It is near 0 if the typical position has another one right beside it, as when several sections
    measured on the same array lie on top of each other.

    Examples
    --------
    >>> spots = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), axis=-1).reshape(-1, 2)
    >>> round(spacing_ratio(spots), 1), round(spacing_ratio(np.concatenate([spots, spots + 0.01])), 2)
    (1.0, 0.01)
    """
    points = distinct(coords)
    n, d = points.shape
    m = max(1, min(neighbours, n // 4))
    distance = kd_tree(points).query(points, m + 1)[0]
    volume = np.pi * distance[:, m] ** 2 if d == 2 else 4 / 3 * np.pi * distance[:, m] ** 3
    return float(np.median(distance[:, 1] / (volume / m) ** (1 / d)))


def overlap(coords: ArrayLike, labels: NDArray, *, near: float = 0.75, least: float = 0.2) -> bool:
    """Whether two groups of positions (N, 2) lie on top of each other, as sections with the same origin do.

    They do if more than the share `least` of one group lies nearer than `near` pitches to the other. The pitch is the median distance to the
    nearest position of the same group, in the denser of the two groups. Groups of spots of one section, such as tissue layers, are a full
    pitch apart.
    """
    coords = np.asarray(coords, float)
    groups = [distinct(coords[labels == label]) for label in np.unique(labels)]
    groups = [group for group in groups if len(group) >= 4]
    trees = [kd_tree(group) for group in groups]
    pitches = [np.median(tree.query(group, 2)[0][:, 1]) for tree, group in zip(trees, groups, strict=True)]
    pairs = itertools.permutations(range(len(groups)), 2)
    return any((trees[i].query(groups[j])[0] < near * min(pitches[i], pitches[j])).mean() > least for i, j in pairs)
