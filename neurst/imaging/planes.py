"""Planes through the nearest points of each: noise along the normal, and normals turned outwards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N_VIEWS = 200  # directions that a piece is looked at from


def spacing_of(points: NDArray) -> float:
    """Median distance to the nearest other point."""
    from scipy.spatial import cKDTree  # slow to import

    return max(float(np.median(cKDTree(points).query(points, k=2)[0][:, 1])), np.finfo(float).tiny)


def local_planes(points: NDArray, k: int) -> tuple[NDArray, NDArray, NDArray]:
    """Mean (N, d) of the `k` nearest points of each, normal (N, d) of the plane through them, and variances (N, d), ascending."""
    from scipy.spatial import cKDTree  # slow to import

    k = min(k, len(points))
    near = points[cKDTree(points).query(points, k=k)[1]].reshape(len(points), k, -1)
    middle = near.mean(1)
    offset = near - middle[:, None]
    variance, frame = np.linalg.eigh(np.einsum("nki,nkj->nij", offset, offset) / k)
    return middle, frame[:, :, 0], variance.clip(0)


def patch_size(points: NDArray, k: int, flat: float, most: int) -> int:
    """Points of a plane: `k`, doubled up to `most` while the typical patch is thicker than `flat` of its width (variances) and gets flatter."""
    thick = np.inf
    while True:
        variance = local_planes(points, k)[2]
        before, thick = thick, float(np.median(variance[:, 0] / variance[:, 1].clip(np.finfo(float).tiny)))
        if thick >= before:
            return k // 2
        if thick <= flat or 2 * k > min(most, len(points)):
            return k
        k *= 2


def noise_along(variance: NDArray, k: int, d: int) -> float:
    """Noise along the normal: the median over planes of d parameters."""
    return float(np.sqrt(np.median(variance[:, 0]) * k / (k - d)))


def turned_alike(points: NDArray, normals: NDArray, k: int) -> NDArray:
    """Normals turned outwards: neighbours agree along the minimum spanning tree of ``1 - |n_i . n_j|``, and most of what is seen from outside faces it."""
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree  # slow to import
    from scipy.spatial import cKDTree  # slow to import

    distance, near = cKDTree(points).query(points, k=min(k, len(points)))
    row, column = np.repeat(np.arange(len(points)), near.shape[1] - 1), near[:, 1:].ravel()
    # a little for the distance: of equal angles the nearer neighbour; never 0, which would be no edge
    far = distance[:, 1:].ravel() / max(distance[:, 1:].mean(), np.finfo(float).tiny)
    cost = 1 - np.abs((normals[row] * normals[column]).sum(1)) + 1e-3 * far + 1e-9
    graph = coo_matrix((cost, (row, column)), shape=(len(points),) * 2).tocsr()
    tree = minimum_spanning_tree(graph.maximum(graph.T))
    out = normals.copy()
    views = np.random.default_rng(0).standard_normal((N_VIEWS, points.shape[1]))
    _, piece = connected_components(tree, directed=False)
    for part in range(piece.max() + 1):
        members = np.flatnonzero(piece == part)
        order, parent = breadth_first_order(tree, members[0], directed=False)
        for i in order[1:]:
            if out[i] @ out[parent[i]] < 0:
                out[i] *= -1
        # the point farthest in a direction is seen from there: most of these must face it
        seen = members[(points[members] @ views.T).argmax(0)]
        if np.sign((out[seen] * views).sum(1)).sum() < 0:
            out[members] *= -1
    return out
