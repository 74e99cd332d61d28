"""Total variation and total generalised variation of pictures, for any linear operator: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    Rule,
    checked,
    instance,
    one_of,
    shown,
    warn,
)
from neurst.core.progress import StepCounter, progress_bar
from neurst.imaging.arrays import SIGMA
from neurst.imaging.operators import Operator
from neurst.imaging.tgv.measured import OPERATOR, Measured
from neurst.imaging.tgv.problem import NORMS, Problem, State
from neurst.imaging.tgv.solver import SOLVER, SolverConfig, solve
from neurst.imaging.tgv.strength import RULES, chosen_strength

SECOND = 2.0  # second weight in units of the first, in pixels


@dataclass(frozen=True)
class WeightChoice:
    """How the weights are chosen, which norm is used, and whether there is a second term."""

    sigma: float | None
    norm: str
    random_state: int
    slopes: bool


@dataclass(frozen=True, eq=False)
class Solution:
    """A picture that minimises a total variation.

    Parameters
    ----------
    image
        (H, W), or (H, W, C), or (B, H, W, C), as the data.
    slopes
        The vector field w in value per pixel, with the two components (along rows and columns) as the last axis: slopes that cost nothing in the
        first term. None for total variation.
    first, second
        The weights. `second` is None for total variation.
    gap
        The duality gap relative to the energy that was found, an upper bound on the error of the energy; NaN where it is not known.
    steps
        Number of steps.
    converged
        Whether the tolerance was reached.
    state
        All variables: pass the solution as `start` to go on from it.
    """

    image: NDArray
    slopes: NDArray | None
    first: float | NDArray
    second: float | NDArray | None
    gap: float
    steps: int
    converged: bool
    state: State


def _weight(value: Any) -> Any:
    if isinstance(value, str):
        if value not in RULES:
            raise ValueError
        return value
    if np.ndim(value) == 0:
        return POSITIVE.read(value)
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim not in (2, 3):
        raise TypeError
    if not (np.isfinite(array).all() and (array > 0).all()):
        msg = "it is not positive and finite everywhere"
        raise ValueError(msg)
    return array.astype(np.float64)


FIRST = Rule(
    ("'sure'", "'discrepancy'", "a positive number", "positive numbers (H, W), or (B, H, W) for a batch"), _weight
)
NORM = one_of(*NORMS)
START = (NONE | instance(Solution, "a `Solution` of the same problem")).advised("None starts from the data")


@checked(
    data=ANYTHING, operator=OPERATOR, first=FIRST, second=NONE | FIRST, sigma=SIGMA, norm=NORM, start=START, config=SOLVER,
    random_state=SEED, progress=FLAG,
)  # fmt: skip
def tgv(
    data: ArrayLike,
    operator: Operator | None = None,
    *,
    first: float | ArrayLike | str = "sure",
    second: float | ArrayLike | None = None,
    sigma: float | None = None,
    norm: str = "joint",
    start: Solution | None = None,
    config: SolverConfig = SolverConfig(),
    random_state: int = 0,
    progress: bool = True,
) -> Solution:
    r"""A picture of small total generalised variation of second order :cite:p:`Bredies2010`.

    .. math::

        \min_{u, w} \tfrac12 \|A u - f\|^2 + \sum_x L_1(x)\, \|\nabla u - w\|(x)
        + \sum_x L_0(x)\, \|\tfrac12 (\nabla w + \nabla w^\top)\|(x)

    in units of pixels. Edges are kept, and ramps do not turn into staircases.

    Parameters
    ----------
    data
        f, real or complex: of the shape of the data of the operator, without one (H, W). A last axis C may hold channels, and a further
        first axis B a batch, as in (B, H, W, C), or (B, H, W, 1) for grey pictures. Unsigned integers are scaled to [0, 1], and `sigma` and weights are
        then in these units.
    operator
        A; None is the identity, which is denoising.
    first
        :math:`L_1` in the units of the picture, a number or a map (H, W). ``"sure"`` chooses it by Stein's unbiased risk estimate,
        ``"discrepancy"`` so that the residual has the norm of the noise, which smooths more.
    second
        :math:`L_0` in the same units, times pixels. None is twice `first`.
    sigma
        Standard deviation of the noise, for the choice of `first`; of complex data, the root of the mean squared modulus. None estimates it,
        which needs data that are pixels of a picture.
    norm
        ``"joint"``: one Euclidean norm over differences and channels, so that channels share edges; ``"isotropic"``: one for each channel;
        ``"anisotropic"``: the sum of absolute values, where the mixed
        second difference counts with a factor of :math:`\sqrt2`.
    start
        A solution to start from, for example with slightly other weights.
    config
        Numbers of the solver, such as ``SolverConfig(tol=1e-5)``.
    random_state
        Seed of ``"sure"``.
    progress
        Show a progress bar.

    Returns
    -------
    Solution
        ``solution.image`` is the picture.

    Raises
    ------
    TypeError, ValueError
        For data of a wrong type or shape or that are not finite, weights that are not positive, an unknown noise level, and an operator whose
        adjoint fails the dot test.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging.tgv import tgv
    >>> ramp = np.linspace(0, 1, 30)[:, None] * np.ones((1, 24))
    >>> noisy = ramp + 0.1 * np.random.default_rng(0).standard_normal(ramp.shape)
    >>> found = tgv(noisy, progress=False)
    >>> bool(abs(found.image - ramp).mean() < 0.02)
    True
    """
    if isinstance(second, str) or (isinstance(first, str) and second is not None):
        msg = f"`second={shown(second)}` with `first={shown(first)}`: expected None, as a rule chooses both weights, or numbers for both"
        raise ValueError(msg)
    choice = WeightChoice(sigma, norm, random_state, slopes=True)
    return _solution(Measured.read(data, operator), first, second, choice, start, config, progress)


@checked(
    data=ANYTHING, operator=OPERATOR, first=FIRST, sigma=SIGMA, norm=NORM, start=START, config=SOLVER, random_state=SEED, progress=FLAG
)  # fmt: skip
def tv(
    data: ArrayLike,
    operator: Operator | None = None,
    *,
    first: float | ArrayLike | str = "sure",
    sigma: float | None = None,
    norm: str = "joint",
    start: Solution | None = None,
    config: SolverConfig = SolverConfig(),
    random_state: int = 0,
    progress: bool = True,
) -> Solution:
    r"""A picture of small total variation :cite:p:`Rudin1992`: :math:`\min_u \tfrac12 \|A u - f\|^2 + \sum_x L_1(x)\, \|\nabla u\|(x)`.

    Parameters
    ----------
    data, operator, first, sigma, norm, start, config, random_state, progress
        As for :func:`tgv`.

    Returns
    -------
    Solution
        ``solution.image`` is the picture.

    Raises
    ------
    TypeError, ValueError
        As :func:`tgv`.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging.tgv import tv
    >>> step = np.repeat([0.0, 1.0], 12)[:, None] * np.ones((1, 20))
    >>> tv(step, first=0.6, progress=False).image[[0, -1], 0].round(2)  # the step loses 2 * 0.6 / 12 of its height
    array([0.05, 0.95])
    """
    choice = WeightChoice(sigma, norm, random_state, slopes=False)
    return _solution(Measured.read(data, operator), first, None, choice, start, config, progress)


def _solution(
    measured: Measured,
    first: Any,
    second: Any,
    choice: WeightChoice,
    start: Solution | None,
    config: SolverConfig,
    progress: bool,
) -> Solution:
    with progress_bar(progress) as on_progress:
        counter = StepCounter(on_progress)
        if isinstance(first, str):
            first = _chosen(measured, first, choice, config, counter)
        if choice.slopes and second is None:
            second = SECOND * first
        problem = _problem(measured, first, second, choice.norm)
        solved = solve(problem, config, start=_start(start, measured, problem), counter=counter)
    if not solved.converged:
        reached = f"the relative gap is {solved.gap:.1e}"
        if np.isnan(solved.gap):
            reached = f"a step still changes a variable by {solved.change:.1e} of its size"
        warn(
            f"the solver stopped after {solved.steps} steps, while {reached}: raise `max_steps` of `SolverConfig`, or its tolerance"
        )
    state = measured.to_user(solved.state)
    slopes = None if state.w is None else measured.pictures(state.w.movedim(2, -1))
    return Solution(
        measured.pictures(state.u), slopes, first, second, solved.gap, solved.steps, solved.converged, state
    )


def _chosen(measured: Measured, rule: str, choice: WeightChoice, config: SolverConfig, counter: StepCounter) -> float:
    """The first weight that a rule chooses."""
    sigma = measured.noise_level() if choice.sigma is None else choice.sigma
    if not sigma > 0:
        msg = f"`sigma={sigma:g}` with `first={rule!r}`: data without noise need no smoothing; give `first` a positive number, or `sigma`"
        raise ValueError(msg)
    unit = sigma * measured.norm
    trial = _problem(measured, unit, SECOND * unit if choice.slopes else None, choice.norm)
    return unit * chosen_strength(
        trial, sigma / measured.noise, rule, config=config, random_state=choice.random_state, counter=counter
    )


def _problem(measured: Measured, first: Any, second: Any, norm: str) -> Problem:
    """The problem with weights that are numbers, or maps (H, W) or (B, H, W)."""
    operator, batch = measured.operator, measured.batch

    def full(name: str, value: Any) -> Tensor | None:  # -> broadcasts to (B, 1, 1, H, W)
        if value is None:
            return None
        array = np.array(value, dtype=np.float64)
        if array.shape not in ((), operator.shape, (len(batch), *operator.shape)):
            msg = f"`{name}` has shape {array.shape}: expected a number, or one for each pixel of the picture, {operator.shape}"
            raise ValueError(msg)
        array = array.reshape(-1, *array.shape[-2:]) if array.ndim else array.reshape(1, 1, 1)
        array = array / measured.weight
        if not array.min() > float(torch.finfo(batch.dtype).tiny):
            msg = f"`{name}` is down to {array.min() * measured.weight:.3g}: too small beside data of {measured.noise:.3g}; expected larger weights, or data in double precision"
            raise ValueError(msg)
        return torch.from_numpy(array).to(batch.real.dtype)[:, None, None]

    return Problem(batch, operator, full("first", first), full("second", second), norm)


def _start(start: Solution | None, measured: Measured, problem: Problem) -> State | None:
    if start is None:
        return None
    fresh = problem.start()
    shapes = [[None if part is None else tuple(part.shape) for part in state] for state in (start.state, fresh)]
    if shapes[0] != shapes[1]:
        msg = f"`start` is a solution of another problem: its picture is {shapes[0][0]}, and this one is {shapes[1][0]}, or one has slopes and the other not"
        raise ValueError(msg)
    if start.state.u.is_complex() and not measured.batch.is_complex():
        msg = "`start` is complex, and these data are real: expected a solution of the same problem"
        raise ValueError(msg)
    return measured.from_user(start.state)
