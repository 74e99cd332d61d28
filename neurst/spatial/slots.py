"""The only reader and writer of AnnData: where a coordinate, a matrix, a field lives, and what is refused at the door."""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from neurst.core import nets
from neurst.core.samples import Box
from neurst.spatial.expression import ExpressionField
from neurst.spatial.fitting import Matrix, Problem, entries, holds_counts, library_size
from neurst.spatial.tissue import distance_to_spots, distinct

SCHEMA = 1  # of uns[key]; raise it when the layout below changes
LAYER_LIMIT = 2 * 1024**3  # bytes; a larger layer is not written
log = logging.getLogger("neurst")


# ---- reading what a user brings


def read_matrix(adata: AnnData, layer: str | None) -> Matrix:
    """`X` or a layer in memory, as CSR or a dense array."""
    if adata.isbacked:
        msg = f"`adata` is backed by the file {adata.filename}: read it into memory first, `adata = adata.to_memory()`"
        raise ValueError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"`layer={layer!r}` is not in `adata.layers`, which holds {_names(adata.layers)}: pass one of these, or None for X"
        raise KeyError(msg)
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        msg = "`adata.X` is empty: pass `layer=`, the name of the layer to fit"
        raise ValueError(msg)
    if type(matrix).__module__.startswith("dask."):
        matrix = matrix.compute()
    if sparse.issparse(matrix):
        return sparse.csr_array(matrix)
    return np.asarray(matrix)


def _names(mapping: Mapping) -> list[str]:
    return [k for k in mapping if k is not None]


def read_coords(adata: AnnData, spatial_key: str) -> NDArray:
    """(n_obs, d) positions of all spots, float64, checked to be finite."""
    if spatial_key not in adata.obsm:
        msg = (
            f"`spatial_key={spatial_key!r}` is not in `adata.obsm`, which holds {_names(adata.obsm)}: pass one of these, or store "
            f"the positions (n_obs, 2 or 3) as `adata.obsm[{spatial_key!r}]`"
        )
        raise KeyError(msg)
    xy = np.asarray(adata.obsm[spatial_key])
    if xy.ndim != 2 or xy.shape[1] not in (2, 3):
        msg = f"`adata.obsm[{spatial_key!r}]` has shape {xy.shape}: expected (n_obs, 2) or (n_obs, 3)"
        raise ValueError(msg)
    xy = xy.astype(float)
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if len(bad):
        msg = (
            f"`adata.obsm[{spatial_key!r}]` is not finite at {len(bad)} of {len(xy)} spots (first: "
            f"{list(adata.obs_names[bad[:3]])}): drop them before fitting"
        )
        raise ValueError(msg)
    return xy


def in_tissue(adata: AnnData) -> NDArray:
    """(n_obs,) mask: spots that are not marked ``in_tissue == 0``."""
    if "in_tissue" not in adata.obs:
        return np.ones(adata.n_obs, dtype=bool)
    return adata.obs["in_tissue"].astype(int).to_numpy() != 0


def check_one_section(adata: AnnData, library_key: str | None) -> None:
    """Several sections share no coordinates: refuse them."""
    if library_key is not None:
        if library_key not in adata.obs:
            msg = f"`library_key={library_key!r}` is not in `adata.obs`, which holds {_names(adata.obs)}"
            raise KeyError(msg)
        sections = list(pd.unique(adata.obs[library_key].astype(str)))
        where = f"`adata.obs[{library_key!r}]`"
        example = f"adata[adata.obs[{library_key!r}] == {sections[0]!r}].copy()"
    else:
        images = adata.uns.get("spatial", {})
        sections = list(images) if isinstance(images, Mapping) else []
        where, example = (
            '`adata.uns["spatial"]`',
            "adata[adata.obs[...] == section].copy(), with its own entry in uns['spatial']",
        )
    if len(sections) > 1:
        msg = (
            f"{where} names {len(sections)} sections ({', '.join(sections[:4])}), whose coordinates are not shared: split by section for "
            f"now and fit each, e.g. `{example}`"
        )
        raise ValueError(msg)


def check_positions(coords: NDArray, spatial_key: str) -> None:
    """At least 4 spots, 3 distinct ones not on a line (not in a plane, in 3-d)."""
    d, points = coords.shape[1], distinct(coords)
    where = f"`adata.obsm[{spatial_key!r}]`"
    if len(coords) < 4:
        msg = f"there are {len(coords)} spots with expression in the tissue: expected at least 4; check `in_tissue` and empty spots"
        raise ValueError(msg)
    if len(points) == 1:
        msg = (
            f"all {len(coords)} spots of {where} are at one point, {points[0].tolist()}: expected positions that differ"
        )
        raise ValueError(msg)
    spread = np.linalg.svd(points - points.mean(0), compute_uv=False)
    if len(spread) < d or spread[-1] < 1e-9 * spread[0]:
        msg = (
            f"the {len(points)} distinct positions in {where} lie on a {'line' if d == 2 else 'plane or line'}: a field in {d} "
            f"dimensions needs spots that span them{'; for one flat section pass 2-d positions' if d == 3 else ''}"
        )
        raise ValueError(msg)


def gene_index(adata: AnnData, genes: Sequence[str] | str | None) -> NDArray:
    """Columns of the named genes, in the order of `adata.var_names`; all if None."""
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()][0]
        msg = f"`adata.var_names` are not unique (first: {twice!r}): call `adata.var_names_make_unique()` first"
        raise ValueError(msg)
    if genes is None:
        return np.arange(adata.n_vars)
    return np.sort(adata.var_names.get_indexer(known_genes(genes, adata.var_names)))


def known_genes(genes: Sequence[str] | str, known: Sequence[str]) -> list[str]:
    """The names as a list, each once, if all are known; else an error with the nearest matches."""
    genes = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not genes:
        msg = "`genes` is empty: name at least one gene, or pass None for all"
        raise ValueError(msg)
    have = set(known)
    unknown = [str(g) for g in genes if g not in have]
    if unknown:
        near = {g: _nearest(g, known) for g in unknown[:3]}
        hints = "; ".join(f"{g!r}: nearest are {m}" if m else f"{g!r}: nothing alike" for g, m in near.items())
        msg = f"`genes` names {len(unknown)} that are not among the {len(known)} at hand ({hints})"
        raise KeyError(msg)
    return genes


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    lower = {str(k).lower(): str(k) for k in known}
    return [lower[m] for m in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]


def pick_likelihood(adata: AnnData, matrix: Matrix, layer: str | None, likelihood: str) -> str:
    """The data term for a matrix: looked up if ``"auto"``, checked if named."""
    where = "`adata.X`" if layer is None else f"`adata.layers[{layer!r}]`"
    values = entries(matrix)
    if not np.all(np.isfinite(values)):
        msg = f"{where} holds {int((~np.isfinite(values)).sum())} NaN or infinite values: replace or drop them before fitting"
        raise ValueError(msg)
    counts = holds_counts(matrix)
    if likelihood == "auto":
        if counts:
            return "poisson"
        if layer is None:
            for name in _names(adata.layers):
                if name == "counts" or "count" in name.lower():
                    log.info(
                        "X holds normalised values, but layer %r looks like counts: pass layer=%r for a count likelihood",
                        name,
                        name,
                    )
        log.info("%s is not counts: fitting normalised values with a Gaussian likelihood", where)
        return "gaussian"
    if likelihood != "gaussian":
        negative = int((values < 0).sum())
        if negative:
            msg = (
                f"{where} holds {negative} negative values, which {likelihood!r} cannot have: pass a layer of raw counts, or "
                "likelihood='gaussian' for normalised data"
            )
            raise ValueError(msg)
        if not counts:
            warnings.warn(
                f"{where} holds values that are not whole numbers; {likelihood!r} takes them as expected counts. If they are "
                "normalised, pass a layer of raw counts or likelihood='gaussian'",
                UserWarning,
                stacklevel=4,
            )
    return likelihood


def read_size(adata: AnnData, matrix: Matrix, size_factors: str | Sequence[float] | None) -> NDArray:
    """(n_obs,) library sizes: the total over all genes of the matrix, or what the user gives."""
    if size_factors is None:
        return library_size(matrix)
    if isinstance(size_factors, str):
        if size_factors not in adata.obs:
            msg = f"`size_factors={size_factors!r}` is not in `adata.obs`, which holds {_names(adata.obs)}"
            raise KeyError(msg)
        size_factors = adata.obs[size_factors].to_numpy()
    size = np.asarray(size_factors, dtype=float).ravel()
    if len(size) != adata.n_obs or not np.all(np.isfinite(size)) or np.any(size < 0):
        msg = f"`size_factors` has {len(size)} values: expected {adata.n_obs} finite numbers >= 0, one for each spot"
        raise ValueError(msg)
    return size


def check_key(adata: AnnData, key: str) -> None:
    """`key` can be stored, and what is stored under it is ours to replace."""
    if not key or "/" in key:
        msg = f"`key_added={key!r}`: expected a name without '/', which files cannot store"
        raise ValueError(msg)
    ours = isinstance(adata.uns.get(key), Mapping) and "neurst_schema" in adata.uns[key]
    taken = [f"uns[{key!r}]"] if key in adata.uns and not ours else []
    if not ours and key in adata.layers:
        taken.append(f"layers[{key!r}]")
    if not ours and f"X_{key}" in adata.obsm:
        taken.append(f"obsm['X_{key}']")
    if taken:
        msg = f"`key_added={key!r}`: {' and '.join(taken)} already holds something else; pass another `key_added`"
        raise ValueError(msg)


@dataclass(frozen=True, eq=False)
class Reading:
    """What a fit reads from an AnnData."""

    problem: Problem  # fitted spots and genes
    likelihood: str
    spots: NDArray  # (n_obs,) mask of the fitted spots
    tissue: NDArray  # (n_obs,) mask of the spots that count as tissue
    genes: NDArray  # columns fitted
    coords: NDArray  # (n_obs, d)
    target_sum: float


def read(
    adata: AnnData,
    *,
    genes: Sequence[str] | str | None,
    layer: str | None,
    spatial_key: str,
    library_key: str | None,
    likelihood: str,
    size_factors: str | Sequence[float] | None,
) -> Reading:
    """Everything a fit needs, checked once; nothing is written."""
    check_one_section(adata, library_key)
    coords = read_coords(adata, spatial_key)
    columns = gene_index(adata, genes)
    matrix = read_matrix(adata, layer)
    tissue = in_tissue(adata)
    likelihood = pick_likelihood(adata, matrix[tissue], layer, likelihood)
    size = None if likelihood == "gaussian" else read_size(adata, matrix, size_factors)
    fitted = tissue if size is None else tissue & (size > 0)
    check_positions(coords[fitted], spatial_key)
    empty = int(tissue.sum() - fitted.sum())
    if empty:
        log.info(
            "%d of %d spots have no counts: they are predicted but do not inform the fit", empty, int(tissue.sum())
        )
    values = matrix[fitted][:, columns]
    names = adata.var_names.to_numpy().astype(str)[columns]
    problem = Problem(coords[fitted], values, None if size is None else size[fitted], names)
    target_sum = 1.0 if size is None else float(np.median(size[fitted]))
    return Reading(problem, likelihood, fitted, tissue, columns, coords, target_sum)


# ---- the stored field


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()


def pack(
    field: ExpressionField, network: nets.Network, spots: NDArray, names: Sequence[str], spatial_key: str
) -> dict[str, Any]:
    """A field and the positions that support it, as plain arrays, strings and numbers."""
    weights = {name.replace(".", "-"): w.numpy().astype(np.float32) for name, w in field.net.state_dict().items()}
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
        "weights": weights,
        "spots": spots,
        "spot_names_sha256": _digest(names),
        "spatial_key": spatial_key,
    }


def _n_outputs(field: ExpressionField) -> int:
    with torch.no_grad():
        return field.net(torch.zeros(1, field.n_dims, dtype=torch.double)).shape[1]


FIELD_PARTS = (
    "genes", "loadings", "intercept", "rotation", "shift", "log_link", "target_sum", "box_center", "box_scale", "network",
    "n_outputs", "weights", "spots", "spot_names_sha256", "spatial_key",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stored:
    """A field read back from ``uns[key]``."""

    field: ExpressionField
    spots: NDArray  # (N, d) positions it was fitted to
    spot_names_sha256: str
    spatial_key: str


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
        msg = f"`key={key!r}` is not in `adata.uns`, which holds {_names(adata.uns)}: call `neurst.tl.neurtv_fit(adata, key_added={key!r})` first"
        raise KeyError(msg)
    slot = adata.uns[key]
    if not (isinstance(slot, Mapping) and "neurst_schema" in slot):
        msg = f"`adata.uns[{key!r}]` was not written by neurst: pass the `key_added` of a fit"
        raise ValueError(msg)
    if int(slot["neurst_schema"]) > SCHEMA:
        written = slot.get("versions", {}).get("neurst", "unknown")
        msg = (
            f"`adata.uns[{key!r}]` has schema {int(slot['neurst_schema'])}, written by neurst {written}; this neurst reads up to {SCHEMA}: "
            "upgrade it (`pip install -U neurst`), or refit with neurtv_fit"
        )
        raise ValueError(msg)
    part = slot.get("field", {})
    missing = [name for name in FIELD_PARTS if name not in part]
    if missing:
        msg = f"`adata.uns[{key!r}]['field']` is incomplete, it lacks {missing}: refit with `neurst.tl.neurtv_fit`"
        raise ValueError(msg)
    try:
        return _unpack(part)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        msg = f"`adata.uns[{key!r}]['field']` is damaged ({str(error).splitlines()[0]}): refit with `neurst.tl.neurtv_fit`"
        raise ValueError(msg) from error


def _unpack(part: Mapping[str, Any]) -> Stored:
    box = Box(torch.from_numpy(np.asarray(part["box_center"], dtype=float)), float(part["box_scale"]))
    net = nets.from_dict(part["network"]).build(len(box.center), int(part["n_outputs"])).double()
    weights = {
        name.replace("-", "."): torch.from_numpy(np.asarray(w, dtype=float)) for name, w in part["weights"].items()
    }
    net.load_state_dict(weights)
    arrays = [np.asarray(part[name], dtype=float) for name in ("rotation", "shift", "loadings", "intercept")]
    genes = np.array([str(g) for g in part["genes"]])
    if not len(genes) == len(arrays[2]) == len(arrays[3]):
        msg = f"{len(genes)} genes, {len(arrays[2])} loadings, {len(arrays[3])} intercepts"
        raise ValueError(msg)
    field = ExpressionField(
        genes, box, net.requires_grad_(False).eval(), *arrays, bool(part["log_link"]), float(part["target_sum"])
    )
    spots = np.asarray(part["spots"], dtype=float)
    return Stored(field, spots, str(part["spot_names_sha256"]), str(part["spatial_key"]))


def check_same_spots(adata: AnnData, kept: Stored, key: str) -> None:
    """The stored field was fitted to the spots that `adata` holds now."""
    coords = read_coords(adata, kept.spatial_key)
    if _digest(adata.obs_names) != kept.spot_names_sha256:
        what = f"other spots (their names differ from the {adata.n_obs} of `adata`)"
    elif not _contains(coords, kept.spots):
        what = f"other coordinates than `adata.obsm[{kept.spatial_key!r}]` holds now"
    else:
        return
    msg = f"the field in `adata.uns[{key!r}]` was fitted to {what}: refit with `neurst.tl.neurtv_fit(adata, key_added={key!r})`"
    raise ValueError(msg)


def _contains(coords: NDArray, spots: NDArray) -> bool:
    return coords.shape[1] == spots.shape[1] and bool(np.all(distance_to_spots(spots, coords) == 0))


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


def fits_in_layer(adata: AnnData, name: str, count: int = 1) -> bool:
    """Whether `count` float32 layers are below the limit; warns if not."""
    size = 4 * adata.n_obs * adata.n_vars * count
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
    out = np.empty((len(coords), len(field.genes)), dtype=np.float32)
    for rows in _row_chunks(len(coords), len(field.genes)):
        out[rows] = field(coords[rows])
    return out


def _row_chunks(n: int, width: int, cells: int = 4_000_000) -> list[slice]:
    step = max(1, cells // max(width, 1))
    return [slice(i, i + step) for i in range(0, n, step)]


def _empty_layer(adata: AnnData) -> NDArray:
    """(n_obs, n_vars) float32 of NaN, the mark of genes that were not fitted."""
    return np.full((adata.n_obs, adata.n_vars), np.nan, dtype=np.float32)


def write_fit(
    adata: AnnData, key: str, *, reading: Reading, fitted: Any, network: nets.Network, params: dict, spatial_key: str
) -> None:
    """All slots of a fit, at once: see the table in the docs."""
    field, n = fitted.field, adata.n_vars
    layer = None
    if fits_in_layer(adata, key):
        layer = _empty_layer(adata)
        layer[:, reading.genes] = read_values(field, reading.coords)
    latent = field.latent(reading.coords).astype(np.float32)
    slot = {
        "neurst_schema": SCHEMA,
        "versions": versions(),
        "params": params,
        "lam": fitted.lam,
        "lam_path": fitted.path,
        "score": fitted.score,
        "history": fitted.history,
        "field": pack(field, network, reading.problem.coords, adata.obs_names, spatial_key),
    }
    no_signal = np.isneginf(field.intercept) if field.log_link else ~field.loadings.any(axis=1)
    make_actual(adata)
    if layer is not None:
        adata.layers[key] = layer
    adata.obsm[f"X_{key}"] = latent
    adata.varm[f"{key}_loadings"] = _spread(field.loadings.astype(np.float32), reading.genes, n, np.nan)
    adata.var[f"{key}_fitted"] = _spread(np.ones(len(reading.genes), dtype=bool), reading.genes, n, False)
    adata.var[f"{key}_empty"] = _spread(no_signal, reading.genes, n, False)
    adata.var[f"{key}_deviance_explained"] = _spread(fitted.gene_scores, reading.genes, n, np.nan)
    adata.uns[key] = slot


def write_gradient(adata: AnnData, key: str, kept: Stored, genes: Sequence[str]) -> None:
    """Layers of the derivatives, the mean gradient norm of each gene, and the edge map."""
    field = kept.field.select(genes)
    coords, tissue = read_coords(adata, kept.spatial_key), in_tissue(adata)
    columns = adata.var_names.get_indexer(genes)
    layers = [_empty_layer(adata) for _ in range(field.n_dims)]
    total = np.zeros(len(genes))
    for rows in _row_chunks(len(coords), len(genes) * field.n_dims):
        gradient = field.gradient(coords[rows])
        total += np.linalg.norm(gradient[tissue[rows]], axis=-1).sum(0)
        for axis, layer in enumerate(layers):
            layer[rows, columns] = gradient[:, :, axis]
    edge = kept.field.edge(coords)
    make_actual(adata)
    for axis, layer in zip("xyz", layers, strict=False):
        adata.layers[f"{key}_d{axis}"] = layer
    adata.var[f"{key}_gradient"] = _spread(total / tissue.sum(), columns, adata.n_vars, np.nan)
    adata.obs[f"{key}_edge"] = edge


def new_adata(
    adata: AnnData, kept: Stored, key: str, coords: NDArray, values: NDArray, genes: Sequence[str], *, radius: float
) -> AnnData:
    """An AnnData of field values at new coordinates: gene columns, the field, and where tissue is."""
    distance = distance_to_spots(coords, kept.spots)
    obs = pd.DataFrame(
        {"distance_to_spot": distance, "in_support": distance <= radius * (1 + 1e-9)},
        index=pd.Index([f"{key}_{i}" for i in range(len(coords))]),
    )
    known = pd.Index(genes).isin(adata.var_names).all()
    var = adata.var.loc[list(genes)].copy() if known else pd.DataFrame(index=pd.Index(genes))
    out = AnnData(values, obs=obs, var=var)
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
    values = read_genes(adata, genes, layer)
    if not kept.field.log_link:
        return values
    size = read_size(adata, read_matrix(adata, layer), size_factors)
    return values * (kept.field.target_sum / np.where(size > 0, size, np.nan))[:, None]


def read_source(adata: AnnData, key: str) -> tuple[str | None, str]:
    """The layer and the `spatial_key` that a field was fitted to."""
    params = adata.uns[key]["params"]
    return None if params["layer"] == "X" else str(params["layer"]), str(params["spatial_key"])


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


def read_history(adata: AnnData, key: str) -> tuple[Mapping[str, NDArray], Mapping[str, NDArray], float]:
    """History of the final fit, the strengths tried with their scores, and the strength chosen."""
    slot = adata.uns[key]
    return slot["history"], slot["lam_path"], float(slot["lam"])
