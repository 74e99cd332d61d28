"""Training of learned weights on clean pictures that are corrupted in a known way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neurst.core.arguments import ANYTHING, FLAG, NONE, POSITIVE, SIZE, Rule, checked, instance, number, real_array
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.train import TrainConfig, train
from neurst.imaging.operators import Operator, identity
from neurst.imaging.tgv.learned import LEAST_CONTRAST, LearnedTGV


def _function(value: Any) -> Any:
    if not callable(value):
        raise TypeError
    return value


Corrupt = Callable[[Tensor, torch.Generator], tuple[Tensor, Operator, Tensor]]


def add_noise(least: float, most: float) -> Corrupt:
    """Corruption for denoising: Gaussian noise whose level is log-uniform between two values > 0, another one for each picture."""
    least = POSITIVE("least", least)
    most = number(least)("most", most)

    def corrupt(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Operator, Tensor]:
        draw = torch.rand(len(clean), generator=generator)
        sigma = math.log(least) + draw * (math.log(most) - math.log(least))
        noise = torch.randn(clean.shape, generator=generator)
        sigma = sigma.exp()
        return clean + sigma[:, None, None, None] * noise, identity(clean.shape[-2:]), sigma

    return corrupt


@checked(
    model=instance(LearnedTGV, "a `LearnedTGV`"),
    pictures=ANYTHING,
    corrupt=Rule(("a function such as add_noise(0.05, 0.2)",), _function),
    config=instance(TrainConfig, "a `neurst.core.train.TrainConfig`"),
    patch=NONE | SIZE,
    batch=SIZE,
    progress=FLAG,
)
def fit_reconstructor(
    model: LearnedTGV,
    pictures: Sequence[ArrayLike],
    corrupt: Corrupt,
    config: TrainConfig = TrainConfig(),
    *,
    patch: int | None = 64,
    batch: int = 6,
    progress: bool = True,
) -> dict[str, list[float]]:
    r"""Train a model in place on pictures whose corruption is known.

    Minimises the mean of :math:`(u - u_{true})^2 / \mathrm{unit}^2` over random patches, flips and quarter turns. The unit is the noise level, or with
    ``unit="rms"`` the standard deviation of the clean batch.

    Parameters
    ----------
    model
        The model.
    pictures
        Clean ones, (H, W), or (H, W, C), whose channels are taken as separate pictures.
    corrupt
        From clean pictures (B, 1, h, w) and a random generator to data, operator, and noise levels (B,); such as :func:`add_noise`.
    config
        Numbers of the training.
    patch
        Side of the patches; None takes whole pictures, one in each batch and not turned.
    batch
        Number of patches in a batch; without effect if whole pictures are taken.
    progress
        Show a progress bar.

    Returns
    -------
    dict
        ``step`` and ``loss``.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging.tgv import LearnedConfig, LearnedTGV
    >>> model = LearnedTGV(LearnedConfig(width=4, free_steps=3, kept_steps=2))
    >>> clean = np.random.default_rng(0).random((40, 40))
    >>> history = fit_reconstructor(
    ...     model, [clean], add_noise(0.05, 0.2), TrainConfig(steps=2), patch=16, progress=False
    ... )
    >>> history["step"]
    [0, 1]
    """
    planes = _planes(pictures, patch)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Operator, Tensor]:
        pick = lambda n: int(torch.randint(n, (), generator=generator))
        parts = []
        for _ in range(1 if patch is None else batch):
            plane = planes[pick(len(planes))]
            if patch is not None:
                row, column = (pick(n - patch + 1) for n in plane.shape)
                plane = torch.rot90(plane[row : row + patch, column : column + patch], pick(4))
            parts.append(plane.flip(0) if pick(2) else plane)
        clean = torch.stack(parts)[:, None]
        return clean, *corrupt(clean, generator)

    def loss(model: LearnedTGV, drawn: tuple) -> Tensor:
        clean, data, operator, sigma = drawn
        device = model.log_ratios.device
        found = model(data.to(device), operator, sigma.to(device))
        error = (found - clean.to(device)).abs().square().mean((1, 2, 3))
        unit = sigma if model.config.unit == "sigma" else clean.std().clamp_min(LEAST_CONTRAST * sigma)
        return (error / unit.to(device) ** 2).mean()

    with progress_bar(progress) as on_progress:
        return train(model, draw, loss, config, on_step=StepCounter(on_progress).stage("training", config.steps))


def _planes(pictures: Sequence[ArrayLike], patch: int | None) -> list[Tensor]:
    """All channels of all pictures, as (H, W) float32."""
    out: list[Tensor] = []
    if isinstance(pictures, np.ndarray) and pictures.ndim == 2:
        msg = f"`pictures` is one array of shape {pictures.shape}: expected a list of pictures, such as [picture]"
        raise ValueError(msg)
    for k, picture in enumerate(pictures):
        array = real_array(f"pictures[{k}]", picture)
        if array.ndim not in (2, 3) or 0 in array.shape or not np.isfinite(array).all():
            msg = f"`pictures[{k}]` has shape {array.shape}: expected finite values (H, W) or (H, W, C)"
            raise ValueError(msg)
        if patch is not None and min(array.shape[:2]) < patch:
            msg = f"`pictures[{k}]` has shape {array.shape}: expected at least `patch={patch}` pixels along each side"
            raise ValueError(msg)
        planes: Any = array.reshape(*array.shape[:2], -1).astype(np.float32)
        out += [torch.from_numpy(np.ascontiguousarray(planes[..., c])) for c in range(planes.shape[2])]
    if not out:
        msg = "`pictures` is empty: expected one or more pictures"
        raise ValueError(msg)
    return out
