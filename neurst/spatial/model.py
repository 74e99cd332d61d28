"""One fit of a latent field to spots: what is fitted, and how it is read at other spots."""

from __future__ import annotations

import dataclasses
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
from neurst.spatial.holdout import dense
from neurst.spatial.loadings import solve_loadings
from neurst.spatial.problem import Problem, moments, residual_directions, to_tensor

LIKELIHOODS = ("poisson", "negative_binomial", "gaussian")
LikelihoodName = Literal["poisson", "negative_binomial", "gaussian"]
MOST_DENSE = 4_000_000  # values of a matrix that is made dense as a whole, which spares doing so in every step


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
        values = problem.values if n * g > MOST_DENSE else dense(problem.values)
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


@dataclass(frozen=True, eq=False)
class Fit:
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


def completed(found: Field, problem: Problem, fitted: NDArray) -> Fit:
    """The fit of the genes `fitted` of a problem, with loadings of its other genes solved for."""
    head: Loadings = found.head
    loadings, intercept = head.loadings().detach().double().numpy(), head.intercept().detach().double().numpy()
    if len(fitted) == len(problem.genes):
        return Fit(found, loadings, intercept)
    rest = np.setdiff1d(np.arange(len(problem.genes)), fitted)
    z, others = _mean_latent(found, problem), problem.take(np.arange(len(problem.coords)), rest)
    all_loadings = np.empty((len(problem.genes), loadings.shape[1]))
    all_intercepts = np.empty(len(problem.genes))
    all_loadings[fitted], all_intercepts[fitted] = loadings, intercept
    phi = None
    if isinstance(found.likelihood, NegativeBinomial):  # genes of like spread: those of the fit
        phi = np.full(len(rest), float(torch.exp(-found.likelihood.log_dispersion.detach()).median()))
    all_loadings[rest], all_intercepts[rest] = solve_loadings(z, others, inverse_dispersion=phi)
    return Fit(found, all_loadings, all_intercepts)


def pooled(fits: list[Fit], weights: NDArray, spots: Problem) -> NDArray:
    """(N, G) mean predictor."""
    return sum(w * fit.eta(spots) for w, fit in zip(weights, fits, strict=True))
