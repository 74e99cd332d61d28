"""Reads the input of a fit from an AnnData, and checks it before any work."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from neurst.core.arguments import TEXT, instance, real_array, shown, warn
from neurst.spatial.adata.keys import check_column, is_fit, names_of
from neurst.spatial.adata.sections import check_one_section
from neurst.spatial.data import SpotData
from neurst.spatial.geometry import distinct, geometry
from neurst.spatial.matrix import Matrix, dense, holds_counts, library_size, stored_values
from neurst.spatial.observation import Counts, Normalised, Observation

LARGEST = 1e30  # sums of larger values overflow float32
LEAST_SPOTS = 4
SPOT_DIAMETER = 0.55  # of a Visium spot, in pitches
SANE_DIAMETERS = (0.2, 1.2)  # of spots on a lattice, in pitches
TISSUE_MARKS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
LIKELIHOODS = ("poisson", "negative_binomial", "gaussian")
ADATA = instance(AnnData, "an AnnData").advised("read one, e.g. with `scanpy.read_h5ad`")
KEY = TEXT.advised("the `key_added` of a fit")
log = logging.getLogger("neurst")


def read_matrix(adata: AnnData, layer: str | None) -> Matrix:
    """`X` or a layer in memory, as CSR or a dense array."""
    if adata.isbacked:
        msg = f"`adata` is backed by the file {adata.filename}: read it into memory first, `adata = adata.to_memory()`"
        raise ValueError(msg)
    if layer is not None and layer not in adata.layers:
        msg = f"`layer={layer!r}` is not in `adata.layers`, which holds {names_of(adata.layers)}: pass one of these, or None for X"
        raise KeyError(msg)
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        msg = f"`adata.X` is None: pass `layer=`, the name of the layer to fit; `adata.layers` holds {names_of(adata.layers)}"
        raise ValueError(msg)
    if type(matrix).__module__.startswith("dask."):
        matrix = matrix.compute()
    if isinstance(matrix, np.ma.MaskedArray) and np.ma.is_masked(matrix):
        msg = f"{_matrix_name(layer)} is a masked array with {np.ma.count_masked(matrix)} masked entries: fill them first, or drop the genes"
        raise ValueError(msg)
    matrix = _as_csr(matrix) if sparse.issparse(matrix) else np.asarray(matrix)
    if matrix.dtype.kind not in "biuf":
        msg = f"{_matrix_name(layer)} holds values of type {matrix.dtype}: expected numbers; convert them, e.g. with `.astype('float32')`"
        raise ValueError(msg)
    # totals of float16 would overflow
    return matrix if matrix.dtype in (np.float32, np.float64) else matrix.astype(np.float32)


def _as_csr(matrix: Any) -> sparse.csr_array:
    csr = sparse.csr_array(matrix)
    if not csr.has_canonical_format:  # one entry may have several stored values, which are to be added
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def _matrix_name(layer: str | None) -> str:
    return "`adata.X`" if layer is None else f"`adata.layers[{layer!r}]`"


def read_coords(adata: AnnData, spatial_key: str) -> NDArray:
    """(n_obs, d) positions of all spots, float64, checked to be finite."""
    if spatial_key not in adata.obsm:
        msg = (
            f"`spatial_key={spatial_key!r}` is not in `adata.obsm`, which holds {names_of(adata.obsm)}: pass one of these, or store "
            f"the positions (n_obs, 2 or 3) as `adata.obsm[{spatial_key!r}]`"
        )
        raise KeyError(msg)
    xy = real_array(f"adata.obsm[{spatial_key!r}]", adata.obsm[spatial_key])
    if xy.ndim != 2 or xy.shape[1] not in (2, 3):
        msg = f"`adata.obsm[{spatial_key!r}]` has shape {xy.shape}: expected (n_obs, 2) or (n_obs, 3), the columns x, y and perhaps z"
        raise ValueError(msg)
    if len(xy) == 0:
        msg = f"`adata` has 0 spots in `adata.obsm[{spatial_key!r}]`: expected at least {LEAST_SPOTS}; look for a filter that dropped them all"
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


def check_positions(coords: NDArray, spatial_key: str, n_obs: int) -> None:
    """Require at least 4 spots, at 3 or more places that are not on a line (in 3-d: at 4 or more, not in a plane)."""
    where = f"`adata.obsm[{spatial_key!r}]`"
    if len(coords) < LEAST_SPOTS:
        msg = (
            f"{len(coords)} of {n_obs} spots are in the tissue and hold expression: expected at least {LEAST_SPOTS}; check `adata.obs['in_tissue']` "
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


def resolve_footprint(
    adata: AnnData, footprint: float | Literal["auto"] | None, coords: NDArray, library_key: str | None
) -> float | None:
    """Diameter of a spot in the units of the coordinates (N, d) of the fitted spots; None for values at points.

    On a lattice ``"auto"`` is ``spot_diameter_fullres`` of the section in ``uns["spatial"]``, else 0.55 of the pitch, as in Visium.
    Irregular positions are cells or beads, which are taken as points.
    """
    if footprint is None or footprint != "auto":
        return footprint
    layout = geometry(coords)
    if layout.kind == "irregular":
        return None
    diameter = _stored_diameter(adata, library_key)
    if diameter is None:
        return SPOT_DIAMETER * layout.pitch
    low, high = SANE_DIAMETERS
    if not low * layout.pitch <= diameter <= high * layout.pitch:
        msg = (
            f"`footprint='auto'`: `spot_diameter_fullres` in `adata.uns['spatial']` is {diameter:g}, but the spots are "
            f"{layout.pitch:.4g} apart: expected {low} to {high} of this; pass the diameter in the units of the coordinates, or None"
        )
        raise ValueError(msg)
    return diameter


def _stored_diameter(adata: AnnData, library_key: str | None) -> float | None:
    """`spot_diameter_fullres` of the one section that `adata` holds, if it is there."""
    images = adata.uns.get("spatial", {})
    sections = dict(images) if isinstance(images, Mapping) else {}
    name = next(iter(sections), None) if library_key is None else str(adata.obs[library_key].iloc[0])
    section = sections.get(name)
    factors = section.get("scalefactors", {}) if isinstance(section, Mapping) else {}
    if not isinstance(factors, Mapping) or "spot_diameter_fullres" not in factors:
        return None
    return spot_diameter(factors)


def spot_diameter(factors: Mapping[str, Any]) -> float:
    """`spot_diameter_fullres` of scale factors, checked to be a positive number."""
    try:
        diameter = float(np.asarray(factors["spot_diameter_fullres"]).item())
    except (TypeError, ValueError):
        diameter = np.nan
    if not 0 < diameter < np.inf:
        msg = (
            f"`spot_diameter_fullres` in `adata.uns['spatial']` is {shown(factors['spot_diameter_fullres'])}: expected a positive number, the diameter of "
            "a spot in pixels; correct it, or delete `adata.uns['spatial']`"
        )
        raise ValueError(msg)
    return diameter


def gene_index(adata: AnnData, genes: Sequence[str] | str | None) -> NDArray:
    """Columns of the named genes, in the order of `adata.var_names`; all if None."""
    check_var_names(adata)
    if genes is None:
        return np.arange(adata.n_vars)
    return np.sort(adata.var_names.get_indexer(known_genes(genes, adata.var_names, "genes in `adata.var_names`")))


def check_var_names(adata: AnnData) -> None:
    """Require at least one gene, and unique names."""
    if adata.n_vars == 0:
        msg = "`adata` has 0 genes: expected at least 1; look for a filter that dropped them all"
        raise ValueError(msg)
    if not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()][0]
        msg = f"`adata.var_names` are not unique (first: {twice!r}): call `adata.var_names_make_unique()` first"
        raise ValueError(msg)


def known_genes(genes: Sequence[str] | str, known: Sequence[str], what: str = "genes at hand") -> list[str]:
    """The names as a list without duplicates. Unknown names raise a KeyError that suggests similar ones."""
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
    """The name of the likelihood of a matrix: chosen by its values if ``"auto"``, else checked against them."""
    where, values = _matrix_name(layer), stored_values(matrix)
    _check_values(values, where)
    counts = holds_counts(matrix)
    if likelihood == "auto":
        if counts:
            return "poisson"
        log.info("%s does not hold counts: a Gaussian likelihood is fitted to it as normalised values", where)
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
            warn(
                f"{where} holds values that are not whole numbers; {likelihood!r} takes them as expected counts. If they are "
                "normalised, pass a layer of raw counts or likelihood='gaussian'"
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
    """(n_obs,) library sizes: totals over all genes of the matrix, or those that the user gives."""
    if size_factors is None:
        return library_size(matrix)
    name = "size_factors"
    if isinstance(size_factors, str):
        check_column(adata, "size_factors", size_factors)
        size_factors, name = adata.obs[size_factors], f"adata.obs[{size_factors!r}]"
    if isinstance(size_factors, pd.Series) and not size_factors.index.equals(adata.obs_names):
        msg = "`size_factors` is a Series whose index is not `adata.obs_names`: align it, or pass it `.to_numpy()` in the order of the spots"
        raise ValueError(msg)
    size = real_array(name, size_factors).squeeze()  # row sums of a sparse matrix are (n_obs, 1)
    if size.shape != (adata.n_obs,):
        msg = f"`{name}` has shape {size.shape}: expected ({adata.n_obs},), one library size for each spot"
        raise ValueError(msg)
    bad = np.flatnonzero(~((size >= 0) & np.isfinite(size)))
    if len(bad):
        msg = (
            f"`{name}` is negative or not finite at {len(bad)} of {len(size)} spots (first: {adata.obs_names[bad[0]]!r}, {size[bad[0]]}): "
            "expected library sizes; 0 leaves a spot out of the fit"
        )
        raise ValueError(msg)
    return size


@dataclass(frozen=True, eq=False)
class Measured:
    """The input of a fit, read from an AnnData."""

    data: SpotData  # fitted spots and genes
    likelihood: str
    size_factors: str | NDArray | None  # as given
    fitted: NDArray  # (n_obs,) mask of the fitted spots
    columns: NDArray  # indices of the fitted genes in var
    coords: NDArray  # (n_obs, d)


def read_spots(
    adata: AnnData,
    genes: Sequence[str] | str | None,
    layer: str | None,
    spatial_key: str,
    library_key: str | None,
    likelihood: str,
    size_factors: str | Sequence[float] | None,
    footprint: float | Literal["auto"] | None = None,
) -> Measured:
    """Read and check everything that a fit needs; nothing is written."""
    coords = read_coords(adata, spatial_key)
    tissue = in_tissue(adata)
    check_positions(coords[tissue], spatial_key, adata.n_obs)
    check_one_section(adata[tissue], library_key, coords[tissue])
    columns = gene_index(adata, genes)
    if layer is None and any(is_fit(slot) and "query" in slot for slot in adata.uns.values()):
        warn(
            "`adata.X` holds values of a field, read by `neurtv_superres` or `neurtv_query`: fit measured spots instead"
        )
    matrix = read_matrix(adata, layer)
    likelihood = pick_likelihood(adata, matrix[tissue], layer, likelihood)
    observation, fitted = _observation(adata, matrix, tissue, likelihood, size_factors)
    check_positions(coords[fitted], spatial_key, adata.n_obs)
    data = SpotData(
        coords[fitted],
        matrix[fitted][:, columns],
        adata.var_names.to_numpy().astype(str)[columns],
        observation,
        resolve_footprint(adata, footprint, coords[fitted], library_key),
    )
    given = (
        size_factors
        if size_factors is None or isinstance(size_factors, str)
        else np.asarray(size_factors, dtype=float).ravel()
    )
    return Measured(data, likelihood, given, fitted, columns, coords)


def _observation(
    adata: AnnData, matrix: Matrix, tissue: NDArray, likelihood: str, size_factors: str | Sequence[float] | None
) -> tuple[Observation, NDArray]:
    """The observation model of the values, and a mask (n_obs,) of the spots that can be fitted."""
    if likelihood == "gaussian":
        if size_factors is not None:
            warn(
                "`size_factors` has no meaning for normalised values, to which a Gaussian likelihood is fitted: it is ignored"
            )
        return Normalised(), tissue
    size = read_size(adata, matrix, size_factors)
    fitted = tissue & (size > 0)
    empty = int(tissue.sum() - fitted.sum())
    if empty:
        log.info(
            "%d of %d spots have no counts: they are predicted but do not inform the fit", empty, int(tissue.sum())
        )
    return Counts(size[fitted], likelihood), fitted


def read_genes(adata: AnnData, genes: Sequence[str], layer: str | None) -> NDArray:
    """(n_obs, G) values of the named genes, dense."""
    check_var_names(adata)
    return dense(read_matrix(adata, layer)[:, adata.var_names.get_indexer(genes)])
