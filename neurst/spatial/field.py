"""The expression field: latent coordinate networks times gene loadings, evaluated anywhere in the user's units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from neurst.core.arguments import NAMES
from neurst.core.field import (
    POINTS_AT_ONCE,
    Field,
    box_from_dict,
    finite_array,
    network_from_dict,
    positive_number,
    stored_as,
)
from neurst.core.jet import Jet, seed
from neurst.core.nets import NETWORKS, Bumps, ConcatNet, Network
from neurst.core.samples import Box
from neurst.spatial.loadings import signs
from neurst.spatial.local import LocalStructure
from neurst.spatial.observation import LINKS, Link
from neurst.spatial.spread import Spread

MAX_OUTPUTS = 2**20  # upper limit for a stored network
LEAST_COMPONENT = 1e-4  # components below this share of the largest are dropped


def canonical(
    mean: NDArray, covariance: NDArray, loadings: NDArray, unit: NDArray | float = 1.0
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Rotation (m, r), shift (r,), loadings (G, r) and change of the intercept (G,) of the canonical form of ``u W'``.

    In this form latents are centred, loadings orthonormal, components sorted by falling variance, and the largest loading of each component
    is positive. r components remain after dropping those below 1e-4 of the largest: they were shrunk to zero by the prior, or repeat what
    other members hold.

    Parameters
    ----------
    mean, covariance
        (m,) and (m, m) moments of the latents u at the spots.
    loadings
        W (G, m).
    unit
        (G,) unit of each gene in this comparison, so that one gene with large values does not outweigh the others.
    """
    q, r = np.linalg.qr(loadings)  # W = Q R
    variance, frame = np.linalg.eigh(r @ covariance @ r.T)
    size, frame = np.sqrt(np.maximum(variance[::-1], 0.0)), frame[:, ::-1]
    strength = size * np.linalg.norm((q @ frame).T / unit, axis=1)
    frame = frame[:, strength > LEAST_COMPONENT * strength.max()] if strength.any() else frame[:, :1]
    rotated = np.where(loadings.any(axis=1, keepdims=True), q @ frame, 0.0)  # rows that are zero in W stay exactly zero
    sign = signs(rotated)
    rotation = r.T @ frame * sign
    return rotation, mean @ rotation, rotated * sign, loadings @ mean


@stored_as("expression")
@dataclass(frozen=True, eq=False)
class ExpressionField(Field):
    r"""A fitted expression field: a function from coordinates to the expected expression of genes. It holds no AnnData.

    ``expected(x) = target_sum exp(intercept + loadings z(x))`` for counts, ``intercept + loadings z(x)`` for normalised data. The latents
    ``z(x) = net(x) rotation - shift`` are canonical: centred at the fitted spots, with orthonormal loadings, sorted by
    their variance at the spots. An average of members is such a field too: the mean of their predictors is linear in
    the concatenated outputs u(x) = net(x) of their networks.

    Parameters
    ----------
    genes
        (G,) names.
    box
        Converts between the user's units and the unit box.
    networks
        Specification of each network.
    net
        The latent networks on the box.
    rotation, shift
        (m, r) and (r,).
    latent_sd
        (r,) standard deviation of each latent at the spots, where they are uncorrelated.
    loadings, intercept
        (G, r) and (G,). The intercept of a gene without counts is ``-inf``: its expected count is 0 everywhere.
    link
        Maps the predictor to the expected expression.
    spread
        The variance of the predictors; None if no member of the average is a Gaussian process.
    """

    genes: NDArray
    box: Box
    networks: tuple[Network, ...]
    net: ConcatNet
    rotation: NDArray
    shift: NDArray
    latent_sd: NDArray
    loadings: NDArray
    intercept: NDArray
    link: Link
    spread: Spread | None = None

    @classmethod
    def average(
        cls,
        genes: NDArray,
        box: Box,
        networks: Sequence[Network],
        nets: Sequence[nn.Module],
        loadings: Sequence[NDArray],
        intercepts: Sequence[NDArray],
        weights: Sequence[float],
        *,
        constant: NDArray,
        structure: LocalStructure | None = None,
        spots: NDArray,
        link: Link,
        unit: NDArray | float = 1.0,
        spread: Spread | None = None,
    ) -> ExpressionField:
        """The mean predictor of several fits with the given weights, in canonical form at `spots` (N, d).

        `loadings` are (G, r_k) and `intercepts` (G,), one of each for each network; `unit` as in :func:`canonical`. What the weights lack
        to sum to 1 is the weight of a constant predictor (G,). Local `structure` is added to the average.
        """
        weights = np.asarray(weights, dtype=float)
        each = [weight * part for weight, part in zip(weights, loadings, strict=True)]
        if structure is not None:
            bumps = Bumps(structure.width / box.scale)
            net = bumps.build(len(box.center), len(structure.centres), torch.Generator())
            with torch.no_grad():
                net.centres.copy_(box.to_unit(torch.from_numpy(structure.centres)))
            networks, nets, each = (*networks, bumps), [*nets, net], [*each, structure.loadings]
        net = ConcatNet(nets, [v.shape[1] for v in each]).double().requires_grad_(False)
        mean, covariance = _moments(net, box.to_unit(torch.from_numpy(spots)))
        rotation, shift, rotated, change = canonical(mean, covariance, np.concatenate(each, axis=1), unit)
        # the predictor of a gene without counts is -inf in every part of the average
        rest, empty = 1 - weights.sum(), np.isneginf(constant)
        known = np.stack(intercepts, axis=1) @ weights + rest * np.where(empty, 0.0, constant)
        intercept = np.where(empty, constant, known + change)
        sd = np.sqrt(np.maximum(np.einsum("mr,mk,kr->r", rotation, covariance, rotation), 0.0))
        return cls(genes, box, tuple(networks), net, rotation, shift, sd, rotated, intercept, link, spread)

    @property
    def n_channels(self) -> int:
        """G, the number of genes."""
        return len(self.genes)

    @property
    def target_sum(self) -> float:
        """The library size that expected counts refer to; 1 for normalised values."""
        return self.link.target_sum

    def select(self, genes: Sequence[str]) -> ExpressionField:
        """The same field for some genes only, in the order given."""
        genes = NAMES("genes", genes)
        genes = (genes,) if isinstance(genes, str) else genes
        at = {g: i for i, g in enumerate(self.genes)}
        missing = [g for g in genes if g not in at]
        if missing:
            known = ", ".join(self.genes[:3])
            msg = f"`genes`: {missing[:5]} are not in the field ({len(self.genes)} genes: {known}, ...): pass some of these"
            raise KeyError(msg)
        index = np.array([at[g] for g in genes], dtype=int)
        return dataclasses.replace(
            self,
            genes=self.genes[index],
            loadings=self.loadings[index],
            intercept=self.intercept[index],
            spread=None if self.spread is None else self.spread.select(index),
        )

    def _latent_in_box(self, x: Tensor | Jet) -> Tensor | Jet:  # (N, d) -> (N, r)
        return F.linear(self.net(x), torch.from_numpy(self.rotation.T), torch.from_numpy(-self.shift))

    def predictor_in_box(self, x: Tensor | Jet) -> Tensor | Jet:  # (N, d) -> (N, G)
        """The predictors at box coordinates: log-rates for counts, the values themselves for normalised data."""
        return F.linear(self._latent_in_box(x), torch.from_numpy(self.loadings), torch.from_numpy(self.intercept))

    def in_box(self, x: Tensor | Jet) -> Tensor | Jet:
        return self.link.mean(self.predictor_in_box(x))

    def latent(self, coords: ArrayLike) -> NDArray:  # (N, d) -> (N, r)
        """Canonical latent coordinates."""
        return self.read(self._latent_in_box, coords, width=self.rotation.shape[1])

    def gradient(self, coords: ArrayLike) -> NDArray:  # (N, d) -> (N, G, d)
        """First derivatives of the expected expression, per unit of the coordinates: the same as :meth:`jacobian`."""
        return self.jacobian(coords)

    def std(self, coords: ArrayLike) -> NDArray:  # (N, d) -> (N, G)
        r"""Standard deviation of the expected expression, in its units: :math:`\mathrm{expected} \cdot s` for counts and s for normalised data.

        :math:`s^2` is the posterior variance of the predictor (the log-rate, for counts), see :mod:`neurst.spatial.spread`. It grows with the
        distance to the spots.

        Raises
        ------
        ValueError
            If no member of the average is a Gaussian process.
        """

        def spread(x: Tensor) -> Tensor:
            sd = np.sqrt(self._variance(x).numpy())
            return torch.from_numpy(self.link.spread(self.predictor_in_box(x).numpy(), sd))

        return self.read(spread, coords)

    def predictor_variance(self, coords: ArrayLike) -> NDArray:  # (N, d) -> (N, G)
        """The square of s in :meth:`std`: posterior variance of the predictor (the log-rate, for counts)."""
        return self.read(self._variance, coords)

    def _variance(self, x: Tensor) -> Tensor:
        if self.spread is None:
            msg = "the field has no standard deviation, as none of its members is a Gaussian process: refit with `penalty='auto'`"
            raise ValueError(msg)
        return torch.from_numpy(self.spread.predictor_variance(x))

    def boundary(self, coords: ArrayLike) -> NDArray:  # (N, d) -> (N,)
        r"""Strength of tissue boundaries: how fast expression changes, in standard deviations per unit of the coordinates.

        .. math::
            B(x) = \sqrt{\frac{\sum_g w_g\, |\nabla \eta_g(x)|^2 / s_g^2}{\sum_g w_g}}

        :math:`\eta_g` is the predictor (the log-rate, for counts) and :math:`s_g` its standard deviation over the spots, so that each gene counts
        in units of its own spread. :math:`w_g` is the geometric mean of its expected counts (equal for normalised values): the gradient of a gene
        with few counts is mostly noise. Genes without variation are left out.
        """
        found = self.boundary_of(np.asarray(self.latent_jacobian(coords)[1]))
        return torch.from_numpy(found) if isinstance(coords, Tensor) else found

    def latent_jacobian(self, coords: ArrayLike) -> tuple[NDArray, NDArray]:  # (N, d) -> (N, r), (N, r, d)
        """Canonical latent coordinates, and their first derivatives per unit of the coordinates."""

        def both(x: Tensor) -> Tensor:
            jet = self._latent_in_box(seed(x))
            return torch.cat([jet.value[..., None], jet.derivative(1).permute(1, 2, 0) / self.box.scale], -1)

        found = self.read(both, coords, width=self.rotation.shape[1] * (1 + self.n_dims))
        return found[..., 0], found[..., 1:]

    def gradient_of(self, latent: NDArray, derivatives: NDArray) -> NDArray:  # (N, r), (N, r, d) -> (N, G, d)
        """The gradient of the expected expression from latents and their derivatives, by the chain rule."""
        slope = self.link.slope(latent @ self.loadings.T + self.intercept)
        return np.stack([slope * (part @ self.loadings.T) for part in np.moveaxis(derivatives, 2, 0)], axis=2)

    def boundary_of(self, derivatives: NDArray) -> NDArray:  # (N, r, d) -> (N,)
        """The strength of boundaries from the derivatives of the latents."""
        spread = np.sqrt(self.loadings**2 @ self.latent_sd**2)
        varies = spread > 1e-6 * max(spread.max(initial=0.0), 1e-300)
        weight = np.where(varies, self.link.slope(self.intercept), 0.0)
        share = np.sqrt(weight / max(weight.sum(), 1e-300)) / np.where(varies, spread, 1.0)
        root = np.linalg.qr(
            self.loadings * share[:, None], mode="r"
        )  # its square is the weighted Gram matrix of the loadings
        return np.linalg.norm(np.einsum("nrd,sr->nsd", derivatives, root, optimize=True), axis=(1, 2))

    def to_dict(self) -> dict[str, Any]:
        with torch.no_grad():
            at = torch.zeros(1, self.n_dims, dtype=torch.float64)
            n_outputs = [net(at).shape[1] for net in self.net.nets]
        weights = {name.replace(".", "-"): w.numpy().astype(np.float32) for name, w in self.net.state_dict().items()}
        return {
            "genes": np.asarray(self.genes, dtype=str).astype(object),
            "loadings": self.loadings,
            "intercept": self.intercept,
            "rotation": self.rotation,
            "shift": self.shift,
            "latent_sd": self.latent_sd,
            "link": self.link.name,
            "target_sum": self.link.target_sum,
            "box_center": self.box.center.numpy(),
            "box_scale": self.box.scale,
            "networks": {str(k): NETWORKS.to_dict(network) for k, network in enumerate(self.networks)},
            "n_outputs": np.array(n_outputs),
            "widths": np.array(self.net.widths),
            "spread": {} if self.spread is None else self.spread.to_dict(),
            "weights": weights,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ExpressionField:
        box = box_from_dict(stored)
        genes, r = np.array([str(g) for g in stored["genes"]]), np.size(stored["shift"])
        n_outputs = finite_array(stored, "n_outputs", np.size(stored["n_outputs"]), dtype=np.float64)
        widths = finite_array(stored, "widths", len(n_outputs), dtype=np.float64)
        if not np.all((np.abs(n_outputs) < MAX_OUTPUTS) & (n_outputs % 1 == 0) & (widths % 1 == 0)):
            msg = f"n_outputs are {n_outputs} and widths {widths}, expected whole numbers below {MAX_OUTPUTS:,}"
            raise ValueError(msg)
        n_outputs, widths = n_outputs.astype(int), widths.astype(int)
        if not np.all((widths >= 1) & (widths <= n_outputs)):
            msg = f"widths are {widths}, expected 1 to {n_outputs}"
            raise ValueError(msg)
        m, specs, spread = int(widths.sum()), stored["networks"], stored.get("spread", {})
        networks = tuple(NETWORKS.from_dict(specs[str(k)]) for k in range(len(n_outputs)))
        net = ConcatNet(_nets(networks, len(box.center), n_outputs, stored["weights"]), widths).double()
        link = str(stored["link"])
        if link not in LINKS:
            msg = f"link is {link!r}, expected one of {sorted(LINKS)}"
            raise ValueError(msg)
        return cls(
            genes,
            box,
            networks,
            net.requires_grad_(False).eval(),
            rotation=finite_array(stored, "rotation", m, r, dtype=np.float64),
            shift=finite_array(stored, "shift", r, dtype=np.float64),
            latent_sd=finite_array(stored, "latent_sd", r, dtype=np.float64),
            loadings=finite_array(stored, "loadings", len(genes), r, dtype=np.float64),
            intercept=finite_array(stored, "intercept", len(genes), minus_infinity=True, dtype=np.float64),
            link=LINKS[link](positive_number(stored, "target_sum")),
            spread=Spread.from_dict(spread, len(box.center), len(genes)) if spread else None,
        )


@torch.no_grad()
def _moments(net: nn.Module, x: Tensor) -> tuple[NDArray, NDArray]:
    """Mean (m,) and covariance (m, m) of the outputs of a network at box coordinates (N, d), a chunk of points at a time."""
    n, first = len(x), net(x[:1])[0]  # squares of differences from a typical output lose no digits
    total, squares = torch.zeros_like(first), torch.zeros(len(first), len(first), dtype=first.dtype)
    for part in x.split(POINTS_AT_ONCE):
        u = net(part) - first
        total, squares = total + u.sum(0), squares + u.T @ u
    mean = total / n
    return (mean + first).numpy(), (squares / n - torch.outer(mean, mean)).numpy()


def _nets(networks: Sequence[Network], d: int, n_outputs: NDArray, weights: Mapping[str, Any]) -> list[nn.Module]:
    """The stored networks of all members, whose weights are named ``nets-<member>-...``."""
    if not isinstance(weights, Mapping):
        msg = f"weights are a {type(weights).__name__}, expected a dictionary of arrays"
        raise TypeError(msg)
    each: list[dict[str, Any]] = [{} for _ in n_outputs]
    for name, values in weights.items():
        nets, member, *rest = str(name).split("-")
        if nets != "nets" or not member.isdecimal() or int(member) >= len(each):
            msg = f"weights of {name} belong to none of the {len(each)} networks"
            raise ValueError(msg)
        each[int(member)]["-".join(rest)] = values
    parts = zip(networks, n_outputs, each, strict=True)
    return [network_from_dict(network, d, int(n), part) for network, n, part in parts]
