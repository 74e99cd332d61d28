r"""Fits an expression field to spots.

For counts, ``y_ig ~ Poisson(t_i exp(b_g + V_g . z(x_i)))`` with t_i the library size; for normalised data,
``y_ig ~ N(b_g + V_g . z(x_i), s_g^2)``. The objective is

    sum of -log p(y)  +  lam * mean over points of sum_k |grad z_k|  +  sum V^2 / 2,

the last term a standard normal prior on the loadings (in units of each gene's standard deviation for normalised data): z/c with cV
is the same field, and the prior is what holds the scale that the two share (:class:`neurst.core.fit.Loadings`).
Array functions: no AnnData here.
"""

from __future__ import annotations

import dataclasses
import math
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
from neurst.spatial.problem import Problem, moments, residual_directions, signs, to_tensor

LIKELIHOODS = ("poisson", "negative_binomial", "gaussian")
LikelihoodName = Literal["poisson", "negative_binomial", "gaussian"]
OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LamPath:
    """How `lam` is chosen: a path of prior strengths, weak to strong, scored on spots that were held out.

    One fit at `start` with `first_steps`, then the prior is made stronger by `ratio` at a time, each stage going on from the last
    field for `stage_steps`, until the held-out score falls. The choice is the vertex of the parabola through the best
    strength and its neighbours in log lam. From weak to strong, because a component that the prior has driven to zero
    does not come back; not below `start`, because a prior that is too weak costs far more than one that is too strong.

    Parameters
    ----------
    start, ratio, stop
        First prior strength in nats, the factor between stages, and the last strength.
    first_steps, stage_steps
        Steps of the first fit and of each further stage.
    fraction
        Share of spots held out.
    n_genes
        Most genes used for the path; the most variable ones if there are more.
    """

    start: float = 100.0
    ratio: float = 2.0
    stop: float = 6400.0
    first_steps: int = 300
    stage_steps: int = 120
    fraction: float = 0.2
    n_genes: int = 500

    @property
    def strengths(self) -> list[float]:
        """All strengths of the path, in order."""
        count = 1 + math.floor(math.log(self.stop / self.start, self.ratio) + 1e-9)
        return [self.start * self.ratio**k for k in range(count)]


@dataclass(frozen=True, eq=False)
class Fitted:
    """An expression field and how it came about.

    Parameters
    ----------
    field
        The fitted field.
    lam
        Prior strength in nats, chosen or given.
    path
        ``lam`` and ``score`` of each strength tried; one entry if `lam` was given.
    score
        Deviance (or variance) explained on the held-out spots, all genes together, by a fit to the others.
    gene_scores
        (G,) the same for each gene.
    history
        Of the final fit.
    """

    field: ExpressionField
    lam: float
    path: dict[str, NDArray]
    score: float
    gene_scores: NDArray
    history: dict[str, NDArray]


def batch_points(n_spots: int, n_genes: int) -> int:
    """Spots in one step: all, unless a step would hold more than 4 million values or 8,192 spots."""
    batch = int(np.clip(4_000_000 // n_genes, 256, 8192))
    return 0 if n_spots <= batch else batch


@dataclass(frozen=True, eq=False)
class Model:
    """What is fitted to a :class:`Problem`: everything but the prior strength.

    Parameters
    ----------
    likelihood, penalty, network
        Data term, regulariser of the latent field, and its network.
    rank
        r, lowered where there are fewer spots or genes.
    config
        Numbers of a fit.
    """

    likelihood: LikelihoodName
    penalty: Penalty
    network: Network
    rank: int
    config: FitConfig

    def fit(
        self, problem: Problem, box: Box, lam: float, *, start: Field | None = None, on_step=None, **config
    ) -> Field:
        """Latent field, loadings and intercepts of a problem whose genes are all :meth:`Problem.active`."""
        n, g = problem.values.shape
        rank = max(1, min(self.rank, n - 1, g))
        batch = self.config.batch_points or batch_points(n, g)
        mean, sd = moments(problem.values)
        samples = Samples(torch.from_numpy(problem.coords), to_tensor(problem.values), offset=problem.offset())
        return fit_field(
            samples,
            network=self.network,
            likelihood=self._data_term(sd),
            penalty=self.penalty,
            lam=lam,
            head=None if start is not None else self._head(problem, rank, sd),
            n_latent=rank,
            box=box,
            config=dataclasses.replace(self.config, batch_points=batch, **config),
            start=start,
            on_step=on_step,
        )

    def _data_term(self, sd: NDArray) -> Likelihood:
        if self.likelihood == "poisson":
            return Poisson()
        if self.likelihood == "negative_binomial":
            return NegativeBinomial(torch.full((len(sd),), 10.0))
        return Gaussian(torch.from_numpy(sd), learned=True)

    def _head(self, problem: Problem, rank: int, sd: NDArray) -> Loadings:
        directions = torch.from_numpy(
            np.ascontiguousarray(residual_directions(problem, rank, self.config.random_state))
        )
        null = torch.from_numpy(problem.null())
        return (
            Loadings(directions, null, torch.from_numpy(sd))
            if problem.size is None
            else Loadings(directions, null.log())
        )


def _scores(found: Field, train: Problem, test: Problem) -> tuple[float, NDArray]:
    """Overall and per-gene score of a fit on held-out spots."""
    mean = found(torch.from_numpy(test.coords)).double().numpy()
    if test.size is None:
        arguments = (test.values, mean, train.null())
        return holdout.variance_explained(*arguments), holdout.variance_explained_per_gene(*arguments)
    arguments = (test.values, test.size, mean, train.null())
    return holdout.deviance_explained(*arguments), holdout.deviance_explained_per_gene(*arguments)


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


@dataclass(frozen=True, eq=False)
class _Choice:
    lam: float
    path: dict[str, NDArray]
    found: Field  # the field of the best strength tried


def _choose_lam(model: Model, path: LamPath, train: Problem, test: Problem, box: Box, on_step) -> _Choice:
    lams, scores, best, found = [], [], None, None
    for lam in path.strengths:
        steps = path.stage_steps if lams else path.first_steps
        found = model.fit(train, box, lam, start=found, on_step=on_step, steps=steps)
        lams.append(lam)
        scores.append(_scores(found, train, test)[0])
        if scores[-1] < max(scores):
            break
        best = found
    return _Choice(vertex(lams, scores), {"lam": np.array(lams), "score": np.array(scores)}, best)


def planned_steps(lam: float | str, n_genes: int, config: FitConfig, path: LamPath) -> int:
    """Steps of a whole fit, at most: for progress bars."""
    chosen = path.first_steps + path.stage_steps * (len(path.strengths) - 1) if lam == "auto" else 0
    scored = config.steps if lam != "auto" or n_genes > path.n_genes else 0
    return chosen + scored + config.steps


def _split(problem: Problem, path: LamPath, random_state: int) -> tuple[Problem, Problem]:
    """Training and held-out spots, at least one of each; genes without training values are left to the mean."""
    train, test = holdout.split(problem.coords, "random", random_state=random_state, fraction=path.fraction)
    if len(test) == 0:
        train, test = train[1:], train[:1]
    genes = problem.take(train).active()
    return problem.take(train, genes), problem.take(test, genes)


def canonical(latent: NDArray, loadings: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Rotation (r, r), shift (r,), loadings (G, r) and intercept change (G,) of the canonical form of ``z V'``.

    Centred latents, orthonormal loadings, components by falling variance, the largest loading of each positive.
    """
    centre = latent.mean(0)
    q, r = np.linalg.qr(loadings)  # V = Q R
    _, _, bt = np.linalg.svd((latent - centre) @ r.T, full_matrices=False)
    turned = q @ bt.T
    sign = signs(turned)
    rotation = r.T @ bt.T * sign
    return rotation, centre @ rotation, turned * sign, loadings @ centre


def _assemble(found: Field, problem: Problem, active: NDArray, log_link: bool, target_sum: float) -> ExpressionField:
    head: Loadings = found.head
    rotation, shift, turned, change = canonical(
        found.latent(torch.from_numpy(problem.coords)).double().numpy(), head.loadings().detach().double().numpy()
    )
    null = problem.null()
    with np.errstate(divide="ignore"):  # a gene without counts: log 0 = -inf, expected nowhere
        intercept = np.log(null) if log_link else null
    loadings = np.zeros((len(null), rotation.shape[1]))
    loadings[active] = turned
    intercept[active] = head.intercept().detach().double().numpy() + change
    net = found.net.double().requires_grad_(False)
    return ExpressionField(problem.genes, found.box, net, rotation, shift, loadings, intercept, log_link, target_sum)


def fit_expression(
    problem: Problem,
    model: Model,
    *,
    lam: float | Literal["auto"] = "auto",
    target_sum: float = 1.0,
    path: LamPath = LamPath(),
    on_step: OnStep | None = None,
) -> Fitted:
    """Choose `lam`, score the choice on held-out spots, and fit all spots.

    Parameters
    ----------
    problem
        Spots, with library sizes > 0 for count likelihoods.
    model
        What to fit.
    lam
        Prior strength in nats, or ``"auto"``.
    target_sum
        Reference library size of the field.
    path
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
    train, test = _split(everything, path, model.config.random_state)
    tick = _Ticker(planned_steps(lam, len(active), model.config, path), on_step)

    lam, tried, score, known_scores = _hold_out(model, lam, path, train, test, box, tick)
    gene_scores = np.zeros(len(problem.genes))
    gene_scores[np.isin(problem.genes, train.genes)] = known_scores
    final = model.fit(everything, box, lam, on_step=tick.at("fitting"))
    field = _assemble(final, problem, active, problem.size is not None, target_sum)
    history = {name: np.array(values) for name, values in final.history.items()}
    return Fitted(field, float(lam), tried, score, gene_scores, history)


def _hold_out(
    model: Model, lam: float | str, path: LamPath, train: Problem, test: Problem, box: Box, tick: _Ticker
) -> tuple[float, dict[str, NDArray], float, NDArray]:
    """`lam`, the strengths tried, and the scores of held-out spots, overall and for each gene of `train`."""
    if len(train.genes) == 0:  # all that varies is held out: nothing to choose by, nothing explained
        lam = path.start if lam == "auto" else lam
        return lam, {"lam": np.array([lam]), "score": np.zeros(1)}, 0.0, np.zeros(0)
    found, tried = None, {}
    if lam == "auto":
        subset = train.most_variable(path.n_genes)
        spots = np.arange(len(train.coords)), np.arange(len(test.coords))
        choice = _choose_lam(
            model, path, train.take(spots[0], subset), test.take(spots[1], subset), box, tick.at("choosing lam")
        )
        lam, tried = choice.lam, choice.path
        found = choice.found if len(subset) == len(train.genes) else None
    if found is None:
        found = model.fit(train, box, lam, on_step=tick.at("held-out score"))
    score, gene_scores = _scores(found, train, test)
    return lam, tried or {"lam": np.array([lam]), "score": np.array([score])}, score, gene_scores


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
