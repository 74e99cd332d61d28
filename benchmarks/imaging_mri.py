"""Magnetic resonance pictures from a part of k-space: weights that a network predicts, beside the best scalar weights.

``NEURST_DATA=folder python benchmarks/imaging_mri.py FOLDER [single] [coils]`` reads ``mr`` of the data folder and writes the tables named (both if none is) of
docs/benchmarks_tables.md. The models are trained on slices of one head (``brain_gd_vol``), kept in FOLDER, and judged on slices of another
(``brain_t1``) and on measured k-space of eight coils (``brain_8coil_kspace``).
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from imaging_tgv import problem, scores
from tables import write

from neurst.core.train import TrainConfig
from neurst.imaging.operators import Operator, cartesian_mask, coil_maps, masked_fourier, multicoil
from neurst.imaging.tgv import LearnedConfig, LearnedTGV, SolverConfig, fit_reconstructor
from neurst.imaging.tgv.solver import solve

FOLDER = Path(os.environ.get("NEURST_DATA", "."), "mr")
COIL_SPEEDS, SPEEDS, NOISES = (4, 6), (4, 8), (0.05, 0.1, 0.2)
SLICES = (2, 5, 8, 11)  # of the twelve of the test head
WEIGHTS = (0.003, 0.006, 0.012, 0.024, 0.048, 0.096)  # first weights, for pictures in [0, 1]
COIL_WEIGHTS = (0.003, 0.006, 0.012, 0.024)  # the same, for the measured head
SECOND = 2.0  # second weight in units of the first
EXACT = SolverConfig(max_steps=1000)
MODELS = {"learned TV": (False, 1000), "learned TGV": (True, 600)}  # whether there is a second term, and the updates


def noisy(
    clean: torch.Tensor, operator: Operator, noise: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measured k-space of pictures (B, 1, H, W), and its noise level: `noise` times the standard deviation of the real and imaginary parts of what is measured :cite:p:`Vu2025`."""
    k = operator.forward(clean + 0j)
    seen = k[..., operator.observed]
    sigma = noise * ((seen.real.var() + seen.imag.var()) / 2).sqrt()
    drawn = torch.view_as_complex(torch.randn((*k.shape, 2), generator=generator)) / 2**0.5
    return (k + operator.observed * sigma * drawn).to(torch.complex64), sigma


def corrupt(clean: torch.Tensor, generator: torch.Generator) -> tuple:
    """Acceleration from 4 to 8, noise from 0 to 0.2, a new mask each time."""
    speed, noise = 4 + 4 * float(torch.rand((), generator=generator)), 0.2 * float(torch.rand((), generator=generator))
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    operator = masked_fourier(cartesian_mask(clean.shape[-2:], speed, random_state=seed))
    data, sigma = noisy(clean, operator, noise + 1e-3, generator)
    return data, operator, sigma.expand(len(clean))


def training_slices() -> list[np.ndarray]:
    """Slices of the training head along its three axes, without those that show little of it; 1 is at the 99.9th percentile of the head."""
    volume = np.load(FOLDER / "brain_gd_vol.npz")["vol"]
    volume = np.clip(volume / np.percentile(volume, 99.9), 0, None)
    slices = [np.take(volume, i, axis) for axis in range(3) for i in range(0, volume.shape[axis], 2)]
    return [each for each in slices if (each > 0.1).mean() > 0.15]


def trained(path: Path, *, slopes: bool, steps: int) -> tuple[LearnedTGV, str]:
    """A model, trained if the file is not there, and how long that took."""
    text = path.with_suffix(".txt")
    if not path.exists():
        # 60 steps with scalar weights, whose picture the network reads, 40 without a gradient, 12 with one
        config = LearnedConfig(
            slopes=slopes,
            unit="rms",
            first_start=0.06,
            second_start=0.12,
            first_steps=60,
            reads_both=True,
            free_steps=40,
            ratio=0.05,
        )
        model, pictures, begin = LearnedTGV(config), training_slices(), time.perf_counter()
        settings = TrainConfig(steps=steps, record_every=50, device="cpu")
        history = fit_reconstructor(model, pictures, corrupt, settings, patch=None)
        model.save(path)
        losses = ", ".join(f"{loss:.3f}" for loss in history["loss"][1::4])
        minutes = (time.perf_counter() - begin) / 60
        text.write_text(f"{steps} updates, {len(pictures)} slices, {minutes:.0f} minutes, loss {losses}")
        print(path.name, text.read_text(), flush=True)
    return LearnedTGV.load(path), text.read_text()


def scalar(data: np.ndarray, operator: Operator, weights: tuple, *, second: bool) -> list[np.ndarray]:
    """Pictures with each of the scalar weights, converged."""
    state, found = None, []
    for first in weights:
        solved = solve(
            problem(data, operator, first, SECOND * first if second else None, torch.float32), EXACT, start=state
        )
        state = solved.state
        found.append(state.u[0, 0].abs().numpy())
    return found


def best_common(rows: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """The best mean PSNR and the best mean SSIM that one weight reaches over all slices; rows are slices, columns are weights."""
    return tuple(np.mean(rows, 0).max(0))


def single_table(models: dict[str, LearnedTGV], trained_how: str) -> None:
    """One coil, slices of another head."""
    slices, lines = np.load(FOLDER / "brain_t1.npz")["slices"] / 255, []
    for speed in SPEEDS:
        for noise in NOISES:
            found = {name: [] for name in ("zero-filled", "TV", "TGV", *models)}
            for k in SLICES:
                clean = slices[..., k]
                operator = masked_fourier(cartesian_mask(clean.shape, speed, random_state=k))
                data, sigma = noisy(
                    torch.from_numpy(clean)[None, None], operator, noise, torch.Generator().manual_seed(k)
                )
                data = data[0, 0].numpy()
                judged: Callable = lambda image, clean=clean: scores(np.abs(image), clean)
                found["zero-filled"].append([judged(operator.adjoint(torch.from_numpy(data)).numpy())])
                for name, second in (("TV", False), ("TGV", True)):
                    found[name].append([judged(each) for each in scalar(data, operator, WEIGHTS, second=second)])
                for name, model in models.items():
                    found[name].append([judged(model.reconstruct(data, operator, sigma=float(sigma)))])
            best = {name: best_common(rows) for name, rows in found.items()}
            cells = [f"{psnr:.2f} / {ssim:.3f}" for psnr, ssim in best.values()]
            gains = [f"{best[name][0] - best['TV'][0]:+.2f}" for name in models]
            lines.append(f"| {speed} | {noise} | {' | '.join([*cells, *gains])} |")
            print(lines[-1], flush=True)
    write(
        "mri",
        __file__,
        f"PSNR in dB / SSIM of magnitudes, means over {len(SLICES)} slices (188 x 256) of a head that the networks have not seen; every R-th column of k-space on average. The noise is in units of the "
        f"standard deviation of the real and imaginary parts of what is measured. Scalar weights are the best common ones of {len(WEIGHTS)} for each row, chosen with the truth at hand and separately for PSNR and SSIM; one network serves all rows. "
        f"All are solved until a step changes no variable by more than 2e-4, at most 1,000 steps (networks: 2,000); the second weight of scalar TGV is twice the first. The last columns are PSNR over the best TV. Training: {trained_how}.",
        [
            f"| R | noise | zero-filled | TV, best weight | TGV, best weights | **{'** | **'.join(models)}** | {' | '.join(models)} |",
            "|---" * (5 + 2 * len(models)) + "|",
            *lines,
        ],
    )


def coils_table(models: dict[str, LearnedTGV]) -> None:
    """Measured k-space of eight coils; what all of it gives is the truth."""
    k = np.load(FOLDER / "brain_8coil_kspace.npz")["ksp"]
    k = np.fft.ifftshift(k, axes=(1, 2)) if _centred(k) else k
    k, lines = k.astype(np.complex64), []
    maps = coil_maps(k, width=20)
    full = multicoil(np.ones(k.shape[1:], bool), maps)
    combine = lambda data, operator: operator.adjoint(torch.from_numpy(data)).numpy()
    scale = np.abs(combine(k, full)).max()
    k, clean = k / scale, np.abs(combine(k, full)) / scale
    high = np.abs(np.fft.fftfreq(k.shape[1])) > 0.45  # hardly anything but noise
    sigma = float(np.sqrt((np.abs(k[:, high]) ** 2).mean()))
    for speed in COIL_SPEEDS:
        found = {name: [] for name in ("zero-filled", "TV", "TGV", *models)}
        mask = cartesian_mask(k.shape[1:], speed, centre=20, random_state=0)
        operator = multicoil(mask, coil_maps(mask * k, width=20))
        data = (mask * k).astype(np.complex64)
        judged: Callable = lambda image: scores(np.abs(image), clean)
        found["zero-filled"].append([judged(combine(data, operator))])
        for name, second in (("TV", False), ("TGV", True)):
            found[name].append([judged(each) for each in scalar(data, operator, COIL_WEIGHTS, second=second)])
        for name, model in models.items():
            found[name].append([judged(model.reconstruct(data, operator, sigma=sigma))])
        best = {name: best_common(rows) for name, rows in found.items()}
        lines.append(f"| {speed} | {' | '.join(f'{psnr:.2f} / {ssim:.3f}' for psnr, ssim in best.values())} |")
        print(lines[-1], flush=True)
    write(
        "mri-coils",
        __file__,
        "PSNR in dB / SSIM of magnitudes, measured k-space of a head with eight coils (230 x 180), one mask for each R that keeps the 20 middle columns, from which the maps of the coils are made. The truth is the picture from all of k-space, "
        "with its noise. Scalar weights are the best of four. The networks are those of the table above, trained on one simulated coil.",
        [
            f"| R | zero-filled | TV, best weight | TGV, best weights | {' | '.join(f'**{name}**' for name in models)} |",
            "|---" * (4 + len(models)) + "|",
            *lines,
        ],
    )


def _centred(k: np.ndarray) -> bool:
    """Whether the zero frequency is in the middle."""
    power = np.abs(k).sum(0)
    return bool(power[power.shape[0] // 2, power.shape[1] // 2] > power[0, 0])


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # scalar TGV of small weights needs more than the largest number of steps
    place = Path(sys.argv[1])
    found = {
        name: trained(place / f"{name.replace(' ', '_')}.safetensors", slopes=slopes, steps=steps)
        for name, (slopes, steps) in MODELS.items()
    }
    models = {name: model for name, (model, _) in found.items()}
    wanted = sys.argv[2:] or ["single", "coils"]
    if "single" in wanted:
        single_table(models, "; ".join(f"{name} {how}" for name, (_, how) in found.items()))
    if "coils" in wanted:
        coils_table(models)
