"""Converts a fit to an entry of `uns`, made of arrays, strings and numbers that files can hold, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from neurst.core.arguments import shown
from neurst.core.field import finite_array
from neurst.core.nets import NETWORKS
from neurst.core.storage import written_by
from neurst.core.tuning import LineSearch
from neurst.spatial.adata.keys import (
    SCHEMA,
    Slot,
    fit_slot,
    is_fit,
    names_of,
    recorded,
    refit,
    written_slots,
)
from neurst.spatial.field import ExpressionField
from neurst.spatial.fit import FitResult
from neurst.spatial.geometry import kd_tree
from neurst.spatial.priors import prior_from_dict, prior_to_dict
from neurst.spatial.spec import ExpressionConfig, ExpressionSpec

# largest difference of a stored position, from rounding to float32, as a share of half the longest side of the tissue
SAME_PLACE = 1e-5
HISTORY, SEARCH = ("member", "step", "objective", "likelihood", "penalty"), ("penalty", "lam", "score")
# errors that damage of a stored fit can cause
DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
FIELD_PARTS = (
    "genes", "loadings", "intercept", "rotation", "shift", "latent_sd", "link", "target_sum", "box_center", "box_scale", "networks", "n_outputs", "widths",
    "weights",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredFit:
    """A fit that was read back from an AnnData."""

    key: str
    field: ExpressionField
    coords: NDArray  # (N, d) positions of all spots at the time of the fit
    supports: NDArray  # (N,) bool: spots that were fitted
    spatial_key: str
    query: Mapping[str, Any] | None  # how this AnnData was computed from the field; None for measured spots
    slot: Mapping[str, Any]  # the whole entry of uns

    @property
    def spots(self) -> NDArray:
        """(M, d) positions that were fitted."""
        return self.coords[self.supports]

    def known_places(self, coords: NDArray) -> tuple[NDArray, NDArray]:
        """For positions (N, d): whether the fit (or query) had a point there, and whether that point was fitted."""
        known = self.coords if self.query is None else finite_array(self.query, "points", dtype=np.float64)
        if known.shape[1:] != coords.shape[1:]:
            nowhere = np.zeros(len(coords), dtype=bool)
            return nowhere, nowhere
        distance, nearest = kd_tree(known).query(coords)
        same = distance <= SAME_PLACE * self.field.box.scale
        return same, same & (self.supports[nearest] if self.query is None else True)


def fit_to_dict(
    result: FitResult,
    spec: ExpressionSpec,
    *,
    arguments: Mapping[str, Any],
    versions: Mapping[str, str],
    coords: NDArray,
    supports: NDArray,
    slots: Sequence[Slot],
) -> dict[str, Any]:
    """The entry of `uns` that stores a fit.

    Parameters
    ----------
    result, spec
        The fit and its choices.
    arguments
        Arguments of :func:`neurst.tl.neurtv_fit` that are not part of the spec.
    versions
        Versions of the packages that the numbers depend on.
    coords, supports
        Positions (N, d) of all spots, and a mask (N,) of the fitted spots.
    slots
        Slots of further results of the fit.
    """
    tuning, labels = result.tuning, [candidate.name for candidate in spec.candidates()]
    return {
        "neurst_schema": SCHEMA,
        "versions": dict(versions),
        # None is always the default, and older versions of AnnData cannot write it
        "params": {k: v for k, v in arguments.items() if v is not None} | _spec_arguments(spec),
        "n_spots": int(supports.sum()),
        "lam": dict(zip(labels, tuning.lam.tolist(), strict=True)),
        "member_weights": dict(zip(labels, tuning.weights.tolist(), strict=True))
        | ({"constant": tuning.constant} if spec.has_constant else {}),
        "lam_search": {**tuning.search, "penalty": np.array(labels, dtype=object)[tuning.search["penalty"]]},
        "score": tuning.score,
        "history": result.history,
        "field": result.field.to_dict(),
        "coords": coords,
        "supports": supports,
        "slots": recorded(slots),
    }


def _spec_arguments(spec: ExpressionSpec) -> dict[str, Any]:
    """The arguments of a fit that give this spec, with ``"auto"`` resolved."""
    return {
        "penalty": {str(k): prior_to_dict(prior) for k, prior in enumerate(spec.penalties)},
        "network": {str(k): NETWORKS.to_dict(network) for k, network in enumerate(spec.networks)},
        "rank": spec.rank,
        "n_members": spec.n_members,
        "lam": "auto" if spec.lam is None else spec.lam,
        "steps": spec.fit.steps,
        "search": {k: v for k, v in dataclasses.asdict(spec.search).items() if v is not None},
        "random_state": spec.fit.random_state,
        "device": spec.fit.device,
        "config": dataclasses.asdict(spec.config),
    }


def arguments_of(stored: StoredFit) -> dict[str, Any]:
    """The arguments of :func:`neurst.tl.neurtv_fit` that repeat a stored fit."""
    try:
        return _arguments(stored)
    except DAMAGE as error:
        raise _damaged(stored.key, error) from error


def _arguments(stored: StoredFit) -> dict[str, Any]:
    params = _plain(stored.slot["params"])
    penalties, networks = params["penalty"], params["network"]
    out = params | {
        "spatial_key": stored.spatial_key,
        "penalty": [prior_from_dict(penalties[str(k)]) for k in range(len(penalties))],
        "network": [NETWORKS.from_dict(networks[str(k)]) for k in range(len(networks))],
        "search": LineSearch(**params["search"]),
        "config": ExpressionConfig(**params["config"]),
    }
    return out | ({"genes": stored.field.genes.tolist()} if out.pop("some_genes", False) else {})


def _plain(value: Any) -> Any:
    """A value that was read from a file, as a plain Python type."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def stored_fit(adata: AnnData, key: str) -> StoredFit:
    """The fit stored under ``uns[key]``.

    Raises
    ------
    KeyError
        If there is none.
    ValueError
        If what is there is not a fit, is incomplete, or of another version.
    """
    slot, where, again = adata.uns.get(key), str(fit_slot(key)), f"refit with `{refit(key)}`"
    if slot is None:
        names, parts = (key, f"{key}_fitted", f"{key}_loadings"), (adata.layers, adata.var, adata.varm)
        left = any(name in part for name in names for part in parts)
        advice = f"call `{refit(key)}` first"
        if left:
            advice = (
                "the AnnData still holds results of it, but the field is lost, as `concat` and some filters drop `uns`: concatenate with "
                "`uns_merge='first'` to keep it, or delete the results and refit, or refit under another `key_added`"
            )
        msg = f"`key={key!r}` is not in `adata.uns`, which holds {names_of(adata.uns)}: {advice}"
        raise KeyError(msg)
    if not is_fit(slot):
        msg = f"{where} was not written by `neurst.tl.neurtv_fit`: pass the `key_added` of a fit"
        raise ValueError(msg)
    schema = slot["neurst_schema"]
    if not isinstance(schema, Integral):
        msg = f"{where} is damaged (neurst_schema is {shown(schema)}): {again}"
        raise ValueError(msg)
    if schema != SCHEMA:
        versions = slot.get("versions")
        by = str(versions.get("neurst", "unknown")) if isinstance(versions, Mapping) else "unknown"
        advice = f"upgrade it (`pip install -U neurst-spatial`), or {again}" if schema > SCHEMA else again
        age = "a newer" if schema > SCHEMA else "an early"
        msg = f"{where} has schema {schema}, written by {age} neurst ({by}); this one, {written_by()}, reads schema {SCHEMA}: {advice}"
        raise ValueError(msg)
    field = slot.get("field")
    missing = [name for name in FIELD_PARTS if name not in field] if isinstance(field, Mapping) else ["everything"]
    if missing:
        msg = f"{where} is incomplete, its 'field' lacks {', '.join(missing)}: {again}"
        raise ValueError(msg)
    try:
        return _stored_fit(key, slot)
    except DAMAGE as error:
        raise _damaged(key, error) from error


def _damaged(key: str, error: Exception) -> ValueError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{fit_slot(key)} is damaged ({reason}): refit with `{refit(key)}`")


def _stored_fit(key: str, slot: Mapping[str, Any]) -> StoredFit:
    field = ExpressionField.from_dict(slot["field"])
    coords = finite_array(slot, "coords", len(slot["coords"]), field.n_dims, dtype=np.float64)
    supports = np.asarray(slot["supports"])
    if supports.shape != (len(coords),) or supports.dtype != bool or supports.sum() < 4:
        msg = f"supports has shape {supports.shape} and type {supports.dtype}, expected {len(coords)} booleans, at least 4 of them True"
        raise ValueError(msg)
    for part, columns in {"history": HISTORY, "lam_search": SEARCH}.items():
        lengths = {name: np.shape(slot[part][name]) for name in columns}
        if len(set(lengths.values())) != 1 or len(next(iter(lengths.values()))) != 1:
            msg = f"the columns of {part} have the shapes {lengths}, expected one length"
            raise ValueError(msg)
    if not all(isinstance(value, Real) for value in slot["lam"].values()):
        msg = f"lam is {shown(slot['lam'])}, expected a number for each penalty"
        raise ValueError(msg)
    query = slot.get("query")
    if query is not None and finite_array(query, "points", dtype=np.float64).shape[1:] != (field.n_dims,):
        msg = f"the points of its query have the shape {np.shape(query['points'])}, expected (N, {field.n_dims})"
        raise ValueError(msg)
    spatial_key = str(slot["params"]["spatial_key"]) if query is None else "spatial"
    return StoredFit(key, field, coords, supports, spatial_key, query, slot)


def own_slots(adata: AnnData, key: str) -> list[Slot]:
    """All slots that belong to the fit under a name, if there is one."""
    slot = adata.uns.get(key)
    return [fit_slot(key), *written_slots(slot)] if is_fit(slot) else []
