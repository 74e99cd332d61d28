"""Where results live in an AnnData: the only place that builds their names, writes them and reads them back."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from neurst.core import nets
from neurst.spatial.door import Reading, in_tissue, names_of, read_coords, read_matrix, read_size
from neurst.spatial.expression import ExpressionField
from neurst.spatial.fitting import Fitted
from neurst.spatial.packing import FIELD_PARTS, Stored, from_schema_1, pack, unpack
from neurst.spatial.problem import Matrix
from neurst.spatial.tissue import distance_to_spots

SCHEMA = 2  # of uns[key]; raise it when the layout below changes
LEAST_FOR_STD = 4  # members whose spread is worth writing
LAYER_LIMIT = 2 * 1024**3  # bytes; a larger layer is not written
DEFAULT_KEY = "neurtv"
Places = tuple[tuple[str, str], ...]
PLACES: Places = (  # of a fit under a key
    ("layers", "{}"), ("layers", "{}_std"), ("layers", "{}_dx"), ("layers", "{}_dy"), ("layers", "{}_dz"), ("obsm", "X_{}"), ("varm", "{}_loadings"),
    ("var", "{}_fitted"), ("var", "{}_empty"), ("var", "{}_deviance_explained"), ("var", "{}_dispersion"), ("var", "{}_gradient"), ("obs", "{}_edge"),
    ("uns", "{}"),
)  # fmt: skip
SCORE_PLACES: Places = (("uns", "{}"), ("var", "{}"), ("var", "{}_baseline"))
SCORE_COLUMNS = ("mode", "seed", "method", "score", "median_r", "seconds", "n_train", "n_test", "lam")
log = logging.getLogger("neurst")


def check_key(adata: AnnData, key: str) -> None:
    """`key` can be stored, and what is stored under it is ours to replace."""
    _check_name(key)
    if not _is_ours(adata.uns.get(key)):
        _check_free(adata, key, PLACES, "a fit")


def check_score_key(adata: AnnData, key: str) -> None:
    """The same for held-out scores."""
    _check_name(key)
    if not _are_scores(adata.uns.get(key)):
        _check_free(adata, key, SCORE_PLACES, "held-out scores")


def _check_name(key: str) -> None:
    if not (isinstance(key, str) and key and "/" not in key):
        msg = f"`key_added={key!r}`: expected a name, at least one letter and no '/', which files cannot store"
        raise ValueError(msg)


def _check_free(adata: AnnData, key: str, places: Places, what: str) -> None:
    taken = _present(adata, key, places)
    if taken:
        names = ", ".join(f"`adata.{part}[{name!r}]`" for part, name in taken)
        msg = (
            f"`key_added={key!r}` would overwrite {names}, which is not from {what} in `adata.uns[{key!r}]`: pass another `key_added`, or "
            "delete it first"
        )
        raise ValueError(msg)


def _is_ours(slot: Any) -> bool:
    return isinstance(slot, Mapping) and "neurst_schema" in slot


def _are_scores(slot: Any) -> bool:
    return isinstance(slot, pd.DataFrame) and list(slot.columns) == list(SCORE_COLUMNS)


def _present(adata: AnnData, key: str, places: Places) -> list[tuple[str, str]]:
    """Which places of results under `key` are taken."""
    return [(part, name) for part, form in places if (name := form.format(key)) in getattr(adata, part)]


# ---- the stored field


def _digests(names: Iterable[str], coords: NDArray) -> dict[str, str]:
    """Fingerprints of the spots of an AnnData, by which a later one is known to hold the same."""
    return {
        "names_sha256": hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest(),
        "coords_sha256": hashlib.sha256(np.ascontiguousarray(coords, dtype=float).tobytes()).hexdigest(),
    }


def stored(adata: AnnData, key: str) -> Stored:
    """The field stored under ``uns[key]``.

    Raises
    ------
    KeyError
        If there is none.
    ValueError
        If what is there is not ours, incomplete, or of a newer version.
    """
    if key not in adata.uns:
        msg = f"`key={key!r}` is not in `adata.uns`, which holds {names_of(adata.uns)}: call `{_refit(key)}` first"
        raise KeyError(msg)
    slot, where, refit = adata.uns[key], f"`adata.uns[{key!r}]`", f"refit with `{_refit(key)}`"
    if not _is_ours(slot):
        msg = f"{where} was not written by neurst: pass the `key_added` of a fit"
        raise ValueError(msg)
    schema, part = slot["neurst_schema"], slot.get("field")
    if not isinstance(schema, Integral):
        msg = f"{where} is damaged (neurst_schema is {schema!r}): {refit}"
        raise ValueError(msg)
    if schema > SCHEMA:
        msg = (
            f"{where} has schema {schema}, written by a newer neurst ({_written_by(slot)}); this one, {versions()['neurst']}, reads up "
            f"to {SCHEMA}: upgrade it (`pip install -U neurst`), or {refit}"
        )
        raise ValueError(msg)
    if isinstance(part, Mapping) and schema == 1:
        part = from_schema_1(part)
    missing = [name for name in FIELD_PARTS if name not in part] if isinstance(part, Mapping) else ["everything"]
    if missing:
        msg = f"{where} is incomplete, its 'field' lacks {', '.join(missing)}: {refit}"
        raise ValueError(msg)
    try:
        return unpack(part)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = f"{where} is damaged ({reason}): {refit}"
        raise ValueError(msg) from error


def _refit(key: str) -> str:
    option = "" if key == DEFAULT_KEY else f", key_added={key!r}"
    return f"neurst.tl.neurtv_fit(adata{option})"


def _written_by(slot: Mapping[str, Any]) -> str:
    found = slot.get("versions")
    return str(found.get("neurst", "unknown")) if isinstance(found, Mapping) else "unknown"


def holds_fit(adata: AnnData) -> bool:
    """Whether any fit is stored, under whatever key."""
    return any(_is_ours(slot) for slot in adata.uns.values())


def check_same_spots(adata: AnnData, kept: Stored, key: str) -> None:
    """The stored field was fitted to the spots that `adata` holds now."""
    now = _digests(adata.obs_names, read_coords(adata, kept.spatial_key))
    if now["names_sha256"] != kept.digests["names_sha256"]:
        what = f"other spots than the {adata.n_obs} of `adata` now: their names or their order differ"
    elif now != kept.digests:
        what = f"other coordinates than `adata.obsm[{kept.spatial_key!r}]` holds now"
    else:
        return
    msg = f"the field in `adata.uns[{key!r}]` was fitted to {what}. Refit with `{_refit(key)}`"
    raise ValueError(msg)


# ---- writing results


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from neurst import __version__

    return {"neurst": __version__, **{name: version(name) for name in ("torch", "numpy", "anndata")}}


def make_actual(adata: AnnData) -> None:
    """Turn a view into an AnnData of its own before writing to it."""
    if adata.is_view:
        log.info("`adata` is a view: it becomes a copy of its own, and the original is left as it is")
        adata._init_as_actual(adata.copy())


def _spread(values: NDArray, columns: NDArray, n: int, fill: Any) -> NDArray:
    """Per-gene values on all n genes; `fill` for those not fitted."""
    out = np.full((n, *values.shape[1:]), fill, dtype=values.dtype)
    out[columns] = values
    return out


def fits_in_layer(adata: AnnData, name: str) -> bool:
    """Whether a float32 layer is below the limit; warns if not."""
    size = 4 * adata.n_obs * adata.n_vars
    if size > LAYER_LIMIT:
        warnings.warn(
            f"layers[{name!r}] would take {size / 1024**3:.1f} GiB and is not written: read what you need with "
            "`neurst.tl.neurtv_query` or `neurst.get.field`",
            UserWarning,
            stacklevel=4,
        )
    return size <= LAYER_LIMIT


def read_values(field: ExpressionField, coords: NDArray) -> NDArray:
    """(N, G) float32 expected expression; float64 only a chunk at a time."""
    return _read(field, len(field.genes), coords)


def has_std(field: ExpressionField) -> bool:
    """Whether the members of a field are enough for a standard deviation."""
    return field.members is not None and len(field.members.weights) >= LEAST_FOR_STD


def _read(read: Callable[[NDArray], NDArray], width: int, coords: NDArray) -> NDArray:
    out = np.empty((len(coords), width), dtype=np.float32)
    for rows in _row_chunks(len(coords), width):
        out[rows] = read(coords[rows])
    return out


def _row_chunks(n: int, width: int, cells: int = 4_000_000) -> list[slice]:
    step = max(1, cells // max(width, 1))
    return [slice(i, i + step) for i in range(0, n, step)]


def _empty_layer(adata: AnnData) -> NDArray:
    """(n_obs, n_vars) float32 of NaN, the mark of genes that were not fitted."""
    return np.full((adata.n_obs, adata.n_vars), np.nan, dtype=np.float32)


def write_fit(
    adata: AnnData, key: str, *, reading: Reading, fitted: Fitted, network: nets.Network, params: dict, spatial_key: str
) -> None:
    """All slots of a fit, at once: see the table in the docs."""
    field, n = fitted.field, adata.n_vars
    layers = {}
    if fits_in_layer(adata, key):
        reads = {key: field, f"{key}_std": field.std} if has_std(field) else {key: field}
        for name, read in reads.items():
            layers[name] = _empty_layer(adata)
            layers[name][:, reading.genes] = _read(read, len(field.genes), reading.coords)
    latent = field.latent(reading.coords).astype(np.float32)
    names = params["penalties"]
    search = {**fitted.search, "penalty": np.array(names, dtype=object)[fitted.search["penalty"]]}
    slot = {
        "neurst_schema": SCHEMA,
        "versions": versions(),
        "params": params,
        "lam": dict(zip(names, fitted.lam.tolist(), strict=True)),
        "penalty_weights": dict(zip(names, fitted.weights.tolist(), strict=True)),
        "lam_search": search,
        "score": fitted.score,
        "history": fitted.history,
        "field": pack(field, network, reading.problem.coords, _digests(adata.obs_names, reading.coords), spatial_key),
    }
    no_signal = np.isneginf(field.intercept) if field.log_link else ~field.loadings.any(axis=1)
    loadings = _spread(field.loadings.astype(np.float32), reading.genes, n, np.nan)
    columns = {
        f"{key}_fitted": _spread(np.ones(len(reading.genes), dtype=bool), reading.genes, n, False),
        f"{key}_empty": _spread(no_signal, reading.genes, n, False),
        f"{key}_deviance_explained": _spread(fitted.gene_scores, reading.genes, n, np.nan),
    }
    if fitted.dispersion is not None:
        columns[f"{key}_dispersion"] = _spread(fitted.dispersion, reading.genes, n, np.nan)
    make_actual(adata)
    for part, name in _present(adata, key, PLACES):  # a gradient of an older fit must not outlive it
        del getattr(adata, part)[name]
    for name, layer in layers.items():
        adata.layers[name] = layer
    adata.obsm[f"X_{key}"] = latent
    adata.varm[f"{key}_loadings"] = loadings
    for name, column in columns.items():
        adata.var[name] = column
    adata.uns[key] = slot


def write_gradient(adata: AnnData, key: str, kept: Stored, genes: Sequence[str]) -> None:
    """Layers of the derivatives, the mean gradient norm of each gene, and the edge map."""
    size = 4 * adata.n_obs * adata.n_vars
    if size > LAYER_LIMIT:
        msg = (
            f"each derivative would be a layer of {size / 1024**3:.1f} GiB: keep the genes you need, `adata[:, genes].copy()`, or read "
            "`neurst.get.field(adata).select(genes).gradient(coords)`"
        )
        raise ValueError(msg)
    field = kept.field.select(genes)
    coords, masked = read_coords(adata, kept.spatial_key), _masked(adata, key)
    tissue = in_tissue(adata) & ~masked
    columns = adata.var_names.get_indexer(genes)
    layers = [_empty_layer(adata) for _ in range(field.n_dims)]
    total = np.zeros(len(genes))
    for rows in _row_chunks(len(coords), len(genes) * field.n_dims):
        gradient = field.gradient(coords[rows])
        total += np.linalg.norm(gradient[tissue[rows]], axis=-1).sum(0)
        gradient[masked[rows]] = np.nan
        for axis, layer in enumerate(layers):
            layer[rows, columns] = gradient[:, :, axis]
    edge = np.where(masked, np.nan, kept.field.edge(coords))
    make_actual(adata)
    for axis, layer in zip("xyz", layers, strict=False):
        adata.layers[f"{key}_d{axis}"] = layer
    adata.var[f"{key}_gradient"] = _spread(total / max(tissue.sum(), 1), columns, adata.n_vars, np.nan)
    adata.obs[f"{key}_edge"] = edge


def write_scores(adata: AnnData, key: str, *, reading: Reading, rows: Sequence[Mapping[str, Any]]) -> None:
    """Held-out scores: the table of methods and seeds, and shares explained by the field and the best baseline, gene by gene."""
    table = pd.DataFrame([{name: row[name] for name in SCORE_COLUMNS} for row in rows])
    table.index = table.index.astype(str)  # as a file would give it back
    per_gene = {"{}": "field", "{}_baseline": best_baseline(table)}
    columns = {form.format(key): _mean_gene_scores(rows, method, reading) for form, method in per_gene.items()}
    columns = {name: _spread(scores, reading.genes, adata.n_vars, np.nan) for name, scores in columns.items()}
    make_actual(adata)
    for name, column in columns.items():
        adata.var[name] = column
    adata.uns[key] = table


def _mean_gene_scores(rows: Sequence[Mapping[str, Any]], method: str | None, reading: Reading) -> NDArray:
    """(G,) means over seeds; NaN if there is no such method."""
    scores = [row["gene_scores"] for row in rows if row["method"] == method]
    return np.mean(scores, axis=0) if scores else np.full(len(reading.genes), np.nan)


def best_baseline(table: pd.DataFrame) -> str | None:
    """The method of the best mean score but for the field; None if there is no other."""
    means = table[table["method"] != "field"].groupby("method")["score"].mean()
    return str(means.idxmax()) if len(means) else None


def _masked(adata: AnnData, key: str) -> NDArray:
    """(n_obs,) points that a query masked as outside the tissue; none of measured spots."""
    if adata.uns.get(f"{key}_query", {}).get("outside") != "nan":
        return np.zeros(adata.n_obs, dtype=bool)
    return ~adata.obs["in_support"].to_numpy(dtype=bool)


def new_adata(
    adata: AnnData, kept: Stored, key: str, coords: NDArray, values: NDArray, genes: Sequence[str], *, radius: float
) -> AnnData:
    """An AnnData of field values at new coordinates: gene columns, the field, and where tissue is."""
    distance = distance_to_spots(coords, kept.spots)
    obs = pd.DataFrame(
        {"distance_to_spot": distance, "in_support": distance <= radius * (1 + 1e-9)},
        index=pd.Index([f"{key}_{i}" for i in range(len(coords))]),
    )
    known = adata.var_names.is_unique and pd.Index(genes).isin(adata.var_names).all()
    var = adata.var.loc[list(genes)].copy() if known else pd.DataFrame(index=pd.Index(genes))
    out = AnnData(values, obs=obs, var=var)
    if has_std(kept.field):
        out.layers[f"{key}_std"] = _read(kept.field.select(genes).std, len(genes), coords)
    out.obsm["spatial"] = coords
    out.uns[key] = copy.deepcopy(dict(adata.uns[key]))
    out.uns[key]["field"]["spatial_key"] = "spatial"
    out.uns[f"{key}_query"] = {
        "support_radius": float(radius),
        "log_link": int(kept.field.log_link),
        "target_sum": kept.field.target_sum,
    }
    return out


def copy_images(adata: AnnData, out: AnnData, shrink: float) -> None:
    """A copy of ``uns["spatial"]`` whose spots are drawn `shrink` times as wide."""
    if not isinstance(adata.uns.get("spatial"), Mapping):
        return
    images = copy.deepcopy(dict(adata.uns["spatial"]))
    for library in images.values():
        factors = library.get("scalefactors", {}) if isinstance(library, Mapping) else {}
        if "spot_diameter_fullres" in factors:
            factors["spot_diameter_fullres"] = float(factors["spot_diameter_fullres"]) * shrink
    out.uns["spatial"] = images


# ---- reading results


def values_layer(adata: AnnData, key: str) -> str | None:
    """The layer that holds the field's values; None, that is `X`, in what a query returns."""
    if key in adata.layers:
        return key
    if f"{key}_query" in adata.uns:
        return None
    msg = (
        f"`adata.layers[{key!r}]` is missing, dropped or too large to be written: read the field first, "
        "`neurst.tl.neurtv_superres(adata, genes=[...])`"
    )
    raise KeyError(msg)


def read_genes(adata: AnnData, genes: Sequence[str], layer: str | None) -> NDArray:
    """(n_obs, G) values of the named genes, dense."""
    return _dense(read_matrix(adata, layer)[:, adata.var_names.get_indexer(genes)])


def _dense(matrix: Matrix) -> NDArray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def read_measured(
    adata: AnnData, kept: Stored, genes: Sequence[str], layer: str | None, size_factors: str | Sequence[float] | None
) -> NDArray:
    """(n_obs, G) measured expression in the unit of a field; for counts NaN at spots without any."""
    matrix = read_matrix(adata, layer)
    values = _dense(matrix[:, adata.var_names.get_indexer(genes)])
    if not kept.field.log_link:
        return values
    size = read_size(adata, matrix, size_factors)
    size = np.where(size > 0, size, np.nan)
    median, target = np.median(size[size > 0]) if (size > 0).any() else np.nan, kept.field.target_sum
    if max(median / target, target / median) > 2:
        warnings.warn(
            f"the median library size of the spots is {median:.4g}, that of the fit was {target:.4g}: pass all genes, and the "
            "`size_factors` of the fit if it was given any",
            UserWarning,
            stacklevel=4,
        )
    return values * (target / size)[:, None]


def read_source(adata: AnnData, key: str) -> tuple[str | None, str, str | None]:
    """The layer, the `spatial_key` and the column of library sizes (None: totals, or an array) that a field was fitted to."""
    params = adata.uns[key]["params"]
    layer, spatial_key, size = (str(params[name]) for name in ("layer", "spatial_key", "size_factors"))
    return None if layer == "X" else layer, spatial_key, None if size in ("totals", "array") else size


def read_gradient(adata: AnnData, key: str, genes: Sequence[str], n_dims: int) -> NDArray:
    """(n_obs, G, d) stored derivatives."""
    layers = [f"{key}_d{axis}" for axis in "xyz"[:n_dims]]
    _check_gradient(layers[0] in adata.layers, f"`adata.layers[{layers[0]!r}]` is missing", key)
    gradient = np.stack([read_genes(adata, genes, name) for name in layers], axis=-1)
    without = [g for g, known in zip(genes, np.isfinite(gradient).any((0, 2)), strict=True) if not known]
    _check_gradient(not without, f"`adata.layers[{layers[0]!r}]` does not hold genes {without[:3]}", key)
    return gradient


def read_edge(adata: AnnData, key: str) -> NDArray:
    """(n_obs,) stored edge strength."""
    name = f"{key}_edge"
    _check_gradient(name in adata.obs, f"`adata.obs[{name!r}]` is missing", key)
    return adata.obs[name].to_numpy(dtype=float)


def _check_gradient(found: bool, what: str, key: str) -> None:
    if not found:
        option = "" if key == "neurtv" else f", key={key!r}"
        msg = f"{what}: call `neurst.tl.neurtv_gradient(adata{option})` first"
        raise KeyError(msg)


def read_history(adata: AnnData, key: str) -> tuple[Mapping[str, NDArray], Mapping[str, NDArray], Mapping[str, float]]:
    """History of the final fits, the strengths tried with their scores, and the strength chosen for each penalty."""
    slot = adata.uns[key]
    return slot["history"], slot["lam_search"], slot["lam"]


def read_scores(adata: AnnData, key: str) -> tuple[pd.DataFrame, NDArray, NDArray]:
    """The table of held-out scores, and per gene those of the field and of the best baseline, (n_vars,) each."""
    names = [form.format(key) for part, form in SCORE_PLACES if part == "var"]
    if not _are_scores(adata.uns.get(key)) or any(name not in adata.var for name in names):
        option = "" if key == "holdout_score" else f", key_added={key!r}"
        msg = f"`key={key!r}`: `adata` holds no held-out scores under it: call `neurst.tl.holdout_score(adata{option})` first"
        raise KeyError(msg)
    field, baseline = (adata.var[name].to_numpy(dtype=float) for name in names)
    return adata.uns[key], field, baseline
