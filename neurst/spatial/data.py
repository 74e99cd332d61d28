"""What was measured: spots as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurst.core.samples import Box
from neurst.spatial.geometry import disc_quadrature
from neurst.spatial.matrix import Matrix
from neurst.spatial.observation import Observation


@dataclass(frozen=True, eq=False)
class SpotData:
    """Values of genes at spots.

    Parameters
    ----------
    coords
        (N, d) positions.
    values
        (N, G), dense or CSR.
    genes
        (G,) names.
    observation
        How the values depend on a predictor.
    footprint
        Diameter of the disc over which a spot averages, in the units of the coordinates; None for values at points.
    """

    coords: NDArray
    values: Matrix
    genes: NDArray
    observation: Observation
    footprint: float | None = None

    @cached_property
    def box(self) -> Box:
        """The unit box around the spots."""
        return Box.of(torch.from_numpy(self.coords))

    def take(self, spots: NDArray, genes: NDArray | None = None) -> SpotData:
        """The data of some spots and genes, given by their indices."""
        values = self.values[spots] if genes is None else self.values[spots][:, genes]
        names = self.genes if genes is None else self.genes[genes]
        return SpotData(self.coords[spots], values, names, self.observation.take(spots), self.footprint)

    def take_genes(self, genes: NDArray) -> SpotData:
        """The data of all spots and some genes, given by their indices."""
        return self.take(np.arange(len(self.coords)), genes)

    def mean_rate(self) -> NDArray:
        """(G,) prediction of the null model, see :meth:`Observation.mean_rate`."""
        return self.observation.mean_rate(self.values)

    def informative_genes(self) -> NDArray:
        """Indices of the genes that can be fitted: those with counts, or with values that vary."""
        return self.observation.informative_genes(self.values)

    def most_variable(self, n: int) -> NDArray:
        """Indices of the `n` most variable genes, ascending."""
        return np.sort(np.argsort(-self.observation.variability(self.values), kind="stable")[:n])

    def quadrature(self) -> Tensor | None:
        """(Q, d) offsets over which a spot averages; None for values at points."""
        if self.footprint is None:
            return None
        return torch.from_numpy(disc_quadrature(self.footprint, self.coords.shape[1]))
