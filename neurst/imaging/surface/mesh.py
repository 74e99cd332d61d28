"""Triangle meshes of the zero set of a signed distance, near the points of its fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BLOCK = 8  # lattice cells along a side of a block, in which the distance is computed everywhere or only in the middle
NEAR_SURFACE = 2.0  # a block is computed if its middle is nearer to the surface than this many half diagonals
LEAST_SHARE = 0.1  # least share of vertices near points, for a connected piece of the mesh to be kept
HOLE = 12  # number of neighbours used to distinguish a hole from a random gap between points
ONE_SIDED = 0.42  # about 4 / (3 pi): mean offset of the points of a half disc from its centre, in units of the radius


def extract_mesh(
    distance: Callable[[NDArray], NDArray],
    low: NDArray,
    high: NDArray,
    points: NDArray,
    resolution: int,
    within: float | str | None,
) -> tuple[NDArray, NDArray]:
    """Vertices and faces as :meth:`neurst.imaging.Surface.mesh` gives them, for a function `distance` (Q, 3) -> (Q,) between two corners."""
    from scipy.spatial import cKDTree  # slow to import
    from skimage.measure import marching_cubes  # slow to import

    step = (high - low).max() / resolution
    blocks = np.ceil((high - low) / (step * BLOCK)).astype(int)
    corner = step * BLOCK * np.stack(np.meshgrid(*map(np.arange, blocks), indexing="ij"), -1).reshape(-1, 3)
    middle = distance(low + corner + step * BLOCK / 2)
    lattice = np.repeat(middle, BLOCK**3).reshape(-1, BLOCK, BLOCK, BLOCK)
    inner = step * np.stack(np.meshgrid(*[np.arange(BLOCK)] * 3, indexing="ij"), -1).reshape(-1, 3)
    close = np.flatnonzero(np.abs(middle) < NEAR_SURFACE * math.sqrt(3) / 2 * step * (BLOCK + 1))
    for part in np.array_split(close, len(close) // 64 + 1):
        query = (low + corner[part])[:, None] + inner
        lattice[part] = distance(query.reshape(-1, 3)).reshape(-1, BLOCK, BLOCK, BLOCK)
    lattice = lattice.reshape(*blocks, BLOCK, BLOCK, BLOCK).transpose(0, 3, 1, 4, 2, 5).reshape(*(blocks * BLOCK))
    if not lattice.min() < 0 < lattice.max():
        msg = f"the distance has no zero in its box ({lattice.min():.3g} to {lattice.max():.3g}): the fit has failed; give `normals`"
        raise ValueError(msg)
    vertices, faces, _, _ = marching_cubes(lattice, 0.0, gradient_direction="descent")
    vertices = low + step * vertices.astype(np.float64)
    vertices, faces = _supported(vertices, faces.astype(np.int64), points, step)
    if within is None:
        return vertices, faces
    if within == "auto":
        open_ = _holes(vertices, faces, points)
    else:
        open_ = cKDTree(points).query(vertices)[0] > within
    faces = faces[~open_[faces].all(1)]
    used = np.unique(faces)
    return vertices[used], np.searchsorted(used, faces)


def _pieces(edges: NDArray, n: int) -> tuple[int, NDArray]:  # (2, E) -> number of pieces, (n,)
    """The number of connected pieces of a mesh with n vertices, and the piece of each vertex."""
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import connected_components  # slow to import

    return connected_components(coo_matrix((np.ones(edges.shape[1]), edges), shape=(n, n)), directed=False)


def _holes(vertices: NDArray, faces: NDArray, points: NDArray) -> NDArray:  # -> (V,) bool
    r"""Vertices in holes of the points, with k = 12.

    For a vertex in the core of a hole, the nearest point is farther away than the distance from this point to its k-th neighbour. Where points
    cover an area at random, this holds for a share ``exp(-k)`` of places. A vertex in the rim of a hole is connected with the core, no farther
    from it than that distance, and has points on one side only: the mean of its k nearest points is away from it by
    :math:`4 / (3 \pi) = 0.42` or more of the distance to the k-th, as at the edge of a half plane of points. Within an area covered at random
    this is 0.2.
    """
    from scipy.spatial import cKDTree  # slow to import

    k, tree = min(HOLE, len(points) - 1), cKDTree(points)
    gap, near = tree.query(vertices, k=k)
    kth = tree.query(points, k=[k + 1])[0][near[:, 0], 0]  # from the nearest point to its k-th neighbour
    core = gap[:, 0] > kth
    if not core.any():
        return core
    beside = cKDTree(vertices[core]).query(vertices)[0] <= kth
    rim = core | (beside & (np.linalg.norm(points[near].mean(1) - vertices, axis=1) > ONE_SIDED * gap[:, -1]))
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).T
    n_pieces, piece = _pieces(edges[:, rim[edges].all(0)], len(vertices))
    return (np.bincount(piece, core, n_pieces) > 0)[piece]


def _supported(vertices: NDArray, faces: NDArray, points: NDArray, step: float) -> tuple[NDArray, NDArray]:
    """The connected pieces of a mesh that have at least a tenth of their vertices within 3 spacings, or a lattice step, of a point."""
    from scipy.spatial import cKDTree  # slow to import

    n_pieces, piece = _pieces(faces[:, [0, 1, 1, 2]].reshape(-1, 2).T, len(vertices))
    tree = cKDTree(points)
    radius = max(3 * float(np.median(tree.query(points, k=2)[0][:, 1])), step)
    close = tree.query(vertices)[0] < radius
    share = np.bincount(piece, close, n_pieces) / np.bincount(piece, minlength=n_pieces)
    keep = share[piece] >= LEAST_SHARE
    return vertices[keep], (np.cumsum(keep) - 1)[faces[keep[faces[:, 0]]]]
