"""Trains the local neural field that ships with the package: a denoiser of grey pictures for Gaussian noise of any level.

``NEURST_DATA=folder python benchmarks/train_lofi.py [steps]`` reads ``images/Kodak`` of that folder and writes
neurst/imaging/lofi/denoiser.safetensors. None of these pictures is in Set5, Set12 or Set14. 30,000 steps take 8 minutes on one core.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from skimage import io

from neurst.imaging.lofi import fit_lofi
from neurst.imaging.lofi.model import SHIPPED


def pictures() -> list:
    """Grey pictures in [0, 1], at full resolution and at half of it, which has more structure in each pixel."""
    files = sorted(Path(os.environ["NEURST_DATA"], "images", "Kodak").iterdir())
    full = [io.imread(file).mean(2) / 255 for file in files]
    half = [picture.reshape(picture.shape[0] // 2, 2, -1, 2).mean((1, 3)) for picture in full]
    return [picture.astype(np.float32) for picture in full + half]


def main(steps: int) -> None:
    torch.set_num_threads(1)  # a step is too small to gain from more
    begin = time.perf_counter()
    model = fit_lofi(pictures(), steps=steps, device="cpu", progress=False)
    model.save(SHIPPED)
    print(f"{steps} steps, {time.perf_counter() - begin:.0f} s; {SHIPPED.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 30_000)
