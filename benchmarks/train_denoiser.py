"""Trains the denoiser that ships with the package: learned weights of total generalised variation for grey pictures.

``NEURST_DATA=folder python benchmarks/train_denoiser.py [steps]`` reads ``images/Kodak`` of that folder and writes
neurst/core/denoiser.safetensors. None of these pictures is in Set5, Set12 or Set14. 2,000 steps take 6 minutes on one core.
"""

import os
import sys
import time
from pathlib import Path

import torch
from skimage import io

from neurst.core.train import TrainConfig
from neurst.core.weight_net import DENOISER
from neurst.imaging.tgv import LearnedTGV, add_noise, fit_reconstructor

NOISE = (0.04, 0.25)  # levels, in units of the range


def pictures() -> list:
    """Grey pictures in [0, 1]."""
    files = sorted(Path(os.environ["NEURST_DATA"], "images", "Kodak").iterdir())
    return [io.imread(file).mean(2) / 255 for file in files]


def main(steps: int) -> None:
    torch.set_num_threads(1)  # the patches are too small to gain from more
    model, clean = LearnedTGV(), pictures()
    begin = time.perf_counter()
    history = fit_reconstructor(
        model, clean, add_noise(*NOISE), TrainConfig(steps=steps, record_every=100, device="cpu")
    )
    model.save(DENOISER)
    print(
        f"{len(clean)} pictures, {steps} steps, {time.perf_counter() - begin:.0f} s; loss {history['loss'][0]:.4f} to {history['loss'][-1]:.4f}"
    )
    print(
        "ratios of steps",
        [round(float(ratio.detach()), 1) for ratio in model.ratios()],
        "constant weights",
        model.net.bias.exp().tolist(),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 2000)
