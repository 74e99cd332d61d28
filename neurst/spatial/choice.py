"""What held-out spots choose and say: the strength of each penalty, the weights of their average, scores and over-dispersion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neurst.core.fit import Field, FitConfig
from neurst.core.penalty import Penalty
from neurst.core.samples import Box
from neurst.core.search import climb
from neurst.spatial import holdout
from neurst.spatial.holdout import dense
from neurst.spatial.model import Model, completed, pooled
from neurst.spatial.problem import Problem, moments
from neurst.spatial.uncertainty import inverse_dispersion

MOST_SCORED = 20_000_000  # held-out values that are predicted to score every gene; of more, some spots are taken


@dataclass(frozen=True)
class LamSearch:
    """How `lam` is chosen: short fits from scratch at strengths a `ratio` apart, scored on held-out spots.

    From `start` the search goes to the stronger neighbour, and on in the direction in which the score rises until it falls. The
    choice is the vertex of the parabola through the best strength and its neighbours in log lam. Every fit starts anew: a field that
    goes on from another strength keeps its components, and misleads. Short fits hold themselves back, and see fewer spots: the final
    ones of counts want more of a prior, and too little of it does more harm than too much, so they take `stretch` times the choice. Of
    normalised values they take the choice: all components may vanish a little beyond it.

    Parameters
    ----------
    start, ratio
        First strength in nats, and the factor between neighbours.
    reach
        Most neighbours looked at in one direction.
    stretch
        Strength of the final fits over that at which short ones score best, for counts.
    steps, learning_rate
        Of the short fits; 0.4 times the steps of a final fit if None.
    fraction
        Share of spots held out.
    n_genes
        Most genes used for the search; the most variable ones if there are more.
    """

    start: float = 400.0
    ratio: float = 3.0
    reach: int = 4
    stretch: float = 1.5
    steps: int | None = None
    learning_rate: float = 5e-3
    fraction: float = 0.2
    n_genes: int = 500

    def steps_of(self, config: FitConfig) -> int:
        """Steps of a short fit."""
        return max(1, round(0.4 * config.steps)) if self.steps is None else self.steps


def split_spots(problem: Problem, search: LamSearch, for_gaps: bool, random_state: int) -> tuple[Problem, Problem]:
    """Training and held-out spots, at least one of each; genes without training values are left to the mean."""
    mode = "block" if for_gaps else "random"
    train, test = holdout.split(problem.coords, mode, random_state=random_state, fraction=search.fraction)
    if len(test) == 0:
        train, test = train[1:], train[:1]
    genes = problem.take(train).active()
    return problem.take(train, genes), problem.take(test, genes)


def _log_loss(test: Problem, eta: NDArray) -> float:
    """Negative log-likelihood of held-out spots, up to a constant: Poisson, or Gaussian in units of each gene."""
    if test.size is None:
        sd = moments(test.values)[1]
        return float((((dense(test.values) - eta)[:, sd > 0] / sd[sd > 0]) ** 2).sum())
    return float((test.size[:, None] * np.exp(eta) - dense(test.values) * eta).sum())


def average_weights(etas: list[NDArray], test: Problem, *, step: float = 0.05) -> NDArray:
    """Weights >= 0 of sum 1 with which the mean predictor suits held-out spots best: a convex problem, solved by exchange.

    Parameters
    ----------
    etas
        (N, G) predictors of each fit at the held-out spots.
    test
        The held-out spots.
    step
        What is moved from one weight to another while that helps.
    """
    weights = np.full(len(etas), 1 / len(etas))
    loss = lambda w: _log_loss(test, sum(a * eta for a, eta in zip(w, etas, strict=True)))
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
        if lowest >= best:
            break
        best, weights = lowest, trial
    return weights


def _scores(test: Problem, eta: NDArray, null: NDArray) -> tuple[float, NDArray]:
    """Overall and per-gene score of predictors on held-out spots."""
    if test.size is None:
        arguments = (test.values, eta, null)
        return holdout.variance_explained(*arguments), holdout.variance_explained_per_gene(*arguments)
    arguments = (test.values, test.size, np.exp(eta), null)
    return holdout.deviance_explained(*arguments), holdout.deviance_explained_per_gene(*arguments)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What held-out spots say: fields as in :class:`neurst.spatial.fitting.Fitted`."""

    lam: NDArray  # (P,)
    weights: NDArray  # (P,)
    search: dict[str, NDArray]
    score: float
    gene_scores: NDArray  # (G,) of the training problem
    dispersion: NDArray | None


@dataclass(eq=False)
class _Trials:
    """Short fits of one penalty to the training spots, scored on the held-out ones."""

    model: Model
    penalty: Penalty
    train: Problem
    test: Problem
    box: Box
    search: LamSearch
    directions: NDArray
    on_step: Callable[[int, float], None]
    fits: dict[float, Field] = dataclasses.field(default_factory=dict)

    def __call__(self, lam: float) -> float:
        numbers = {"steps": self.search.steps_of(self.model.config), "learning_rate": self.search.learning_rate}
        self.fits[lam] = self.model.fit(
            self.train, self.box, self.penalty, lam, self.directions, on_step=self.on_step, **numbers
        )
        fit = completed(self.fits[lam], self.train, np.arange(len(self.train.genes)))
        return _scores(self.test, fit.eta(self.test), self.train.null())[0]


def hold_out(
    model: Model,
    lam: float | str,
    search: LamSearch,
    train: Problem,
    test: Problem,
    box: Box,
    on_step: Callable[[int, float], None],
) -> HeldOut:
    """Short fits to `train` under each penalty, at `lam` or at strengths that are searched, judged by `test`."""
    n_penalties = len(model.penalties)
    if len(train.genes) == 0:  # all that varies is held out: nothing to choose by, nothing explained
        lam = np.full(n_penalties, search.start if lam == "auto" else lam)
        tried = {"penalty": np.arange(n_penalties), "lam": lam, "score": np.zeros(n_penalties)}
        none = np.zeros(0)
        return HeldOut(lam, np.full(n_penalties, 1 / n_penalties), tried, 0.0, none, none)
    genes = train.most_variable(search.n_genes)
    few, hidden = (p.take(np.arange(len(p.coords)), genes) for p in (train, test))
    directions = model.directions(few)
    lams, tried, best = [], [], []
    for k, penalty in enumerate(model.penalties):
        trials = _Trials(model, penalty, few, hidden, box, search, directions, on_step)
        if lam == "auto":
            chosen, scores = climb(trials, start=search.start, ratio=search.ratio, reach=search.reach)
            lams.append(chosen if train.size is None else search.stretch * chosen)
        else:
            lams.append(lam)
            scores = {lam: trials(lam)}
        tried += [(k, strength, found) for strength, found in scores.items()]
        best.append(trials.fits[max(scores, key=scores.get)])
    fits = [completed(found, train, genes) for found in best]
    weights = average_weights([fit.eta(hidden)[:, genes] for fit in fits], hidden)
    test = test.take(_some(len(test.coords), MOST_SCORED // len(train.genes), model.config.random_state))
    eta = pooled(fits, weights, test)
    score, gene_scores = _scores(test, eta, train.null())
    dispersion = None if test.size is None else inverse_dispersion(test.values, test.size[:, None] * np.exp(eta))
    columns = dict(zip(("penalty", "lam", "score"), map(np.array, zip(*tried, strict=True)), strict=True))
    return HeldOut(np.array(lams), weights, columns, score, gene_scores, dispersion)


def _some(n: int, most: int, random_state: int) -> NDArray:
    """All of n, or a random subset."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(random_state).permutation(n)[: max(1, most)])
