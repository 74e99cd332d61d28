r"""Fits an expression field to spots.

For counts, ``y_ig ~ Poisson(t_i exp(b_g + V_g . z(x_i)))`` with t_i the library size; for normalised data,
``y_ig ~ N(b_g + V_g . z(x_i), s_g^2)``. The objective is

    sum of -log p(y)  +  lam * mean over points of P(z)  +  sum V^2 / 2,

the last term a standard normal prior on the loadings (in units of each gene's standard deviation for normalised data): z/c with cV
is the same field, and the prior is what holds the scale that the two share (:class:`neurst.core.fit.Loadings`).

A field is the average of a few members, fits that differ in their penalty P and their seed. Held-out spots choose the strength `lam`
of each penalty and the weights of the average. The latent fields are fitted to the most variable genes; loadings of the others are
a convex problem on them (:mod:`neurst.spatial.loadings`). Array functions: no AnnData here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neurst.core.samples import Box
from neurst.spatial.choice import HeldOut, LamSearch, hold_out, split_spots
from neurst.spatial.expression import ExpressionField
from neurst.spatial.model import Fit, Model, completed
from neurst.spatial.problem import Problem, moments

OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Fitted:
    """An expression field and how it came about.

    Parameters
    ----------
    field
        The fitted field.
    lam
        Prior strength in nats of each penalty, chosen or given, (P,).
    weights
        (P,) share of each penalty in the average.
    search
        ``penalty`` (its index), ``lam`` and ``score`` of each short fit.
    score
        Deviance (or variance) explained on the held-out spots, all genes together, by the average fitted to the others.
    gene_scores
        (G,) the same for each gene.
    dispersion
        (G,) over-dispersion of the held-out counts; None for normalised data.
    history
        Of the final fits, one after the other: ``member`` (its number) beside the entries of :class:`neurst.core.fit.Field`.
    """

    field: ExpressionField
    lam: NDArray
    weights: NDArray
    search: dict[str, NDArray]
    score: float
    gene_scores: NDArray
    dispersion: NDArray | None
    history: dict[str, NDArray]


def planned_steps(lam: float | str, model: Model, search: LamSearch) -> int:
    """Steps of a whole fit, at most: for progress bars."""
    trials = (search.reach + 2 if lam == "auto" else 1) * len(model.penalties)
    return trials * search.steps_of(model.config) + model.n_members * model.config.steps


def fit_expression(
    problem: Problem,
    model: Model,
    *,
    lam: float | Literal["auto"] = "auto",
    target_sum: float = 1.0,
    for_gaps: bool = False,
    search: LamSearch = LamSearch(),
    on_step: OnStep | None = None,
) -> Fitted:
    """Choose `lam` and the weights of the penalties, score the choice on held-out spots, and fit all spots.

    Parameters
    ----------
    problem
        Spots, with library sizes > 0 for count likelihoods.
    model
        What to fit.
    lam
        Prior strength in nats of every penalty, or ``"auto"``.
    target_sum
        Reference library size of the field.
    for_gaps
        Hold out discs rather than single spots: the choice then suits gaps wider than the distance of spots.
    search
        How ``"auto"`` chooses, and the share of spots held out for the scores.
    on_step
        Called as ``on_step(done, planned, stage)`` after each step.

    Returns
    -------
    Fitted

    Raises
    ------
    ValueError
        If no gene varies.
    """
    active = problem.active()
    if len(active) == 0:
        msg = f"none of the {len(problem.genes)} genes varies between spots, so there is no field to fit: check `layer` and `genes`"
        raise ValueError(msg)
    box = Box.of(torch.from_numpy(problem.coords))
    everything = problem.take(np.arange(len(problem.coords)), active)
    train, test = split_spots(everything, search, for_gaps, model.config.random_state)
    tick = _Ticker(planned_steps(lam, model, search), on_step)
    on_step = tick.at("choosing lam" if lam == "auto" else "held-out score")
    chosen = hold_out(model, lam, search, train, test, box, on_step)
    known = np.isin(problem.genes, train.genes)
    gene_scores, dispersion = np.zeros(len(problem.genes)), None
    gene_scores[known] = chosen.gene_scores
    if problem.size is not None:
        dispersion = np.zeros(len(problem.genes))
        dispersion[known] = chosen.dispersion
    fits, weights = _members(model, everything, box, chosen, tick)
    field = _average(fits, weights, problem, active, box, target_sum)
    history = [{"member": [k] * len(fit.found.history["step"]), **fit.found.history} for k, fit in enumerate(fits)]
    history = {name: np.concatenate([h[name] for h in history]) for name in history[0]}
    return Fitted(field, chosen.lam, chosen.weights, chosen.search, chosen.score, gene_scores, dispersion, history)


def _members(
    model: Model, problem: Problem, box: Box, chosen: HeldOut, tick: _Ticker, least: float = 0.1
) -> tuple[list[Fit], NDArray]:
    """The fits to all spots, and the weight of each: members in turn of the penalties whose weight is not below `least`."""
    order = np.argsort(-chosen.weights, kind="stable")
    used = [k for k in order if chosen.weights[k] >= least][: model.n_members]
    turns = [used[m % len(used)] for m in range(model.n_members)]
    genes = problem.most_variable(model.latent_genes)
    few, fits = problem.take(np.arange(len(problem.coords)), genes), []
    directions = model.directions(few)
    for m, k in enumerate(turns):
        on_step = tick.at(f"fitting, {m + 1} of {model.n_members}" if model.n_members > 1 else "fitting")
        numbers = {"on_step": on_step, "random_state": model.seed(m)}
        found = model.fit(few, box, model.penalties[k], chosen.lam[k], directions, **numbers)
        fits.append(completed(found, problem, genes))
    weights = np.array([chosen.weights[k] / turns.count(k) for k in turns])
    return fits, weights / weights.sum()


def _average(
    fits: list[Fit], weights: NDArray, problem: Problem, active: NDArray, box: Box, target_sum: float
) -> ExpressionField:
    """The field of all genes of a problem, those that hold nothing to fit at their mean."""
    log_link, null = problem.size is not None, problem.null()
    with np.errstate(divide="ignore"):  # a gene without counts: log 0 = -inf, expected nowhere
        resting = np.log(null) if log_link else null
    loadings, intercepts = [], []
    for fit in fits:
        v, b = np.zeros((len(null), fit.loadings.shape[1])), resting.copy()
        v[active], b[active] = fit.loadings, fit.intercept
        loadings.append(v)
        intercepts.append(b)
    return ExpressionField.average(
        problem.genes,
        box,
        [fit.found.net for fit in fits],
        loadings,
        intercepts,
        weights,
        spots=problem.coords,
        log_link=log_link,
        target_sum=target_sum,
        unit=1.0 if log_link else np.where(loadings[0].any(1), moments(problem.values)[1], 1.0),
    )


@dataclass(eq=False)
class _Ticker:
    """Counts steps over all fits of one call."""

    planned: int
    on_step: OnStep | None
    done: int = 0

    def at(self, stage: str) -> Callable[[int, float], None]:
        def count(step: int, objective: float) -> None:
            self.done += 1
            if self.on_step is not None:
                self.on_step(self.done, self.planned, stage)

        return count
