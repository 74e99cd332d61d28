"""Pictures from incomplete data with a denoiser as the prior: gaps of 70 %, and visibilities of a radio interferometer.

``NEURST_DATA=folder python benchmarks/imaging_inverse.py [inpaint] [radio]`` reads images/Set12 and astro/ of that folder and writes the tables named
(both if none is) of docs/benchmarks_tables.md.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from imaging_data import archive
from skimage import io
from skimage.restoration import inpaint_biharmonic
from skimage.transform import resize
from tables import write

from neurst.imaging import metrics, plug_and_play
from neurst.imaging.lofi import pretrained_lofi
from neurst.imaging.operators import Operator, interferometer, pixel_mask
from neurst.imaging.tgv import SolverConfig, tv

SEEDS = (0, 1, 2)
SIDE = 128
SHARE = 0.3  # of the pixels that are known
INPAINT_WEIGHTS = (0.001, 0.003, 0.01, 0.03)
VISIBILITY_NOISE = 0.03  # of each component, as a share of the root mean square of a component
RADIO_WEIGHTS = (0.01, 0.1, 1.0, 10.0)  # of total variation, as multiples of the noise times the norm of the operator
SHORT = SolverConfig(max_steps=1000, step_tol=5e-4)


def inpaint_table() -> None:
    """A picture of which 70 % of the pixels are missing."""
    prior, rows = pretrained_lofi(), []
    files = sorted(Path(os.environ["NEURST_DATA"], "images", "Set12").iterdir())[:8]
    for file in files:
        image = io.imread(file) / 255
        row, column = ((n - SIDE) // 2 for n in image.shape)
        clean, found = image[row : row + SIDE, column : column + SIDE], []
        for seed in SEEDS:
            seen = np.random.default_rng(seed).random(clean.shape) < SHARE
            data, operator = np.where(seen, clean, 0), pixel_mask(seen)
            found.append([
                metrics.psnr(inpaint_biharmonic(data, ~seen), clean),
                max(metrics.psnr(tv(data, operator, first=w, progress=False).image, clean) for w in INPAINT_WEIGHTS),
                metrics.psnr(plug_and_play(data, operator, prior, progress=False), clean),
            ])  # fmt: skip
        rows.append(np.array(found))
        print(file.stem, rows[-1].mean(0).round(2), flush=True)
    rows = np.array(rows)  # (pictures, seeds, methods)
    lines = [f"| {file.stem} | {cells(row.mean(0))} |" for file, row in zip(files, rows, strict=True)]
    spread = " | ".join(
        f"{mean:.2f} +- {std:.2f}" for mean, std in zip(rows.mean((0, 1)), rows.mean(0).std(0, ddof=1), strict=True)
    )
    write(
        "inverse-inpaint",
        __file__,
        f"PSNR in dB of the centres (128 x 128) of eight pictures of Set12 of which {100 * (1 - SHARE):.0f} % of the pixels are missing, mean of {len(SEEDS)} masks; +- is the standard deviation over masks. "
        f"The weight of total variation is chosen for each picture from {len(INPAINT_WEIGHTS)} with the truth at hand; `plug_and_play` with `lofi.pretrained_lofi()` has its defaults.",
        [
            "| picture | biharmonic | TV, best weight | plug and play |",
            "|---" * 4 + "|",
            *lines,
            f"| mean | {spread} |",
        ],
    )


def radio_case(side: int, seed: int, name: str = "M31_256") -> tuple[np.ndarray, np.ndarray, Operator, float]:
    """A picture, its visibilities with noise, their operator, and the noise. The longest baseline along an axis is just sampled."""
    image = np.clip(archive("astro/radio_images")[name].astype(float), 0, None)
    image = resize(image, (side, side), anti_aliasing=side < len(image), order=1)
    baselines = archive("astro/uv_ami01")["table"][:, 1::-1]  # in wavelengths, along rows and columns
    operator = interferometer((side, side), baselines * np.pi / np.abs(baselines).max())
    clean = image / image.max()
    y = operator.forward(torch.from_numpy(clean)).numpy()
    noise = VISIBILITY_NOISE * np.sqrt(np.mean(y**2))
    return clean, y + noise * np.random.default_rng(seed).standard_normal(y.shape), operator, noise


def radio_table() -> None:
    """A model of M31 from the visibilities of an array of ten antennas."""
    prior, lines = pretrained_lofi(), []
    nothing = lambda image, sigma: image
    for side in (128, 256):
        found, seconds = [], []
        for seed in SEEDS:
            clean, y, operator, noise = radio_case(side, seed)
            smooth = plug_and_play(y, operator, nothing, progress=False)
            weights = [w * noise * operator.norm for w in RADIO_WEIGHTS]
            best = [tv(y, operator, first=w, config=SHORT, progress=False).image for w in weights]
            options = {"noise": noise, "progress": False}
            bounded = plug_and_play(y, operator, nothing, lower=0.0, **options)
            free = plug_and_play(y, operator, prior, **options)
            begin = time.process_time()
            answer = plug_and_play(y, operator, prior, lower=0.0, **options)
            seconds.append(time.process_time() - begin)
            answers = (smooth, bounded, free, answer)
            psnr = [metrics.psnr(each, clean) for each in answers]
            found.append([psnr[0], max(metrics.psnr(each, clean) for each in best), *psnr[1:]])
            print(side, seed, np.round(found[-1], 2), f"{seconds[-1]:.0f} s", flush=True)
        lines.append(
            f"| {side} | {cells(np.mean(found, 0))} | {np.std(found, 0, ddof=1)[-1]:.2f} | {np.mean(seconds):.0f} |"
        )
    write(
        "inverse-radio",
        __file__,
        f"PSNR in dB of M31 from 9,413 visibilities at the baselines of `uv_ami01`, with noise of {100 * VISIBILITY_NOISE:.0f} % of their root mean square, mean of {len(SEEDS)} draws of the noise. Pixels are such that the longest baseline along an axis is just "
        f"sampled. The weight of total variation is chosen from {len(RADIO_WEIGHTS)} with the truth at hand; `plug_and_play` with `lofi.pretrained_lofi()` knows the noise and has its defaults.",
        [
            "| side | smoothest | TV, best weight | not negative, no denoiser | plug and play | plug and play, not negative | +- | CPU seconds |",
            "|---" * 8 + "|",
            *lines,
        ],
    )


def cells(values: np.ndarray) -> str:
    return " | ".join(f"{each:.2f}" for each in values)


if __name__ == "__main__":
    tables = {"inpaint": inpaint_table, "radio": radio_table}
    for table in sys.argv[1:] or tables:
        tables[table]()
