"""What else one could use: classical methods, their parameters chosen by an oracle that sees the truth.

A method takes a case and returns its answer and a dict with the seconds of one run at the chosen parameters, and these.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import cache

import numpy as np
from imaging_data import Case, nearest_on
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Answer = tuple[NDArray, dict]


def timed(act: Callable, **more) -> Answer:
    """The answer of a call and its seconds."""
    begin = time.perf_counter()
    answer = act()
    return answer, {"seconds": time.perf_counter() - begin, **more}


def climb(
    case: Case, solve: Callable[[float], NDArray], start: float, ratio: float = 1.35, name: str = "weight"
) -> Answer:
    """The best of one positive parameter: steps by `ratio` until the score falls on both sides, then the top of a parabola in its logarithm."""
    found = {}

    def at(step: int) -> float:
        if step not in found:
            answer, note = timed(lambda: solve(start * ratio**step), **{name: start * ratio**step})
            found[step] = case.value(answer), answer, note
        return found[step][0]

    top = 0
    while abs(top) < 25 and max(at(top - 1), at(top + 1)) > at(top):
        top += 1 if at(top + 1) > at(top - 1) else -1
    below, middle, above = at(top - 1), at(top), at(top + 1)
    shift = 0.5 * (above - below) / (2 * middle - below - above) if 2 * middle > below + above else 0.0
    answer, note = timed(lambda: solve(start * ratio ** (top + shift)), **{name: start * ratio ** (top + shift)})
    best = max([*found.values(), (case.value(answer), answer, note)], key=lambda f: f[0])
    return best[1], best[2]


def search(case: Case, solve: Callable[..., NDArray], **grids) -> Answer:
    """The best of a grid of several parameters."""
    best = (-np.inf, None, {})
    for values in itertools.product(*grids.values()):
        chosen = dict(zip(grids, values, strict=True))
        answer, note = timed(lambda chosen=chosen: solve(**chosen), **chosen)
        best = max(best, (case.value(answer), answer, note), key=lambda f: f[0])
    return best[1], best[2]


# Total variation on grids: primal-dual steps (Chambolle and Pock 2011) with a data term given by its proximal map.


def _gradient(x: NDArray) -> NDArray:  # (H, W, C) -> (2, H, W, C)
    g = np.zeros((2, *x.shape), x.dtype)
    np.subtract(x[1:], x[:-1], out=g[0, :-1])
    np.subtract(x[:, 1:], x[:, :-1], out=g[1, :, :-1])
    return g


def _divergence(p: NDArray) -> NDArray:  # minus the adjoint of the gradient
    d = np.zeros(p.shape[1:], p.dtype)
    d[:-1] += p[0, :-1]
    d[1:] -= p[0, :-1]
    d[:, :-1] += p[1, :, :-1]
    d[:, 1:] -= p[1, :, :-1]
    return d


def total_variation(
    start: NDArray,
    prox: Callable[[NDArray, float], NDArray],
    weight: float,
    *,
    coupled: bool = False,
    strong: float = 0.0,
    step: float = 0.25,
    tol: float = 3e-5,
    most: int = 1000,
) -> NDArray:
    """min over x (H, W, C) of data(x) + weight TV(x); one norm over channels if `coupled`; `strong` is the data term's convexity modulus."""
    x = ahead = start.astype(np.float32)
    p = np.zeros((2, *x.shape), x.dtype)
    axes = (0, -1) if coupled else (0,)
    tau, sigma = step, 1 / (8 * step)
    for _ in range(most):
        p += np.float32(sigma) * _gradient(ahead)
        norm = np.sqrt(np.einsum("khwc,khwc->hw", p, p))[..., None] if coupled else np.sqrt((p * p).sum(axes))
        p /= np.maximum(1, norm / np.float32(weight))
        old, x = x, prox(x + np.float32(tau) * _divergence(p), tau).astype(np.float32)
        theta = 1 / np.sqrt(1 + 2 * strong * tau)
        tau, sigma = tau * theta, sigma / theta
        ahead = x + np.float32(theta) * (x - old)
        if np.linalg.norm(x - old) < tol * tau * np.linalg.norm(x):
            break
    return x.astype(float)


def _channels(image: NDArray) -> NDArray:
    return image if image.ndim == 3 else image[..., None]


def tv_l2(image: NDArray, weight: float, *, coupled: bool = False, most: int = 400) -> NDArray:
    """min 1/2 |x - y|^2 + weight TV(x)."""
    y = _channels(image).astype(np.float32)
    prox = lambda x, tau: (x + np.float32(tau) * y) / np.float32(1 + tau)
    return total_variation(y, prox, weight, coupled=coupled, strong=1.0, most=most).reshape(image.shape)


def _symmetric(v: NDArray) -> NDArray:  # (2, H, W, C) -> (3, H, W, C): xx, yy and xy of the symmetrised gradient
    down, right = _gradient(v[0]), _gradient(v[1])
    return np.stack([down[0], right[1], (down[1] + right[0]) / 2])


def _symmetric_adjoint(q: NDArray) -> NDArray:
    return -np.stack([_divergence(q[[0, 2]]), _divergence(q[[2, 1]])])


def tgv_l2(image: NDArray, weight: float, *, ratio: float = 2.0, tol: float = 1e-5, most: int = 600) -> NDArray:
    """min over x and v of 1/2 |x - y|^2 + weight (|grad x - v| + ratio |sym_grad v|), one norm over channels (Bredies et al. 2010)."""
    y = _channels(image).astype(np.float32)
    x = x_ahead = y
    v = v_ahead = np.zeros((2, *y.shape), y.dtype)
    p, q = np.zeros((2, *y.shape), y.dtype), np.zeros((3, *y.shape), y.dtype)
    inside = np.ones(
        (2, *y.shape[:2], 1), y.dtype
    )  # a gradient across the border is none, so that affine pictures cost nothing
    inside[0, -1], inside[1, :, -1] = 0, 0
    tau = np.float32(0.1)
    sigma = np.float32(1 / (12 * tau))  # the squared norm of the operator is below 12
    for _ in range(most):
        p += sigma * (_gradient(x_ahead) - inside * v_ahead)
        p /= np.maximum(1, np.sqrt(np.einsum("khwc,khwc->hw", p, p)) / np.float32(weight))[..., None]
        q += sigma * _symmetric(v_ahead)
        squares = np.einsum("khwc,khwc->khw", q, q)
        q /= np.maximum(1, np.sqrt(squares[0] + squares[1] + 2 * squares[2]) / np.float32(ratio * weight))[..., None]
        old, x = x, (x + tau * (_divergence(p) + y)) / (1 + tau)
        v_old, v = v, v + tau * (inside * p - _symmetric_adjoint(q))
        x_ahead, v_ahead = 2 * x - old, 2 * v - v_old
        if np.linalg.norm(x - old) < tol * np.linalg.norm(x):
            break
    return x.reshape(image.shape).astype(float)


# denoise


@cache
def _best_tv(case: Case, coupled: bool) -> Answer:
    noisy, sigma = case.given["noisy"], case.given["sigma"]
    return climb(case, lambda weight: tv_l2(noisy, weight, coupled=coupled), (0.9 if coupled else 0.6) * sigma)


def tv(case: Case) -> Answer:
    """Isotropic TV of each channel, scikit-image's."""
    from skimage.restoration import denoise_tv_chambolle

    noisy, weight = case.given["noisy"], _best_tv(case, False)[1]["weight"]
    axis = -1 if noisy.ndim == 3 else None
    solve = lambda: denoise_tv_chambolle(noisy, weight, eps=1e-7, max_num_iter=500, channel_axis=axis)
    return timed(solve, weight=weight)


def colour_tv(case: Case) -> Answer:
    """One gradient norm over the channels."""
    return _best_tv(case, case.given["noisy"].ndim == 3)


def tgv(case: Case) -> Answer:
    """Second-order TGV, norms over the channels together."""
    return climb(case, lambda weight: tgv_l2(case.given["noisy"], weight), 0.8 * case.given["sigma"])


def bm3d(case: Case) -> Answer:
    """BM3D told the noise level."""
    from bm3d import bm3d as grey
    from bm3d import bm3d_rgb

    noisy, sigma = case.given["noisy"], case.given["sigma"]
    return timed(lambda: (bm3d_rgb if noisy.ndim == 3 else grey)(noisy, sigma))


# inpaint


def _each_channel(fill: Callable[[NDArray, NDArray], NDArray]) -> Callable[..., Answer]:
    """A method of grey pictures, for each channel with its own mask."""

    def method(case: Case) -> Answer:
        image, mask = case.given["image"], case.given["mask"]
        channels = range(image.shape[-1])
        return timed(lambda: np.stack([fill(image[..., c], mask[..., c]) for c in channels], -1))

    return method


def _interpolated(kind: str) -> Callable[[NDArray, NDArray], NDArray]:
    def fill(image: NDArray, mask: NDArray) -> NDArray:
        from scipy.interpolate import griddata

        seen, everywhere = np.argwhere(mask), np.argwhere(np.ones_like(mask))
        nearest = griddata(seen, image[mask], everywhere, "nearest")
        inside = griddata(seen, image[mask], everywhere, kind)
        return np.where(np.isnan(inside), nearest, inside).reshape(image.shape)

    return fill


def _biharmonic(image: NDArray, mask: NDArray) -> NDArray:
    from skimage.restoration import inpaint_biharmonic

    return inpaint_biharmonic(image, ~mask)


linear = _each_channel(_interpolated("linear"))
cubic = _each_channel(_interpolated("cubic"))
biharmonic = _each_channel(_biharmonic)


def _tv_inpainting(coupled: bool) -> Callable[..., Answer]:
    """The least TV among the pictures that agree with the known entries: no weight to choose."""

    def method(case: Case) -> Answer:
        image, mask = case.given["image"], case.given["mask"]
        start = linear(case)[0]
        prox = lambda x, tau: np.where(mask, image, x)
        return timed(lambda: total_variation(start, prox, 1.0, coupled=coupled, step=0.03, tol=1e-4, most=1500))

    return method


tv_inpainting, colour_tv_inpainting = _tv_inpainting(False), _tv_inpainting(True)


# mixed noise in cubes


def without_impulses(cube: NDArray, threshold: float) -> NDArray:
    """Entries further than `threshold` from the median of their 3 x 3 neighbours in the band, replaced by it."""
    from scipy.ndimage import median_filter

    median = median_filter(cube, (3, 3, 1))
    return np.where(np.abs(cube - median) > threshold, median, cube)


def in_bands(solve: Callable[[NDArray], NDArray], cube: NDArray, bands: int = 2) -> NDArray:
    """A method of uncoupled channels, a few at a time: they stay in the processor's cache."""
    return np.concatenate([solve(cube[..., b : b + bands]) for b in range(0, cube.shape[-1], bands)], -1)


def tv_l1(cube: NDArray, weight: float) -> NDArray:
    """min |x - y| + weight TV(x), which impulses do not move."""
    y = cube.astype(np.float32)
    prox = lambda x, tau: y + np.sign(x - y) * np.maximum(np.abs(x - y) - np.float32(tau), 0)
    return total_variation(y, prox, weight, step=0.05, most=150)


def _each_band(solve: Callable[..., NDArray], **grids) -> Callable[..., Answer]:
    """A method of grey pictures, its parameters chosen for each band by its true error."""

    def method(case: Case) -> Answer:
        noisy, least, seconds = case.given["noisy"], np.inf, []
        best = noisy.copy()
        for values in itertools.product(*grids.values()):
            chosen = dict(zip(grids, values, strict=True))
            answer, note = timed(lambda chosen=chosen: in_bands(lambda part: solve(part, **chosen), noisy))
            error = ((answer - case.truth) ** 2).mean((0, 1))
            best[..., error < least] = answer[..., error < least]
            least = np.minimum(error, least)
            seconds.append(note["seconds"])
        return best, {"seconds": float(np.median(seconds))}

    return method


WEIGHTS = 0.03 * 1.7 ** np.arange(6)
_band_tv = lambda part, weight: tv_l2(part, weight, most=120)
band_tv = _each_band(_band_tv, weight=WEIGHTS)
median_tv = _each_band(
    lambda part, threshold, weight: _band_tv(without_impulses(part, threshold), weight),
    threshold=(0.3,),
    weight=WEIGHTS,
)
band_tv_l1 = _each_band(tv_l1, weight=0.4 * 1.4 ** np.arange(5))


def _spectral(matrix: NDArray, shrink: Callable[[NDArray], NDArray]) -> tuple[NDArray, NDArray]:
    """A matrix (n, bands) with its singular values shrunk, and its singular vectors over bands that are kept."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    values = np.sqrt(np.maximum(values, 1e-12))
    kept = shrink(values)
    vectors, factor = vectors[:, kept > 0], (kept / values)[kept > 0]
    return (matrix @ vectors * factor) @ vectors.T, vectors


def low_rank_and_sparse(noisy: NDArray, shrink: Callable, threshold: float, hard: bool, n_steps: int) -> tuple:
    """Low-rank and sparse parts of a cube by turns (n, bands), and the kept vectors; what is in neither is Gaussian noise."""
    y = noisy.reshape(-1, noisy.shape[-1]).astype(np.float32)
    sparse = np.zeros_like(y)
    for _ in range(n_steps):
        low, vectors = _spectral(y - sparse, shrink)
        rest = y - low
        inside = np.clip(rest, -threshold, threshold)
        sparse = np.where(inside == rest, 0, rest) if hard else rest - inside
    return low, y - sparse, vectors


def _rank(rank: int) -> Callable[[NDArray], NDArray]:
    return lambda values: values * (np.arange(len(values)) >= len(values) - rank)  # ascending


def robust_pca(case: Case) -> Answer:
    """Stable principal component pursuit: nuclear norm, 1-norm and squared error, both weights by the oracle."""
    noisy = case.given["noisy"]
    edge = 0.1 * sum(
        np.sqrt([noisy.shape[0] * noisy.shape[1], noisy.shape[2]])
    )  # the largest singular value of noise of 0.1

    def solve(nuclear: float, threshold: float) -> NDArray:
        shrink = lambda values: np.maximum(values - nuclear * edge, 0)
        return low_rank_and_sparse(noisy, shrink, threshold, False, 30)[0].reshape(noisy.shape)

    return search(case, solve, nuclear=(0.25, 0.5, 1.0, 2.0), threshold=(0.05, 0.1, 0.2, 0.4))


def godec(case: Case) -> Answer:
    """The best of given rank and of sparse entries above a threshold (Zhou and Tao 2011), without one if that is better."""
    noisy = case.given["noisy"]
    solve = lambda rank, threshold: low_rank_and_sparse(noisy, _rank(rank), threshold, True, 40)[0].reshape(noisy.shape)
    return search(case, solve, rank=(3, 4, 6, 9), threshold=(0.1, 0.15, 0.25, 0.4, np.inf))


@cache
def _coefficients(case: Case, rank: int, threshold: float) -> tuple[NDArray, NDArray, float]:
    """Pictures (H, W, rank) of a cube in the vectors of its low-rank part, without its sparse part; these vectors; and the seconds."""
    noisy = case.given["noisy"]
    (_, rest, vectors), note = timed(lambda: low_rank_and_sparse(noisy, _rank(rank), threshold, True, 40))
    return (rest @ vectors).reshape(*noisy.shape[:2], -1), vectors, note["seconds"]


@cache
def low_rank_tv(case: Case) -> Answer:
    """Each coefficient's picture denoised as a grey one (Zhuang and Bioucas-Dias 2018); rank, sparse part and the weight of TV by the oracle."""

    def solve(rank: int, threshold: float, weight: float) -> NDArray:
        pictures, vectors, _ = _coefficients(case, rank, threshold)
        return tv_l2(pictures, weight, most=150) @ vectors.T

    weights = (0.015, 0.03, 0.06, 0.12, 0.2)
    answer, note = search(case, solve, rank=(3, 4, 6, 9), threshold=(0.1, 0.15, 0.25, 0.4), weight=weights)
    return answer, note | {"seconds": note["seconds"] + _coefficients(case, note["rank"], note["threshold"])[-1]}


def low_rank_bm3d(case: Case) -> Answer:
    """The same with BM3D: rank and sparse part of the best TV, the noise level by the oracle."""
    note = low_rank_tv(case)[1]
    pictures, vectors, seconds = _coefficients(case, note["rank"], note["threshold"])
    solve = lambda sigma: _bm3d_of_each(pictures, sigma) @ vectors.T
    answer, found = search(case, solve, sigma=(0.03, 0.045, 0.07, 0.1, 0.14, 0.2))
    return answer, found | {"seconds": found["seconds"] + seconds}


def _bm3d_of_each(pictures: NDArray, sigma: float) -> NDArray:
    from bm3d import bm3d as grey

    return np.stack([grey(pictures[..., k], sigma) for k in range(pictures.shape[-1])], -1)


# attributes at scattered points


def neighbours(case: Case) -> Answer:
    """Mean of the k nearest."""
    given, tree = case.given, cKDTree(case.given["points"])
    solve = lambda k: given["values"][tree.query(given["query"], k=range(1, k + 1))[1]].mean(1)
    return search(case, solve, k=(1, 3, 5, 8, 12, 17, 24, 34, 48, 68))


def kernel(case: Case) -> Answer:
    """Gaussian kernel (Nadaraya-Watson) over the 300 nearest."""
    given, tree = case.given, cKDTree(case.given["points"])
    near, index = tree.query(given["query"], k=300)
    near, index = near.astype(np.float32), index.astype(np.int32)

    def solve(width: float) -> NDArray:
        weight = np.exp(-0.5 * (near**2 - near[:, :1] ** 2) / width**2)
        return np.einsum("nk,nkc->nc", weight, given["values"][index]) / weight.sum(1, keepdims=True)

    return climb(case, solve, float(np.median(tree.query(given["points"], k=2)[0][:, 1])), name="width")


def kriging(case: Case, n_near: int = 64, n_trial: int = 3000) -> Answer:
    """Ordinary kriging from the 64 nearest, Matern-3/2; length and noise by the oracle at 3,000 of the points."""
    given, tree = case.given, cKDTree(case.given["points"])
    _, index = tree.query(given["query"], k=n_near)
    trial = np.random.default_rng(0).permutation(len(given["query"]))[:n_trial]

    def solve(rows: NDArray, length: float, noise: float) -> NDArray:
        answer = np.empty((len(rows), given["values"].shape[1]))
        for part in np.array_split(rows, max(1, len(rows) // 500)):
            sites, values = given["points"][index[part]], given["values"][index[part]]
            between = _matern(np.linalg.norm(sites[:, :, None] - sites[:, None], axis=-1) / length)
            between += noise * np.eye(n_near)
            to = _matern(np.linalg.norm(sites - given["query"][part][:, None], axis=-1) / length)
            right = np.concatenate([values, np.ones((*values.shape[:2], 1))], -1)
            solved = np.linalg.solve(between, right)  # of the values, and of the mean
            mean = solved[..., :-1].sum(1, keepdims=True) / solved[..., -1:].sum(1, keepdims=True)
            at = np.searchsorted(np.sort(rows), part)
            answer[at] = (mean + to[:, None] @ (solved[..., :-1] - solved[..., -1:] * mean))[:, 0]
        return answer

    spacing = float(np.median(tree.query(given["points"], k=2)[0][:, 1]))
    grid = itertools.product(spacing * 2.0 ** np.arange(1, 8), (0.03, 0.1, 0.3, 1.0, 3.0))
    rows = np.sort(trial)
    error = lambda p: ((solve(rows, *p) - case.truth[rows]) ** 2).mean()
    length, noise = min(grid, key=error)
    return timed(lambda: solve(np.arange(len(given["query"])), length, noise), length=float(length), noise=noise)


def _matern(r: NDArray) -> NDArray:
    return (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r)


# surfaces


def _oriented(points: NDArray, k: int):
    import open3d

    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    cloud.estimate_normals(open3d.geometry.KDTreeSearchParamKNN(k))
    cloud.orient_normals_consistent_tangent_plane(k)
    return cloud


def _with_points(mesh, points: NDArray) -> dict:
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.triangles)
    return {"vertices": vertices, "faces": faces, "points": nearest_on(points, vertices, faces)}


def _poisson(case: Case, points: NDArray) -> Answer:
    """Depth, neighbours of the normals and the share of vertices cut where points are few by the oracle."""
    import open3d

    @cache
    def whole(depth: int, k: int) -> tuple:
        reconstruct = open3d.geometry.TriangleMesh.create_from_point_cloud_poisson
        (mesh, density), note = timed(lambda: reconstruct(_oriented(points, k), depth=depth, n_threads=1))
        return mesh, np.asarray(density), note["seconds"]

    def solve(depth: int, k: int, cut: float) -> dict:
        mesh, density, _ = whole(depth, k)
        mesh = open3d.geometry.TriangleMesh(mesh)
        mesh.remove_vertices_by_mask(density < np.quantile(density, cut))
        return _with_points(mesh, case.given["points"])

    answer, note = search(case, solve, depth=(6, 7, 8, 9), k=(12, 20, 40), cut=(0.0, 0.03, 0.06, 0.1, 0.15))
    return answer, note | {"seconds": whole(note["depth"], note["k"])[-1]}


def poisson(case: Case) -> Answer:
    """Screened Poisson reconstruction."""
    return _poisson(case, case.given["points"])


def planes_poisson(case: Case) -> Answer:
    """Screened Poisson reconstruction of the points on their planes."""
    return _poisson(case, planes(case)[0]["points"])


def ball_pivoting(case: Case) -> Answer:
    """Ball pivoting of the points on their planes, radii in multiples of the points' spacing by the oracle."""
    import open3d

    points = planes(case)[0]["points"]

    def solve(k: int, radius: float) -> dict:
        cloud = _oriented(points, k)
        spacing = np.mean(cloud.compute_nearest_neighbor_distance())
        radii = open3d.utility.DoubleVector(radius * spacing * np.array([1.0, 2.0]))
        mesh = open3d.geometry.TriangleMesh.create_from_point_cloud_ball_pivoting(cloud, radii)
        return _with_points(mesh, case.given["points"])

    return search(case, solve, k=(20, 40), radius=(1.5, 2.0, 3.0, 4.5))


def planes(case: Case) -> Answer:
    """Each point on the plane of its k nearest; no mesh."""
    points = case.given["points"]
    tree = cKDTree(points)

    def solve(k: int) -> dict:
        near = points[tree.query(points, k=k)[1]]
        mean = near.mean(1)
        normal = np.linalg.eigh(np.einsum("nki,nkj->nij", near - mean[:, None], near - mean[:, None]))[1][..., 0]
        return {"points": points - ((points - mean) * normal).sum(1, keepdims=True) * normal}

    return search(case, solve, k=(8, 12, 17, 24, 34, 48, 68))


def nothing(case: Case) -> Answer:
    """The noisy points as they are."""
    return timed(lambda: {"points": case.given["points"]})


def clean_mesh(case: Case) -> Answer:
    """The truth itself: the floor of the sampled distance."""
    return timed(lambda: case.truth | {"points": nearest_on(case.given["points"], **case.truth)})


def check() -> None:
    """The solvers agree with their laws and with each other's answers before anything is scored."""
    from skimage.restoration import denoise_tv_chambolle

    rng = np.random.default_rng(0)
    x, v, q = (rng.normal(size=(*n, 7, 9, 2)) for n in ((), (2,), (3,)))
    np.testing.assert_allclose((_gradient(x) * v).sum(), -(x * _divergence(v)).sum())
    twice = np.array([1, 1, 2]).reshape(3, 1, 1, 1)  # xy stands for xy and yx
    np.testing.assert_allclose((_symmetric(v) * q * twice).sum(), (v * _symmetric_adjoint(q)).sum())
    noisy = np.kron([[0.2, 0.8], [0.6, 0.3]], np.ones((10, 12))) + 0.1 * rng.normal(size=(20, 24))
    other = denoise_tv_chambolle(noisy, 0.1, eps=1e-9, max_num_iter=5000)
    np.testing.assert_allclose(tv_l2(noisy, 0.1, most=3000), other, atol=5e-3)
    plane = np.add.outer(np.arange(20.0), 2 * np.arange(24.0)) / 60
    np.testing.assert_allclose(tgv_l2(plane, 0.3, tol=0, most=3000), plane, atol=1e-4)
    np.testing.assert_allclose(
        _spectral(np.diag([3.0, 2.0, 1.0]), lambda s: np.maximum(s - 1, 0))[0], np.diag([2.0, 1.0, 0.0])
    )
    triangles, points = rng.normal(size=(40, 3, 3)), rng.normal(size=(30, 3))
    found = nearest_on(points, triangles.reshape(-1, 3), np.arange(120).reshape(40, 3))
    on = np.einsum("nk,tkd->tnd", rng.dirichlet(np.full(3, 0.3), 4000), triangles).reshape(
        -1, 3
    )  # many points of all triangles, more at corners
    excess = cKDTree(on).query(points)[0] - np.linalg.norm(found - points, axis=1)
    assert (excess > -1e-9).all() and excess.max() < 0.05, "a nearer point of the mesh, or one that is none"
