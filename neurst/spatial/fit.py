r"""Fits an expression field to spots.

For counts, ``y_ig ~ Poisson(t_i exp(b_g + V_g . z(x_i)))`` with t_i the library size; for normalised data,
``y_ig ~ N(b_g + V_g . z(x_i), s_g^2)``. The objective is

    sum of -log p(y)  +  lam * mean over points of P(z)  +  sum V^2 / 2.

The last term is a standard normal prior on the loadings (for normalised data, in units of each gene's standard deviation). The pairs (z, V) and
(z/c, cV) give the same field; the prior fixes the scale c, see :class:`neurst.core.heads.Loadings`.

A field is a weighted average of predictors: of networks that differ in their penalty P and their seed, fitted with the objective above; of a
Gaussian process (:mod:`neurst.spatial.gaussian_process`); and of the constant, which is the mean rate of each gene. First, held-out spots decide on
the strength of each member and on the weights of the average (:mod:`neurst.spatial.tune`). Then the members are fitted to all spots. The latent
fields are fitted to the most variable genes. The loadings of the other genes on these latents solve a convex problem
(:mod:`neurst.spatial.loadings`). An average of log-rates has smaller totals than its members, by up to a fifth for genes that vary strongly; so each
gene is shifted to an expected total that equals the observed one, as it is at the maximum of a Poisson likelihood. Local structures
(:mod:`neurst.spatial.local`) are added after that. The posterior of the Gaussian process gives the standard deviation of the field (:mod:`neurst.spatial.spread`).
All functions here take and return arrays, not AnnData.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from neurst.core.field import check_round_trip
from neurst.core.parallel import run_all
from neurst.core.progress import OnProgress, StepCounter
from neurst.core.samples import Box
from neurst.spatial.data import SpotData
from neurst.spatial.field import ExpressionField
from neurst.spatial.local import LocalStructure, Predictor, find_structure
from neurst.spatial.matrix import gene_chunks
from neurst.spatial.member import Member, fitter, learn, start_directions
from neurst.spatial.spec import ExpressionSpec
from neurst.spatial.spread import Spread, posterior_spread
from neurst.spatial.tune import Tuning, informative_genes, tune

HISTORY = ("member", "step", "objective", "likelihood", "penalty")


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
    for network in spec.networks:
        check_round_trip(network, data.coords.shape[1])  # before the work, not after it
    counter = StepCounter(on_progress, spec.planned_steps(len(data.coords)))
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
    known = data.take_genes(informative)
    members, weights, spread = _fit_members(known, spec, tuning, data.box, counter)
    target_sum = data.observation.target_sum() if target_sum is None else target_sum
    rate, genes = data.mean_rate(), np.arange(len(informative))
    constant = data.observation.intercept(rate)
    predictor = _predictor(members, weights, constant[informative], known)
    shift = np.concatenate(
        [
            data.observation.balance(rate[informative[part]], predictor(genes[part]))
            for part in gene_chunks(known.values.shape)
        ]
    )
    members = [replace(member, intercept=member.intercept + shift) for member in members]
    constant[informative] += shift
    dispersion = None if tuning.dispersion is None else tuning.dispersion[informative]
    structure = find_structure(
        known, lambda genes: predictor(genes) + shift[genes], dispersion, most=spec.config.most_bumps
    )
    field = _average(
        members,
        weights,
        constant,
        None if spread is None else spread.among(len(data.genes), informative),
        None if structure is None else structure.among(len(data.genes), informative),
        data,
        informative,
        target_sum,
    )
    each = [
        {"member": [k] * len(m.field.history["step"]), **m.field.history}
        for k, m in enumerate(members)
        if m.field.history
    ]
    columns = {name: [history[name] for history in each] for name in HISTORY}
    return FitResult(
        field, tuning, {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}
    )


def _fit_members(
    data: SpotData, spec: ExpressionSpec, tuning: Tuning, box: Box, counter: StepCounter
) -> tuple[list[Member], NDArray, Spread | None]:
    """The fits to all spots, the weight of each, and the spread of a Gaussian process if there is one.

    Fits of networks cycle through the candidates that have weight.
    """
    candidates, genes = spec.candidates(), data.most_variable(spec.config.latent_genes)
    few = data.take_genes(genes)
    directions = start_directions(few, spec)
    used = [int(k) for k in np.argsort(-tuning.weights, kind="stable") if tuning.weights[k] > 0]
    networks = [k for k in used if candidates[k].network is not None][: spec.n_members]
    turns = [networks[m % len(networks)] for m in range(spec.n_members)] if networks else []
    stage = counter.stage(f"fitting {len(turns)} members" if len(turns) > 1 else "fitting")

    def fit_network(m: int) -> Member:
        fit = fitter(candidates[turns[m]], few, spec, directions, box, random_state=spec.member_seed(m))
        return fit(tuning.lam[turns[m]], stage).with_all_genes(data, genes)

    def fit_process(k: int) -> tuple[Member, Spread]:
        process, known = learn(candidates[k], few, spec, directions, box)
        lam = tuning.lam[k] if tuning.weights[k] > 0 else 1.0  # without weight it serves for the spread only
        typical = Member(*process.fit(1.0)).with_all_genes(few, known)
        fitted = typical if lam == 1.0 else Member(*process.fit(lam)).with_all_genes(few, known)
        fitted = fitted.with_all_genes(data, genes)
        # further genes: the channels of both fits are nearly the same, each in its own unit
        loadings = fitted.loadings * (process.unit(lam) / process.unit(1.0))
        loadings[genes] = typical.loadings
        information, unit = (f(data.values) for f in (data.observation.gene_information, data.observation.gene_unit))
        unit = np.broadcast_to(unit, information.shape)
        return fitted, posterior_spread(process, typical.field.net, loadings, information, unit)

    processes = [k for k, candidate in enumerate(candidates) if candidate.network is None]
    tasks = [partial(fit_network, m) for m in range(len(turns))] + [partial(fit_process, k) for k in processes]
    found = run_all(tasks, counter, together=spec.together)
    members, spread = found[: len(turns)], None
    for k, (member, its_spread) in zip(processes, found[len(turns) :], strict=True):
        spread = its_spread
        if tuning.weights[k] > 0:
            members, turns = [*members, member], [*turns, k]
    # candidates that were not fitted, as there are more of them than members, leave their weight to the others
    weights = np.array([tuning.weights[k] / turns.count(k) for k in turns])
    return members, weights * tuning.weights.sum() / weights.sum(), spread


def _predictor(members: list[Member], weights: NDArray, constant: NDArray, data: SpotData) -> Predictor:
    """Predictors of the average at the spots, by genes. With a footprint, the predictors of the mean over each spot."""
    offsets, rest = data.quadrature(), 1 - weights.sum()
    shifts = np.zeros((1, data.coords.shape[1])) if offsets is None else offsets.numpy()
    latents = [[member.field.latent(data.coords + at) for member in members] for at in shifts]

    def at_points(genes: NDArray, at: list[NDArray]) -> NDArray:
        parts = zip(weights, members, at, strict=True)
        return rest * constant[genes] + sum(w * (z @ m.loadings[genes].T + m.intercept[genes]) for w, m, z in parts)

    def predictor(genes: NDArray) -> NDArray:
        each = [at_points(genes, at) for at in latents]
        if len(each) == 1:
            return each[0]
        return members[0].field.likelihood.average(torch.from_numpy(np.stack(each))).numpy()

    return predictor


def _average(
    members: list[Member],
    weights: NDArray,
    constant: NDArray,
    spread: Spread | None,
    structure: LocalStructure | None,
    data: SpotData,
    informative: NDArray,
    target_sum: float,
) -> ExpressionField:
    """The field of all genes of the data; genes that cannot be fitted get their mean rate."""
    loadings, intercepts = [], []
    for member in members:
        v, b = np.zeros((len(constant), member.loadings.shape[1])), constant.copy()
        v[informative], b[informative] = member.loadings, member.intercept
        loadings.append(v)
        intercepts.append(b)
    unit = data.observation.gene_unit(data.values)
    return ExpressionField.average(
        data.genes,
        data.box,
        [member.field.network for member in members],
        [member.field.net for member in members],
        loadings,
        intercepts,
        weights,
        constant=constant,
        structure=structure,
        spots=data.coords,
        link=data.observation.link(target_sum),
        unit=unit if np.ndim(unit) == 0 else np.where(np.isin(np.arange(len(constant)), informative), unit, 1.0),
        spread=spread,
    )
