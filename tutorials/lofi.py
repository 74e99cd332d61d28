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
# # Local neural fields
#
# The value of a picture at a point depends mostly on what was observed around it. A local neural field (LoFi) uses this: a small network reads the observed values on a few rings around a point and gives the value there.
# The same network serves every point of every picture, so it learns from very few pictures, it does not care how large they are, and it can be read between the pixels. Where the rings are is learned too.
#
# This tutorial takes the noise off a photograph with the model that ships with the package and trains models of its own: on three photographs, for computed tomography with a low dose, and for maps of dark matter. Then it uses a
# denoiser where data are no picture at all: missing pixels, and visibilities of a radio interferometer. At the end it finds an unknown geometry.
#
# ``python tutorials/lofi.py`` runs it as a script.

# %%
from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data
from skimage.filters import gaussian
from skimage.transform import resize

from neurst.imaging import fit_lofi, inpaint, learn_geometry, plug_and_play
from neurst.imaging.lofi import pretrained_lofi
from neurst.imaging.metrics import psnr
from neurst.imaging.operators import filtered_back_projection, interferometer, lensing, pixel_mask, radon, shape_noise
from neurst.imaging.options import FitOptions
from neurst.imaging.tgv import tv

rng = np.random.default_rng(0)


def show(axes: np.ndarray, pictures: dict[str, np.ndarray], **style) -> None:
    """One picture in each axis, without ticks."""
    for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
        ax.imshow(picture, **({"cmap": "gray", "vmin": 0, "vmax": 1} | style))
        ax.set(title=title, xticks=[], yticks=[])


def scored(pictures: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures with their scores in the titles, and the truth."""
    return {f"{name}, {psnr(each, truth):.2f} dB": each for name, each in pictures.items()} | {"truth": truth}


# %% [markdown]
# ## A denoiser for every noise level and every unit
#
# `pretrained_lofi()` was trained on other photographs; `imaging.denoise(noisy, method="lofi")` calls it. The value at a point is a weighted mean of the observed values on the rings. The network gives the weights, and it sees the values in units of the noise
# after their mean is taken off. So a picture in other units, or with other noise, needs no other model. Without `sigma` the noise is estimated.

# %%
clean = data.camera()[90:250, 150:310] / 255
noisy = clean + 0.15 * rng.standard_normal(clean.shape)
model = pretrained_lofi()
restored = model(noisy)
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
show(axes, scored({"noisy": noisy, "TV": tv(noisy, progress=False).image, "LoFi": restored}, clean))
plt.show()

# %% [markdown]
# The result is a function of the coordinates, (row, column) in pixels: here a detail, and the same detail with eight times as many points along each side. The right panel shows the positions that are read for one point. The outer rings are read in blurred copies
# of the picture.

# %%
rows, columns = (np.arange(start, start + 24, 0.125) for start in (30, 70))
coords = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
detail = model.at(noisy, coords).reshape(len(rows), len(columns))
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
part = np.s_[30:54, 70:94]
show(axes[:3], {"noisy": noisy[part], "LoFi, pixels": restored[part], "LoFi, between the pixels": detail})
show(axes[3:], {"what is read for one point": noisy[part]}, alpha=0.4)
positions = model.geometry(noisy, [[42.0, 82.0]])[0] - [30, 70]  # (rings, rays, 2)
for ring in positions:
    axes[3].plot(*ring[:, ::-1].T, "o", markersize=4)
axes[3].set(xlim=(-0.5, 23.5), ylim=(23.5, -0.5))
plt.show()

# %% [markdown]
# ## Training on three photographs
#
# A step reads 256 points, and the noise is new in each. So even three photographs do not lead to overfitting, and a short training is enough to be near the model of the package.

# %%
photographs = [data.coins() / 255, data.moon() / 255, data.astronaut().mean(2) / 255]
tiny = fit_lofi(photographs, sigma=(0.15, 0.15), steps=800, progress=False)
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
show(axes, scored({"three photographs": tiny(noisy, sigma=0.15), "package": model(noisy, sigma=0.15)}, clean))
plt.show()

# %% [markdown]
# ## Computed tomography with a low dose
#
# Filtered back-projection turns noisy views into a noisy picture, whose noise is strong and correlated between pixels. `degrade` tells `fit_lofi` how an input is made from a clean picture; it is called again and again during the training. The training pictures here
# are random ellipses inside a ring of bone, and the test is a head phantom.

# %%
angles = np.arange(0, 180, 2.0)
scan = radon((96, 96), angles)


def views(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    sinogram = scan.forward(torch.from_numpy(picture)).numpy()
    return sinogram + 0.08 * np.sqrt((sinogram**2).mean()) * generator.standard_normal(sinogram.shape)


def back_projected(picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return filtered_back_projection(views(picture, generator), picture.shape, angles)


def ellipses(generator: np.random.Generator, side: int = 96) -> np.ndarray:
    y, x = np.mgrid[: 3 * side, : 3 * side] / (3 * side - 1) * 2 - 1
    out = generator.uniform(0.2, 0.6) * ((x / 0.8) ** 2 + (y / 0.9) ** 2 < 1)
    for _ in range(12):
        (a, b), turn = generator.uniform(0.04, 0.4, 2), generator.uniform(0, np.pi)
        u, v = x - generator.uniform(-0.6, 0.6), y - generator.uniform(-0.6, 0.6)
        inside = ((np.cos(turn) * u + np.sin(turn) * v) / a) ** 2 + ((np.cos(turn) * v - np.sin(turn) * u) / b) ** 2 < 1
        out = np.where(inside & (out > 0), np.clip(out + generator.uniform(-0.3, 0.3), 0.05, 1), out)
    bone = ((x / 0.8) ** 2 + (y / 0.9) ** 2 < 1) & ((x / 0.73) ** 2 + (y / 0.84) ** 2 > 1)
    fine = np.where(bone, generator.uniform(0.7, 1.0), out)
    return fine.reshape(side, 3, side, 3).mean((1, 3))


phantom = resize(data.shepp_logan_phantom(), (92, 92), anti_aliasing=True)
phantom = np.pad(phantom, 2)
ct_model = fit_lofi([ellipses(rng) for _ in range(12)], degrade=back_projected, steps=1000, progress=False)
sinogram = views(phantom, rng)
back = filtered_back_projection(sinogram, phantom.shape, angles)
hann = filtered_back_projection(sinogram, phantom.shape, angles, window="hann")
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
show(axes, scored({"back-projection": back, "Hann window": hann, "then LoFi": ct_model(back)}, phantom), vmax=0.6)
plt.show()

# %% [markdown]
# ## Maps of dark matter
#
# Gravity bends light, so matter shears the shapes of the galaxies behind it. `lensing` is the operator from matter to shear, and its adjoint inverts it exactly (Kaiser and Squires), but the shapes of single galaxies are far noisier than the shear. The
# matter here is synthetic: the exponential of a smooth random field.


# %%
def matter(generator: np.random.Generator, side: int = 128) -> np.ndarray:
    k = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    field = np.fft.ifft2(
        np.fft.fft2(generator.standard_normal((side, side))) / (k + 0.02) ** 1.5 * np.exp(-((k / 0.12) ** 2))
    ).real
    kappa = np.exp(1.5 * field / field.std())
    return 0.02 * (kappa / kappa.mean() - 1)


shear = lensing((128, 128))
noise = 0.3 * shape_noise(pixel_area=0.5**2)  # pixels of half an arcminute, eleven times the galaxies of a wide survey


def inverted(kappa: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    observed = shear.forward(torch.from_numpy(kappa)).numpy()
    return shear.adjoint(torch.from_numpy(observed + noise * generator.standard_normal(observed.shape))).numpy()


truth, raw = matter(rng), None
raw = inverted(truth, rng)
dark_model = fit_lofi([matter(rng) for _ in range(8)], degrade=inverted, steps=800, progress=False)
smooth = {width: gaussian(raw, width) for width in (1, 1.5, 2, 3, 4)}
best = min(smooth, key=lambda width: ((smooth[width] - truth) ** 2).mean())  # chosen with the truth at hand
explained = lambda found: 1 - ((found - truth) ** 2).mean() / truth.var()
pictures = {f"smoothed by {best} pixels": smooth[best], "LoFi": dark_model(raw)}
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
titles = {f"{name}, {explained(each):.2f} of variance": each for name, each in pictures.items()}
show(axes, {"inversion": raw} | titles | {"truth": truth}, cmap="inferno", vmin=-0.02, vmax=0.12)
plt.show()

# %% [markdown]
# ## Data that are no picture: a denoiser as the prior
#
# `plug_and_play` looks for a picture that agrees with the data and that the denoiser leaves as it is. It alternates between both. Any function of a picture and a noise level may be the denoiser. First, 70 % of the pixels are missing.

# %%
seen = rng.random(clean.shape) < 0.3
filled = plug_and_play(np.where(seen, clean, 0.0), pixel_mask(seen), model, progress=False)
field = inpaint(np.where(seen, clean, 0.0), seen, options=FitOptions(progress=False))
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
show(axes, scored({"observed": np.where(seen, clean, 0.0), "NeurTV field": field, "LoFi as prior": filled}, clean))
plt.show()

# %% [markdown]
# A radio interferometer measures single frequencies of the sky, one for each pair of antennas and moment. `interferometer` sums the exact Fourier series at these frequencies, without a grid. Brightness is not negative, which `lower=0` states.

# %%
hours = np.linspace(-1.2, 1.2, 60)
antennas = rng.normal(size=(10, 2)) * 0.9
pairs = [(i, j) for i in range(10) for j in range(i)]
uv = np.array(
    [
        [h @ (antennas[i] - antennas[j]) for h in ((np.cos(t), np.sin(t)), (-0.7 * np.sin(t), 0.7 * np.cos(t)))]
        for i, j in pairs
        for t in hours
    ]
)
uv = uv[np.abs(uv).max(1) < np.pi]  # radians per pixel
sky = gaussian(data.hubble_deep_field()[300:396, 100:196].mean(2) / 255, 1.0)
sky = np.clip((sky - 0.08) / (sky.max() - 0.08), 0, None)
instrument = interferometer(sky.shape, uv)
visibilities = instrument.forward(torch.from_numpy(sky)).numpy()
level = 0.05 * np.sqrt((visibilities**2).mean())
visibilities = visibilities + level * rng.standard_normal(visibilities.shape)
dirty = instrument.adjoint(torch.from_numpy(visibilities)).numpy()
dirty = dirty * (dirty * sky).sum() / (dirty**2).sum()  # in the best scale, which needs the truth
found = plug_and_play(visibilities, instrument, model, noise=level, lower=0.0, progress=False)
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
axes[0].scatter(*np.concatenate([uv, -uv]).T, s=0.5, c="k")
axes[0].set(title="measured frequencies", aspect="equal", xlabel="radians per pixel", ylabel="radians per pixel")
show(axes[1:], scored({"dirty image": dirty, "LoFi as prior": found}, sky), cmap="inferno", vmax=0.7)
plt.show()

# %% [markdown]
# ## Memory does not grow with the picture
#
# Training reads windows of a picture, so the picture may stay in a file. Each line is a new process, which takes 20 steps of 512 points. Its peak memory includes the parts of the file that were read.

# %%
steps = """
import sys
from pathlib import Path
import numpy as np
from neurst.imaging.lofi import LoFiTraining, fit_lofi
numbers = dict(config=LoFiTraining(windows=1, points=512), device="cpu", progress=False)
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3
fit_lofi([np.zeros((64, 64), np.float32)], steps=3, **numbers)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
fit_lofi([np.load(sys.argv[1], mmap_mode="r")], steps=20, **numbers)
print(round(peak() - before))
"""
with tempfile.TemporaryDirectory() as folder:
    for side in (256, 1024, 4096) if sys.platform == "linux" else ():
        path = Path(folder, "picture.npy")
        np.save(path, rng.random((side, side), np.float32))
        grown = subprocess.run([sys.executable, "-c", steps, path], capture_output=True, text=True, check=True).stdout
        print(f"{side} x {side}: file {path.stat().st_size / 1e6:.0f} MB, peak memory grows by {grown.strip()} MB")

# %% [markdown]
# ## Unknown geometry
#
# Sometimes it is not known where the input shows what the target shows. `learn_geometry` finds the map of coordinates from pairs of pictures, and `fit_lofi(..., warp=...)` trains it further together with the network. Here the input is bent, and noisy.

# %%
y, x = np.mgrid[:128, :128].astype(float)
scene = gaussian(data.coins()[60:188, 100:228] / 255, 0.7)
at = np.stack([y + 4 * np.sin(2 * np.pi * x / 128), x + 5 * np.cos(2 * np.pi * y / 150)], -1).reshape(-1, 2)
target = pretrained_lofi().at(scene, at, sigma=0.005).reshape(scene.shape)
observed = scene + 0.05 * rng.standard_normal(scene.shape)
warp = learn_geometry([observed], [target], kind="smooth", progress=False)
joint = fit_lofi([target], inputs=[observed], warp=warp, steps=400, progress=False)
pixels = np.stack([y, x], -1).reshape(-1, 2)
error = np.linalg.norm(warp.at(pixels, shape=scene.shape) - at, axis=1).reshape(scene.shape)
fig, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
show(axes[:3], {"input": observed, "target": target, "input, mapped and denoised": joint(observed)})
image = axes[3].imshow(error, vmax=1, cmap="magma_r")
axes[3].set(title=f"error of the map, median {np.median(error):.2f} px", xticks=[], yticks=[])
fig.colorbar(image, ax=axes[3], shrink=0.8)
plt.show()
