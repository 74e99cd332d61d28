r"""An unknown map from the coordinates of one picture to those of another, learned from pairs of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from neurst.core.arguments import ANYTHING, FLAG, SEED, SIZE, check_fields, checked, coordinates, instance, one_of, pair
from neurst.core.fit import DEVICE
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.train import TrainConfig, seeded, train
from neurst.imaging.lofi.pictures import Picture, as_pairs, standard_deviation, tensor
from neurst.imaging.lofi.reading import pyramid, read

KINDS = ("affine", "smooth")
SHAPE = pair(SIZE, "(height, width)")
WIDTH = 64  # hidden units of a smooth map
TRIAL_LEVELS = (5, 4, 3)  # of blur, at which starts are compared
LEVELS = (3, 2, 1, 0)  # of blur, through which learning goes on
COARSE_SHARE = 0.8  # of the steps, after which the last level is reached


@dataclass(frozen=True)
class GeometryConfig:
    """Numbers of :func:`learn_geometry`.

    Parameters
    ----------
    turns
        Number of angles from which learning starts, without and with a reflection.
    trial_steps, trial_rate
        Steps and learning rate of each trial.
    steps, learning_rate
        The same for the affine map that starts from the best trial.
    smooth_steps, smooth_rate
        The same for a smooth map, which starts from the affine one.
    points
        Pixels that are compared in a step.
    """

    turns: int = 8
    trial_steps: int = 60
    trial_rate: float = 3e-2
    steps: int = 1000
    learning_rate: float = 2e-2
    smooth_steps: int = 3000
    smooth_rate: float = 1e-2
    points: int = 1024

    def __post_init__(self):
        check_fields(self)


class Warp(nn.Module):
    r"""A map g of coordinates: the target at t shows what the input shows at g(t).

    With both pictures centred at 0 and their longest side scaled to [-1, 1], :math:`g(t) = A t + b`, and for ``"smooth"`` maps :math:`g(t) = A t + b + N(t)`, where N is a network with two hidden layers that starts at 0.

    Parameters
    ----------
    kind
        ``"affine"`` or ``"smooth"``.

    Examples
    --------
    >>> Warp("affine").matrix.shape
    torch.Size([2, 2])
    """

    def __init__(self, kind: str = "affine"):
        super().__init__()
        self.kind = kind = one_of(*KINDS)("kind", kind)
        self.matrix, self.shift = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2))
        self.bend = None
        if kind == "smooth":
            with seeded(0):
                layers = [nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)]
            self.bend = nn.Sequential(*layers)
            nn.init.zeros_(layers[-1].weight)
            nn.init.zeros_(layers[-1].bias)

    def forward(self, points: Tensor, target: tuple[int, int], source: tuple[int, int]) -> Tensor:  # (..., 2)
        """Pixel coordinates in inputs of shape `source` for those in targets of shape `target`."""
        (centre, half), (new_centre, new_half) = (_frame(shape, points) for shape in (target, source))
        t = (points - centre) / half
        g = t @ self.matrix.T + self.shift
        return new_centre + new_half * (g if self.bend is None else g + self.bend(t))

    def at(self, coords: ArrayLike, *, shape: tuple[int, int], source: tuple[int, int] | None = None) -> NDArray:
        """Coordinates (N, 2) in the input, in pixels, of coordinates in a target of a shape.

        Parameters
        ----------
        coords
            (N, 2) (row, column) in pixels of the target.
        shape
            (H, W) of the target.
        source
            (H, W) of the input; None is the same shape.
        """
        points = torch.from_numpy(coordinates("coords", coords, (2,))).to(self.matrix.dtype)
        shape = SHAPE("shape", shape)
        source = shape if source is None else SHAPE("source", source)
        with torch.no_grad():
            return self(points, shape, source).numpy()


def _frame(shape: tuple[int, int], like: Tensor) -> tuple[Tensor, float]:
    """Centre of a picture, and half its longest side, in pixels."""
    return like.new_tensor([(n - 1) / 2 for n in shape]), max(max(shape) - 1, 1) / 2


@checked(
    inputs=ANYTHING, targets=ANYTHING, kind=one_of(*KINDS), coarse_to_fine=FLAG, config=instance(GeometryConfig, "a `GeometryConfig`"),
    random_state=SEED, device=DEVICE, progress=FLAG,
)  # fmt: skip
def learn_geometry(
    inputs: Sequence[ArrayLike],
    targets: Sequence[ArrayLike],
    *,
    kind: str = "affine",
    coarse_to_fine: bool = True,
    config: GeometryConfig = GeometryConfig(),
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Warp:
    r"""The map of coordinates that makes inputs look like targets.

    Minimises the mean of :math:`|x_k(g(t)) - y_k(t)|` over random pixels t of all pairs of inputs :math:`x_k` and targets :math:`y_k`. Learning from one start usually ends where structures do not overlap. So 16 affine maps, turned by multiples of
    45 degrees, with and without a reflection, are tried for 60 steps each on strongly blurred pictures. The best one is trained further while the blur goes down to none.

    Parameters
    ----------
    inputs
        Pictures as they were observed, each with its own target. (H, W) or (H, W, C).
    targets
        What they are compared with, one for each input. One map relates all pairs, whose pictures may have different shapes.
    kind
        ``"affine"``, or ``"smooth"`` for maps that bend: the affine map is found first.
    coarse_to_fine
        False starts from the identity and never blurs, which finds maps that are almost the identity only.
    config
        Numbers of the method.
    random_state
        Seed of all random numbers.
    device
        ``"auto"``, or a torch device name.
    progress
        Show a progress bar.

    Returns
    -------
    Warp
        Its method ``at`` gives coordinates, and :func:`fit_lofi` takes it as `warp`.

    Raises
    ------
    TypeError, ValueError
        For pictures of wrong types or shapes, or that are not finite, and for other wrong arguments.

    Notes
    -----
    That geometry and values can be learned together is shown in :cite:p:`Khorashadizadeh2024`; the trials and the blur are not in the paper.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging.lofi import GeometryConfig, learn_geometry
    >>> rows, columns = np.mgrid[:24, :24] / 23
    >>> picture = np.exp(-8 * ((rows - 0.3) ** 2 + (columns - 0.6) ** 2))
    >>> warp = learn_geometry([picture], [picture.T], config=GeometryConfig(steps=200), progress=False)
    >>> warp.at([[5.0, 9.0]], shape=(24, 24)).round()
    array([[9., 5.]], dtype=float32)
    """
    levels = LEVELS if coarse_to_fine else (0,)
    planned = config.steps + config.smooth_steps * (kind == "smooth")
    planned += 2 * config.turns * config.trial_steps * coarse_to_fine
    numbers = lambda steps, rate: TrainConfig(steps, rate, random_state=random_state, device=device)
    with progress_bar(progress) as on_progress:
        pairs = [_standardised(pair) for pair in as_pairs("inputs", inputs, "targets", targets)]
        search = Search(pairs, config, StepCounter(on_progress, planned))
        warp = Warp("affine")
        if coarse_to_fine:
            warp = search.best_start(numbers(config.trial_steps, config.trial_rate))
        search.advance(warp, numbers(config.steps, config.learning_rate), levels)
        if kind == "smooth":
            warp = _bending(warp)
            search.advance(warp, numbers(config.smooth_steps, config.smooth_rate), levels)
    return warp


def _bending(affine: Warp) -> Warp:
    """A smooth map that starts at an affine one."""
    warp = Warp("smooth")
    warp.load_state_dict(affine.state_dict(), strict=False)
    return warp


class Search:
    """Pairs of pictures (1, C, H, W) at all levels of blur, and the training of maps between them."""

    def __init__(self, pairs: list[list[Tensor]], config: GeometryConfig, counter: StepCounter):
        self.copies = [[pyramid(part, range(max(TRIAL_LEVELS) + 1)) for part in pair] for pair in pairs]
        self.config, self.counter = config, counter

    def best_start(self, numbers: TrainConfig) -> Warp:
        """The affine map with the least error after a short training from each start."""
        found = []
        for mirror in (1.0, -1.0):
            for angle in 2 * math.pi * torch.arange(self.config.turns) / self.config.turns:
                warp, (c, s) = Warp("affine"), (angle.cos(), angle.sin())
                warp.matrix.data = torch.stack([torch.stack([c, -mirror * s]), torch.stack([s, mirror * c])])
                self.advance(warp, numbers, TRIAL_LEVELS)
                found.append((self.error(warp, TRIAL_LEVELS[-1]), warp))
        return min(found, key=lambda each: each[0])[1]

    def advance(self, warp: Warp, numbers: TrainConfig, levels: Sequence[int]) -> None:
        """Train a map in place, going through levels of blur."""
        taken = iter(range(numbers.steps))

        def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            share = next(taken) / (COARSE_SHARE * numbers.steps)
            level = levels[min(len(levels) - 1, int(share * len(levels)))]
            pick = lambda n, k=(): torch.randint(n, k, generator=generator)
            source, target = (part[level] for part in self.copies[int(pick(len(self.copies)))])
            points = torch.stack([pick(n, (self.config.points,)) for n in target.shape[-2:]], -1)
            return source, target, points

        train(warp, draw, _difference, numbers, on_step=self.counter.stage("learning the map"))

    def error(self, warp: Warp, level: int) -> float:
        """Mean absolute difference on every second pixel along each axis, at a level of blur."""
        errors = []
        with torch.no_grad():
            for pair in self.copies:
                source, target = (part[level] for part in pair)
                axes = [torch.arange(0, n, 2) for n in target.shape[-2:]]
                points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
                errors.append(float(_difference(warp, (source, target, points))))
        return sum(errors) / len(errors)


def _difference(warp: Warp, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean absolute difference of an input (1, C, H, W) at mapped points and a target at points (P, 2)."""
    source, target, points = (part.to(warp.matrix.device) for part in drawn)
    at = warp(points.float(), tuple(target.shape[-2:]), tuple(source.shape[-2:]))
    values = target[0][:, points[:, 0], points[:, 1]]  # (C, P)
    return (read(source, at[None, :, None])[0, ..., 0] - values).abs().mean()


def _standardised(pair: tuple[Picture, Picture]) -> list[Tensor]:
    """A pair of pictures as (1, C, H, W), centred and scaled alike."""
    mean, scale = pair[1].moments()[0], standard_deviation(pair[1:])
    return [tensor((part.whole() - mean) / scale)[None] for part in pair]
