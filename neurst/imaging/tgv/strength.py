r"""Weights of total (generalised) variation from the data and the noise level alone: Stein's unbiased risk estimate, or the discrepancy principle."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from neurst.core.progress import StepCounter
from neurst.core.tuning import LineSearch, choose
from neurst.imaging.tgv.problem import Problem
from neurst.imaging.tgv.solver import SolverConfig, solve

RULES = ("sure", "discrepancy")
# of weights in units of sigma * norm(A); nothing is held out, and a trial has its own steps
SEARCH = LineSearch(start=0.8, ratio=1.5, max_steps=12, fraction=0.5, steps=1)
PROBE = 0.1  # size of the perturbation that measures the divergence, in units of sigma
TRIAL = {"tol": 1e-2, "step_tol": 2e-3, "max_steps": 300}  # of a solve in the search


def chosen_strength(
    problem: Problem,
    sigma: float,
    rule: str,
    *,
    config: SolverConfig = SolverConfig(),
    random_state: int = 0,
    counter: StepCounter | None = None,
) -> float:
    r"""The factor of both weights of a problem that a rule chooses.

    ``"sure"`` minimises Stein's unbiased estimate of :math:`\|A u - A u_{true}\|^2`, :cite:p:`Ramani2008`,

    .. math:: \|A u - f\|^2 - n \sigma^2 + 2 \sigma^2 \,\mathrm{div}_f (A u),

    where the divergence is measured with one random perturbation. ``"discrepancy"`` finds the factor at which
    :math:`\|A u - f\|^2 = n \sigma^2`, which smooths more.

    Parameters
    ----------
    problem
        The data, and weights in the proportion that is kept.
    sigma
        Standard deviation of the noise; of complex data, the root of the mean squared modulus.
    rule
        ``"sure"`` or ``"discrepancy"``.
    config
        Numbers of the solver.
    random_state
        Seed of the perturbation.
    counter
        Counts the steps.
    """
    config = dataclasses.replace(config, **TRIAL)
    operator, data = problem.operator, problem.data
    n = operator.n_observed * math.prod(data.shape[:2])
    probe = _probe(problem, random_state)
    both = dataclasses.replace(problem, data=torch.cat([data, data + PROBE * sigma * probe]))

    def misfit(image: Tensor) -> float:
        return float((operator.forward(image) - data).abs().square().sum())

    def risk(factor: float) -> tuple[float, None]:
        u = solve(_scaled(both, factor), config, counter=counter).state.u
        u, moved = u.chunk(2)
        answer = operator.forward(moved) - operator.forward(u)
        divergence = float((probe.conj() * answer).real.sum() if probe.is_complex() else (probe * answer).sum()) / (
            PROBE * sigma
        )
        return -(misfit(u) / (n * sigma**2) - 1 + 2 * divergence / n), None

    def discrepancy(factor: float) -> tuple[float, None]:
        u = solve(_scaled(problem, factor), config, counter=counter).state.u
        return -abs(math.log(max(misfit(u), 1e-300) / (n * sigma**2))), None

    if rule == "discrepancy":
        search = dataclasses.replace(SEARCH, ratio=SEARCH.ratio**0.5, max_steps=2 * SEARCH.max_steps)
        return choose(discrepancy, search, quiet=True).strength
    return choose(risk, SEARCH, quiet=True).strength


def _scaled(problem: Problem, factor: float) -> Problem:
    second = None if problem.second is None else factor * problem.second
    return dataclasses.replace(problem, first=factor * problem.first, second=second)


def _probe(problem: Problem, random_state: int) -> Tensor:
    """Standard normal numbers where there are data, in their dtype."""
    generator = torch.Generator().manual_seed(random_state)
    probe = torch.randn(problem.data.shape, generator=generator, dtype=problem.data.dtype).to(problem.data.device)
    observed = problem.operator.observed
    return probe if observed is None else probe * observed.to(probe.device)
