"""Choices and scores from held-out spots: the strength and weight of each candidate, scores of genes, over-dispersion.

Half of the held-out spots are single spots and half lie in discs, so that the choices suit predictions between neighbouring spots and across gaps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from neurst.core.arguments import warn
from neurst.core.parallel import run_all
from neurst.core.progress import StepCounter
from neurst.core.samples import Box
from neurst.core.tuning import Choice, choose
from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.splits import split
from neurst.spatial.member import Member, fitter, start_directions
from neurst.spatial.spec import Candidate, ExpressionSpec

LEAST_TRACE = 0.01  # least weight of the best candidate


@dataclass(frozen=True, eq=False)
class Tuning:
    """What held-out spots decided.

    Parameters
    ----------
    lam
        (K,) strength of each candidate for the final fits: in nats for networks, relative to the marginal likelihood for a Gaussian process.
    weights
        (K,) share of each candidate in the average. What is missing from 1 is the share of the constant.
    search
        ``penalty`` (index of the candidate), ``lam`` and ``score`` of each trial.
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

    @property
    def constant(self) -> float:
        """Share of the constant in the average."""
        return max(0.0, 1.0 - float(self.weights.sum()))


@dataclass(frozen=True, eq=False)
class Fold:
    """Training and held-out spots, with the genes that can be fitted in every fold, and the same with the most variable genes only."""

    train: SpotData
    test: SpotData
    few_train: SpotData
    few_test: SpotData
    few: NDArray  # indices of the most variable genes
    directions: NDArray | None  # (G, r) starting values of their loadings; None without genes

    def predictor(self, members: list[Member], weights: NDArray, test: SpotData) -> NDArray:  # -> (N, G)
        """The predictor at held-out spots of the average of fits to the most variable genes, for all genes."""
        constant = self.train.observation.intercept(self.train.mean_rate())
        eta = (1 - weights.sum()) * np.broadcast_to(constant, test.values.shape)
        for weight, member in zip(weights, members, strict=True):
            if weight > 0:
                eta = eta + weight * member.with_all_genes(self.train, self.few).predictor(test)
        return eta


def tune(data: SpotData, spec: ExpressionSpec, counter: StepCounter | None = None) -> Tuning:
    """Fit trials of each candidate to some of the spots, and score them on the held-out spots.

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
    folds = hold_out(data.take_genes(informative), spec)
    known = np.flatnonzero(np.isin(data.genes, folds[0].train.genes))
    found = _tune_known(folds, spec, data.box, counter)
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


def hold_out(data: SpotData, spec: ExpressionSpec) -> list[Fold]:
    """Divisions into training and held-out spots, at least one of each, with the genes that can be fitted to the training spots of all."""
    fraction, seed = spec.search.fraction, spec.fit.random_state
    parts = []
    for k in range(spec.n_folds(len(data.coords))):
        train, test = split(data.coords, "mixed", random_state=seed if k == 0 else (seed, k), fraction=fraction)
        parts.append((train, test) if len(test) else (train[1:], train[:1]))
    genes = np.arange(len(data.genes))
    for train, _ in parts:
        genes = np.intersect1d(genes, data.take(train).informative_genes())
    folds = []
    for part in parts:
        train, test = (data.take(spots, genes) for spots in part)
        few = train.most_variable(spec.config.trial_genes) if len(genes) else genes
        few_train = train.take_genes(few)
        directions = start_directions(few_train, spec) if len(genes) else None
        folds.append(Fold(train, test, few_train, test.take_genes(few), few, directions))
    return folds


def _tune_known(folds: list[Fold], spec: ExpressionSpec, box: Box, counter: StepCounter) -> Tuning:
    candidates, observation = spec.candidates(), folds[0].train.observation
    # if no gene varies between training spots, nothing can be chosen, and nothing is explained
    if len(folds[0].train.genes) == 0:
        given = [spec.lam if each.network is not None else None for each in candidates]
        lam = np.array([spec.search_of(c).start if g is None else g for c, g in zip(candidates, given, strict=True)])
        search = {"penalty": np.arange(len(candidates)), "lam": lam, "score": np.zeros(len(candidates))}
        nothing = np.zeros(0)
        return Tuning(
            lam, _networks_alone(candidates), search, 0.0, nothing, nothing if observation.has_dispersion else None
        )
    tasks = [partial(_choose_strength, candidate, folds, spec, box, counter) for candidate in candidates]
    choices = run_all(tasks, counter, together=spec.together)
    for candidate, choice in zip(candidates, choices, strict=True):
        if choice.advice and candidate.network is not None:
            warn(choice.advice)
    lams = [
        choice.strength * (observation.refit_factor if spec.lam is None and each.network is not None else 1.0)
        for each, choice in zip(candidates, choices, strict=True)
    ]
    tried = [(k, lam, score) for k, choice in enumerate(choices) for lam, score in choice.scores.items()]
    weights = _weights([choice.best for choice in choices], folds, spec)
    score, gene_scores, dispersion = _held_out_scores([choice.best for choice in choices], weights, folds, spec)
    search = dict(zip(("penalty", "lam", "score"), map(np.array, zip(*tried, strict=True)), strict=True))
    return Tuning(np.array(lams), weights, search, score, gene_scores, dispersion)


def _choose_strength(
    candidate: Candidate, folds: list[Fold], spec: ExpressionSpec, box: Box, counter: StepCounter
) -> Choice[list[Member]]:
    """The strength at which fits to the training spots score best on the held-out spots, and the fit of each fold."""
    fitters = [fitter(candidate, fold.few_train, spec, fold.directions, box, trial=True) for fold in folds]
    stage = "choosing lam" if spec.lam is None else "held-out score"

    def trial(lam: float) -> tuple[float, list[Member]]:
        members, scores = [], []
        for fit, fold in zip(fitters, folds, strict=True):
            members.append(fit(lam, counter.stage(stage)))
            test = fold.few_test
            prediction = test.observation.prediction(members[-1].predictor(test))
            scores.append(test.observation.score(test.values, prediction, fold.few_train.mean_rate()))
        return float(np.mean(scores)), members

    given = spec.lam if candidate.network is not None else None
    return choose(trial, spec.search_of(candidate), given=given, quiet=True)


def _networks_alone(candidates: list[Candidate]) -> NDArray:
    """The weights of the average of the networks alone, or of all candidates if none is a network."""
    networks = np.array([candidate.network is not None for candidate in candidates])
    chosen = networks if networks.any() else np.ones(len(candidates), dtype=bool)
    return chosen / chosen.sum()


def _weights(members: list[list[Member]], folds: list[Fold], spec: ExpressionSpec) -> NDArray:
    """The weight of each candidate in the average; those of less than the least weight are 0, and the others take their share."""
    config, target = spec.config, _networks_alone(spec.candidates())
    etas, tests = [], []
    for k, fold in enumerate(folds):
        most = max(1, config.dense_values // len(fold.few) // len(folds))
        test = fold.few_test.take(_subset(len(fold.few_test.coords), most, spec.fit.random_state))
        predicted = [each[k].predictor(test) for each in members]
        if spec.has_constant:
            constant = fold.few_train.observation.intercept(fold.few_train.mean_rate())
            predicted.append(np.broadcast_to(constant, predicted[0].shape))
        etas.append(predicted)
        tests.append(test)
    target = np.append(target, 0.0) if spec.has_constant else target
    weights = average_weights(etas, tests, target, strength=config.weight_prior * len(folds))
    kept = weights >= config.least_weight
    # if there is nothing but the constant, the best of the others keeps a trace, so that there is a field
    if not kept[: len(members)].any():
        best = int(np.argmax(weights[: len(members)]))
        weights[best], kept[best] = max(weights[best], LEAST_TRACE), True
    return (kept * weights / weights[kept].sum())[: len(members)]


def average_weights(
    etas: list[list[NDArray]], tests: list[SpotData], target: NDArray, *, strength: float = 50.0
) -> NDArray:
    """Weights >= 0 that sum to 1 and minimise the loss of the mean predictor on held-out spots, drawn towards the weights `target`.

    The objective is ``loss(sum_k w_k eta_k + s) + strength |w - target|^2``, which is convex. The shift s of each gene makes the expected total
    equal to the observed one, because the final fit does the same: a smaller total is no reason against an average.

    Parameters
    ----------
    etas
        For each set of held-out spots, K predictors (N, G).
    tests
        The sets of held-out spots.
    target
        (K,) weights that suit if the held-out spots do not say otherwise.
    strength
        In nats.
    """
    from scipy.optimize import minimize

    if len(target) == 1:
        return np.ones(1)
    scale = 1 / sum(len(test.coords) for test in tests)
    rates = [test.mean_rate() for test in tests]

    def objective(weights: NDArray) -> tuple[float, NDArray]:
        away = weights - target
        total, gradient = strength * (away @ away), 2 * strength * away
        for each, test, rate in zip(etas, tests, rates, strict=True):
            mean = sum(w * eta for w, eta in zip(weights, each, strict=True))
            mean = mean + test.observation.balance(rate, mean)
            loss, slope = test.observation.loss(test.values, mean)
            total, gradient = total + loss, gradient + [np.vdot(slope, eta) for eta in each]
        return scale * total, scale * gradient

    found = minimize(
        objective,
        target,
        jac=True,
        bounds=[(0, 1)] * len(target),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-7},
    )
    weights = np.clip(found.x, 0, 1)
    return weights / weights.sum()


def _held_out_scores(
    members: list[list[Member]], weights: NDArray, folds: list[Fold], spec: ExpressionSpec
) -> tuple[float, NDArray, NDArray | None]:
    """Score over all genes, score of each gene, and over-dispersion of each gene: means over the folds.

    The average is scored without the shift of the final fit, so the scores are a little low for genes that vary strongly.
    """
    found = []
    for k, fold in enumerate(folds):
        most = spec.config.scored_values // len(fold.train.genes)
        test, rate = fold.test.take(_subset(len(fold.test.coords), most, spec.fit.random_state)), fold.train.mean_rate()
        prediction = test.observation.prediction(fold.predictor([each[k] for each in members], weights, test))
        found.append(
            (
                test.observation.score(test.values, prediction, rate),
                test.observation.gene_scores(test.values, prediction, rate),
                test.observation.dispersion(test.values, prediction),
            )
        )
    scores, gene_scores, dispersions = zip(*found, strict=True)
    dispersion = None if dispersions[0] is None else np.mean(dispersions, axis=0)
    return float(np.mean(scores)), np.mean(gene_scores, axis=0), dispersion


def _subset(n: int, most: int, random_state: int) -> NDArray:
    """Indices of all n spots, or of `most` of them drawn at random."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(random_state).permutation(n)[: max(1, most)])
