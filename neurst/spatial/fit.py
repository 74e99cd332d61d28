r"""Fits an expression field to spots.

For counts, ``y_ig ~ Poisson(t_i exp(b_g + V_g . z(x_i)))`` with t_i the library size; for normalised data,
``y_ig ~ N(b_g + V_g . z(x_i), s_g^2)``. The objective is

    sum of -log p(y)  +  lam * mean over points of P(z)  +  sum V^2 / 2.

The last term is a standard normal prior on the loadings (for normalised data, in units of each gene's standard deviation). The pairs (z, V) and
(z/c, cV) give the same field; the prior fixes the scale c, see :class:`neurst.core.heads.Loadings`.

A field is the average of a few members: fits that differ in their penalty P and their seed. First, held-out spots decide on the strength `lam`
of each penalty and on the weights of the average (:mod:`neurst.spatial.tune`). Then the members are fitted to all spots. The latent fields are
fitted to the most variable genes. The loadings of the other genes on these latents solve a convex problem (:mod:`neurst.spatial.loadings`).
All functions here take and return arrays, not AnnData.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neurst.core.field import check_round_trip
from neurst.core.progress import OnProgress, StepCounter
from neurst.core.samples import Box
from neurst.spatial.data import SpotData
from neurst.spatial.field import ExpressionField
from neurst.spatial.member import Member, fit_member, start_directions
from neurst.spatial.spec import ExpressionSpec
from neurst.spatial.tune import Tuning, informative_genes, tune


@dataclass(frozen=True, eq=False)
class FitResult:
    """An expression field and the record of its fit.

    Parameters
    ----------
    field
        The fitted field.
    tuning
        What held-out spots decided.
    history
        Records of the final fits, concatenated: ``member`` (its number) and the entries of :class:`neurst.core.field.FittedField`.
    """

    field: ExpressionField
    tuning: Tuning
    history: dict[str, NDArray]


def fit_expression(
    data: SpotData, spec: ExpressionSpec, *, target_sum: float | None = None, on_progress: OnProgress | None = None
) -> FitResult:
    """Choose strengths and weights on held-out spots, then fit all spots.

    Parameters
    ----------
    data
        Spots and genes.
    spec
        What to fit.
    target_sum
        Library size that expected counts refer to; the median of the spots if None.
    on_progress
        Called as ``on_progress(done, planned, stage)`` after each step.

    Raises
    ------
    ValueError
        If no gene varies.
    """
    check_round_trip(spec.network, data.coords.shape[1])  # before the work, not after it
    counter = StepCounter(on_progress, spec.planned_steps())
    tuning = tune(data, spec, counter)
    return fit_tuned(data, spec, tuning, target_sum=target_sum, counter=counter)


def fit_tuned(
    data: SpotData,
    spec: ExpressionSpec,
    tuning: Tuning,
    *,
    target_sum: float | None = None,
    counter: StepCounter | None = None,
) -> FitResult:
    """Fit all spots with the strengths and weights that :func:`neurst.spatial.tune.tune` found; arguments as in :func:`fit_expression`."""
    counter = counter or StepCounter(None)
    informative = informative_genes(data)
    members, weights = _fit_members(data.take_genes(informative), spec, tuning, data.box, counter)
    target_sum = data.observation.target_sum() if target_sum is None else target_sum
    field = _average(members, weights, data, spec, informative, target_sum)
    each = [{"member": [k] * len(m.field.history["step"]), **m.field.history} for k, m in enumerate(members)]
    return FitResult(field, tuning, {name: np.concatenate([history[name] for history in each]) for name in each[0]})


def _fit_members(
    data: SpotData, spec: ExpressionSpec, tuning: Tuning, box: Box, counter: StepCounter
) -> tuple[list[Member], NDArray]:
    """The fits to all spots, and the weight of each. Members cycle through the penalties whose weight is large enough."""
    order = np.argsort(-tuning.weights, kind="stable")
    least = spec.config.least_weight
    used = [k for k in order if tuning.weights[k] > 0 and tuning.weights[k] >= least][: spec.n_members]
    turns = [used[m % len(used)] for m in range(spec.n_members)]
    genes = data.most_variable(spec.config.latent_genes)
    few, members = data.take_genes(genes), []
    directions = start_directions(few, spec)
    for m, k in enumerate(turns):
        on_step = counter.stage(f"fitting, {m + 1} of {spec.n_members}" if spec.n_members > 1 else "fitting")
        numbers = {"on_step": on_step, "random_state": spec.member_seed(m)}
        member = fit_member(few, spec, spec.penalties[k], tuning.lam[k], directions, box, **numbers)
        members.append(member.with_all_genes(data, genes))
    weights = np.array([tuning.weights[k] / turns.count(k) for k in turns])
    return members, weights / weights.sum()


def _average(
    members: list[Member],
    weights: NDArray,
    data: SpotData,
    spec: ExpressionSpec,
    informative: NDArray,
    target_sum: float,
) -> ExpressionField:
    """The field of all genes of the data; genes that cannot be fitted get their mean rate."""
    constant, loadings, intercepts = data.observation.intercept(data.mean_rate()), [], []
    for member in members:
        v, b = np.zeros((len(constant), member.loadings.shape[1])), constant.copy()
        v[informative], b[informative] = member.loadings, member.intercept
        loadings.append(v)
        intercepts.append(b)
    unit = data.observation.gene_unit(data.values)
    return ExpressionField.average(
        data.genes,
        data.box,
        spec.network,
        [member.field.net for member in members],
        loadings,
        intercepts,
        weights,
        spots=data.coords,
        link=data.observation.link(target_sum),
        unit=unit if np.ndim(unit) == 0 else np.where(loadings[0].any(1), unit, 1.0),
    )
