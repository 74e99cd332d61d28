"""The solver: primal-dual steps whose ratios are balanced on the way, until the duality gap or the change of a step is small."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neurst.core.arguments import check_fields, instance, number
from neurst.core.progress import StepCounter
from neurst.imaging.tgv.problem import Problem, Ratios, State, balanced, distance

# share of the energy of a picture of zeros, of data without their mean, beside which an error does not matter
NEGLIGIBLE = 1e-5
# share of the possible size of a variable beside which a change does not matter
NEGLIGIBLE_CHANGE = 0.01


@dataclass(frozen=True)
class SolverConfig:
    r"""Numbers of the solver.

    Parameters
    ----------
    tol
        The solver of a denoising problem stops when the duality gap, an upper bound on the error of the energy, is at most this share of the energy.
    step_tol
        The solver of another problem, whose gap is not known, stops when a step changes each of the variables by at most this, relative to its size.
    max_steps
        Largest number of steps.
    check_every
        Steps between checks.
    relaxation
        :math:`\rho`, at least 1 and below 2. The steps stay inside the bound within which the method converges, whatever is chosen.
    denoising_ratio
        Ratio of dual to primal steps for denoising, where one ratio suits all pictures and weights.
    ratio
        First ratio for other operators. The best one differs by a factor of 10,000 between them, so the ratios are balanced on the way.
    dual_ratio
        (First) ratio of the steps of the two dual variables.
    balance_from, balance_growth, balance_share
        The ratios are balanced at step `balance_from`, and again after windows that grow by the factor `balance_growth`, so that they change less
        and less often. Each time they move by `balance_share` of the distance to the balance, on a logarithmic scale.
    """

    tol: float = 3e-3
    step_tol: float = 2e-4
    max_steps: int = 2000
    check_every: int = 10
    relaxation: float = 1.9
    denoising_ratio: float = 100.0
    ratio: float = 1.0
    dual_ratio: float = 3.0
    balance_from: int = 8
    balance_growth: float = 1.3
    balance_share: float = 0.3

    def __post_init__(self):
        growth = number(1, above=True)
        check_fields(
            self,
            tol=number(0),
            step_tol=number(0),
            relaxation=number(1, 1.99),
            balance_growth=growth,
            balance_share=number(0, 1),
        )


SOLVER = instance(SolverConfig, "a `neurst.imaging.tgv.SolverConfig`, such as SolverConfig(tol=1e-4)")


@dataclass(frozen=True, eq=False)
class Solved:
    """Where the solver stopped.

    Parameters
    ----------
    state
        All variables.
    steps
        Number of steps.
    gap
        Relative duality gap, the largest of a batch; NaN where it is not known.
    change
        Relative change of a variable in the last step, the largest of all; NaN where the gap is known.
    converged
        Whether the tolerance was reached.
    """

    state: State
    steps: int
    gap: float
    change: float
    converged: bool


def solve(
    problem: Problem,
    config: SolverConfig = SolverConfig(),
    *,
    start: State | None = None,
    counter: StepCounter | None = None,
) -> Solved:
    """The minimum of a problem whose operator has a norm of 1. The solver begins at `start`, or at the adjoint of the data."""
    denoising = problem.operator.is_identity
    first = config.denoising_ratio if denoising else config.ratio
    ratios = Ratios(
        *(torch.full((len(problem.data),), r, dtype=torch.float64) for r in (first, first, config.dual_ratio))
    )
    sizes = problem.step_sizes(ratios, config.relaxation)
    state = since = problem.start() if start is None else start
    window = balance_at = float(config.balance_from)
    on_step = (counter or StepCounter(None)).stage("solving", config.max_steps)
    gap = change = math.nan
    bound = torch.zeros(len(problem.data), dtype=problem.first.dtype)  # the energy is never negative
    with torch.no_grad():
        for k in range(1, config.max_steps + 1):
            old, state = state, problem.advance(state, sizes, config.relaxation)
            on_step(k, gap)
            if k % config.check_every == 0 or k == config.max_steps:
                if denoising:
                    bound = torch.maximum(bound, problem.lower_bound(state))  # any of them holds
                    gap = _relative_gap(problem, state, bound)
                    converged = gap <= config.tol
                else:
                    change = _relative_change(problem, state, old)
                    converged = change <= config.step_tol
                if converged:
                    break
            if k >= balance_at and not denoising:
                ratios = balanced(ratios, state, since, config.balance_share)
                sizes = problem.step_sizes(ratios, config.relaxation)
                window *= config.balance_growth
                since, balance_at = state, k + window
    return Solved(state, k, gap, change, converged)


def _relative_gap(problem: Problem, state: State, bound: Tensor) -> float:
    """The gap over the energy, or over a small share of the energy of a picture of zeros if that is larger."""
    energy = problem.energy(state.u, state.w)
    floor = NEGLIGIBLE * problem.data.abs().square().flatten(1).sum(1) / 2
    gap = (energy - bound).clamp_min(0)
    return float(
        torch.where(gap > 0, gap / torch.maximum(energy, floor).clamp_min(torch.finfo(gap.dtype).tiny), 0.0).max()
    )


def _relative_change(problem: Problem, new: State, old: State) -> float:
    """The largest change of a block over its size, or over a small share of its possible size if that is larger."""
    radius = [part.square().mean((1, 2, 3, 4)).sqrt() for part in (problem.first, problem.second) if part is not None]
    typical = (*[torch.ones_like(radius[0])] * len(new.primal), *radius)
    blocks = list(zip(new.primal + new.dual, old.primal + old.dual, typical, strict=True))
    shares = []
    for block, before, size in blocks[:1] + blocks[len(new.primal) :]:
        least = NEGLIGIBLE_CHANGE * size * block[0].numel() ** 0.5
        own = distance((block,), (torch.zeros_like(block),))[0]
        shares.append(distance((block,), (before,))[0] / torch.maximum(own, least))
    return float(torch.stack(shares).max())
