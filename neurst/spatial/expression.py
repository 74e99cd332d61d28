r"""The expression field: a latent coordinate network times gene loadings, read anywhere in users' units."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neurst.core.jet import hessian, jacobian
from neurst.core.samples import Box

CHUNK = 16_384  # points read at once


@dataclass(frozen=True, eq=False)
class ExpressionField:
    r"""A fitted expression field: numpy in, numpy out, users' units, no AnnData inside.

    ``expected(x) = target_sum * exp(intercept + loadings z(x))`` for counts, ``intercept + loadings z(x)`` for normalised data, where
    ``z(x) = net(x) rotation - shift`` is canonical: centred at the fitted spots, orthonormal loadings, components sorted by
    their variance at the spots.

    Parameters
    ----------
    genes
        (G,) names.
    box, net
        Users' units <-> box, and the latent network on the box.
    rotation, shift
        (r, r) and (r,).
    loadings, intercept
        (G, r) and (G,). The intercept of a gene without counts is ``-inf``: it is expected nowhere.
    log_link
        True for counts.
    target_sum
        Reference library size of expected counts (1 for normalised data).
    """

    genes: NDArray
    box: Box
    net: nn.Module
    rotation: NDArray
    shift: NDArray
    loadings: NDArray
    intercept: NDArray
    log_link: bool
    target_sum: float

    @property
    def n_dims(self) -> int:
        """d, the number of coordinates."""
        return len(self.box.center)

    def select(self, genes: list[str] | NDArray) -> ExpressionField:
        """The same field for some genes only, in the order given."""
        at = {g: i for i, g in enumerate(self.genes)}
        missing = [g for g in genes if g not in at]
        if missing:
            msg = (
                f"genes {missing[:5]} are not in the field ({len(self.genes)} genes: {', '.join(self.genes[:3])}, ...)"
            )
            raise KeyError(msg)
        index = np.array([at[g] for g in genes], dtype=int)
        return dataclasses.replace(
            self, genes=self.genes[index], loadings=self.loadings[index], intercept=self.intercept[index]
        )

    def _chunks(self, coords: NDArray) -> list[Tensor]:
        coords = np.asarray(coords, dtype=float)
        if coords.ndim != 2 or coords.shape[1] != self.n_dims:
            msg = (
                f"`coords` has shape {coords.shape}: expected (N, {self.n_dims}), one row for each point in the units the field "
                "was fitted in"
            )
            raise ValueError(msg)
        return [self.box.inward(part) for part in torch.from_numpy(np.ascontiguousarray(coords)).split(CHUNK)]

    def _map(self, read: Callable[[Tensor], NDArray], coords: NDArray, *shape: int) -> NDArray:
        chunks = self._chunks(coords)
        out = np.empty((sum(map(len, chunks)), *shape))
        start = 0
        with torch.no_grad():
            for x in chunks:
                out[start : start + len(x)] = read(x)
                start += len(x)
        return out

    def _latent(self, x: Tensor) -> NDArray:
        return self.net(x)[:, : len(self.rotation)].numpy() @ self.rotation - self.shift

    def _expected(self, z: NDArray) -> NDArray:
        eta = z @ self.loadings.T + self.intercept
        return self.target_sum * np.exp(eta) if self.log_link else eta

    def _latent_jacobian(self, x: Tensor) -> NDArray:  # (N, r, d) per user unit
        first = jacobian(self.net, x)[:, : len(self.rotation)].numpy()
        return np.einsum("nkd,kr->nrd", first, self.rotation) / self.box.scale

    def latent(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, r)
        """Canonical latent coordinates."""
        return self._map(self._latent, coords, self.rotation.shape[1])

    def __call__(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G)
        """Expected expression: counts at `target_sum`, or normalised values."""
        return self._map(lambda x: self._expected(self._latent(x)), coords, len(self.genes))

    def gradient(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G, d)
        """First derivatives of the expected expression, per user unit."""

        def read(x: Tensor) -> NDArray:
            slope = np.einsum("gr,nrd->ngd", self.loadings, self._latent_jacobian(x))
            return slope * self._expected(self._latent(x))[:, :, None] if self.log_link else slope

        return self._map(read, coords, len(self.genes), self.n_dims)

    def hessian(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G, d, d)
        """Second derivatives of the expected expression, per square user unit."""

        def read(x: Tensor) -> NDArray:
            second = hessian(self.net, x)[:, : len(self.rotation)].numpy() / self.box.scale**2
            bend = np.einsum("nkde,kr,gr->ngde", second, self.rotation, self.loadings, optimize=True)
            if not self.log_link:
                return bend
            # D_de exp(eta) = exp(eta) (D_de eta + D_d eta D_e eta)
            slope = np.einsum("gr,nrd->ngd", self.loadings, self._latent_jacobian(x))
            mean = self._expected(self._latent(x))
            return mean[:, :, None, None] * (bend + slope[..., :, None] * slope[..., None, :])

        return self._map(read, coords, len(self.genes), self.n_dims, self.n_dims)

    def edge(self, coords: NDArray) -> NDArray:  # (N, d) -> (N,)
        r"""Gene-space norm of the predictor's Jacobian, :math:`\sqrt{\mathrm{tr}(J V^\top V J^\top)}`, per user unit.

        The predictor is the log of the expected count, or the normalised value itself. Loadings are orthonormal over all
        fitted genes, so on the whole field it is the norm of the canonical latent Jacobian.
        """
        gram = self.loadings.T @ self.loadings

        def read(x: Tensor) -> NDArray:
            j = self._latent_jacobian(x)
            return np.sqrt(np.einsum("nrd,rs,nsd->n", j, gram, j, optimize=True).clip(min=0))

        return self._map(read, coords)
