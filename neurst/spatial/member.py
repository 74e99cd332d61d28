"""A member: one fit of a latent field to spots, with gene loadings. An expression field is the average of several members."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from neurst.core.field import FittedField
from neurst.core.fit import OnStep, fit_field
from neurst.core.nets import Network
from neurst.core.penalty import Penalty
from neurst.core.samples import Box, Samples
from neurst.spatial.data import SpotData
from neurst.spatial.gaussian_process import LatentProcess, learn_process
from neurst.spatial.matrix import dense, to_tensor
from neurst.spatial.spec import Candidate, ExpressionSpec


@dataclass(frozen=True, eq=False)
class Member:
    """A fitted latent field, with loadings (G, r) and intercepts (G,) of genes."""

    field: FittedField
    loadings: NDArray
    intercept: NDArray

    def predictor(self, spots: SpotData) -> NDArray:  # -> (N, G)
        """Predictors at spots, without the offset. With a footprint, the predictors of the mean over each spot."""
        offsets = spots.quadrature()
        if offsets is None:
            return self.field.latent(spots.coords) @ self.loadings.T + self.intercept
        each = [self.field.latent(spots.coords + at) @ self.loadings.T + self.intercept for at in offsets.numpy()]
        return self.field.likelihood.average(torch.from_numpy(np.stack(each))).numpy()

    def with_all_genes(self, data: SpotData, fitted: NDArray) -> Member:
        """The member with loadings of all genes of `data`, after a fit to the genes with the indices `fitted`."""
        n_genes = len(data.genes)
        if len(fitted) == n_genes:
            return self
        rest = np.setdiff1d(np.arange(n_genes), fitted)
        others = data.take_genes(rest)
        loadings, intercept = np.empty((n_genes, self.loadings.shape[1])), np.empty(n_genes)
        loadings[fitted], intercept[fitted] = self.loadings, self.intercept
        solved = data.observation.solve_loadings(self.mean_latent(data), others.values, self.field.likelihood)
        loadings[rest], intercept[rest] = solved
        return Member(self.field, loadings, intercept)

    def mean_latent(self, spots: SpotData) -> NDArray:  # -> (N, r)
        """Latents of spots. With a footprint, their means over each spot."""
        offsets = spots.quadrature()
        shifts = np.zeros((1, spots.coords.shape[1])) if offsets is None else offsets.numpy()
        return sum(self.field.latent(spots.coords + at) for at in shifts) / len(shifts)


def start_directions(data: SpotData, spec: ExpressionSpec) -> NDArray:  # -> (G, r)
    """Starting values of the loadings for fits to these spots."""
    n, g = data.values.shape
    rank = max(1, min(spec.rank, n - 1, g))
    return data.observation.directions(data.values, rank, spec.fit.random_state)


Fitter = Callable[[float, OnStep | None], Member]  # (strength, on_step) -> the fit


def fitter(
    candidate: Candidate,
    data: SpotData,
    spec: ExpressionSpec,
    directions: NDArray,
    box: Box,
    *,
    trial: bool = False,
    random_state: int | None = None,
) -> Fitter:
    """The function that fits a candidate to spots with a given strength; arguments as in :func:`fit_member`."""
    if candidate.network is None:
        return _process_fitter(candidate, data, spec, directions, box)

    def fit(lam: float, on_step: OnStep | None = None) -> Member:
        return fit_member(
            data,
            spec,
            candidate.prior,
            candidate.network,
            lam,
            directions,
            box,
            on_step=on_step,
            trial=trial,
            random_state=random_state,
        )

    return fit


def _process_fitter(
    candidate: Candidate, data: SpotData, spec: ExpressionSpec, directions: NDArray, box: Box
) -> Fitter:
    """The function that fits a Gaussian process."""
    process, genes = learn(candidate, data, spec, directions, box)

    def fit(lam: float, on_step: OnStep | None = None) -> Member:
        return Member(*process.fit(lam)).with_all_genes(data, genes)

    return fit


def learn(
    candidate: Candidate, data: SpotData, spec: ExpressionSpec, directions: NDArray, box: Box
) -> tuple[LatentProcess, NDArray]:
    """The Gaussian process of some spots, and the indices of its genes. Of a large section it learns from a random subset of the spots."""
    n, g = data.values.shape
    config = spec.config
    most = max(config.least_process_spots, min(config.most_process_spots, config.dense_values // g))
    genes = np.arange(g)
    if n > most:
        data = data.take(np.sort(np.random.default_rng(spec.fit.random_state).permutation(n)[:most]))
        genes = data.informative_genes()
        data = data.take_genes(genes)
    return learn_process(data, directions[genes], box, **dataclasses.asdict(candidate.prior)), genes


def fit_member(
    data: SpotData,
    spec: ExpressionSpec,
    penalty: Penalty,
    network: Network,
    lam: float,
    directions: NDArray,
    box: Box,
    *,
    on_step: OnStep | None = None,
    trial: bool = False,
    random_state: int | None = None,
) -> Member:
    """Fit a latent field, loadings and intercepts to spots.

    Parameters
    ----------
    data, spec
        As in :func:`neurst.spatial.tune.tune`; every gene must be informative.
    penalty, network, lam
        Regulariser and network of the latent field, and prior strength in nats.
    directions
        (G, r) starting values of the loadings.
    box
        Unit box of the coordinates.
    on_step
        Called after each step.
    trial
        Whether this is a short fit, to be scored on held-out spots.
    random_state
        Seed; that of the spec if None.
    """
    n, g = data.values.shape
    footprint, observation = data.quadrature(), data.observation
    points = g * (1 if footprint is None else len(footprint))
    config = spec.fit_of(network, n, points, trial=trial, random_state=random_state)
    values = data.values if n * g > spec.config.dense_values else dense(data.values)
    found = fit_field(
        Samples(torch.from_numpy(data.coords), to_tensor(values), offset=observation.offset(), footprint=footprint),
        network=network,
        likelihood=observation.likelihood(data.values),
        penalty=penalty,
        lam=lam,
        head=observation.head(data.values, directions),
        n_latent=directions.shape[1],
        box=box,
        config=config,
        on_step=on_step,
    )
    loadings, intercept = (part().detach().double().numpy() for part in (found.head.loadings, found.head.intercept))
    return Member(found, loadings, intercept)
