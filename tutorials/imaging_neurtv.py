# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Pictures, cubes and point clouds as continuous fields
#
# The core that fits a field to spots fits one to pixels as well. This tutorial takes the noise off a picture, fills one of which a fifth is known, reads
# it between its pixels, draws its exact gradient, restores a hyperspectral cube with noise of several kinds, and denoises the colours and the
# shape of a point cloud. Every picture is of data that come with scikit-image or are drawn here, and every truth is known.
#
# ``python tutorials/imaging_neurtv.py --output imaging_output`` runs it as a script.

# %%
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from skimage import data

from neurst.core.lattice import Lattice
from neurst.imaging import FitOptions, denoise, denoise_cube, fit_image, fit_surface, inpaint, recover_attributes
from neurst.imaging.metrics import mpsnr, psnr, sam

rng = np.random.default_rng(0)
QUIET = FitOptions(progress=False)


def show(axes: np.ndarray, pictures: dict[str, np.ndarray], **style) -> None:
    """One picture in each axis, without ticks."""
    for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
        ax.imshow(np.clip(picture, 0, 1) if picture.ndim == 3 else picture, **style)
        ax.set(title=title, xticks=[], yticks=[])


# %% [markdown]
# ## Noise
#
# The level of the noise and the strength of the prior are found by `denoise` itself: the one from the finest wavelets, the other on pixels that are
# held out.


# %%
def noise() -> tuple[Figure, dict[str, float]]:
    """A picture with Gaussian noise, restored by two penalties."""
    picture = data.astronaut()[20:180, 140:300] / 255
    noisy = picture + 0.1 * rng.standard_normal(picture.shape)
    found = {
        "isotropic": denoise(noisy, options=FitOptions(penalty="isotropic", progress=False)),
        "space-variant (default)": denoise(noisy, options=QUIET),
    }
    fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    scores = {"noisy": psnr(noisy, picture)} | {name: psnr(out, picture) for name, out in found.items()}
    titled = {f"{name}, {scores[name]:.1f} dB": out for name, out in ({"noisy": noisy} | found).items()}
    show(axes, titled | {"truth": picture})
    return fig, scores


# %% [markdown]
# ## Gaps
#
# A fifth of the entries are seen, drawn anew for each channel. What is seen comes back as it is.


# %%
def gaps() -> tuple[Figure, dict[str, float]]:
    """A picture of which a fifth is known."""
    picture = data.astronaut()[20:180, 140:300] / 255
    seen = rng.random(picture.shape) < 0.2
    filled = inpaint(np.where(seen, picture, np.nan), seen, options=QUIET)
    fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
    score = psnr(filled, picture)
    show(
        axes,
        {"a fifth of the entries": np.where(seen, picture, 0), f"filled, {score:.1f} dB": filled, "truth": picture},
    )
    return fig, {"filled": score}


# %% [markdown]
# ## Between the pixels, and slopes
#
# `fit_image` gives the field: a function of (row, column) that can be read and differentiated anywhere. Its Jacobian is exact, per pixel, and the
# prior has taken the noise off it, which differences of neighbouring pixels would double.


# %%
def between() -> tuple[Figure, dict[str, float]]:
    """A corner of a noisy picture read at an eighth of a pixel, and the size of its gradient."""
    coins = data.coins()[20:148, 20:148] / 255
    noisy = coins + 0.05 * rng.standard_normal(coins.shape)
    field = fit_image(noisy, options=QUIET)
    rows, columns = (torch.arange(a, a + 32, 1 / 8, dtype=torch.float64) for a in (20, 12))
    fine = field.on_lattice(Lattice((rows, columns))).reshape(len(rows), len(columns)).numpy()
    pixels = np.argwhere(np.ones(coins.shape))
    slope = np.linalg.norm(field.jacobian(pixels)[:, 0], axis=1).reshape(coins.shape)
    differences = np.hypot(*np.gradient(noisy))
    fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    show(axes[:2], {"32 x 32 pixels": noisy[20:52, 12:44], "the field between them": fine}, cmap="gray", vmin=0, vmax=1)
    show(
        axes[2:],
        {"differences of pixels": differences, "gradient of the field": slope},
        cmap="magma",
        vmin=0,
        vmax=0.25,
    )
    clean = np.hypot(*np.gradient(coins))
    error = lambda found: float(np.sqrt(np.mean((found - clean) ** 2)))
    return fig, {"error of differences": error(differences), "error of the field's gradient": error(slope)}


# %% [markdown]
# ## A cube
#
# Four materials, each with its spectrum, and every kind of noise at once: Gaussian, impulses, stripes and a dead line. `denoise_cube`
# returns the clean cube and what it took to be the sparse part.


# %%
def cube() -> tuple[Figure, dict[str, float]]:
    """A mixture of four materials with mixed noise."""
    i, j = np.mgrid[:64, :56] / 60
    bands = np.linspace(0, 1, 40)
    where = [np.hypot(i - 0.3, j - 0.3) < 0.22, (j > 0.6) & (i < 0.6), i > 0.75 - 0.2 * j]
    share = np.stack([*where, np.ones_like(i)], -1).astype(float)
    share /= share.sum(-1, keepdims=True)
    spectra = np.stack([0.5 + 0.4 * np.sin((3 + k) * bands + 2 * k) for k in range(4)])
    clean = share @ spectra
    noisy = clean + 0.05 * rng.standard_normal(clean.shape)
    hit = rng.random(clean.shape) < 0.05
    noisy[hit] = rng.integers(0, 2, hit.sum())
    for band in rng.choice(40, 12, replace=False):
        noisy[:, rng.choice(56, 6, replace=False), band] += rng.uniform(-0.25, 0.25, 6)
    noisy[:, 20, 15:20] = 0
    restored, sparse = denoise_cube(noisy, options=QUIET)
    fig, axes = plt.subplots(1, 4, figsize=(12, 3.7), layout="constrained")
    band = {"band 18, noisy": noisy, "restored": restored, "truth": clean}
    show(axes[:3], {title: c[..., 17] for title, c in band.items()}, cmap="viridis", vmin=0, vmax=1)
    show(axes[3:], {"sparse part": sparse[..., 17]}, cmap="RdBu", vmin=-0.6, vmax=0.6)
    return fig, {
        "noisy": mpsnr(noisy, clean),
        "restored": mpsnr(restored, clean),
        "angle in degrees": sam(restored, clean),
    }


# %% [markdown]
# ## A point cloud
#
# Noisy points of a torus with noisy colours, a third of them unknown. Colours are read at the points; the surface is the zero of a signed distance,
# onto which the points can be projected and which marching cubes turn into triangles.


# %%
def cloud() -> tuple[Figure, dict[str, float]]:
    """A torus: colours recovered, points projected, a mesh."""
    u, v = 2 * np.pi * rng.random((2, 3000))
    ring = 1 + 0.4 * np.cos(v)
    surface = np.stack([ring * np.cos(u), ring * np.sin(u), 0.4 * np.sin(v)], -1)
    colours = np.where((np.sin(3 * u) > 0)[:, None], [0.9, 0.5, 0.2], [0.2, 0.4, 0.8])
    points = surface + 0.015 * rng.standard_normal(surface.shape)
    seen = rng.random(len(points)) < 0.67
    given = np.where(seen[:, None], colours + 0.15 * rng.standard_normal(colours.shape), np.nan)
    found = recover_attributes(points, given, n_members=2, options=FitOptions(steps=300, progress=False))
    shape = fit_surface(points, options=QUIET)
    vertices, faces = shape.mesh(64)

    def off(p: np.ndarray) -> float:
        """Mean distance to the torus."""
        return float(np.abs(np.hypot(np.hypot(p[:, 0], p[:, 1]) - 1, p[:, 2]) - 0.4).mean())

    fig = plt.figure(figsize=(12, 3.8), layout="constrained")
    views = [fig.add_subplot(1, 3, k + 1, projection="3d") for k in range(3)]
    for ax, (title, c) in zip(
        views, {"noisy colours, a third unknown": given, "recovered": found}.items(), strict=False
    ):
        known = np.isfinite(c).all(1)
        ax.scatter(*points[known].T, c=np.clip(c[known], 0, 1), s=3)
        ax.set_title(title)
    views[2].plot_trisurf(*vertices.T, triangles=faces, color="lightgrey", edgecolor="none")
    views[2].set_title("surface")
    for ax in views:
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), zlim=(-0.9, 0.9))
        ax.set_box_aspect((4, 4, 3))
        ax.set_axis_off()
    return fig, {
        "noisy colours": psnr(given[seen], colours[seen]),
        "recovered colours": psnr(found, colours),
        "points off the torus": off(points),
        "projected points off it": off(shape.project(points)),
    }


# %%
def main() -> None:
    """Run everything, save the pictures, print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("imaging_output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for section in (noise, gaps, between, cube, cloud):
        begin = time.perf_counter()
        fig, scores = section()
        fig.savefig(output / f"{section.__name__}.png", dpi=130)
        plt.close(fig)
        told = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
        sys.stdout.write(f"{section.__name__}: {told} ({time.perf_counter() - begin:.0f} s)\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
