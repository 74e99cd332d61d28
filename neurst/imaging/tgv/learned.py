r"""Total (generalised) variation whose space-varying weights a network predicts from the data :cite:p:`Vu2025`.

The network learns through the solver: its loss is the error of the picture that the predicted weights give.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
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
from neurst.core.train import seeded
from neurst.core.weight_net import DENOISER, WeightNet
from neurst.imaging.arrays import SIGMA
from neurst.imaging.operators import Operator
from neurst.imaging.tgv.measured import OPERATOR, Measured, nearest_constant
from neurst.imaging.tgv.problem import Problem, Ratios, State
from neurst.imaging.tgv.solver import SOLVER, SolverConfig, solve

KIND = "learned_tgv"  # of a saved file
FORMAT = 1  # of its content; raise it when the layout changes
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
    first_steps
        Steps of the solver with the weights of an untrained network, after which the network reads the picture, and from which the solver goes on. 0 where
        :math:`A^\top f` shows the structures, as in denoising.
    reads_both
        Whether the network reads :math:`A^\top f` beside the picture of the first steps, as it shows how the data are incomplete.
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
    first_steps: int = 0
    reads_both: bool = False
    unit: str = "sigma"
    free_steps: int = 60
    kept_steps: int = 12
    relaxation: float = 1.8
    ratio: float = 30.0

    def __post_init__(self):
        if self.unit not in ("sigma", "rms"):
            msg = f"`LearnedConfig.unit={shown(self.unit)}`: expected 'sigma' or 'rms'"
            raise ValueError(msg)
        check_fields(
            self,
            slopes=FLAG,
            reads_both=FLAG,
            depth=whole(0),
            first_steps=whole(0),
            free_steps=whole(0),
            relaxation=number(1, 1.99),
        )
        if self.reads_both and not self.first_steps:
            msg = "`LearnedConfig.reads_both=True` with `first_steps=0`: expected `first_steps`, such as 60, after which there are two pictures to read"
            raise ValueError(msg)


class LearnedTGV(nn.Module):
    r"""A solver of total generalised variation with weights that a network predicts for each pixel.

    The logarithms of the weights, in a unit, are those that :class:`neurst.core.weight_net.WeightNet` reads off the picture :math:`A^\top f`, for A of norm 1, or off
    the picture of a first solution with constant weights. An untrained model has the constant weights of its configuration. If data and noise are scaled, the weights scale
    with them and the picture follows; so it does if a constant is added to a real picture. Channels, and the modulus of a complex picture, go through the network one by one; the mean of their log-weights, times the square root of
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
        with seeded(random_state):  # layers draw their first weights from the global generator
            self.net = WeightNet(starts, config.width, config.depth, config.log_range, 1 + config.reads_both)
        self.register_buffer("log_starts", torch.tensor(starts).log(), persistent=False)
        self.log_ratios = nn.Parameter(torch.tensor([config.ratio, config.ratio, 3.0]).log())

    def predicted(self, data: Tensor, operator: Operator, sigma: Tensor) -> tuple[Problem, State, Tensor]:
        r"""The problem with predicted weights, the state from which its solution starts, and what is added to the solution.

        Data (B, C, \*data_shape) and noise levels (B,) are both divided by the norm of the operator. Then the constant picture whose data are nearest to them,
        which is added to the solution, is taken off. The modulus of complex pictures is read with this constant.
        """
        config, norm = self.config, operator.norm
        operator, data, sigma = operator.normalised(), data / norm, sigma / norm
        mean = nearest_constant(operator, data)  # (B, C, 1, 1)
        constant = operator.forward(mean.expand(*mean.shape[:2], *operator.shape))
        data = data - constant
        u = operator.adjoint(data)
        visible = mean if u.is_complex() else torch.zeros_like(mean)
        pictures = shown = self._shown(u + (operator.adjoint(constant) if u.is_complex() else 0))
        rms = shown.std((1, 2, 3), correction=0, keepdim=True)
        noise = sigma.to(shown).repeat_interleave(u.shape[1])[:, None, None, None]
        rms = torch.maximum(rms, LEAST_CONTRAST * noise)
        unit = noise if config.unit == "sigma" else rms

        def problem(h: Tensor) -> Problem:
            mean = lambda x: x.unflatten(0, u.shape[:2]).mean(1)  # over channels
            # the noise in the norm of the differences of C channels grows as the root of C
            weights = u.shape[1] ** 0.5 * mean(unit) * mean(h).exp()
            maps = [each[:, None, None].to(u.real.dtype) for each in weights.unbind(1)]  # (B, 1, 1, H, W)
            return Problem(data, operator, *maps) if config.slopes else Problem(data, operator, maps[0], None)

        start = None
        if config.first_steps:
            with torch.no_grad():
                first = problem(self.log_starts[:, None, None].expand(len(shown), -1, *u.shape[-2:]))
                start = self._advanced(first, first.start(), config.first_steps)
            pictures = self._shown(start.u + visible)
        pictures = torch.cat([pictures, shown], 1) if config.reads_both else pictures
        found = problem(self.net(pictures, rms, noise))
        return found, start or found.start(), mean

    def _shown(self, u: Tensor) -> Tensor:  # -> (B C, 1, H, W)
        """What the network reads of pictures (B, C, H, W)."""
        return (u.abs() if u.is_complex() else u).flatten(0, 1)[:, None].to(self.log_starts.dtype)

    def _advanced(self, problem: Problem, state: State, steps: int) -> State:
        """A state some steps further, with the learned ratios."""
        sizes = problem.step_sizes(self.ratios(), self.config.relaxation)
        for _ in range(steps):
            state = problem.advance(state, sizes, self.config.relaxation)
        return state

    def ratios(self) -> Ratios:
        """The learned ratios of steps."""
        return Ratios(*self.log_ratios.exp()[:, None])

    def forward(self, data: Tensor, operator: Operator, sigma: Tensor) -> Tensor:  # -> (B, C, H, W)
        """Pictures after the steps of training: those without, then those with a gradient."""
        problem, state, mean = self.predicted(data, operator, sigma)
        with torch.no_grad():
            state = self._advanced(problem, state, self.config.free_steps)
        return self._advanced(problem, state, self.config.kept_steps).u + mean

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
        problem, start = self._predicted(measured, sigma)
        fixed = config is None and problem.operator.is_identity
        config = SolverConfig(max_steps=DENOISING_STEPS) if fixed else config or SolverConfig()
        with progress_bar(FLAG("progress", progress)) as on_progress:
            solved = solve(problem, config, start=start, counter=StepCounter(on_progress))
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
        problem, _ = self._predicted(measured, sigma)
        maps = [m if m is None else measured.weight * m[:, 0, 0].numpy() for m in (problem.first, problem.second)]
        first, second = (m if m is None or measured.extra == 2 else m[0] for m in maps)
        return first, second

    def _predicted(self, measured: Measured, sigma: float | None) -> tuple[Problem, State]:
        sigma = SIGMA("sigma", sigma)
        sigma = measured.noise_level() if sigma is None else sigma
        if not sigma > 0:
            msg = f"`sigma={sigma:g}`: expected the standard deviation of noise that is there; data without noise need no smoothing"
            raise ValueError(msg)
        data, operator, noise = measured.batch, measured.operator, sigma / measured.noise
        if data.is_complex():  # whose modulus is read with its mean
            mean = (measured.mean / measured.scale).to(data.dtype)
            data = data + operator.forward(mean.expand(*mean.shape[:2], *operator.shape))
        with torch.no_grad():
            problem, start, _ = self.predicted(data, operator, torch.full((len(data),), noise))
        return dataclasses.replace(problem, data=measured.batch), start

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to one file, which :meth:`load` reads."""
        content = {"format": FORMAT, "config": dataclasses.asdict(self.config), "weights": storage.weights_of(self)}
        storage.save(path, KIND, content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LearnedTGV:
        """The model in a file that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, it is damaged, or holds something else.
        """

        def build(content: dict[str, Any]) -> LearnedTGV:
            model = cls(LearnedConfig(**content["config"]))
            storage.fill(model, content["weights"])
            return model.eval()

        return storage.restore(path, KIND, FORMAT, build)


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
    return LearnedTGV.load(DENOISER)
