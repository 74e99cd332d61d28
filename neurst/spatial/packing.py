"""A fitted field as plain arrays, strings and numbers that a file can hold, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neurst.core import nets
from neurst.core.samples import Box
from neurst.spatial.expression import ExpressionField, Members, SideBySide

MEMBER_PARTS = ("weights", "loadings", "intercepts")
FIELD_PARTS = (
    "genes", "loadings", "intercept", "rotation", "shift", "log_link", "target_sum", "box_center", "box_scale", "network",
    "n_outputs", "widths", "members", "weights", "spots", "digests", "spatial_key",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stored:
    """A field read back from ``uns[key]``."""

    field: ExpressionField
    spots: NDArray  # (N, d) positions it was fitted to
    digests: dict[str, str]
    spatial_key: str


def pack(
    field: ExpressionField, network: nets.Network, spots: NDArray, digests: dict[str, str], spatial_key: str
) -> dict[str, Any]:
    """A field and the positions that support it, as plain arrays, strings and numbers."""
    weights = {name.replace(".", "-"): w.numpy().astype(np.float32) for name, w in field.net.state_dict().items()}
    members = {} if field.members is None else {name: getattr(field.members, name) for name in MEMBER_PARTS}
    return {
        "genes": np.asarray(field.genes, dtype=str).astype(object),
        "loadings": field.loadings,
        "intercept": field.intercept,
        "rotation": field.rotation,
        "shift": field.shift,
        "log_link": int(field.log_link),
        "target_sum": field.target_sum,
        "box_center": field.box.center.numpy(),
        "box_scale": field.box.scale,
        "network": nets.to_dict(network),
        "n_outputs": _n_outputs(field),
        "widths": np.array(field.net.widths),
        "members": members,
        "weights": weights,
        "spots": spots,
        "digests": digests,
        "spatial_key": spatial_key,
    }


def _n_outputs(field: ExpressionField) -> NDArray:
    """(M,) outputs of each network, those of a second field included."""
    with torch.no_grad():
        at = torch.zeros(1, field.n_dims, dtype=torch.double)
        return np.array([net(at).shape[1] for net in field.net.nets])


def unpack(part: Mapping[str, Any]) -> Stored:
    """The inverse of :func:`pack`: KeyError, TypeError or ValueError if something is not as it was packed."""
    genes = np.array([str(g) for g in part["genes"]])
    d, r = np.size(part["box_center"]), np.size(part["shift"])
    center, scale = _array(part, "box_center", d), _positive(part, "box_scale")
    outputs = np.asarray(part["n_outputs"], dtype=int)
    widths = _unpack_widths(part, outputs)
    m = int(widths.sum())
    spec = nets.from_dict(part["network"])
    net = SideBySide([spec.build(d, int(n)) for n in outputs], widths).double()
    shapes = {name: w.shape for name, w in net.state_dict().items()}
    weights = {name.replace("-", "."): w for name, w in part["weights"].items()}
    net.load_state_dict({name: torch.from_numpy(_array(weights, name, *shapes.get(name, ()))) for name in weights})
    field = ExpressionField(
        genes,
        Box(torch.from_numpy(center), scale),
        net.requires_grad_(False).eval(),
        rotation=_array(part, "rotation", m, r),
        shift=_array(part, "shift", r),
        loadings=_array(part, "loadings", len(genes), r),
        intercept=_array(part, "intercept", len(genes), least=-np.inf),
        log_link=bool(int(part["log_link"])),
        target_sum=_positive(part, "target_sum"),
        members=_unpack_members(part["members"], len(genes), len(widths), m),
    )
    spots = _array(part, "spots", max(4, len(part["spots"])), d)
    digests = {name: str(part["digests"][name]) for name in ("names_sha256", "coords_sha256")}
    return Stored(field, spots, digests, str(part["spatial_key"]))


def _unpack_widths(part: Mapping[str, Any], outputs: NDArray) -> NDArray:
    """(M,) how many outputs of each network are latents."""
    widths = _array(part, "widths", len(outputs)).astype(int)
    if not np.all((widths >= 1) & (widths <= outputs)):
        msg = f"widths are {widths}, expected 1 to {outputs}"
        raise ValueError(msg)
    return widths


def _unpack_members(part: Mapping[str, Any], n_genes: int, n_members: int, m: int) -> Members | None:
    if n_members == 1:
        return None
    weights = _array(part, "weights", n_members)
    if not (np.all(weights > 0) and np.isclose(weights.sum(), 1)):
        msg = f"weights are {weights}, expected shares that sum to 1"
        raise ValueError(msg)
    intercepts = _array(part, "intercepts", n_genes, n_members, least=-np.inf)
    return Members(weights, _array(part, "loadings", n_genes, m), intercepts)


def _array(part: Mapping[str, Any], name: str, *shape: int, least: float = -np.finfo(float).max) -> NDArray:
    """A stored array, of that shape and finite: from `least` to the largest number."""
    value = np.asarray(part[name], dtype=float)
    if value.shape != shape:
        msg = f"{name} has shape {value.shape}, expected {shape}"
        raise ValueError(msg)
    if not np.all((value >= least) & (value < np.inf)):
        msg = f"{name} is not finite"
        raise ValueError(msg)
    return value


def _positive(part: Mapping[str, Any], name: str) -> float:
    value = float(part[name])
    if not 0 < value < np.inf:
        msg = f"{name} is {value}, expected a positive number"
        raise ValueError(msg)
    return value


def from_schema_1(part: Mapping[str, Any]) -> dict[str, Any]:
    """A field of one network, in the present layout."""
    weights = {f"nets-0-{name}": w for name, w in part["weights"].items()} if "weights" in part else {}
    single = {"widths": [np.size(part.get("shift", 0))], "members": {}, "weights": weights}
    return {**part, **single, "n_outputs": np.atleast_1d(part.get("n_outputs", 0))}
