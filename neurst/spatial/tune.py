"""Choices and scores from held-out spots: the strength and weight of each penalty, scores of genes, over-dispersion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neurst.core.progress import StepCounter
from neurst.core.samples import Box
from neurst.core.tuning import choose
from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.splits import split
from neurst.spatial.member import Member, fit_member, mean_predictor, start_directions
from neurst.spatial.spec import ExpressionSpec


@dataclass(frozen=True, eq=False)
class Tuning:
    """What held-out spots decided.

    Parameters
    ----------
    lam
        (P,) prior strength in nats of each penalty, for the final fits.
    weights
        (P,) share of each penalty in the average.
    search
        ``penalty`` (its index), ``lam`` and ``score`` of each trial.
    score
        Held-out score over all genes together: the share of the deviance (or variance) that the average explains.
    gene_scores
        (G,) the same share for each gene.
    dispersion
        (G,) over-dispersion of the held-out counts; None for normalised data.
    """

    lam: NDArray
    weights: NDArray
    search: dict[str, NDArray]
    score: float
    gene_scores: NDArray
    dispersion: NDArray | None


def tune(data: SpotData, spec: ExpressionSpec, counter: StepCounter | None = None) -> Tuning:
    """Fit trials with each penalty to some of the spots, and score them on the held-out spots.

    Parameters
    ----------
    data
        Spots and genes.
    spec
        Choices of the fit.
    counter
        Counts the steps.

    Raises
    ------
    ValueError
        If no gene varies.
    """
    counter = counter or StepCounter(None)
    informative = informative_genes(data)
    train, test = _hold_out(data.take_genes(informative), spec)
    known = np.flatnonzero(np.isin(data.genes, train.genes))
    found = _tune_known(train, test, spec, data.box, counter)
    gene_scores, dispersion = np.zeros(len(data.genes)), found.dispersion
    gene_scores[known] = found.gene_scores
    if dispersion is not None:
        dispersion = np.zeros(len(data.genes))
        dispersion[known] = found.dispersion
    return dataclasses.replace(found, gene_scores=gene_scores, dispersion=dispersion)


def informative_genes(data: SpotData) -> NDArray:
    """Indices of the genes that can be fitted. Raises a ValueError if there are none."""
    found = data.informative_genes()
    if len(found) == 0:
        msg = f"none of the {len(data.genes)} genes varies between spots, so there is no field to fit: check `layer` and `genes`"
        raise ValueError(msg)
    return found


def _hold_out(data: SpotData, spec: ExpressionSpec) -> tuple[SpotData, SpotData]:
    """Training and held-out spots, at least one of each, with the genes that can be fitted to the training spots."""
    fraction, seed = spec.search.fraction, spec.fit.random_state
    train, test = split(data.coords, spec.holdout, random_state=seed, fraction=fraction)
    if len(test) == 0:
        train, test = train[1:], train[:1]
    genes = data.take(train).informative_genes()
    return data.take(train, genes), data.take(test, genes)


def _tune_known(train: SpotData, test: SpotData, spec: ExpressionSpec, box: Box, counter: StepCounter) -> Tuning:
    n_penalties, rate = len(spec.penalties), train.mean_rate()
    if len(train.genes) == 0:  # no gene varies between training spots: nothing can be chosen, and nothing is explained
        lam = np.full(n_penalties, spec.search.start if spec.lam is None else spec.lam)
        search = {"penalty": np.arange(n_penalties), "lam": lam, "score": np.zeros(n_penalties)}
        nothing = np.zeros(0)
        dispersion = nothing if train.observation.has_dispersion else None
        return Tuning(lam, np.full(n_penalties, 1 / n_penalties), search, 0.0, nothing, dispersion)
    genes = train.most_variable(spec.config.trial_genes)
    few_train, few_test = train.take_genes(genes), test.take_genes(genes)
    directions, few_rate = start_directions(few_train, spec), few_train.mean_rate()
    numbers = {"steps": spec.search.steps, "learning_rate": spec.config.trial_learning_rate}
    stage = "choosing lam" if spec.lam is None else "held-out score"
    lams, tried, best = [], [], []
    for k, penalty in enumerate(spec.penalties):

        def trial(lam: float, penalty=penalty) -> tuple[float, Member]:
            member = fit_member(few_train, spec, penalty, lam, directions, box, on_step=counter.stage(stage), **numbers)
            prediction = few_test.observation.prediction(member.predictor(few_test))
            return few_test.observation.score(few_test.values, prediction, few_rate), member

        choice = choose(trial, spec.search, given=spec.lam)
        factor = 1.0 if spec.lam is not None else train.observation.refit_factor
        lams.append(factor * choice.strength)
        tried += [(k, lam, score) for lam, score in choice.scores.items()]
        best.append(choice.best)
    weights = average_weights([member.predictor(few_test) for member in best], few_test, step=spec.config.weight_step)
    n_scored = spec.config.scored_values // len(train.genes)
    test = test.take(_subset(len(test.coords), n_scored, spec.fit.random_state))
    members = [member.with_all_genes(train, genes) for member in best]
    prediction = test.observation.prediction(mean_predictor(members, weights, test))
    score = test.observation.score(test.values, prediction, rate)
    gene_scores = test.observation.gene_scores(test.values, prediction, rate)
    columns = dict(zip(("penalty", "lam", "score"), map(np.array, zip(*tried, strict=True)), strict=True))
    dispersion = test.observation.dispersion(test.values, prediction)
    return Tuning(np.array(lams), weights, columns, score, gene_scores, dispersion)


def average_weights(etas: list[NDArray], test: SpotData, *, step: float = 0.05) -> NDArray:
    """Weights >= 0 that sum to 1 and minimise the loss of the mean predictor on held-out spots.

    The problem is convex. It is solved by moving weight from one predictor to another while that lowers the loss.

    Parameters
    ----------
    etas
        (N, G) predictors of each fit at the held-out spots.
    test
        The held-out spots.
    step
        Amount that is moved at once.
    """
    weights = np.full(len(etas), 1 / len(etas))

    def loss(weights: NDArray) -> float:
        return test.observation.loss(test.values, sum(a * eta for a, eta in zip(weights, etas, strict=True)))

    best = loss(weights)
    moves = [(i, j) for i in range(len(etas)) for j in range(len(etas)) if i != j]
    while moves:
        trials = []
        for i, j in moves:
            trial = weights.copy()
            amount = min(step, trial[i])
            trial[i] -= amount
            trial[j] += amount
            trials.append((loss(trial) if amount > 0 else np.inf, trial))
        lowest, trial = min(trials, key=lambda pair: pair[0])
        if not lowest < best:
            break
        best, weights = lowest, trial
    return weights


def _subset(n: int, most: int, random_state: int) -> NDArray:
    """Indices of all n spots, or of `most` of them drawn at random."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(random_state).permutation(n)[: max(1, most)])
