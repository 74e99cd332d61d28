"""Total generalised variation: steps to a given accuracy, and denoising with the best scalar weights and with learned maps.

``NEURST_DATA=folder python benchmarks/imaging_tgv.py [steps] [denoise] [scattered] [time]`` reads ``images/Set12`` of that folder and writes the tables named
(all four if none is) of docs/benchmarks_tables.md.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from skimage import io
from tables import write

from neurst.imaging import FitOptions, fit_image, metrics
from neurst.imaging.operators import cartesian_mask, identity, masked_fourier, pixel_mask
from neurst.imaging.tgv import SolverConfig, pretrained_denoiser, tgv
from neurst.imaging.tgv.problem import Problem
from neurst.imaging.tgv.solver import solve

NOISES = (0.05, 0.1, 0.2)
FIRST = (0.35, 0.42, 0.5, 0.6, 0.7, 0.8, 0.95, 1.1)  # weights in units of the noise, for the best of a picture
SECOND = (1.0, 2.0, 4.0)  # second weight in units of the first
SCATTERED_FIRST = (0.2, 0.5, 1.0, 1.75, 2.5)  # the same, for a share of the pixels
SCATTERED_SECOND = (0.2, 2.0)
MARKS = (1e-3, 1e-4)


def pictures() -> list:
    """Set12, grey in [0, 1]."""
    return [io.imread(file) / 255 for file in sorted(Path(os.environ["NEURST_DATA"], "images", "Set12").iterdir())]


def centre(image: np.ndarray, side: int = 128) -> np.ndarray:
    row, column = ((n - side) // 2 for n in image.shape)
    return image[row : row + side, column : column + side]


def problem(data: np.ndarray, operator, first: float, second: float | None, dtype=torch.float64) -> Problem:
    """A problem with scalar weights."""
    full = lambda value: None if value is None else torch.full((1, 1, 1, 1, 1), value, dtype=dtype)
    values = torch.from_numpy(data)[None, None]
    values = values if values.is_complex() else values.to(dtype)
    return Problem(values, operator, full(first), full(second))


def steps_table() -> None:
    """Steps until the energy is within 1e-3 and 1e-4 of its minimum for good."""
    rng, image = np.random.default_rng(0), pictures()[0]
    crop, large = image[96:160, 96:160], centre(pictures()[3])
    noisy = crop + 0.1 * rng.standard_normal(crop.shape)
    seen = rng.random(large.shape) < 0.35
    fourier = masked_fourier(cartesian_mask(large.shape, 4))
    k_space = fourier.forward(torch.from_numpy(large + 0j)).numpy()
    cases = {
        "denoising, 64 x 64, weights 0.07 and 0.14": problem(noisy, identity(noisy.shape), 0.07, 0.14),
        "denoising, 64 x 64, weights 0.3 and 0.6": problem(noisy, identity(noisy.shape), 0.3, 0.6),
        "35 % of the pixels, 128 x 128, weights 0.04 and 0.08": problem(seen * large, pixel_mask(seen), 0.04, 0.08),
        "a quarter of k-space, 128 x 128, weights 0.01 and 0.02": problem(k_space, fourier, 0.01, 0.02),
    }
    lines = []
    for name, each in cases.items():
        exact = SolverConfig(tol=0, step_tol=0, max_steps=8000)
        best = float(each.energy(*solve(each, exact).state[:2]))
        checked = {}
        for steps in range(20, 1201, 10):
            solved = solve(each, replace(exact, max_steps=steps))
            checked[steps] = (float(each.energy(*solved.state[:2])) / best - 1, solved.gap)
            if checked[steps][0] < 0.1 * MARKS[-1]:
                break
        reached = [max((s for s, (error, _) in checked.items() if error > mark), default=0) + 10 for mark in MARKS]
        fixed = replace(exact, max_steps=1000)
        gap = solve(each, fixed).gap
        lines.append(f"| {name} | {reached[0]} | {reached[1]} | {'-' if np.isnan(gap) else f'{gap:.1e}'} |")
        print(lines[-1], flush=True)
    write(
        "tgv-steps",
        __file__,
        "Steps of `tgv` until the energy stays within 1e-3 and 1e-4 of its minimum (found by 8,000 steps), float64; and the relative duality gap after 1,000 steps.",
        ["| problem | steps to 1e-3 | steps to 1e-4 | gap after 1,000 |", "|---" * 4 + "|", *lines],
    )


def scores(found: np.ndarray, clean: np.ndarray) -> tuple[float, float]:
    found = found.astype(np.float64)
    return metrics.psnr(found, clean), metrics.ssim(found, clean)


def oracle(noisy: np.ndarray, clean: np.ndarray, sigma: float, *, second: bool) -> tuple[float, float]:
    """The best PSNR, and the best SSIM, over a grid of scalar weights."""
    state, found = None, []
    for first in FIRST:
        for factor in SECOND if second else (None,):
            weights = (first * sigma, None if factor is None else first * factor * sigma)
            solved = solve(problem(noisy, identity(noisy.shape), *weights, dtype=torch.float32), start=state)
            state = solved.state
            found.append(scores(state.u[0, 0].numpy(), clean))
    return max(psnr for psnr, _ in found), max(ssim for _, ssim in found)


def denoise_table() -> None:
    """Learned maps beside the best scalar weights of each picture."""
    model, lines = pretrained_denoiser(), []
    for sigma in NOISES:
        rows = []
        for k, image in enumerate(pictures()):
            clean = centre(image)
            noisy = clean + sigma * np.random.default_rng(k).standard_normal(clean.shape)
            more = SolverConfig(tol=0, step_tol=0, max_steps=400)
            rows.append([
                scores(noisy, clean),
                scores(tgv(noisy, progress=False).image, clean),
                oracle(noisy, clean, sigma, second=False),
                oracle(noisy, clean, sigma, second=True),
                scores(model.reconstruct(noisy, sigma=sigma), clean),
                scores(model.reconstruct(noisy), clean),
                scores(model.reconstruct(noisy, sigma=sigma, config=more), clean),
            ])  # fmt: skip
        means = np.mean(rows, 0)
        cells = [f"{psnr:.2f} / {ssim:.3f}" for psnr, ssim in means]
        lines.append(
            f"| {sigma} | {' | '.join(cells)} | {means[4, 0] - means[3, 0]:+.2f} | {means[4, 1] - means[3, 1]:+.3f} |"
        )
        print(lines[-1], flush=True)
    write(
        "tgv-denoise",
        __file__,
        "PSNR in dB / SSIM, means over the centres (128 x 128) of the 12 pictures of Set12, none of which the network has seen. The best scalar weights are chosen for each picture with the truth "
        f"at hand, from {len(FIRST)} first and, for TGV, {len(SECOND)} second weights, separately for PSNR and SSIM. `tgv` without an argument and `learned, own sigma` estimate the noise level. All are solved to a "
        "relative gap of 3e-3 (steps chosen by the solver), but for the column with 400 steps. The last columns are learned TGV over the best scalar TGV.",
        [
            "| noise | noisy | `tgv` | TV, best weight | TGV, best weights | **learned TGV** | learned, own sigma | learned, 400 steps | PSNR | SSIM |",
            "|---" * 10 + "|",
            *lines,
        ],
    )


def scattered_table() -> None:
    """A third of the pixels, on the lattice and as a continuous field."""
    lines, share, penalties = [], 0.35, ("tgv", "learned_tgv", "space_variant")
    for sigma in NOISES[:2]:
        rows = []
        for k, image in enumerate(pictures()[::3]):
            clean, rng = centre(image), np.random.default_rng(k)
            noisy, seen = clean + sigma * rng.standard_normal(clean.shape), rng.random(clean.shape) < share
            operator, found = pixel_mask(seen), []
            for factor in SCATTERED_FIRST:
                for ratio in SCATTERED_SECOND:
                    weights = (factor * sigma, ratio * factor * sigma)
                    solved = solve(problem(seen * noisy, operator, *weights, torch.float32))
                    found.append(scores(solved.state.u[0, 0].numpy(), clean))
            fields = [
                fit_image(noisy, seen, sigma=sigma, options=FitOptions(penalty=penalty, progress=False))
                for penalty in penalties
            ]
            points = np.argwhere(np.ones(clean.shape))
            best = max(psnr for psnr, _ in found), max(ssim for _, ssim in found)
            rows.append([best, *(scores(field(points).reshape(clean.shape), clean) for field in fields)])
        cells = [f"{psnr:.2f} / {ssim:.3f}" for psnr, ssim in np.mean(rows, 0)]
        gains = ", ".join(f"{row[2][0] - row[1][0]:+.2f}" for row in rows)
        lines.append(f"| {sigma} | {' | '.join(cells)} | {gains} |")
        print(lines[-1], flush=True)
    write(
        "tgv-scattered",
        __file__,
        f"PSNR in dB / SSIM, means over the centres (128 x 128) of every third picture of Set12; {100 * share:.0f} % of the pixels are known, with noise. On the pixels, the best scalar weights of each "
        f"picture are chosen from {len(SCATTERED_FIRST)} first and {len(SCATTERED_SECOND)} second ones with the truth at hand. The strength of fields is chosen on held-out pixels; the noise level is given to all. "
        "The last column is the gain in dB of `learned_tgv` over `tgv` for each picture.",
        [
            "| noise | TGV on the pixels, best weights | field, `tgv` | field, `learned_tgv` | field, `space_variant` (default) | gain |",
            "|---" * 6 + "|",
            *lines,
        ],
    )


def time_table() -> None:
    """Seconds of a grey picture of 256 x 256."""
    image = next(each for each in pictures() if each.shape == (256, 256))
    noisy = (image + 0.1 * np.random.default_rng(0).standard_normal(image.shape)).astype(np.float32)
    model = pretrained_denoiser()
    calls = {
        "`tgv`, weights given, to a relative gap of 3e-3": lambda: tgv(noisy, first=0.07, progress=False),
        "`tgv`, weights by Stein's unbiased risk estimate": lambda: tgv(noisy, progress=False),
        "learned TGV": lambda: model.reconstruct(noisy),
    }
    lines = []
    for name, call in calls.items():
        call()
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        lines.append(f"| {name} | {min(seconds):.2f} |")
        print(lines[-1], flush=True)
    write(
        "tgv-time",
        __file__,
        "Seconds for a grey picture of 256 x 256, float32, the least of three.",
        ["| call | seconds |", "|---|---|", *lines],
    )


if __name__ == "__main__":
    tables = {"steps": steps_table, "denoise": denoise_table, "scattered": scattered_table, "time": time_table}
    for table in sys.argv[1:] or tables:
        tables[table]()
