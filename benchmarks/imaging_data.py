"""The cases of the imaging benchmarks: truth, what the methods are given, and the score.

Pictures are floats in [0, 1], cut to their middle 256 x 256 where larger. Noise comes from ``default_rng(0)`` for each case and is not clipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from skimage import io

from neurst.imaging import metrics

SIDE = 256


@dataclass(frozen=True, eq=False)
class Case:
    """What a method is given, by name, how its answer is scored, and what oracles see: the truth, and that the first score be large."""

    given: dict
    score: Callable[[NDArray], dict[str, float]]
    truth: NDArray | dict
    quick: Callable[[NDArray], dict[str, float]] | None = None  # for oracles, where `score` is slow

    def value(self, answer: NDArray) -> float:
        """What an oracle maximises."""
        return next(iter((self.quick or self.score)(answer).values()))


def _root() -> Path:
    return Path(os.environ["NEURST_DATA"])


@cache
def archive(name: str) -> dict[str, NDArray]:
    """The arrays of ``<name>.npz``."""
    with np.load(_root() / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def crop(image: NDArray, side: int = SIDE) -> NDArray:
    """The middle of a picture."""
    top, left = (max(0, (n - side) // 2) for n in image.shape[:2])
    return image[top : top + side, left : left + side]


def pictures(colour: bool) -> list[str]:
    """Names of the colour pictures, or of the grey ones."""
    folder = "Set5" if colour else "Set12"
    names = [f"{folder}/{path.stem}" for path in sorted((_root() / "images" / folder).glob("*.png"))]
    return ["plane", *names] if colour else names


def picture(name: str) -> NDArray:
    """A picture, (H, W) or (H, W, 3)."""
    if name == "plane":
        return archive("images/neurtv_plane")["gt"] / 255
    return crop(io.imread(_root() / "images" / f"{name}.png") / 255)


def _picture_score(truth: NDArray) -> Callable:
    channels = {"channels": metrics.mpsnr} if truth.ndim == 3 else {}  # the mean over channels
    scores = {"psnr": metrics.psnr, "ssim": metrics.ssim} | channels
    return lambda image: {name: score(image, truth) for name, score in scores.items()}


def _cube_score(truth: NDArray) -> Callable:
    return lambda cube: {
        "psnr": metrics.mpsnr(cube, truth),
        "ssim": metrics.ssim(cube, truth),
        "sam": metrics.sam(cube, truth),
    }


def denoise_names() -> list[str]:
    """Picture and noise level of each row."""
    return [f"{name} {sigma}" for sigma in (0.1, 0.2) for name in (*pictures(True), *pictures(False))]


def denoise_case(name: str) -> Case:
    """Gaussian noise; the plane at 0.1 is the noisy picture of its file."""
    title, sigma = name.split()
    sigma, truth = float(sigma), picture(title)
    if name == "plane 0.1":
        noisy = archive("images/neurtv_plane")["noisy_case1"].astype(float)
        found = metrics.psnr(noisy, truth)
        if round(found, 2) != 20.01:
            raise ValueError(f"the noisy plane has {found:.2f} dB, not the 20.01 dB of its source: another file?")
    else:
        noisy = truth + sigma * np.random.default_rng(0).normal(size=truth.shape)
    return Case({"noisy": noisy, "sigma": sigma}, _picture_score(truth), truth)


def networks_names() -> list[str]:
    """Pictures that stand in no other table: choices may be looked at on them."""
    return [f"Set14/{name}" for name in ("barbara", "comic", "flowers", "monarch")]


def networks_case(name: str, side: int = 96, sigma: float = 0.1) -> Case:
    """The middle of a picture with Gaussian noise."""
    truth = crop(io.imread(_root() / "images" / f"{name}.png") / 255, side)
    noisy = truth + sigma * np.random.default_rng(0).normal(size=truth.shape)
    return Case({"noisy": noisy, "sigma": sigma}, _picture_score(truth), truth)


def inpaint_names() -> list[str]:
    """Colour pictures."""
    return pictures(True)


def inpaint_case(name: str) -> Case:
    """A fifth of the entries, each channel drawn by itself, without noise; the plane as its file has it, where non-zero."""
    truth = picture(name)
    if name == "plane":
        mask = archive("images/neurtv_plane")["sampled_p2"] != 0
        if np.abs(archive("images/neurtv_plane")["sampled_p2"][mask] - truth[mask]).max() > 1e-6:
            raise ValueError("the kept entries of the plane are not those of the picture: another file?")
    else:
        mask = np.random.default_rng(0).random(truth.shape) < 0.2
    return Case({"image": np.where(mask, truth, 0.0), "mask": mask}, _picture_score(truth), truth)


def mixed_names() -> list[str]:
    """Cube and kind of noise of each row."""
    return [f"{cube} {kind}" for cube in ("jasper_ridge", "samson") for kind in ("impulses", "stripes")]


def cube(name: str) -> NDArray:
    """A cube (H, W, bands), its least entry 0 and its greatest 1."""
    values = archive(f"hsi/{name}")["cube"].astype(float)
    return (values - values.min()) / np.ptp(values)


def impulses(truth: NDArray, rng: np.random.Generator) -> NDArray:
    """Gaussian noise of 0.1, then a tenth of the entries replaced by 0 or 1."""
    noisy = truth + 0.1 * rng.normal(size=truth.shape)
    hit = rng.random(truth.shape) < 0.1
    return np.where(hit, rng.integers(0, 2, truth.shape), noisy)


def stripes(truth: NDArray, rng: np.random.Generator) -> NDArray:
    """Gaussian noise of 0.05; offsets in [-0.25, 0.25] of 10 to 20 % of the columns of 30 % of the bands; three dead columns in 10 % of the bands."""
    _, columns, bands = truth.shape
    noisy = truth + 0.05 * rng.normal(size=truth.shape)
    for band in rng.permutation(bands)[: round(0.3 * bands)]:
        hit = rng.permutation(columns)[: round(rng.uniform(0.1, 0.2) * columns)]
        noisy[:, hit, band] += rng.uniform(-0.25, 0.25, len(hit))
    for band in rng.permutation(bands)[: round(0.1 * bands)]:
        noisy[:, rng.permutation(columns)[:3], band] = 0
    return noisy


def mixed_case(name: str) -> Case:
    """A cube with mixed noise."""
    title, kind = name.split()
    truth = cube(title)
    noisy = {"impulses": impulses, "stripes": stripes}[kind](truth, np.random.default_rng(0))
    quick = lambda answer: {"psnr": metrics.mpsnr(answer, truth)}
    return Case({"noisy": noisy}, _cube_score(truth), truth, quick)


def points_names() -> list[str]:
    """The scan."""
    return ["table_rgb"]


def points_case(name: str, n: int = 30_000, share: float = 0.2, sigma: float = 0.1) -> Case:
    """Noisy colours of a fifth of 30,000 points of a scan, wanted at all of them."""
    rng, scan = np.random.default_rng(0), archive(f"points/{name}")
    chosen = rng.permutation(len(scan["points"]))[:n]
    query, truth = scan["points"][chosen].astype(float), scan["colours"][chosen] / 255
    seen = np.arange(n) < round(share * n)  # the points are in random order
    values = truth[seen] + sigma * rng.normal(size=truth[seen].shape)
    score = lambda colours: {
        "psnr": metrics.psnr(colours, truth),
        "observed": metrics.psnr(colours[seen], truth[seen]),
        "others": metrics.psnr(colours[~seen], truth[~seen]),
    }
    return Case({"points": query[seen], "values": values, "query": query}, score, truth)


def surface_names() -> list[str]:
    """The scan."""
    return ["bunny"]


def surface_case(name: str, n: int = 10_000, share: float = 0.005) -> Case:
    """Points of a mesh with noise of 0.5 % of its longest side. Distances are in thousandths of that side."""
    rng, scan = np.random.default_rng(0), archive(f"points/{name}")
    vertices, faces = scan["points"].astype(float), scan["faces"]
    side = np.ptp(vertices, axis=0).max()
    chosen = vertices[rng.permutation(len(vertices))[:n]]
    noisy = chosen + share * side * rng.normal(size=chosen.shape)
    dense, wanted = sample(vertices, faces, 300_000, rng), sample(vertices, faces, 30_000, rng)

    def quick(answer: dict, n: int = 3_000) -> dict[str, float]:
        """Exact distances of the points on the answer, and of n points of either mesh to the other."""
        found = {"projected": distance(answer["points"][:n], vertices, faces).mean()}
        if "faces" in answer:
            cloud = sample(answer["vertices"], answer["faces"], n, np.random.default_rng(1))
            found["accuracy"] = distance(cloud, vertices, faces).mean()
            found["completeness"] = distance(wanted[:n], answer["vertices"], answer["faces"]).mean()
            found["distance"] = (found["accuracy"] + found["completeness"]) / 2
        first = found.get("distance", found["projected"])
        return {"score": -1e3 * first / side} | {key: 1e3 * d / side for key, d in found.items()}

    def score(answer: dict) -> dict[str, float]:
        """The same of all points and of 30,000, and the sampled distance."""
        cloud = answer["points"]
        if "faces" in answer:
            cloud = sample(answer["vertices"], answer["faces"], 30_000, np.random.default_rng(1))
        return quick(answer, 30_000) | {"chamfer": 1e3 * metrics.chamfer(cloud, dense) / side}

    return Case({"points": noisy}, score, {"vertices": vertices, "faces": faces}, quick)


def sample(vertices: NDArray, faces: NDArray, n: int, rng: np.random.Generator) -> NDArray:
    """Points drawn uniformly on a mesh."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    at = rng.choice(len(faces), n, p=area / area.sum())
    u, v = rng.random((2, n, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return a[at] + u * (b - a)[at] + v * (c - a)[at]


def distance(points: NDArray, vertices: NDArray, faces: NDArray) -> NDArray:
    """From each point to the nearest point of a mesh, on its triangles."""
    return np.linalg.norm(points - nearest_on(points, vertices, faces), axis=1)


def nearest_on(points: NDArray, vertices: NDArray, faces: NDArray, most: int = 512) -> NDArray:
    """The nearest point of a mesh, on its triangles.

    Triangles are cut into pieces no longer than h; a piece whose middle is further than the best distance + 2 h / 3 cannot hold the nearest point. So many
    pieces are looked at, nearest middles first, as this takes, `most` at most.
    """
    corners = vertices[faces]
    longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1).max(1)
    h = np.quantile(longest, 0.9)
    middles, owner = _pieces(corners, np.maximum(np.ceil(longest / h), 1).astype(int))
    tree, best, far = cKDTree(middles), np.empty_like(points), np.full(len(points), np.inf)
    left, k = np.arange(len(points)), 16
    while len(left):
        k = min(k, len(middles))
        for part in np.array_split(left, len(left) * k // 500_000 + 1):
            reach, index = tree.query(points[part], k=range(1, k + 1))
            on = _nearest_on_triangles(points[part, None], corners[owner[index]])
            d = np.linalg.norm(on - points[part, None], axis=-1)
            first = d.argmin(1)[:, None]
            best[part] = np.take_along_axis(on, first[..., None], 1)[:, 0]
            far[part] = np.where(reach[:, -1] > d.min(1) + 2 / 3 * h, np.inf, 1)
        left = left[np.isfinite(far[left])] if k < min(most, len(middles)) else left[:0]
        k *= 4
    return best


def _pieces(corners: NDArray, cuts: NDArray) -> tuple[NDArray, NDArray]:
    """Middles of the ``cuts**2`` equal parts of each triangle, and its number."""
    middles, owner = [], []
    for n in np.unique(cuts):
        i, j = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
        up, down = i + j < n, i + j < n - 1
        u = np.concatenate([i[up] + 1 / 3, i[down] + 2 / 3]) / n
        v = np.concatenate([j[up] + 1 / 3, j[down] + 2 / 3]) / n
        own = np.flatnonzero(cuts == n)
        a, b, c = (corners[own, k, None] for k in range(3))
        middles.append((a + u[:, None] * (b - a) + v[:, None] * (c - a)).reshape(-1, 3))
        owner.append(np.repeat(own, len(u)))
    return np.concatenate(middles), np.concatenate(owner)


def _nearest_on_triangles(p: NDArray, corners: NDArray) -> NDArray:
    """The foot of the perpendicular where it falls inside, the best of the three sides elsewhere."""
    a, b, c = (corners[..., k, :] for k in range(3))
    dot = lambda x, y: (x * y).sum(-1, keepdims=True)
    e, f, g = b - a, c - a, p - a
    ee, ef, ff, ge, gf = dot(e, e), dot(e, f), dot(f, f), dot(g, e), dot(g, f)
    flat = np.maximum(ee * ff - ef * ef, 1e-300)
    u, v = (ff * ge - ef * gf) / flat, (ee * gf - ef * ge) / flat
    feet = [a + u * e + v * f]
    for start, way in ((a, e), (a, f), (b, c - b)):
        feet.append(start + np.clip(dot(p - start, way) / np.maximum(dot(way, way), 1e-300), 0, 1) * way)
    feet = np.stack(np.broadcast_arrays(*feet))
    d = ((feet - p) ** 2).sum(-1)
    inside = ((u >= 0) & (v >= 0) & (u + v <= 1))[..., 0]
    d[0] = np.where(inside, d[0], np.inf)
    return np.take_along_axis(feet, d.argmin(0)[None, ..., None], 0)[0]


def edges_names() -> list[str]:
    """The drawn picture."""
    return ["discs, ramp, wedge, line"]


def drawn(side: int = 192, fine: int = 8) -> tuple[NDArray, NDArray, NDArray]:
    """A picture, its pixels within 3 pixels of an edge, and those of its ramp.

    Two discs, a ramp in a rectangle, a wedge of 20 degrees and a line 1.5 pixels wide on grey; each pixel is the mean of `fine` x `fine` points.
    """
    from scipy.ndimage import distance_transform_edt

    y, x = np.meshgrid(*2 * [(np.arange(side * fine) + 0.5) / (side * fine)], indexing="ij")
    across = ((x - 0.5) - 0.35 * (y - 0.6)) / np.hypot(1, 0.35)
    shapes = [  # later ones lie on top
        (np.hypot(x - 0.25, y - 0.25) < 0.17, 0.8),
        (np.hypot(x - 0.25, y - 0.25) < 0.06, 0.1),
        ((np.abs(x - 0.74) < 0.2) & (np.abs(y - 0.25) < 0.17), 0.1 + 0.8 * (x - 0.54) / 0.4),
        ((x > 0.05) & (x < 0.4) & (np.abs(y - 0.72) < np.tan(np.radians(10)) * (x - 0.05)), 0.95),
        ((np.abs(across) < 0.75 / side) & (y > 0.5) & (y < 0.95), 0.9),
        (np.hypot(x - 0.8, y - 0.72) < 0.13, 0.6),
    ]
    image, label = np.full(x.shape, 0.35), np.zeros(x.shape, int)
    for k, (inside, value) in enumerate(shapes, 1):
        image, label = np.where(inside, value, image), np.where(inside, k, label)
    blocks = lambda a: a.reshape(side, fine, side, fine)
    mixed = blocks(label).min((1, 3)) != blocks(label).max((1, 3))
    border = np.zeros_like(mixed)  # regions that meet between two pixels
    first = blocks(label)[:, 0, :, 0]
    border[:-1] |= first[:-1] != first[1:]
    border[:, :-1] |= first[:, :-1] != first[:, 1:]
    near = distance_transform_edt(~(mixed | border)) <= 3
    return blocks(image).mean((1, 3)), near, (first == 3) & ~near


def edges_case(name: str) -> Case:
    """The drawn picture with Gaussian noise of 0.1, its errors told apart by place."""
    truth, near, ramp = drawn()
    noisy = truth + 0.1 * np.random.default_rng(0).normal(size=truth.shape)
    places = {"edges": near, "ramp": ramp, "elsewhere": ~(near | ramp)}

    def score(image: NDArray) -> dict[str, float]:
        apart = {place: metrics.rmse(image[where], truth[where]) for place, where in places.items()}
        return {"psnr": metrics.psnr(image, truth)} | apart

    return Case({"noisy": noisy, "sigma": 0.1}, score, truth)
