"""Training of local neural fields on pictures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neurst.core.arguments import (
    ANYTHING,
    FLAG,
    NONE,
    POSITIVE,
    SEED,
    SIZE,
    Rule,
    check_fields,
    checked,
    instance,
    number,
    pair,
    shown,
    whole,
)
from neurst.core.fit import DEVICE
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.train import TrainConfig, seeded, train
from neurst.imaging.lofi.model import LoFi
from neurst.imaging.lofi.net import HIGHEST, PIECES, LoFiNet
from neurst.imaging.lofi.pictures import Picture, as_pairs, as_pictures, standard_deviation, tensor
from neurst.imaging.lofi.reading import read
from neurst.imaging.lofi.spec import LoFiSpec
from neurst.imaging.lofi.warp import Warp

LEAST_NOISE = 0.02  # in the units of the pictures: below it, errors count less than in proportion to the noise
LARGEST_GRADIENT = 1e3  # norm; Adam needs no limit here, this one stops overflow
Degrade = Callable[[NDArray, np.random.Generator], ArrayLike]


@dataclass(frozen=True)
class LoFiTraining:
    """Numbers of the training of a local neural field.

    Parameters
    ----------
    learning_rate, warm_up
        As in :class:`neurst.core.train.TrainConfig`.
    windows, side, points
        A step looks at `points` random points in each of `windows` random windows of `side` pixels. Models with a filter or a warp read whole pictures instead.
    between
        Share of the points that lie between pixel centres, where the target is the bicubic interpolation of the clean picture.
    refresh_every
        Steps after which one of the pictures that `degrade` gave is made anew.
    """

    learning_rate: float = 4e-3
    warm_up: int = 50
    windows: int = 8
    side: int = 48
    points: int = 32
    between: float = 0.25
    refresh_every: int = 4

    def __post_init__(self):
        check_fields(self, warm_up=whole(0), between=number(0, 1))


class Batch(NamedTuple):
    """Inputs (B, C, h, w) and points (B, P, 2) in them, values there (B, P, C), noise levels (B,) or None, and the shape of the target."""

    inputs: Tensor
    points: Tensor
    values: Tensor
    sigma: Tensor | None
    shape: tuple[int, int]


@dataclass(eq=False)
class Pairs:
    """Pairs of an input and a target; inputs that a function made are made anew from time to time."""

    inputs: list[Picture]
    targets: list[Picture]
    degrade: Degrade | None
    refresh_every: int
    drawn: int = 0

    def refresh(self, generator: torch.Generator) -> None:
        """Count a step, and degrade one of the pictures anew when it is due."""
        if self.degrade is not None and self.drawn % self.refresh_every == 0:
            k = (self.drawn // self.refresh_every) % len(self.targets)
            self.inputs[k] = degraded(self.degrade, self.targets[k], k, generator)
        self.drawn += 1


def degraded(degrade: Degrade, clean: Picture, k: int, generator: torch.Generator) -> Picture:
    """What a user's function makes of a picture."""
    seed = int(torch.randint(2**62, (), generator=generator))
    whole_picture = np.array(clean.whole())  # a copy, as the function may write into it
    given = whole_picture[..., 0] if clean.channels == 1 else whole_picture
    found = Picture.of("degrade(picture, rng)", degrade(given, np.random.default_rng(seed)))
    if (found.shape, found.channels) != (clean.shape, clean.channels):
        msg = f"`degrade` gave a picture of shape {found.values.shape} for `clean[{k}]` of shape {clean.values.shape}: expected the same shape"
        raise ValueError(msg)
    return found


def _function(value: object) -> object:
    if not callable(value):
        raise TypeError
    return value


@checked(
    clean=ANYTHING,
    degrade=NONE | Rule(("a function of a picture and a numpy random generator, which gives a picture",), _function),
    inputs=ANYTHING,
    sigma=pair(POSITIVE, "(least, largest) noise level"),
    spec=instance(LoFiSpec, "a `LoFiSpec`"),
    warp=NONE | instance(Warp, "a `Warp`, which `learn_geometry` gives"),
    config=instance(LoFiTraining, "a `LoFiTraining`"),
    steps=SIZE,
    random_state=SEED,
    device=DEVICE,
    progress=FLAG,
)
def fit_lofi(
    clean: Sequence[ArrayLike],
    *,
    degrade: Degrade | None = None,
    inputs: Sequence[ArrayLike] | None = None,
    sigma: tuple[float, float] = (0.01, 0.35),
    spec: LoFiSpec = LoFiSpec(),
    warp: Warp | None = None,
    config: LoFiTraining = LoFiTraining(),
    steps: int = 4000,
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> LoFi:
    r"""Train a local neural field :cite:p:`Khorashadizadeh2024`.

    Minimises the mean of :math:`|f(t; y) - x(t)|` over random points t of pictures x and their degraded versions y with Adam. Windows are turned and flipped at random; models with a filter or a warp read whole pictures, as they are. Noise is drawn afresh in every step; a level :math:`\sigma` is drawn
    log-uniformly, and its errors are divided by :math:`\sigma + 0.02`.

    Parameters
    ----------
    clean
        Pictures (H, W) or (H, W, C) of any sizes; unsigned integers are scaled to [0, 1]. Memory-mapped files are read in windows.
    degrade
        ``degrade(picture, rng)`` gives the input that belongs to a clean picture, such as its reconstruction from noisy measurements; it is called again and again during the training. None adds Gaussian noise.
    inputs
        Pictures as they were observed, each with its own target. One for each clean picture, instead of `degrade`.
    sigma
        Least and largest noise level in the units of the pictures, if neither `degrade` nor `inputs` is given. The model then reads the noise level, and is right for pictures in any units.
    spec
        Numbers of the model.
    warp
        Where inputs are read for each point of the target, from :func:`learn_geometry`; it is trained further with the model. Pictures in `inputs` may then have other shapes than the clean ones.
    config
        Numbers of the method.
    steps
        Steps of the training.
    random_state
        Seed of all random numbers.
    device
        ``"auto"``, or a torch device name.
    progress
        Show a progress bar.

    Returns
    -------
    LoFi
        The trained model.

    Raises
    ------
    TypeError, ValueError
        For pictures of wrong types or shapes or that are not finite, pairs that do not fit together, and other wrong arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging.lofi import fit_lofi
    >>> rows, columns = np.mgrid[:64, :64] / 64
    >>> clean = [np.sin(9 * rows) * np.cos(k * columns) for k in (5, 8)]
    >>> model = fit_lofi(clean, sigma=(0.2, 0.2), steps=2, progress=False)
    >>> model(clean[0] + 0.2, sigma=0.2).shape
    (64, 64)
    """
    if degrade is not None and inputs is not None:
        msg = "`degrade` and `inputs` are both given: expected at most one of them"
        raise ValueError(msg)
    if not sigma[0] <= sigma[1]:
        msg = f"`sigma={shown(sigma)}`: expected the least and the largest noise level"
        raise ValueError(msg)
    if warp is not None and degrade is None and inputs is None:
        msg = "`warp` is given without `inputs` or `degrade`: expected the pictures that it relates to `clean`"
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(random_state)
    pairs = _pairs(clean, inputs, degrade, config, generator, warp)
    if spec.channels not in (1, pairs.targets[0].channels):
        msg = f"`spec` has `channels={spec.channels}` and the pictures have {pairs.targets[0].channels}: expected the same, or 1 to train on channels one by one"
        raise ValueError(msg)
    noisy = degrade is None and inputs is None
    unit = None if noisy else standard_deviation(pairs.inputs)
    with seeded(random_state):  # layers draw their first weights from the global generator
        net = LoFiNet(spec, in_noise_units=noisy, shape=_common_shape(pairs, spec))
    if spec.filter != "none":
        if noisy:
            msg = f"`spec` has `filter={spec.filter!r}` and noise is white: expected `degrade` or `inputs`, as a filter is for noise that is correlated"
            raise ValueError(msg)
        _start_at_wiener(net, pairs)
    model = torch.nn.ModuleDict({"net": net} | ({} if warp is None else {"warp": copy.deepcopy(warp).float()}))
    model.requires_grad_(True)
    whole_pictures = warp is not None or spec.filter != "none"

    def draw(generator: torch.Generator) -> Batch:
        pairs.refresh(generator)
        if whole_pictures:
            return whole_batch(pairs, unit, spec, config, generator)
        return window_batch(pairs, sigma if noisy else unit, net.margin(), spec, config, generator)

    with progress_bar(progress) as on_progress:
        counter = StepCounter(on_progress).stage("training", steps)
        numbers = TrainConfig(
            steps, config.learning_rate, config.warm_up, LARGEST_GRADIENT, random_state=random_state, device=device
        )
        train(model, draw, loss, numbers, on_step=counter)
    return LoFi(net, unit=unit, warp=model["warp"] if warp is not None else None)


def loss(model: torch.nn.ModuleDict, batch: Batch) -> Tensor:
    """Mean absolute error of a batch, relative to the noise where it is known."""
    net = model["net"]
    device = net.log_scale.device
    inputs, points, values = (part.to(device) for part in batch[:3])
    if "warp" in model:
        points = model["warp"](points, batch.shape, tuple(inputs.shape[-2:]))
    if batch.sigma is None:
        return (net(net.with_filter(inputs), points) - values).abs().mean()
    sigma = batch.sigma.to(device)[:, None, None]
    error = net(inputs / sigma[..., None], points) - values / sigma
    return (error.abs() * sigma / (sigma + LEAST_NOISE)).mean()


def _pairs(
    clean: Sequence[ArrayLike],
    inputs: Sequence[ArrayLike] | None,
    degrade: Degrade | None,
    config: LoFiTraining,
    generator: torch.Generator,
    warp: Warp | None,
) -> Pairs:
    if inputs is None:
        targets = as_pictures("clean", clean)
        made = [degraded(degrade, each, k, generator) for k, each in enumerate(targets)] if degrade else targets
        return Pairs(made, targets, degrade, config.refresh_every)
    both = as_pairs("inputs", inputs, "clean", clean)
    for k, (given, target) in enumerate(both):
        if warp is None and given.shape != target.shape:
            msg = f"`inputs[{k}]` has shape {given.shape} and `clean[{k}]` has {target.shape}: expected the same shape, or a `warp` that relates them"
            raise ValueError(msg)
    first, second = (list(part) for part in zip(*both, strict=True))
    return Pairs(first, second, None, config.refresh_every)


def window_batch(
    pairs: Pairs,
    level: tuple[float, float] | float,
    margin: int,
    spec: LoFiSpec,
    config: LoFiTraining,
    generator: torch.Generator,
) -> Batch:
    """Random windows of random pictures, turned and flipped; `level` is a range of noise levels, or the unit of the inputs."""
    pick = lambda n: int(torch.randint(n, (), generator=generator))
    noisy = isinstance(level, tuple)
    inputs, targets = [], []
    for _ in range(config.windows):
        k = pick(len(pairs.targets))
        target, source = pairs.targets[k], pairs.inputs[k]
        top, left = (pick(max(1, n - config.side + 1)) - margin for n in target.shape)
        full = config.side + 2 * margin
        parts = [tensor(each.part(top, left, full, full)) for each in ((target,) if noisy else (target, source))]
        if spec.channels == 1 and target.channels > 1:
            channel = pick(target.channels)
            parts = [part[channel : channel + 1] for part in parts]
        turns, flip = pick(4), pick(2)
        parts = [torch.rot90(part, turns, (1, 2)) for part in parts]
        parts = [part.flip(1) if flip else part for part in parts]
        targets.append(parts[0])
        inputs.append(parts[-1])
    target, source = torch.stack(targets), torch.stack(inputs)
    points = margin + random_points(len(target), (config.side, config.side), config, generator)
    sigma = None
    if noisy:
        low, high = map(math.log, level)
        sigma = torch.exp(low + (high - low) * torch.rand(len(source), generator=generator))
        source = source + sigma[:, None, None, None] * torch.randn(source.shape, generator=generator)
    else:
        shift = source.mean((1, 2, 3), keepdim=True) if spec.head != "value" else 0
        source, target = (source - shift) / level, (target - shift) / level
    return Batch(source, points, values_at(target, points), sigma, tuple(target.shape[-2:]))


def whole_batch(pairs: Pairs, unit: float, spec: LoFiSpec, config: LoFiTraining, generator: torch.Generator) -> Batch:
    """Random points of random whole pictures that have the same shapes."""
    pick = lambda n: int(torch.randint(n, (), generator=generator))
    shapes = [(a.shape, b.shape) for a, b in zip(pairs.inputs, pairs.targets, strict=True)]
    first = shapes[pick(len(shapes))]
    alike = [k for k, each in enumerate(shapes) if each == first]
    chosen = [alike[pick(len(alike))] for _ in range(min(config.windows, len(alike)))]
    channel = pick(pairs.targets[0].channels)
    keep = slice(channel, channel + 1) if spec.channels == 1 else slice(None)
    source = torch.stack([tensor(pairs.inputs[k].whole())[keep] for k in chosen])
    target = torch.stack([tensor(pairs.targets[k].whole())[keep] for k in chosen])
    shift = source.mean((1, 2, 3), keepdim=True) if spec.head != "value" else 0
    source, target = (source - shift) / unit, (target - shift) / unit
    points = random_points(len(chosen), tuple(target.shape[-2:]), config, generator, config.windows // len(chosen))
    return Batch(source, points, values_at(target, points), None, tuple(target.shape[-2:]))


def random_points(
    n: int, shape: tuple[int, int], config: LoFiTraining, generator: torch.Generator, times: int = 1
) -> Tensor:  # (n, P, 2)
    """Pixel centres, the last ones of which are moved by up to half a pixel."""
    count = times * config.points
    points = torch.stack([torch.randint(m, (n, count), generator=generator) for m in shape], -1).float()
    moved = round(config.between * count)
    if moved:
        points[:, -moved:] += torch.rand((n, moved, 2), generator=generator) - 0.5
    return points


def values_at(target: Tensor, points: Tensor) -> Tensor:  # (B, C, h, w) -> (B, P, C)
    """Values of clean pictures."""
    return read(target, points[:, :, None])[..., 0].transpose(1, 2)


def _common_shape(pairs: Pairs, spec: LoFiSpec) -> tuple[int, int] | None:
    if spec.filter != "free":
        return None
    shapes = {each.shape for each in pairs.inputs}
    if len(shapes) > 1:
        msg = f"the inputs have the shapes {sorted(shapes)}: expected one shape for `filter='free'`; use `filter='radial'`"
        raise ValueError(msg)
    return shapes.pop()


def _start_at_wiener(net: LoFiNet, pairs: Pairs) -> None:
    """Start a radial filter at P / (P + N), from the spectra of clean pictures P and of errors of the inputs N."""
    if net.filter.shape is not None:
        return
    power = np.zeros((2, PIECES + 1))
    for source, target in zip(pairs.inputs, pairs.targets, strict=True):
        if source.shape != target.shape:  # related by a warp
            return
        clean, error = target.whole().mean(2), (source.whole() - target.whole()).mean(2)
        rows, columns = (np.fft.fftfreq(n) for n in clean.shape)
        at = np.rint(np.hypot(rows[:, None], columns) / HIGHEST * PIECES).astype(int).ravel()
        for k, each in enumerate((clean - clean.mean(), error - error.mean())):
            power[k] += np.bincount(at, np.abs(np.fft.fft2(each)).ravel() ** 2 / each.size, PIECES + 1)
    gain = power[0] / np.maximum(power.sum(0), np.finfo(float).tiny)
    net.filter.transfer.data.copy_(torch.from_numpy(np.where(power.sum(0) > 0, gain, 1)))
