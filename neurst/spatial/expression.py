r"""The expression field: a latent coordinate network times gene loadings, read anywhere in users' units."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neurst.core.jet import hessian, jacobian
from neurst.core.samples import Box
from neurst.spatial.problem import signs

CHUNK = 16_384  # points read at once


class SideBySide(nn.Module):
    """Networks whose leading outputs stand next to each other: (N, d) -> (N, m), tensor or jet.

    Parameters
    ----------
    nets
        The networks.
    widths
        How many outputs of each.
    """

    def __init__(self, nets: Sequence[nn.Module], widths: Sequence[int]):
        super().__init__()
        self.nets, self.widths = nn.ModuleList(nets), tuple(map(int, widths))

    def forward(self, x):
        return torch.cat([net(x)[..., :width] for net, width in zip(self.nets, self.widths, strict=True)], -1)


@dataclass(frozen=True, eq=False)
class Members:
    """The fits that an expression field is the average of.

    Parameters
    ----------
    weights
        (M,), of sum 1.
    loadings
        (G, m): each member's loadings on its own outputs, side by side as the networks' outputs are.
    intercepts
        (G, M).
    """

    weights: NDArray
    loadings: NDArray
    intercepts: NDArray

    def select(self, index: NDArray) -> Members:
        """The same for some genes."""
        return Members(self.weights, self.loadings[index], self.intercepts[index])


def canonical(
    latent: NDArray, loadings: NDArray, unit: NDArray | float = 1.0
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Rotation (m, r), shift (r,), loadings (G, r) and intercept change (G,) of the canonical form of ``u W'``.

    Centred latents, orthonormal loadings, components by falling variance, the largest loading of each positive; r is the rank of
    the product: what the prior has driven to nothing, and what several members share, is left out (below 1e-4 of the largest
    component).

    Parameters
    ----------
    latent, loadings
        u (N, m) and W (G, m).
    unit
        (G,) in which genes are compared when a component is left out: one gene of large values does not outweigh the others.
    """
    centre = latent.mean(0)
    q, r = np.linalg.qr(loadings)  # W = Q R
    _, size, bt = np.linalg.svd((latent - centre) @ r.T, full_matrices=False)
    held = size * np.linalg.norm((q @ bt.T).T / unit, axis=1)
    bt = bt[held > 1e-4 * held.max()] if held.any() else bt[:1]
    turned = q @ bt.T
    sign = signs(turned)
    rotation = r.T @ bt.T * sign
    return rotation, centre @ rotation, turned * sign, loadings @ centre


@dataclass(frozen=True, eq=False)
class ExpressionField:
    r"""A fitted expression field: numpy in, numpy out, users' units, no AnnData inside.

    ``expected(x) = target_sum * exp(intercept + loadings z(x))`` for counts, ``intercept + loadings z(x)`` for normalised data, where
    ``z(x) = net(x) rotation - shift`` is canonical: centred at the fitted spots, orthonormal loadings, components sorted by
    their variance at the spots. An average of members is such a field too: the mean of their predictors is linear in
    their outputs, which stand side by side in u(x) = net(x).

    Parameters
    ----------
    genes
        (G,) names.
    box, net
        Users' units <-> box, and the latent network on the box.
    rotation, shift
        (m, r) and (r,).
    loadings, intercept
        (G, r) and (G,). The intercept of a gene without counts is ``-inf``: it is expected nowhere.
    log_link
        True for counts.
    target_sum
        Reference library size of expected counts (1 for normalised data).
    members
        What it is the average of; None if it is one fit.
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
    members: Members | None = None

    @classmethod
    def average(
        cls,
        genes: NDArray,
        box: Box,
        nets: Sequence[nn.Module],
        loadings: Sequence[NDArray],
        intercepts: Sequence[NDArray],
        weights: Sequence[float],
        *,
        spots: NDArray,
        log_link: bool,
        target_sum: float,
        unit: NDArray | float = 1.0,
    ) -> ExpressionField:
        """The mean predictor of several fits, of the given weights, in canonical form at `spots` (N, d).

        `loadings` are (G, r_k) and `intercepts` (G,), one of each for each network; `unit` as in :func:`canonical`.
        """
        net = SideBySide(nets, [v.shape[1] for v in loadings]).double().requires_grad_(False)
        weights = np.asarray(weights, dtype=float) / np.sum(weights)
        each, means = np.concatenate(loadings, axis=1), np.stack(intercepts, axis=1)
        share = np.repeat(weights, net.widths)
        with torch.no_grad():
            u = np.concatenate([net(x).numpy() for x in box.inward(torch.from_numpy(spots)).split(CHUNK)])
        rotation, shift, turned, change = canonical(u, each * share, unit)
        members = Members(weights, each, means) if len(weights) > 1 else None
        intercept = means @ weights + change
        return cls(genes, box, net, rotation, shift, turned, intercept, log_link, target_sum, members)

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
            self,
            genes=self.genes[index],
            loadings=self.loadings[index],
            intercept=self.intercept[index],
            members=None if self.members is None else self.members.select(index),
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
        return self.net(x).numpy() @ self.rotation - self.shift

    def _expected(self, z: NDArray) -> NDArray:
        eta = z @ self.loadings.T + self.intercept
        return self.target_sum * np.exp(eta) if self.log_link else eta

    def _latent_jacobian(self, x: Tensor) -> NDArray:  # (N, r, d) per user unit
        first = jacobian(self.net, x).numpy()
        return np.einsum("nkd,kr->nrd", first, self.rotation) / self.box.scale

    def latent(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, r)
        """Canonical latent coordinates."""
        return self._map(self._latent, coords, self.rotation.shape[1])

    def __call__(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G)
        """Expected expression: counts at `target_sum`, or normalised values."""
        return self._map(lambda x: self._expected(self._latent(x)), coords, len(self.genes))

    def std(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G)
        r"""Standard deviation of the expected expression between members, in its units.

        For counts :math:`\mathrm{expected} \cdot s`, for normalised data s, where :math:`s^2 = \sum_m w_m (\eta_m - \eta)^2 / (1 - \sum_m w_m^2)`
        and :math:`\eta` are the predictors (log-rates for counts).

        Raises
        ------
        ValueError
            If the field is a single fit.
        """

        def read(x: Tensor) -> NDArray:
            s = np.sqrt(self._variance(x))
            return s * self._expected(self._latent(x)) if self.log_link else s

        return self._map(read, coords, len(self.genes))

    def predictor_variance(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G)
        """The square of s in :meth:`std`: variance of the predictor (the log-rate, for counts) between members."""
        return self._map(self._variance, coords, len(self.genes))

    def _variance(self, x: Tensor) -> NDArray:
        if self.members is None:
            msg = "the field is a single fit, which has no spread: refit with `n_members=4` or more"
            raise ValueError(msg)
        weights = self.members.weights
        empty = np.isneginf(self.members.intercepts)
        intercepts = np.where(empty, 0.0, self.members.intercepts)  # a gene without counts: the members agree
        edges = np.cumsum((0, *self.net.widths))
        u = self.net(x).numpy()
        eta = [
            u[:, a:b] @ self.members.loadings[:, a:b].T + intercepts[:, k]
            for k, (a, b) in enumerate(itertools.pairwise(edges))
        ]
        mean = sum(w * e for w, e in zip(weights, eta, strict=True))
        squares = sum(w * (e - mean) ** 2 for w, e in zip(weights, eta, strict=True))
        return squares / (1 - np.sum(weights**2))

    def gradient(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G, d)
        """First derivatives of the expected expression, per user unit."""

        def read(x: Tensor) -> NDArray:
            slope = np.einsum("gr,nrd->ngd", self.loadings, self._latent_jacobian(x))
            return slope * self._expected(self._latent(x))[:, :, None] if self.log_link else slope

        return self._map(read, coords, len(self.genes), self.n_dims)

    def hessian(self, coords: NDArray) -> NDArray:  # (N, d) -> (N, G, d, d)
        """Second derivatives of the expected expression, per square user unit."""

        def read(x: Tensor) -> NDArray:
            second = hessian(self.net, x).numpy() / self.box.scale**2
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
