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
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from neurst.core import nets
from neurst.core.samples import Box
from neurst.spatial.expression import ExpressionField
from neurst.spatial.fitting import Matrix, Problem, entries, holds_counts, library_size
from neurst.spatial.tissue import distance_to_spots, distinct

SCHEMA = 1  # of uns[key]; raise it when the layout below changes
LAYER_LIMIT = 2 * 1024**3  # bytes; a larger layer is not written
DEFAULT_KEY = "neurtv"
LARGEST = 1e30  # sums of larger values overflow float32
MOST_NAMES = 12  # listed in an error
TISSUE_MARKS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
PLACES = (  # of results under a key
    ("layers", "{}"), ("layers", "{}_dx"), ("layers", "{}_dy"), ("layers", "{}_dz"), ("obsm", "X_{}"), ("varm", "{}_loadings"),
    ("var", "{}_fitted"), ("var", "{}_empty"), ("var", "{}_deviance_explained"), ("var", "{}_gradient"), ("obs", "{}_edge"),
    ("uns", "{}"),
)  # fmt: skip
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
        msg = f"`adata.X` is None: pass `layer=`, the name of the layer to fit; `adata.layers` holds {_names(adata.layers)}"
        raise ValueError(msg)
    if type(matrix).__module__.startswith("dask."):
        matrix = matrix.compute()
    matrix = _as_csr(matrix) if sparse.issparse(matrix) else np.asarray(matrix)
    if matrix.dtype.kind not in "biuf":
        msg = f"{_matrix_name(layer)} holds values of type {matrix.dtype}: expected numbers; convert them, e.g. with `.astype('float32')`"
        raise ValueError(msg)
    # totals of float16 would overflow
    return matrix if matrix.dtype in (np.float32, np.float64) else matrix.astype(np.float32)


def _as_csr(matrix: Any) -> sparse.csr_array:
    csr = sparse.csr_array(matrix)
    if not csr.has_canonical_format:  # an entry may be stored as several that add up
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _matrix_name(layer: str | None) -> str:
    return "`adata.X`" if layer is None else f"`adata.layers[{layer!r}]`"


def _names(mapping: Mapping) -> str:
    names = [repr(name) for name in mapping if name is not None]
    return ", ".join(names[:MOST_NAMES] + ["..."] * (len(names) > MOST_NAMES)) or "nothing"


def as_floats(values: ArrayLike, where: str) -> NDArray:
    """The values in float64, if they are numbers."""
    try:
        return np.asarray(values).astype(float)
    except (TypeError, ValueError) as error:
        msg = f"{where} cannot be read as numbers ({error}): convert it first"
        raise ValueError(msg) from error


def read_coords(adata: AnnData, spatial_key: str) -> NDArray:
    """(n_obs, d) positions of all spots, float64, checked to be finite."""
    if spatial_key not in adata.obsm:
        msg = (
            f"`spatial_key={spatial_key!r}` is not in `adata.obsm`, which holds {_names(adata.obsm)}: pass one of these, or store "
            f"the positions (n_obs, 2 or 3) as `adata.obsm[{spatial_key!r}]`"
        )
        raise KeyError(msg)
    xy = as_floats(adata.obsm[spatial_key], f"`adata.obsm[{spatial_key!r}]`")
    if xy.ndim != 2 or xy.shape[1] not in (2, 3):
        msg = f"`adata.obsm[{spatial_key!r}]` has shape {xy.shape}: expected (n_obs, 2) or (n_obs, 3), the columns x, y and perhaps z"
        raise ValueError(msg)
    bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if len(bad):
        msg = (
            f"`adata.obsm[{spatial_key!r}]` is not finite at {len(bad)} of {len(xy)} spots (first: "
            f"{list(adata.obs_names[bad[:3]])}): drop them before fitting"
        )
        raise ValueError(msg)
    return xy


def in_tissue(adata: AnnData) -> NDArray:
    """(n_obs,) mask: spots that are not marked ``in_tissue == 0``, be it a number, a bool, a string or a category."""
    if "in_tissue" not in adata.obs:
        return np.ones(adata.n_obs, dtype=bool)
    codes, values = pd.factorize(adata.obs["in_tissue"], use_na_sentinel=False)
    marks = [TISSUE_MARKS.get(str(value).lower()) for value in values]
    unknown = np.array([mark is None for mark in marks], dtype=bool)[codes]
    if unknown.any():
        first = int(np.argmax(unknown))
        msg = (
            f"`adata.obs['in_tissue']` is neither 0 nor 1 at {unknown.sum()} of {adata.n_obs} spots (first: {adata.obs_names[first]!r}, "
            f"{values[codes[first]]!s}): set it to 0 or 1 there, or delete the column to take every spot as tissue"
        )
        raise ValueError(msg)
    return np.array(marks, dtype=bool)[codes]


def check_one_section(adata: AnnData, library_key: str | None) -> None:
    """Several sections share no coordinates: refuse them."""
    if library_key is not None:
        _check_column(adata, "library_key", library_key)
        sections, where = adata.obs[library_key].unique().tolist(), f"`adata.obs[{library_key!r}]`"
        column, section = repr(library_key), repr(sections[0]) if sections else ""
    else:
        images = adata.uns.get("spatial", {})
        sections, where = list(images) if isinstance(images, Mapping) else [], "`adata.uns['spatial']`"
        column, section = "column", "section"
    if len(sections) > 1:
        msg = (
            f"{where} names {len(sections)} sections ({_names(sections)}), each with coordinates of its own: split by section and fit each "
            f"on its own, `one = adata[adata.obs[{column}] == {section}].copy()` and `neurst.tl.neurtv_fit(one, library_key={column})`"
        )
        raise ValueError(msg)


def check_positions(coords: NDArray, spatial_key: str, n_obs: int) -> None:
    """At least 4 spots, 3 distinct ones not on a line (not in a plane, in 3-d)."""
    where = f"`adata.obsm[{spatial_key!r}]`"
    if len(coords) < 4:
        msg = (
            f"{len(coords)} of {n_obs} spots are in the tissue and hold expression: expected at least 4; check `adata.obs['in_tissue']` "
            "and that `layer` is the one to fit"
        )
        raise ValueError(msg)
    d, points = coords.shape[1], distinct(coords)
    if len(points) == 1:
        msg = f"all {len(coords)} spots of {where} are at one point, {points[0].tolist()}: store the positions of the spots there"
        raise ValueError(msg)
    spread = np.linalg.svd(points - points.mean(0), compute_uv=False)
    if len(spread) < d or spread[-1] < 1e-9 * spread[0]:
        remedy = (
            "check its columns"
            if d == 2
            else "pass the 2-d positions of a flat section, its first two columns if z is constant"
        )
        msg = (
            f"the {len(points)} distinct positions in {where} lie on a {'line' if d == 2 else 'plane or a line'}: a field in {d} "
            f"dimensions needs spots that span them; {remedy}"
        )
        raise ValueError(msg)


def gene_index(adata: AnnData, genes: Sequence[str] | str | None) -> NDArray:
    """Columns of the named genes, in the order of `adata.var_names`; all if None."""
    check_var_names(adata)
    if genes is None:
        return np.arange(adata.n_vars)
    return np.sort(adata.var_names.get_indexer(known_genes(genes, adata.var_names, "genes in `adata.var_names`")))


def check_var_names(adata: AnnData) -> None:
    """There are genes, each with a name of its own."""
    if adata.n_vars == 0:
        msg = "`adata` has 0 genes: expected at least 1; look for a filter that dropped them all"
        raise ValueError(msg)
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()][0]
        msg = f"`adata.var_names` are not unique (first: {twice!r}): call `adata.var_names_make_unique()` first"
        raise ValueError(msg)


def known_genes(genes: Sequence[str] | str, known: Sequence[str], what: str = "genes at hand") -> list[str]:
    """The names as a list, each once, if all are known; else an error with the nearest matches."""
    genes = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not genes:
        msg = "`genes` is empty: name at least one gene, or pass None for all"
        raise ValueError(msg)
    have = set(known)
    unknown = [str(g) for g in genes if g not in have]
    if unknown:
        near = {g: _nearest(g, known) for g in unknown[:3]}
        hints = "; ".join(f"{g!r}: did you mean {m}?" if m else f"{g!r}: nothing is alike" for g, m in near.items())
        msg = f"`genes`: {len(unknown)} of {len(genes)} names are not among the {len(known)} {what}. {hints}"
        raise KeyError(msg)
    return genes


def _nearest(name: str, known: Sequence[str]) -> str:
    lower = {str(k).lower(): str(k) for k in known}
    near = [lower[name.lower()]] if name.lower() in lower else []
    near = near or [lower[m] for m in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    return " or ".join(map(repr, near))


def pick_likelihood(adata: AnnData, matrix: Matrix, layer: str | None, likelihood: str) -> str:
    """The data term for a matrix: looked up if ``"auto"``, checked if named."""
    where, values = _matrix_name(layer), entries(matrix)
    _check_values(values, where)
    counts = holds_counts(matrix)
    if likelihood == "auto":
        if counts:
            return "poisson"
        log.info("%s is not counts: fitting normalised values with a Gaussian likelihood", where)
        raw = [name for name in adata.layers if name is not None and "count" in name.lower()] if layer is None else []
        if raw:
            log.warning(
                "`adata.X` is normalised, but there is a layer %r: pass layer=%r to fit counts, or likelihood='gaussian' to fit X",
                raw[0],
                raw[0],
            )
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


def _check_values(values: NDArray, where: str) -> None:
    low, high = values.min(initial=0), values.max(initial=0)  # NaN if any value is
    if -LARGEST < low and high < LARGEST:
        return
    bad = int((~np.isfinite(values)).sum())
    if bad:
        msg = f"{where} holds {bad} NaN or infinite values: replace or drop them before fitting"
    else:
        msg = f"{where} holds values from {low:.3g} to {high:.3g}: expected less than {LARGEST:g}; look for overflow or a fill value"
    raise ValueError(msg)


def read_size(adata: AnnData, matrix: Matrix, size_factors: str | Sequence[float] | None) -> NDArray:
    """(n_obs,) library sizes: the total over all genes of the matrix, or what the user gives."""
    if size_factors is None:
        return library_size(matrix)
    where = "`size_factors`"
    if isinstance(size_factors, str):
        _check_column(adata, "size_factors", size_factors)
        size_factors, where = adata.obs[size_factors], f"`size_factors`, `adata.obs[{size_factors!r}]`,"
    if isinstance(size_factors, pd.Series) and not size_factors.index.equals(adata.obs_names):
        msg = "`size_factors` is a Series whose index is not `adata.obs_names`: align it, or pass it `.to_numpy()` in the order of the spots"
        raise ValueError(msg)
    size = as_floats(size_factors, where).squeeze()  # row sums of a sparse matrix are (n_obs, 1)
    if size.shape != (adata.n_obs,):
        msg = f"{where} has shape {size.shape}: expected ({adata.n_obs},), one library size for each spot"
        raise ValueError(msg)
    bad = np.flatnonzero(~((size >= 0) & np.isfinite(size)))
    if len(bad):
        msg = (
            f"{where} is negative or not finite at {len(bad)} of {len(size)} spots (first: {adata.obs_names[bad[0]]!r}, {size[bad[0]]}): "
            "expected library sizes; 0 leaves a spot out of the fit"
        )
        raise ValueError(msg)
    return size


def _check_column(adata: AnnData, argument: str, column: str) -> None:
    if column not in adata.obs:
        msg = (
            f"`{argument}={column!r}` is not in `adata.obs`, which holds {_names(adata.obs)}: pass one of these columns"
        )
        raise KeyError(msg)


def check_key(adata: AnnData, key: str) -> None:
    """`key` can be stored, and what is stored under it is ours to replace."""
    if not (isinstance(key, str) and key and "/" not in key):
        msg = f"`key_added={key!r}`: expected a name, at least one letter and no '/', which files cannot store"
        raise ValueError(msg)
    taken = [] if _is_ours(adata.uns.get(key)) else _present(adata, key)
    if taken:
        places = ", ".join(f"`adata.{part}[{name!r}]`" for part, name in taken)
        msg = (
            f"`key_added={key!r}` would overwrite {places}, which is not from a fit in `adata.uns[{key!r}]`: pass another `key_added`, or "
            "delete it first"
        )
        raise ValueError(msg)


def _is_ours(slot: Any) -> bool:
    return isinstance(slot, Mapping) and "neurst_schema" in slot


def _present(adata: AnnData, key: str) -> list[tuple[str, str]]:
    """Which places of results under `key` are taken."""
    return [(part, name) for part, form in PLACES if (name := form.format(key)) in getattr(adata, part)]


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
    if likelihood == "gaussian" and size_factors is not None:
        msg = "`size_factors` has no meaning for normalised values, to which a Gaussian likelihood is fitted: it is ignored"
        warnings.warn(msg, UserWarning, stacklevel=3)
    size = None if likelihood == "gaussian" else read_size(adata, matrix, size_factors)
    fitted = tissue if size is None else tissue & (size > 0)
    check_positions(coords[fitted], spatial_key, adata.n_obs)
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
        msg = f"`key={key!r}` is not in `adata.uns`, which holds {_names(adata.uns)}: call `{_refit(key)}` first"
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
    missing = [name for name in FIELD_PARTS if name not in part] if isinstance(part, Mapping) else ["everything"]
    if missing:
        msg = f"{where} is incomplete, its 'field' lacks {', '.join(missing)}: {refit}"
        raise ValueError(msg)
    try:
        return _unpack(part)
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


def _unpack(part: Mapping[str, Any]) -> Stored:
    genes = np.array([str(g) for g in part["genes"]])
    d, r = np.size(part["box_center"]), np.size(part["shift"])
    center, scale = _array(part, "box_center", d), _positive(part, "box_scale")
    net = nets.from_dict(part["network"]).build(d, int(part["n_outputs"])).double()
    shapes = {name: w.shape for name, w in net.state_dict().items()}
    weights = {name.replace("-", "."): w for name, w in part["weights"].items()}
    net.load_state_dict({name: torch.from_numpy(_array(weights, name, *shapes.get(name, ()))) for name in weights})
    field = ExpressionField(
        genes,
        Box(torch.from_numpy(center), scale),
        net.requires_grad_(False).eval(),
        rotation=_array(part, "rotation", r, r),
        shift=_array(part, "shift", r),
        loadings=_array(part, "loadings", len(genes), r),
        intercept=_array(part, "intercept", len(genes), least=-np.inf),
        log_link=bool(int(part["log_link"])),
        target_sum=_positive(part, "target_sum"),
    )
    spots = _array(part, "spots", max(4, len(part["spots"])), d)
    return Stored(field, spots, str(part["spot_names_sha256"]), str(part["spatial_key"]))


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


def check_same_spots(adata: AnnData, kept: Stored, key: str) -> None:
    """The stored field was fitted to the spots that `adata` holds now."""
    coords = read_coords(adata, kept.spatial_key)
    if _digest(adata.obs_names) != kept.spot_names_sha256:
        what = f"other spots than the {adata.n_obs} of `adata` now: their names or their order differ"
    elif not _contains(coords, kept.spots):
        what = f"other coordinates than `adata.obsm[{kept.spatial_key!r}]` holds now"
    else:
        return
    msg = f"the field in `adata.uns[{key!r}]` was fitted to {what}. Refit with `{_refit(key)}`"
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
    loadings = _spread(field.loadings.astype(np.float32), reading.genes, n, np.nan)
    columns = {
        f"{key}_fitted": _spread(np.ones(len(reading.genes), dtype=bool), reading.genes, n, False),
        f"{key}_empty": _spread(no_signal, reading.genes, n, False),
        f"{key}_deviance_explained": _spread(fitted.gene_scores, reading.genes, n, np.nan),
    }
    make_actual(adata)
    for part, name in _present(adata, key):  # a gradient of an older fit must not outlive it
        del getattr(adata, part)[name]
    if layer is not None:
        adata.layers[key] = layer
    adata.obsm[f"X_{key}"] = latent
    adata.varm[f"{key}_loadings"] = loadings
    for name, column in columns.items():
        adata.var[name] = column
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
    known = adata.var_names.is_unique and pd.Index(genes).isin(adata.var_names).all()
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


def read_history(adata: AnnData, key: str) -> tuple[Mapping[str, NDArray], Mapping[str, NDArray], float]:
    """History of the final fit, the strengths tried with their scores, and the strength chosen."""
    slot = adata.uns[key]
    return slot["history"], slot["lam_path"], float(slot["lam"])
