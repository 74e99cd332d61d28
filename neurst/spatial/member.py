"""A member: one fit of a latent field to spots, with gene loadings. An expression field is the average of several members."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from neurst.core.field import FittedField
from neurst.core.fit import OnStep, fit_field
from neurst.core.penalty import Penalty
from neurst.core.samples import Box, Samples
from neurst.spatial.data import SpotData
from neurst.spatial.matrix import dense, to_tensor
from neurst.spatial.spec import ExpressionSpec


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
        solved = data.observation.solve_loadings(self._mean_latent(data), others.values, self.field.likelihood)
        loadings[rest], intercept[rest] = solved
        return Member(self.field, loadings, intercept)

    def _mean_latent(self, spots: SpotData) -> NDArray:  # -> (N, r)
        """Latents of spots. With a footprint, their means over each spot."""
        offsets = spots.quadrature()
        shifts = np.zeros((1, spots.coords.shape[1])) if offsets is None else offsets.numpy()
        return sum(self.field.latent(spots.coords + at) for at in shifts) / len(shifts)


def start_directions(data: SpotData, spec: ExpressionSpec) -> NDArray:  # -> (G, r)
    """Starting values of the loadings for fits to these spots."""
    n, g = data.values.shape
    rank = max(1, min(spec.rank, n - 1, g))
    return data.observation.directions(data.values, rank, spec.fit.random_state)


def fit_member(
    data: SpotData,
    spec: ExpressionSpec,
    penalty: Penalty,
    lam: float,
    directions: NDArray,
    box: Box,
    *,
    on_step: OnStep | None = None,
    **numbers,
) -> Member:
    """Fit a latent field, loadings and intercepts to spots.

    Parameters
    ----------
    data, spec
        As in :func:`neurst.spatial.tune.tune`; every gene must be informative.
    penalty, lam
        Regulariser of the latent field and its strength in nats.
    directions
        (G, r) starting values of the loadings.
    box
        Unit box of the coordinates.
    on_step
        Called after each step.
    numbers
        Fields of :class:`neurst.core.fit.FitConfig` that differ from those of the spec.
    """
    n, g = data.values.shape
    footprint, observation = data.quadrature(), data.observation
    batch = spec.fit.batch_points or spec.config.batch_points(n, g * (1 if footprint is None else len(footprint)))
    config = dataclasses.replace(spec.fit, batch_points=batch, **numbers)
    values = data.values if n * g > spec.config.dense_values else dense(data.values)
    found = fit_field(
        Samples(torch.from_numpy(data.coords), to_tensor(values), offset=observation.offset(), footprint=footprint),
        network=spec.network,
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


def mean_predictor(members: list[Member], weights: NDArray, spots: SpotData) -> NDArray:  # -> (N, G)
    """The weighted mean of the members' predictors at spots."""
    return sum(w * member.predictor(spots) for w, member in zip(weights, members, strict=True))
