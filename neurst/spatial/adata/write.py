"""Writes results into an AnnData, and creates new ones. All results are computed first and then written together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from neurst.core.arguments import warn
from neurst.core.storage import written_by
from neurst.spatial.adata import keys
from neurst.spatial.adata.changes import apply_changes
from neurst.spatial.adata.keys import Slot
from neurst.spatial.adata.read import Measured, spot_diameter
from neurst.spatial.adata.serialise import StoredFit, fit_to_dict, own_slots
from neurst.spatial.evaluate.compare import Comparison
from neurst.spatial.fit import FitResult
from neurst.spatial.observation import Observation
from neurst.spatial.spec import ExpressionSpec

LAYER_LIMIT = 2 * 1024**3  # bytes; larger tables of values are not written
LEAST_SHARE = 0.5  # with a smaller share of fitted genes, tables are stored in obsm, as a layer would be mostly empty


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {"neurst": written_by(), **{name: version(name) for name in ("torch", "numpy", "anndata")}}


def table_part(n_genes: int, n_vars: int) -> str:
    """Where tables of `n_genes` genes are stored: ``"layers"``, or ``"obsm"`` if a layer would be mostly empty."""
    return "layers" if n_genes >= LEAST_SHARE * n_vars else "obsm"


def table_size(n_obs: int, n_genes: int, n_vars: int) -> int:
    """Bytes of a table of `n_genes` genes."""
    return 4 * n_obs * (n_vars if table_part(n_genes, n_vars) == "layers" else n_genes)


def fits(name: str, n_obs: int, n_genes: int, n_vars: int) -> bool:
    """Whether a table of values is below the limit; warns if not."""
    size = table_size(n_obs, n_genes, n_vars)
    if size > LAYER_LIMIT:
        warn(
            f"`adata.{table_part(n_genes, n_vars)}[{name!r}]` would take {size / 1024**3:.1f} GiB and is not written: read what you need with "
            "`neurst.tl.neurtv_query` or `neurst.get.field`"
        )
    return size <= LAYER_LIMIT


def as_table(adata: AnnData, values: NDArray, columns: NDArray) -> NDArray | pd.DataFrame:
    """Values (n_obs, G) of some genes in the form that is stored: a layer with NaN for other genes, or a table of these genes only."""
    if table_part(len(columns), adata.n_vars) == "obsm":
        return pd.DataFrame(values, index=adata.obs_names, columns=adata.var_names[columns].astype(str))
    if len(columns) == adata.n_vars and np.array_equal(columns, np.arange(adata.n_vars)):
        return values
    layer = np.full((adata.n_obs, adata.n_vars), np.nan, dtype=np.float32)
    layer[:, columns] = values
    return layer


def _column(values: NDArray, columns: NDArray, n: int, fill: Any) -> NDArray:
    """Per-gene values for all n genes, with `fill` for genes that were not fitted."""
    out = np.full((n, *values.shape[1:]), fill, dtype=values.dtype)
    out[columns] = values
    return out


def fit_slots(key: str, n_genes: int, n_vars: int, observation: Observation, *, std: bool) -> list[Slot]:
    """The slots that a fit writes."""
    part = table_part(n_genes, n_vars)
    names = ["fitted", "empty", observation.score_name] + (["dispersion"] if observation.has_dispersion else [])
    spread = [keys.std_slot(key, part)] if std else []
    found = [keys.values_slot(key, part), *spread, keys.latent_slot(key), keys.loadings_slot(key), keys.fit_slot(key)]
    return found + [keys.gene_slot(key, name) for name in names]


def check_fit_key(adata: AnnData, key: str, slots: Sequence[Slot]) -> None:
    """Refuse a name under which results would overwrite slots of another origin."""
    keys.check_free(adata, slots, own_slots(adata, key), key, "the fit in")


@dataclass(frozen=True, eq=False)
class FitTables:
    """Values of a field at the spots: expected (n_obs, G) and standard deviations, None if not to be written, and latents (n_obs, r)."""

    values: NDArray | None
    std: NDArray | None
    latent: NDArray


def write_fit(
    adata: AnnData,
    key: str,
    *,
    measured: Measured,
    result: FitResult,
    spec: ExpressionSpec,
    tables: FitTables,
    arguments: Mapping[str, Any],
) -> None:
    """Write all slots of a fit. Slots of an earlier fit under this name are removed."""
    field, tuning, columns, n = result.field, result.tuning, measured.columns, adata.n_vars
    part = table_part(len(columns), n)
    empty = np.isneginf(field.intercept) | ~field.loadings.any(axis=1)
    per_gene = {
        "fitted": (np.ones(len(columns), dtype=bool), False),
        "empty": (empty, False),
        measured.data.observation.score_name: (tuning.gene_scores, np.nan),
    }
    if tuning.dispersion is not None:
        per_gene["dispersion"] = (tuning.dispersion, np.nan)
    written: dict[Slot, Any] = {
        keys.gene_slot(key, name): _column(values, columns, n, fill) for name, (values, fill) in per_gene.items()
    }
    for slot, values in ((keys.values_slot(key, part), tables.values), (keys.std_slot(key, part), tables.std)):
        if values is not None:
            written[slot] = as_table(adata, values, columns)
    written[keys.latent_slot(key)] = tables.latent
    written[keys.loadings_slot(key)] = _column(field.loadings.astype(np.float32), columns, n, np.nan)
    entry = fit_to_dict(
        result,
        spec,
        arguments=arguments,
        versions=versions(),
        coords=measured.coords,
        supports=measured.fitted,
        slots=list(written),
    )
    # own_slots: also remove what belongs to the earlier fit, such as its gradient
    apply_changes(adata, {**written, keys.fit_slot(key): entry}, own_slots(adata, key))


def check_gradient_slots(adata: AnnData, stored: StoredFit, n_genes: int) -> None:
    """Refuse to overwrite slots that are not from the same fit, and to write tables above the limit."""
    key, n_vars = stored.key, adata.n_vars
    tables = keys.derivative_slots(key, stored.field.n_dims, table_part(n_genes, n_vars))
    slots = [*tables, keys.gene_slot(key, "gradient"), keys.boundary_slot(key)]
    keys.check_free(adata, slots, own_slots(adata, key), key, "the fit in")
    size = table_size(adata.n_obs, n_genes, n_vars)
    if size > LAYER_LIMIT:
        msg = (
            f"each derivative would take {size / 1024**3:.1f} GiB: name the `genes` you need, or read "
            "`neurst.get.field(adata).select(genes).gradient(coords)`"
        )
        raise ValueError(msg)


def write_gradient(
    adata: AnnData, stored: StoredFit, columns: NDArray, gradient: Sequence[NDArray], norms: NDArray, boundary: NDArray
) -> None:
    """Write derivatives along each axis (n_obs, G), mean norms of the genes' gradients (G,), and the boundary map (n_obs,)."""
    key, part = stored.key, table_part(len(columns), adata.n_vars)
    slots = keys.derivative_slots(key, stored.field.n_dims, part)
    written = {slot: as_table(adata, values, columns) for slot, values in zip(slots, gradient, strict=True)}
    written[keys.gene_slot(key, "gradient")] = _column(norms, columns, adata.n_vars, np.nan)
    written[keys.boundary_slot(key)] = boundary
    older = [keys.Slot(p, name) for p in ("layers", "obsm") for _, name in keys.derivative_slots(key, 3)]
    stale = [slot for slot in own_slots(adata, key) if slot in older]  # from an earlier call with other genes
    record = {slot for slot in own_slots(adata, key) if slot.part != "uns" and slot not in stale} | set(written)
    entry = {**stored.slot, "slots": keys.recorded(record)}
    apply_changes(adata, {**written, keys.fit_slot(key): entry}, stale)


def check_score_key(adata: AnnData, key: str) -> None:
    """Refuse a name under which scores would overwrite anything but scores."""
    slots = keys.score_slots(key)
    own = slots if keys.is_score_table(adata.uns.get(key)) else ()
    keys.check_free(adata, slots, own, key, "held-out scores in")


def write_scores(adata: AnnData, key: str, *, measured: Measured, comparison: Comparison) -> None:
    """Write the table of methods and seeds, and for each gene the share explained by the field and by the best baseline."""
    table = pd.DataFrame(comparison.rows)
    table.index = table.index.astype(str)  # as it is after reading a file
    columns, n = measured.columns, adata.n_vars
    values = (
        table,
        _column(comparison.gene_scores("field"), columns, n, np.nan),
        _column(comparison.gene_scores(comparison.best_baseline()), columns, n, np.nan),
    )
    apply_changes(adata, dict(zip(keys.score_slots(key), values, strict=True)))


def new_adata(
    adata: AnnData,
    stored: StoredFit,
    coords: NDArray,
    values: NDArray,
    std: NDArray | None,
    genes: Sequence[str],
    *,
    distance: NDArray,
    in_support: NDArray,
    radius: float,
    about: Mapping[str, Any],
) -> AnnData:
    """An AnnData of field values (N, G) at new coordinates, with the field, the columns of `var`, and which points are in the tissue.

    `about` says how the values were computed; it is stored with the positions.
    """
    key = stored.key
    obs = pd.DataFrame(
        {"distance_to_spot": distance, "in_support": in_support},
        index=pd.Index([f"{key}_{i}" for i in range(len(coords))]),
    )
    known = adata.var_names.is_unique and pd.Index(genes).isin(adata.var_names).all()
    var = adata.var.loc[list(genes)].copy() if known else pd.DataFrame(index=pd.Index(genes))
    out = AnnData(values, obs=obs, var=var)
    if std is not None:
        out.layers[keys.std_slot(key).name] = std
    out.obsm["spatial"] = coords
    entry = {name: part for name, part in stored.slot.items() if name != "slots"}
    columns = [slot for slot in own_slots(adata, key) if slot.part == "var" and slot.present(out)]
    query = {"support_radius": float(radius), "points": coords.copy(), "link": stored.field.link.name, **about}
    query["target_sum"] = stored.field.target_sum
    out.uns[key] = copy.deepcopy(entry) | {"slots": keys.recorded(columns), "query": query}
    return out


def copy_images(adata: AnnData, out: AnnData, shrink: float) -> None:
    """A copy of ``uns["spatial"]`` whose spots are drawn `shrink` times as wide."""
    images = adata.uns.get("spatial")
    if isinstance(images, Mapping):
        out.uns["spatial"] = copy.deepcopy(dict(images))
        for factors in _scale_factors(out):
            factors["spot_diameter_fullres"] = spot_diameter(factors) * shrink


def check_images(adata: AnnData) -> None:
    """Refuse scale factors whose spot diameter cannot be read, before any work."""
    for factors in _scale_factors(adata):
        spot_diameter(factors)


def _scale_factors(adata: AnnData) -> Iterator[MutableMapping[str, Any]]:
    """The scale factors of each library in ``uns["spatial"]`` that have a spot diameter."""
    images = adata.uns.get("spatial")
    for library in images.values() if isinstance(images, Mapping) else ():
        factors = library.get("scalefactors") if isinstance(library, Mapping) else None
        if isinstance(factors, MutableMapping) and "spot_diameter_fullres" in factors:
            yield factors
