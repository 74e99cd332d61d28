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

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neurst.core.fit import Field, FitConfig, Loadings, fit_field
from neurst.core.likelihood import Gaussian, Likelihood, NegativeBinomial, Poisson
from neurst.core.nets import Network
from neurst.core.penalty import Penalty
from neurst.core.samples import Box, Samples
from neurst.spatial import holdout
from neurst.spatial.expression import ExpressionField
from neurst.spatial.loadings import solve_loadings
from neurst.spatial.problem import Problem, moments, residual_directions, to_tensor
from neurst.spatial.uncertainty import inverse_dispersion

LIKELIHOODS = ("poisson", "negative_binomial", "gaussian")
LikelihoodName = Literal["poisson", "negative_binomial", "gaussian"]
OnStep = Callable[[int, int, str], None]
MOST_SCORED = 20_000_000  # held-out values that are predicted to score every gene; of more, some spots are taken
MOST_DENSE = 4_000_000  # values of a matrix that is made dense as a whole, which spares doing so in every step


@dataclass(frozen=True)
class LamSearch:
    """How `lam` is chosen: short fits from scratch at strengths a `ratio` apart, scored on held-out spots.

    From `start` the search goes to the stronger neighbour, and on in the direction in which the score rises until it falls. The
    choice is the vertex of the parabola through the best strength and its neighbours in log lam. Every fit starts anew: a field that
    goes on from another strength keeps its components, and misleads.

    Parameters
    ----------
    start, ratio
        First strength in nats, and the factor between neighbours.
    reach
        Most neighbours looked at in one direction.
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
    steps: int | None = None
    learning_rate: float = 5e-3
    fraction: float = 0.2
    n_genes: int = 500

    def steps_of(self, config: FitConfig) -> int:
        """Steps of a short fit."""
        return max(1, round(0.4 * config.steps)) if self.steps is None else self.steps


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


def batch_points(n_spots: int, n_genes: int) -> int:
    """Spots in one step: 512, or a 32nd of all if that is more; not over 8,192, nor over 4 million values.

    512 of 2,911 spots a step reach the score of all of them in a quarter of the time.
    """
    batch = int(np.clip(n_spots // 32, 512, 8192))
    return max(256, min(batch, MOST_DENSE // n_genes))


@dataclass(frozen=True, eq=False)
class Model:
    """What is fitted to a :class:`Problem`: everything but the prior strength.

    Parameters
    ----------
    likelihood
        Data term.
    penalties
        Regularisers of the latent field; several are averaged.
    network
        Of the latent field.
    rank
        r, lowered where there are fewer spots or genes.
    config
        Numbers of a fit.
    n_members
        Fits that are averaged, in turn one of each penalty.
    latent_genes
        Most genes that a latent field is fitted to; loadings of the others are solved for on it.
    """

    likelihood: LikelihoodName
    penalties: tuple[Penalty, ...]
    network: Network
    rank: int
    config: FitConfig
    n_members: int = 2
    latent_genes: int = 1000

    def directions(self, problem: Problem) -> NDArray:  # -> (G, r)
        """The loadings that fits of a problem start from."""
        n, g = problem.values.shape
        return residual_directions(problem, max(1, min(self.rank, n - 1, g)), self.config.random_state)

    def fit(
        self, problem: Problem, box: Box, penalty: Penalty, lam: float, directions: NDArray, *, on_step=None, **config
    ) -> Field:
        """Latent field, loadings and intercepts of a problem whose genes are all :meth:`Problem.active`, from its `directions`."""
        n, g = problem.values.shape
        mean, sd = moments(problem.values)
        footprint = problem.quadrature()
        batch = self.config.batch_points or batch_points(n, g * (1 if footprint is None else len(footprint)))
        config = dataclasses.replace(self.config, batch_points=batch, **config)
        values = problem.values if n * g > MOST_DENSE else _dense(problem.values)
        return fit_field(
            Samples(
                torch.from_numpy(problem.coords),
                to_tensor(values),
                offset=problem.offset(),
                footprint=footprint,
            ),
            network=self.network,
            likelihood=self._data_term(sd),
            penalty=penalty,
            lam=lam,
            head=_head(problem, directions, sd),
            n_latent=directions.shape[1],
            box=box,
            config=config,
            on_step=on_step,
        )

    def _data_term(self, sd: NDArray) -> Likelihood:
        if self.likelihood == "poisson":
            return Poisson()
        if self.likelihood == "negative_binomial":
            return NegativeBinomial(torch.full((len(sd),), 10.0))
        return Gaussian(torch.from_numpy(sd), learned=True)

    def seed(self, member: int) -> int:
        """Random state of a member: that of the fit for the first, others drawn from it."""
        drawn = np.random.default_rng(self.config.random_state).integers(2**31, size=max(member, 1))
        return self.config.random_state if member == 0 else int(drawn[member - 1])


def _head(problem: Problem, directions: NDArray, sd: NDArray) -> Loadings:
    weight, null = torch.from_numpy(np.ascontiguousarray(directions)), torch.from_numpy(problem.null())
    if problem.size is None:
        return Loadings(weight, null, torch.from_numpy(sd))
    return Loadings(weight, null.log())


# ---- one fit, read at spots


@dataclass(frozen=True, eq=False)
class _Fit:
    """A latent field with loadings and intercepts of all genes of a problem."""

    found: Field
    loadings: NDArray  # (G, r)
    intercept: NDArray  # (G,)

    def eta(self, spots: Problem) -> NDArray:
        """(N, G) predictors at spots, those of their footprints if they have one."""
        offsets = spots.quadrature()
        if offsets is None:
            return _latent(self.found, spots.coords) @ self.loadings.T + self.intercept
        each = [_latent(self.found, spots.coords + at) @ self.loadings.T + self.intercept for at in offsets.numpy()]
        return self.found.likelihood.average(torch.from_numpy(np.stack(each))).numpy()


def _latent(found: Field, coords: NDArray) -> NDArray:
    parts = torch.from_numpy(coords).split(65_536)
    return np.concatenate([found.latent(x).double().numpy() for x in parts])


def _mean_latent(found: Field, spots: Problem) -> NDArray:
    """(N, r) latents of spots, means over their footprints if they have one."""
    offsets = spots.quadrature()
    ways = np.zeros((1, spots.coords.shape[1])) if offsets is None else offsets.numpy()
    return sum(_latent(found, spots.coords + at) for at in ways) / len(ways)


def _completed(found: Field, problem: Problem, fitted: NDArray) -> _Fit:
    """The fit of the genes `fitted` of a problem, with loadings of its other genes solved for."""
    head: Loadings = found.head
    loadings, intercept = head.loadings().detach().double().numpy(), head.intercept().detach().double().numpy()
    if len(fitted) == len(problem.genes):
        return _Fit(found, loadings, intercept)
    rest = np.setdiff1d(np.arange(len(problem.genes)), fitted)
    z, others = _mean_latent(found, problem), problem.take(np.arange(len(problem.coords)), rest)
    all_loadings = np.empty((len(problem.genes), loadings.shape[1]))
    all_intercepts = np.empty(len(problem.genes))
    all_loadings[fitted], all_intercepts[fitted] = loadings, intercept
    phi = None
    if isinstance(found.likelihood, NegativeBinomial):  # genes of like spread: those of the fit
        phi = np.full(len(rest), float(torch.exp(-found.likelihood.log_dispersion.detach()).median()))
    all_loadings[rest], all_intercepts[rest] = solve_loadings(z, others, inverse_dispersion=phi)
    return _Fit(found, all_loadings, all_intercepts)


def _pooled(fits: list[_Fit], weights: NDArray, spots: Problem) -> NDArray:
    """(N, G) mean predictor."""
    return sum(w * fit.eta(spots) for w, fit in zip(weights, fits, strict=True))


# ---- the choice of lam and of the weights


def vertex(lam: list[float], score: list[float]) -> float:
    """The best of evenly spaced (in log) strengths, refined by the parabola through it and its neighbours.

    Examples
    --------
    >>> vertex([100.0, 200.0, 400.0], [0.3, 0.4, 0.3])
    200.0
    """
    k = int(np.argmax(score))
    if k in (0, len(lam) - 1):
        return lam[k]
    left, middle, right = score[k - 1 : k + 2]
    bend = left - 2 * middle + right
    return float(lam[k] * (lam[k + 1] / lam[k]) ** (0.5 * (left - right) / bend)) if bend < 0 else lam[k]


def search_lam(score: Callable[[float], float], search: LamSearch) -> tuple[float, dict[float, float]]:
    """The strength chosen, and the score of each one tried, from weak to strong.

    Examples
    --------
    >>> lam, tried = search_lam(lambda lam: -(np.log(lam / 700) ** 2), LamSearch())
    >>> round(lam), [round(x) for x in tried]
    (700, [400, 1200, 3600])
    """
    tried = {0: score(search.start)}
    for sign in (1, -1):
        k = sign
        while abs(k) <= search.reach:
            tried[k] = score(search.start * search.ratio**k)
            if tried[k] <= tried[k - sign]:
                break
            k += sign
        if sign == 1 and k > 1:  # it rose: the weaker side is lower
            break
    tried = dict(sorted(tried.items()))
    lams = [search.start * search.ratio**k for k in tried]
    return vertex(lams, list(tried.values())), dict(zip(lams, tried.values(), strict=True))


def _log_loss(test: Problem, eta: NDArray) -> float:
    """Negative log-likelihood of held-out spots, up to a constant: Poisson, or Gaussian in units of each gene."""
    if test.size is None:
        sd = moments(test.values)[1]
        return float((((_dense(test.values) - eta)[:, sd > 0] / sd[sd > 0]) ** 2).sum())
    return float((test.size[:, None] * np.exp(eta) - _dense(test.values) * eta).sum())


def _dense(values) -> NDArray:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=float)


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
class _HeldOut:
    """What held-out spots say."""

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
        fit = _completed(self.fits[lam], self.train, np.arange(len(self.train.genes)))
        return _scores(self.test, fit.eta(self.test), self.train.null())[0]


def _hold_out(
    model: Model, lam: float | str, search: LamSearch, train: Problem, test: Problem, box: Box, tick: _Ticker
) -> _HeldOut:
    n_penalties = len(model.penalties)
    if len(train.genes) == 0:  # all that varies is held out: nothing to choose by, nothing explained
        lam = np.full(n_penalties, search.start if lam == "auto" else lam)
        tried = {"penalty": np.arange(n_penalties), "lam": lam, "score": np.zeros(n_penalties)}
        none = np.zeros(0)
        return _HeldOut(lam, np.full(n_penalties, 1 / n_penalties), tried, 0.0, none, none)
    genes = train.most_variable(search.n_genes)
    few, hidden = (p.take(np.arange(len(p.coords)), genes) for p in (train, test))
    directions = model.directions(few)
    lams, tried, best = [], [], []
    for k, penalty in enumerate(model.penalties):
        on_step = tick.at("choosing lam" if lam == "auto" else "held-out score")
        trials = _Trials(model, penalty, few, hidden, box, search, directions, on_step)
        chosen, scores = search_lam(trials, search) if lam == "auto" else (lam, {lam: trials(lam)})
        lams.append(chosen)
        tried += [(k, strength, found) for strength, found in scores.items()]
        best.append(trials.fits[max(scores, key=scores.get)])
    fits = [_completed(found, train, genes) for found in best]
    weights = average_weights([fit.eta(hidden)[:, genes] for fit in fits], hidden)
    test = test.take(_some(len(test.coords), MOST_SCORED // len(train.genes), model.config.random_state))
    eta = _pooled(fits, weights, test)
    score, gene_scores = _scores(test, eta, train.null())
    dispersion = None if test.size is None else inverse_dispersion(test.values, test.size[:, None] * np.exp(eta))
    columns = dict(zip(("penalty", "lam", "score"), map(np.array, zip(*tried, strict=True)), strict=True))
    return _HeldOut(np.array(lams), weights, columns, score, gene_scores, dispersion)


def _some(n: int, most: int, random_state: int) -> NDArray:
    """All of n, or a random subset."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(random_state).permutation(n)[: max(1, most)])


def planned_steps(lam: float | str, model: Model, search: LamSearch) -> int:
    """Steps of a whole fit, at most: for progress bars."""
    trials = (search.reach + 2 if lam == "auto" else 1) * len(model.penalties)
    return trials * search.steps_of(model.config) + model.n_members * model.config.steps


def _split(problem: Problem, search: LamSearch, for_gaps: bool, random_state: int) -> tuple[Problem, Problem]:
    """Training and held-out spots, at least one of each; genes without training values are left to the mean."""
    mode = "block" if for_gaps else "random"
    train, test = holdout.split(problem.coords, mode, random_state=random_state, fraction=search.fraction)
    if len(test) == 0:
        train, test = train[1:], train[:1]
    genes = problem.take(train).active()
    return problem.take(train, genes), problem.take(test, genes)


# ---- the whole


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
    train, test = _split(everything, search, for_gaps, model.config.random_state)
    tick = _Ticker(planned_steps(lam, model, search), on_step)
    chosen = _hold_out(model, lam, search, train, test, box, tick)
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
    model: Model, problem: Problem, box: Box, chosen: _HeldOut, tick: _Ticker, least: float = 0.1
) -> tuple[list[_Fit], NDArray]:
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
        fits.append(_completed(found, problem, genes))
    weights = np.array([chosen.weights[k] / turns.count(k) for k in turns])
    return fits, weights / weights.sum()


def _average(
    fits: list[_Fit], weights: NDArray, problem: Problem, active: NDArray, box: Box, target_sum: float
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
