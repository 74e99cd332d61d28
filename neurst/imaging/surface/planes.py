"""Planes through the nearest points of each point, from which noise and outward normals are estimated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N_VIEWS = 200  # directions from which a piece is viewed


def spacing_of(points: NDArray) -> float:
    """Median distance to the nearest point at another place."""
    from scipy.spatial import cKDTree  # slow to import

    places = np.unique(points, axis=0)
    return float(np.median(cKDTree(places).query(places, k=2)[0][:, 1]))


def local_planes(points: NDArray, k: int) -> tuple[NDArray, NDArray, NDArray]:
    """Mean (N, d) of the `k` nearest points of each point, normal (N, d) of the plane through them, and ascending variances (N, d)."""
    from scipy.spatial import cKDTree  # slow to import

    k = min(k, len(points))
    near = points[cKDTree(points).query(points, k=k)[1]].reshape(len(points), k, -1)
    middle = near.mean(1)
    offset = near - middle[:, None]
    variance, frame = np.linalg.eigh(np.einsum("nki,nkj->nij", offset, offset) / k)
    return middle, frame[:, :, 0], variance.clip(0)


def patch_size(points: NDArray, k: int, flat: float, most: int) -> int:
    """Number of points of a local plane.

    It is `k`, and is doubled up to `most` while the typical patch is thicker than `flat` times its width (in variances) and doubling makes
    it flatter.
    """
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
    """Standard deviation of the points along the normal: the median over planes, corrected for the d parameters of a plane."""
    return float(np.sqrt(np.median(variance[:, 0]) * k / (k - d)))


def turned_alike(points: NDArray, normals: NDArray, k: int) -> NDArray:
    """Normals turned outwards.

    Neighbouring normals are made to agree along the minimum spanning tree of ``1 - |n_i . n_j|``. Then each connected piece is turned so that
    most of the points that are visible from outside face outwards.
    """
    from scipy.sparse import coo_matrix  # slow to import
    from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree  # slow to import
    from scipy.spatial import cKDTree  # slow to import

    distance, near = cKDTree(points).query(points, k=min(k, len(points)))
    row, column = np.repeat(np.arange(len(points)), near.shape[1] - 1), near[:, 1:].ravel()
    # a small cost for the distance prefers the nearer of two neighbours at equal angles; a sparse entry of 0 would mean no edge
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
        # the point that lies farthest in a direction is visible from there: most of these points must face that way
        seen = members[(points[members] @ views.T).argmax(0)]
        if np.sign((out[seen] * views).sum(1)).sum() < 0:
            out[members] *= -1
    return out
