"""Triangles of the zero set of a distance, near the points it was fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BLOCK = 8  # lattice cells along a side of what is read, or passed over, as one
REACH = 2.0  # a block is read if its middle is this many half diagonals from the surface, or nearer
LEAST_SHARE = 0.1  # of a piece of a mesh that is near points
HOLE = 12  # neighbours that tell a hole from a gap between points
ONE_SIDED = (
    0.42  # mean offset of so many points in units of the farthest of them, on the edge of a half plane of points
)


def zero_set(
    distance: Callable[[NDArray], NDArray],
    low: NDArray,
    high: NDArray,
    points: NDArray,
    resolution: int,
    within: float | str | None,
) -> tuple[NDArray, NDArray]:
    """Vertices and faces of :meth:`neurst.imaging.Surface.mesh`, of a distance (Q, 3) -> (Q,) between two corners."""
    from scipy.spatial import cKDTree  # slow to import
    from skimage.measure import marching_cubes  # slow to import

    step = (high - low).max() / resolution
    blocks = np.ceil((high - low) / (step * BLOCK)).astype(int)
    corner = step * BLOCK * np.stack(np.meshgrid(*map(np.arange, blocks), indexing="ij"), -1).reshape(-1, 3)
    middle = distance(low + corner + step * BLOCK / 2)
    lattice = np.repeat(middle, BLOCK**3).reshape(-1, BLOCK, BLOCK, BLOCK)
    inner = step * np.stack(np.meshgrid(*[np.arange(BLOCK)] * 3, indexing="ij"), -1).reshape(-1, 3)
    close = np.flatnonzero(np.abs(middle) < REACH * math.sqrt(3) / 2 * step * (BLOCK + 1))
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


def _holes(vertices: NDArray, faces: NDArray, points: NDArray) -> NDArray:  # -> (V,) bool
    r"""Vertices in holes of the points, with k = 12.

    The core of a hole is farther from the nearest point than this one from its k-th neighbour; of places that points cover at random
    ``exp(-k)`` are. Its rim is what hangs together with the core, is no farther from it than that, and has its points on one side: the mean
    of its k nearest is 0.42 :math:`= 4 / (3 \pi)` or more of the distance to the k-th away, as on the edge of a half plane; beyond it is
    more, and within 0.2 by chance.
    """
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import connected_components  # slow to import
    from scipy.spatial import cKDTree  # slow to import

    k, tree = min(HOLE, len(points) - 1), cKDTree(points)
    gap, near = tree.query(vertices, k=k)
    reach = tree.query(points, k=[k + 1])[0][near[:, 0], 0]
    core = gap[:, 0] > reach
    if not core.any():
        return core
    beside = cKDTree(vertices[core]).query(vertices)[0] <= reach
    rim = core | (beside & (np.linalg.norm(points[near].mean(1) - vertices, axis=1) > ONE_SIDED * gap[:, -1]))
    a, b = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).T
    both = rim[a] & rim[b]
    graph = coo_matrix((np.ones(both.sum()), (a[both], b[both])), shape=(len(vertices),) * 2)
    n_places, place = connected_components(graph, directed=False)
    return (np.bincount(place, core, n_places) > 0)[place]


def _supported(vertices: NDArray, faces: NDArray, points: NDArray, step: float) -> tuple[NDArray, NDArray]:
    """The connected pieces of a mesh of which a tenth or more is near points: within 3 spacings, or a step of the lattice."""
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import connected_components  # slow to import
    from scipy.spatial import cKDTree  # slow to import

    edges = faces[:, [0, 1, 1, 2]].reshape(-1, 2).T
    graph = coo_matrix((np.ones(edges.shape[1]), edges), shape=(len(vertices),) * 2)
    n_pieces, piece = connected_components(graph, directed=False)
    tree = cKDTree(points)
    reach = max(3 * float(np.median(tree.query(points, k=2)[0][:, 1])), step)
    close = tree.query(vertices)[0] < reach
    share = np.bincount(piece, close, n_pieces) / np.bincount(piece, minlength=n_pieces)
    keep = share[piece] >= LEAST_SHARE
    return vertices[keep], (np.cumsum(keep) - 1)[faces[keep[faces[:, 0]]]]
