# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Weights that a network predicts
#
# Total generalised variation has two weights. The first one, $L_1$, is the cost of a slope that the picture has beyond a smooth field of slopes; the second
# one, $L_0$, is the cost of a bend of that field. With two numbers, what takes the noise off flat parts also blurs fine structures. `neurst.imaging.tgv` lets a
# small network read the data and predict both weights for each pixel. This tutorial takes the noise off a photograph with the network that ships with the
# package, looks at the weights, trains a network for magnetic resonance pictures within a minute, and fills a picture of which 30 % of the pixels are known.
#
# ``python tutorials/learned_tgv.py`` runs it as a script.

# %%
from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data

from neurst.core.train import TrainConfig
from neurst.imaging import FitOptions, fit_image
from neurst.imaging.metrics import psnr
from neurst.imaging.operators import cartesian_mask, masked_fourier
from neurst.imaging.tgv import (
    LearnedConfig,
    LearnedTGV,
    fit_reconstructor,
    pretrained_denoiser,
    tgv,
    tv,
)

rng = np.random.default_rng(0)


def show(axes: np.ndarray, pictures: dict[str, np.ndarray], **style) -> None:
    """One picture in each axis, without ticks."""
    for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
        ax.imshow(picture, **({"cmap": "gray", "vmin": 0, "vmax": 1} | style))
        ax.set(title=title, xticks=[], yticks=[])


# %% [markdown]
# ## Noise
#
# `tgv` without an argument estimates the noise and chooses one pair of weights by Stein's unbiased risk estimate. `pretrained_denoiser()` predicts a
# pair for each pixel. It was trained on other photographs, and `imaging.denoise(noisy, method="learned_tgv")` calls it.

# %%
clean = data.camera()[90:250, 150:310] / 255
noisy = clean + 0.1 * rng.standard_normal(clean.shape)
classic = tgv(noisy, progress=False).image
denoiser = pretrained_denoiser()
learned = denoiser.reconstruct(noisy)

fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
pictures = {"noisy": noisy, "TGV": classic, "learned TGV": learned}
show(axes, {f"{name}, {psnr(each, clean):.2f} dB": each for name, each in pictures.items()} | {"truth": clean})
plt.show()

# %% [markdown]
# Both weights are small along edges and in fine structures, and large in flat parts, where everything that is left is noise.

# %%
first, second = denoiser.maps(noisy)
fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
show(axes[:1], {"noisy": noisy})
for ax, weight, name in ((axes[1], first, "$L_1$"), (axes[2], second, "$L_0$")):
    image = ax.imshow(np.log10(weight), cmap="viridis")
    ax.set(title=f"log10 {name}", xticks=[], yticks=[])
    fig.colorbar(image, ax=ax, shrink=0.8)
plt.show()

# %% [markdown]
# What happens at an edge shows best on a step that is drawn: the mean of both weights over the rows, in units of their values far away. The second weight
# falls to a tenth, so that slopes may change at once; the first one falls to less than a half. The paper {cite:p}`Vu2025` describes a band of low values of the first
# weight between two of high values; this network does not make one.

# %%
step = np.repeat([0.3, 0.7], 64)[None] * np.ones((128, 1))
profiles = denoiser.maps(step + 0.05 * rng.standard_normal(step.shape), sigma=0.05)
fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, weight in zip(("$L_1$", "$L_0$"), profiles, strict=True):
    profile = weight.mean(0)
    ax.plot(np.arange(-16, 16) + 0.5, profile[48:80] / np.median(profile), label=name)
ax.set(xlabel="distance to the edge in pixels", ylabel="weight / weight far away", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# ## Magnetic resonance
#
# A scanner measures the Fourier transform of a complex picture, and measures faster if it leaves lines out: every fourth (R = 4) or every
# eighth (R = 8) on average. Any model of `neurst.imaging.tgv` works with any linear operator. Here the heads are drawn at random, so that the truth is known and
# no data are needed; `docs/benchmarks.md` has the scores on measured heads.

# %%
SIDE = 128


def head(rng: np.random.Generator) -> np.ndarray:
    """A section of a head that looks different each time, in [0, 1]."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    turn, size = rng.uniform(-0.3, 0.3), rng.uniform(0.9, 1.05)

    def inside(centre: tuple, radii: tuple, angle: float = 0.0, folds: float = 0.0) -> np.ndarray:
        c, s = np.cos(angle + turn), np.sin(angle + turn)
        u, v = c * (x - centre[1]) + s * (y - centre[0]), c * (y - centre[0]) - s * (x - centre[1])
        theta = np.arctan2(v, u)
        wave = folds * (np.sin(11 * theta + rng.uniform(0, 6)) + np.sin(17 * theta + rng.uniform(0, 6)))
        return np.hypot(u / radii[1], v / radii[0]) < size * (1 + wave)

    picture = np.zeros_like(x)
    for region, value in (
        (inside((0, 0), (0.88, 0.7)), rng.uniform(0.8, 0.95)),
        (inside((0, 0), (0.8, 0.62)), rng.uniform(0.1, 0.25)),
        (inside((0, 0), (0.76, 0.58), folds=0.015), rng.uniform(0.4, 0.55)),
        (inside((0, 0), (0.64, 0.46), folds=0.06), rng.uniform(0.6, 0.75)),
        (inside((0, 0.12), (0.28, 0.07), 0.25), rng.uniform(0.1, 0.25)),
        (inside((0, -0.12), (0.28, 0.07), -0.25), rng.uniform(0.1, 0.25)),
    ):
        picture[region] = value
    for _ in range(12):
        spot = inside(tuple(rng.uniform(-0.5, 0.5, 2)), tuple(rng.uniform(0.015, 0.08, 2)), rng.uniform(0, 3))
        picture[spot & (picture > 0.3)] = rng.uniform(0.2, 0.9)
    shade = 1 + 0.15 * np.sin(rng.uniform(1, 2) * x + rng.uniform(0, 6)) * np.cos(rng.uniform(1, 2) * y)
    return picture * shade / 1.15


def corrupt(clean: torch.Tensor, generator: torch.Generator) -> tuple:
    """Lines left out, and noise on the others: k-space, operator, noise level."""
    speed, seed = 4 + 4 * float(torch.rand((), generator=generator)), int(torch.randint(2**31, (), generator=generator))
    sigma = 0.01 + 0.04 * float(torch.rand((), generator=generator))
    operator = masked_fourier(cartesian_mask(clean.shape[-2:], speed, random_state=seed))
    noise = torch.view_as_complex(torch.randn((*clean.shape, 2), generator=generator)) * sigma / 2**0.5
    return operator.forward(clean + noise), operator, torch.full((len(clean),), sigma)


# %% [markdown]
# Artefacts of missing lines look like structures. So the network reads the picture of a first solution with constant weights (`first_steps`) beside the
# zero-filled one (`reads_both`). Here the first term alone is learned, which is total variation; `slopes=True` learns both.

# %%
config = LearnedConfig(
    slopes=False, unit="rms", first_start=0.06, first_steps=60, reads_both=True, free_steps=40, ratio=0.05
)
model = LearnedTGV(config)
heads = [head(np.random.default_rng(seed)) for seed in range(40)]
history = fit_reconstructor(model, heads, corrupt, TrainConfig(steps=200, device="cpu"), patch=None, progress=False)

# %% [markdown]
# A new head, measured at R = 4 and at R = 8. The weights of `tv` and `tgv` are the best of four, chosen with the truth at hand; the network does not know it. It has seen
# heads of the same kind, so the gain is larger than on a measured head, where it is about 1 dB ({doc}`../benchmarks_tables`).

# %%
truth = head(np.random.default_rng(1000))
best = lambda found: max(found, key=lambda each: psnr(abs(each), truth))
fig, axes = plt.subplots(2, 5, figsize=(13, 5.6), layout="constrained")
for row, speed in zip(axes, (4, 8), strict=True):
    operator = masked_fourier(cartesian_mask(truth.shape, speed, random_state=7))
    noise = rng.standard_normal((*truth.shape, 2)) @ [1, 1j] * 0.02 / 2**0.5
    measured = operator.forward(torch.from_numpy(truth + noise)).numpy()
    weights = (0.006, 0.012, 0.025, 0.05)
    pictures = {
        "zero-filled": operator.adjoint(torch.from_numpy(measured)).numpy(),
        "TV": best([tv(measured, operator, first=w, progress=False).image for w in weights]),
        "TGV": best([tgv(measured, operator, first=w, progress=False).image for w in weights]),
        "learned TV": model.reconstruct(measured, operator, sigma=0.02),
    }
    titled = {f"{name}, {psnr(abs(each), truth):.2f} dB": abs(each) for name, each in pictures.items()}
    show(row, titled | {"truth": truth})
    row[0].set_ylabel(f"R = {speed}")
plt.show()

# %% [markdown]
# ## Scattered pixels
#
# The penalty `"learned_tgv"` takes predicted weights to continuous fields, of pixels that lie anywhere and of spots (`neurst.tl.neurtv_fit(adata, penalty="learned_tgv")`):
# during the fit the field is read on a lattice, the network predicts the weights there, and the fit goes on with them. It gains little over constant
# weights (`"tgv"`). The default penalty, which adapts to edges without a network, is the better choice for pictures ({doc}`../benchmarks_tables`).

# %%
clean = data.camera()[90:218, 150:278] / 255
seen = rng.random(clean.shape) < 0.3
noisy = np.where(seen, clean + 0.05 * rng.standard_normal(clean.shape), 0)
pictures = {}
for penalty in ("tgv", "learned_tgv", "space_variant"):
    field = fit_image(noisy, seen, sigma=0.05, options=FitOptions(penalty=penalty, progress=False))
    pictures[penalty] = field(np.argwhere(np.ones(clean.shape))).reshape(clean.shape)
fig, axes = plt.subplots(1, 5, figsize=(13, 3.0), layout="constrained")
titled = {f"{name}, {psnr(each, clean):.2f} dB": each for name, each in pictures.items()}
show(axes, {"30 % of the pixels": noisy} | titled | {"truth": clean})
plt.show()
