"""The expression field: latent coordinate networks times gene loadings, evaluated anywhere in the user's units."""

from __future__ import annotations

import dataclasses
import itertools
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
from neurst.core.jet import Jet, jacobian
from neurst.core.nets import NETWORKS, ConcatNet, Network
from neurst.core.samples import Box
from neurst.spatial.loadings import signs
from neurst.spatial.observation import LINKS, Link

MAX_OUTPUTS = 2**20  # upper limit for a stored network
LEAST_COMPONENT = 1e-4  # components below this share of the largest are dropped


@dataclass(frozen=True, eq=False)
class Members:
    """The fits whose average is an expression field.

    Parameters
    ----------
    weights
        (M,) weights that sum to 1.
    loadings
        (G, m) loadings of all members, concatenated in the order of the networks' outputs.
    intercepts
        (G, M) intercepts.
    """

    weights: NDArray
    loadings: NDArray
    intercepts: NDArray

    def select(self, index: NDArray) -> Members:
        """The same fits for some genes, given by their indices."""
        return Members(self.weights, self.loadings[index], self.intercepts[index])


def canonical(
    latent: NDArray, loadings: NDArray, unit: NDArray | float = 1.0
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Rotation (m, r), shift (r,), loadings (G, r) and change of the intercept (G,) of the canonical form of ``u W'``.

    In this form latents are centred, loadings orthonormal, components sorted by falling variance, and the largest loading of each component
    is positive. r components remain after dropping those below 1e-4 of the largest: they were shrunk to zero by the prior, or repeat what
    other members hold.

    Parameters
    ----------
    latent, loadings
        u (N, m) and W (G, m).
    unit
        (G,) unit of each gene in this comparison, so that one gene with large values does not outweigh the others.
    """
    centre = latent.mean(0)
    q, r = np.linalg.qr(loadings)  # W = Q R
    _, size, bt = np.linalg.svd((latent - centre) @ r.T, full_matrices=False)
    strength = size * np.linalg.norm((q @ bt.T).T / unit, axis=1)
    bt = bt[strength > LEAST_COMPONENT * strength.max()] if strength.any() else bt[:1]
    rotated = np.where(loadings.any(axis=1, keepdims=True), q @ bt.T, 0.0)  # rows that are zero in W stay exactly zero
    sign = signs(rotated)
    rotation = r.T @ bt.T * sign
    return rotation, centre @ rotation, rotated * sign, loadings @ centre


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
    network
        Specification of each network.
    net
        The latent networks on the box.
    rotation, shift
        (m, r) and (r,).
    loadings, intercept
        (G, r) and (G,). The intercept of a gene without counts is ``-inf``: its expected count is 0 everywhere.
    link
        Maps the predictor to the expected expression.
    members
        The fits that were averaged; None for a single fit.
    """

    genes: NDArray
    box: Box
    network: Network
    net: ConcatNet
    rotation: NDArray
    shift: NDArray
    loadings: NDArray
    intercept: NDArray
    link: Link
    members: Members | None = None

    @classmethod
    def average(
        cls,
        genes: NDArray,
        box: Box,
        network: Network,
        nets: Sequence[nn.Module],
        loadings: Sequence[NDArray],
        intercepts: Sequence[NDArray],
        weights: Sequence[float],
        *,
        spots: NDArray,
        link: Link,
        unit: NDArray | float = 1.0,
    ) -> ExpressionField:
        """The mean predictor of several fits with the given weights, in canonical form at `spots` (N, d).

        `loadings` are (G, r_k) and `intercepts` (G,), one of each for each network; `unit` as in :func:`canonical`.
        """
        net = ConcatNet(nets, [v.shape[1] for v in loadings]).double().requires_grad_(False)
        weights = np.asarray(weights, dtype=float) / np.sum(weights)
        each, means = np.concatenate(loadings, axis=1), np.stack(intercepts, axis=1)
        share = np.repeat(weights, net.widths)
        with torch.no_grad():
            parts = box.to_unit(torch.from_numpy(spots)).split(POINTS_AT_ONCE)
            u = np.concatenate([net(x).numpy() for x in parts])
        rotation, shift, rotated, change = canonical(u, each * share, unit)
        members = Members(weights, each, means) if len(weights) > 1 else None
        return cls(genes, box, network, net, rotation, shift, rotated, means @ weights + change, link, members)

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
            members=None if self.members is None else self.members.select(index),
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
        r"""Standard deviation of the expected expression between members, in its units.

        It is :math:`\mathrm{expected} \cdot s` for counts and s for normalised data. Here
        :math:`s^2 = \sum_m w_m (\eta_m - \eta)^2 / (1 - \sum_m w_m^2)`, and :math:`\eta` are the predictors (log-rates for counts).

        Raises
        ------
        ValueError
            If the field is a single fit.
        """

        def spread(x: Tensor) -> Tensor:
            sd = np.sqrt(self._variance(x).numpy())
            return torch.from_numpy(self.link.spread(self.predictor_in_box(x).numpy(), sd))

        return self.read(spread, coords)

    def predictor_variance(self, coords: ArrayLike) -> NDArray:  # (N, d) -> (N, G)
        """The square of s in :meth:`std`: variance of the predictor (the log-rate, for counts) between members."""
        return self.read(self._variance, coords)

    def _variance(self, x: Tensor) -> Tensor:
        if self.members is None:
            msg = "the field is a single fit, which has no spread: refit with `n_members=4` or more"
            raise ValueError(msg)
        weights = self.members.weights
        # a gene without counts has intercept -inf in every member: no difference between members
        intercepts = np.where(np.isneginf(self.members.intercepts), 0.0, self.members.intercepts)
        edges = np.cumsum((0, *self.net.widths))
        u = self.net(x).numpy()
        eta = [
            u[:, a:b] @ self.members.loadings[:, a:b].T + intercepts[:, k]
            for k, (a, b) in enumerate(itertools.pairwise(edges))
        ]
        mean = sum(w * e for w, e in zip(weights, eta, strict=True))
        squares = sum(w * (e - mean) ** 2 for w, e in zip(weights, eta, strict=True))
        return torch.from_numpy(squares / (1 - np.sum(weights**2)))

    def boundary(self, coords: ArrayLike) -> NDArray:  # (N, d) -> (N,)
        r"""Strength of tissue boundaries, per unit of the coordinates.

        It is the norm over genes of the Jacobian of the predictor, :math:`\sqrt{\mathrm{tr}(J V^\top V J^\top)}`, where J is the Jacobian of
        the latents. The predictor is the logarithm of the expected count, or the normalised value itself. Loadings are orthonormal over
        all fitted genes, so for the whole field this is the norm of J.
        """
        gram = torch.from_numpy(self.loadings.T @ self.loadings)

        def norm(x: Tensor) -> Tensor:
            j = jacobian(self._latent_in_box, x) / self.box.scale
            return torch.einsum("nrd,rs,nsd->n", j, gram, j).clamp_min(0).sqrt()

        return self.read(norm, coords, width=self.rotation.shape[1] * self.n_dims)

    def to_dict(self) -> dict[str, Any]:
        members = {} if self.members is None else dataclasses.asdict(self.members)
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
            "link": self.link.name,
            "target_sum": self.link.target_sum,
            "box_center": self.box.center.numpy(),
            "box_scale": self.box.scale,
            "network": NETWORKS.to_dict(self.network),
            "n_outputs": np.array(n_outputs),
            "widths": np.array(self.net.widths),
            "members": members,
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
        m, network = int(widths.sum()), NETWORKS.from_dict(stored["network"])
        net = ConcatNet(_networks(network, len(box.center), n_outputs, stored["weights"]), widths).double()
        link = str(stored["link"])
        if link not in LINKS:
            msg = f"link is {link!r}, expected one of {sorted(LINKS)}"
            raise ValueError(msg)
        return cls(
            genes,
            box,
            network,
            net.requires_grad_(False).eval(),
            rotation=finite_array(stored, "rotation", m, r, dtype=np.float64),
            shift=finite_array(stored, "shift", r, dtype=np.float64),
            loadings=finite_array(stored, "loadings", len(genes), r, dtype=np.float64),
            intercept=finite_array(stored, "intercept", len(genes), minus_infinity=True, dtype=np.float64),
            link=LINKS[link](positive_number(stored, "target_sum")),
            members=_members_from_dict(stored.get("members", {}), len(genes), len(widths), m),
        )


def _networks(network: Network, d: int, n_outputs: NDArray, weights: Mapping[str, Any]) -> list[nn.Module]:
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
    return [network_from_dict(network, d, int(n), part) for n, part in zip(n_outputs, each, strict=True)]


def _members_from_dict(stored: Mapping[str, Any], n_genes: int, n_members: int, m: int) -> Members | None:
    if n_members == 1:
        return None
    weights = finite_array(stored, "weights", n_members, dtype=np.float64)
    if not (np.all(weights > 0) and np.isclose(weights.sum(), 1)):
        msg = f"weights are {weights}, expected shares that sum to 1"
        raise ValueError(msg)
    intercepts = finite_array(stored, "intercepts", n_genes, n_members, minus_infinity=True, dtype=np.float64)
    return Members(weights, finite_array(stored, "loadings", n_genes, m, dtype=np.float64), intercepts)
