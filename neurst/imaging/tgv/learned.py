r"""Total (generalised) variation whose space-varying weights a network predicts from the data :cite:p:`Vu2025`.

The network learns through the solver: its loss is the error of the picture that the predicted weights give.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from neurst.core import storage
from neurst.core.arguments import (
    FLAG,
    SEED,
    check_fields,
    instance,
    number,
    shown,
    warn,
    whole,
)
from neurst.core.progress import StepCounter, progress_bar
from neurst.imaging.operators import Operator
from neurst.imaging.tgv.measured import OPERATOR, SIGMA, Measured
from neurst.imaging.tgv.problem import Problem, Ratios
from neurst.imaging.tgv.solver import SOLVER, SolverConfig, solve

KIND = "learned_tgv"  # of a saved file
FORMAT = 1  # of its content; raise it when the layout changes
LEAK = 0.1  # slope of the leaky rectifier at negative values
LEAST_CONTRAST = 1e-3  # least standard deviation of a picture, in units of the noise
# after which denoised pictures hardly change; weights that are small at edges make the duality gap loose
DENOISING_STEPS = 200


@dataclass(frozen=True)
class LearnedConfig:
    r"""Numbers of a network that predicts weights.

    Parameters
    ----------
    slopes
        Predict both weights, for total generalised variation; else the first one alone, for total variation.
    width, depth
        Channels at full resolution, and number of times that the resolution is halved while the channels double.
    log_range
        Weights are at most ``exp(log_range)`` times larger or smaller than those of an untrained network.
    first_start, second_start
        The weights of an untrained network, in the unit below.
    unit
        What weights are multiples of: ``"sigma"``, the noise times the norm of A; or ``"rms"``, the standard deviation of :math:`A^\top f`, where the noise does not set their scale.
    free_steps, kept_steps
        Steps of the solver in training: first those without, then those with a gradient. Without free steps the solver is fully unrolled.
    relaxation
        As in :class:`SolverConfig`.
    ratio
        Ratio of dual to primal steps before training. The three ratios are learned, and used in training only.
    """

    slopes: bool = True
    width: int = 16
    depth: int = 2
    log_range: float = 4.0
    first_start: float = 0.8
    second_start: float = 1.6
    unit: str = "sigma"
    free_steps: int = 60
    kept_steps: int = 12
    relaxation: float = 1.8
    ratio: float = 30.0

    def __post_init__(self):
        if self.unit not in ("sigma", "rms"):
            msg = f"`LearnedConfig.unit={shown(self.unit)}`: expected 'sigma' or 'rms'"
            raise ValueError(msg)
        check_fields(self, slopes=FLAG, depth=whole(0), free_steps=whole(0), relaxation=number(1, 1.99))


class UNet(nn.Module):
    """A small convolutional network from (B, n_in, H, W) to (B, n_out, H, W), for pictures of any size."""

    def __init__(self, n_in: int, n_out: int, width: int, depth: int):
        super().__init__()
        sizes = [width * 2**k for k in range(depth + 1)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([n_in, *sizes], sizes, strict=False))
        pairs = list(zip(sizes[::-1], sizes[-2::-1], strict=False))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.up = nn.ModuleList(_block(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(width, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        shape, multiple = x.shape[-2:], 2 ** len(self.up)
        missing = [-n % multiple for n in shape]
        x = F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
        kept = []
        for k, block in enumerate(self.down):
            x = block(x if k == 0 else F.avg_pool2d(x, 2))
            kept.append(x)
        for shrink, block, skip in zip(self.shrink, self.up, kept[-2::-1], strict=True):
            x = F.interpolate(shrink(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return self.head(x)[..., : shape[0], : shape[1]]


def _block(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in (n_in, n_out):
        layers += [nn.Conv2d(n, n_out, 3, padding=1, padding_mode="replicate"), nn.LeakyReLU(LEAK)]
    return nn.Sequential(*layers)


class LearnedTGV(nn.Module):
    r"""A solver of total generalised variation with weights that a network predicts for each pixel.

    With :math:`x_0` the picture :math:`A^\top f`, for A of norm 1, m its mean, r its standard deviation and h the output of the network for
    :math:`(x_0 - m) / r` and :math:`\log(\sigma / r)`,

    .. math:: L_i = \mathrm{unit} \cdot \exp(c \tanh(h_i / c) + b_i).

    The last layer starts at 0, so the untrained model has the constant weights exp(b). If data and noise are scaled, or the data are shifted, the weights scale
    with them and the picture follows. Channels, and the modulus of a complex picture, go through the network one by one; the mean of their log-weights, times the square root of
    their number, is used for all.

    Parameters
    ----------
    config
        Numbers of the model.
    random_state
        Seed of its first weights.

    Examples
    --------
    >>> import numpy as np
    >>> model = LearnedTGV()
    >>> noisy = np.random.default_rng(0).standard_normal((9, 14))
    >>> model.reconstruct(noisy, sigma=1.0).shape
    (9, 14)
    """

    def __init__(self, config: LearnedConfig = LearnedConfig(), *, random_state: int = 0):
        super().__init__()
        self.config = config = instance(LearnedConfig, "a `neurst.imaging.tgv.LearnedConfig`")("config", config)
        random_state = SEED("random_state", random_state)
        starts = (config.first_start, config.second_start) if config.slopes else (config.first_start,)
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
            torch.manual_seed(random_state)
            self.net = UNet(2, len(starts), config.width, config.depth)
        nn.init.zeros_(self.net.head.weight)
        nn.init.zeros_(self.net.head.bias)
        self.bias = nn.Parameter(torch.tensor(starts).log())
        self.log_ratios = nn.Parameter(torch.tensor([config.ratio, config.ratio, 3.0]).log())

    def problem(self, data: Tensor, operator: Operator, sigma: Tensor) -> Problem:
        r"""The problem with predicted weights, for data (B, C, \*data_shape) and noise levels (B,), both divided by the norm of the operator."""
        config, norm = self.config, operator.norm
        operator, data, sigma = operator.normalised(), data / norm, sigma / norm
        u = operator.adjoint(data)
        pictures = (u.abs() if u.is_complex() else u).flatten(0, 1)[:, None].to(self.bias.dtype)  # (B C, 1, H, W)
        rms = pictures.std((1, 2, 3), correction=0, keepdim=True)
        noise = sigma.to(pictures).repeat_interleave(u.shape[1])[:, None, None, None]
        rms = torch.maximum(rms, LEAST_CONTRAST * noise)
        level = (noise / rms).log().expand_as(pictures)
        h = self.net(torch.cat([(pictures - pictures.mean((1, 2, 3), keepdim=True)) / rms, level], 1))
        h = config.log_range * torch.tanh(h / config.log_range) + self.bias[:, None, None]
        unit = noise if config.unit == "sigma" else rms
        mean = lambda x: x.unflatten(0, u.shape[:2]).mean(1)  # over channels
        # the noise in the norm of the differences of C channels grows as the root of C
        weights = u.shape[1] ** 0.5 * mean(unit) * mean(h).exp()
        maps = [each[:, None, None].to(u.real.dtype) for each in weights.unbind(1)]  # (B, 1, 1, H, W)
        return Problem(data, operator, *maps) if config.slopes else Problem(data, operator, maps[0], None)

    def ratios(self) -> Ratios:
        """The learned ratios of steps."""
        return Ratios(*self.log_ratios.exp()[:, None])

    def forward(self, data: Tensor, operator: Operator, sigma: Tensor) -> Tensor:  # -> (B, C, H, W)
        """Pictures after the steps of training: those without, then those with a gradient."""
        problem, config = self.problem(data, operator, sigma), self.config
        sizes = problem.step_sizes(self.ratios(), config.relaxation)
        with torch.no_grad():
            state = problem.start()
            for _ in range(config.free_steps):
                state = problem.advance(state, sizes, config.relaxation)
        for _ in range(config.kept_steps):
            state = problem.advance(state, sizes, config.relaxation)
        return state.u

    def reconstruct(
        self,
        data: ArrayLike,
        operator: Operator | None = None,
        *,
        sigma: float | None = None,
        config: SolverConfig | None = None,
        progress: bool = False,
    ) -> NDArray:
        """The picture with predicted weights.

        Parameters
        ----------
        data, operator, sigma
            As for :func:`neurst.imaging.tgv.tgv`.
        config
            Numbers of the solver; None takes 200 steps for denoising, and those of :class:`SolverConfig` for other operators.
        progress
            Show a progress bar.

        Returns
        -------
        numpy.ndarray
            (H, W), (H, W, C) or (B, H, W, C), as the data.
        """
        config = config if config is None else SOLVER("config", config)
        measured = Measured.read(data, OPERATOR("operator", operator))
        problem = self._problem(measured, sigma)
        fixed = config is None and problem.operator.is_identity
        config = SolverConfig(max_steps=DENOISING_STEPS) if fixed else config or SolverConfig()
        with progress_bar(FLAG("progress", progress)) as on_progress:
            solved = solve(problem, config, counter=StepCounter(on_progress))
        if not (solved.converged or fixed):
            warn(
                f"the solver stopped after {solved.steps} steps without reaching its tolerance: raise `max_steps` of `config`, or its tolerance"
            )
        return measured.pictures(measured.to_user(solved.state).u)

    def maps(
        self, data: ArrayLike, operator: Operator | None = None, *, sigma: float | None = None
    ) -> tuple[NDArray, NDArray | None]:
        """The predicted weights, `first` and `second` of :func:`neurst.imaging.tgv.tgv`: (H, W), or (B, H, W) for a batch; `second` is None for total variation."""
        measured = Measured.read(data, OPERATOR("operator", operator))
        problem = self._problem(measured, sigma)
        maps = [m if m is None else measured.weight * m[:, 0, 0].numpy() for m in (problem.first, problem.second)]
        first, second = (m if m is None or measured.extra == 2 else m[0] for m in maps)
        return first, second

    def _problem(self, measured: Measured, sigma: float | None) -> Problem:
        sigma = SIGMA("sigma", sigma)
        sigma = measured.noise_level() if sigma is None else sigma
        if not sigma > 0:
            msg = f"`sigma={sigma:g}`: expected the standard deviation of noise that is there; data without noise need no smoothing"
            raise ValueError(msg)
        with torch.no_grad():
            return self.problem(
                measured.batch, measured.operator, torch.full((len(measured.batch),), sigma / measured.noise)
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to one file, which :meth:`load` reads."""
        weights = {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}
        storage.save(path, KIND, {"format": FORMAT, "config": dataclasses.asdict(self.config), "weights": weights})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LearnedTGV:
        """The model in a file that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, it is damaged, or holds something else.
        """
        kind, content = storage.load(path)
        if kind != KIND or content.get("format") != FORMAT:
            msg = f"`path={str(path)!r}` holds {kind!r} of format {content.get('format')}: expected a {KIND!r} of format {FORMAT}, which `LearnedTGV.save` writes"
            raise ValueError(msg)
        try:
            model = cls(LearnedConfig(**content["config"]))
            model.load_state_dict({name: torch.from_numpy(value) for name, value in content["weights"].items()})
        except (KeyError, TypeError, RuntimeError) as error:
            msg = f"`path={str(path)!r}` is not a complete model ({type(error).__name__}: {error})"
            raise ValueError(msg) from None
        return model.eval()


def pretrained_denoiser() -> LearnedTGV:
    """The model that ships with the package: for Gaussian noise of 4 to 25 % of the range, trained on twelve grey photographs by benchmarks/train_denoiser.py.

    Each call gives a copy, which may be trained further.

    Examples
    --------
    >>> pretrained_denoiser().config.slopes
    True
    """
    return copy.deepcopy(_shipped())


@functools.cache
def _shipped() -> LearnedTGV:
    return LearnedTGV.load(Path(__file__).with_name("denoiser.safetensors"))
