"""Reads stored results back from an AnnData, for figures and for further work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from neurst.core.arguments import warn
from neurst.spatial.adata import keys
from neurst.spatial.adata.keys import Slot
from neurst.spatial.adata.read import (
    check_var_names,
    in_tissue,
    known_genes,
    read_coords,
    read_genes,
    read_matrix,
    read_size,
)
from neurst.spatial.adata.serialise import StoredFit
from neurst.spatial.matrix import dense


def check_places(adata: AnnData, stored: StoredFit) -> tuple[NDArray, NDArray]:
    """Positions (n_obs, d) of the spots, and a mask (n_obs,) of those that were fitted.

    All must be where they were when the field was fitted or queried. A subset or another order of the spots is accepted.
    """
    coords = read_coords(adata, stored.spatial_key)
    same, supports = stored.known_places(coords)
    if not same.all():
        first = int(np.argmin(same))
        where = Slot("obsm", stored.spatial_key)
        msg = (
            f"{int((~same).sum())} of the {adata.n_obs} positions in {where} are none of those that the field in {keys.fit_slot(stored.key)} was "
            f"{'fitted to' if stored.query is None else 'read at'} (first: {adata.obs_names[first]!r}, {coords[first].tolist()}): were they moved or "
            f"rescaled? Refit with `{keys.refit(stored.key)}`, or read the field at other points with `neurst.tl.neurtv_query`"
        )
        raise ValueError(msg)
    return coords, supports


def field_genes(stored: StoredFit, genes: Sequence[str] | str | None) -> list[str]:
    """The named genes of a field; all if None."""
    fitted = stored.field.genes.tolist()
    return fitted if genes is None else known_genes(genes, fitted, "genes of the field")


def genes_at_hand(adata: AnnData, stored: StoredFit, genes: Sequence[str] | str | None) -> list[str]:
    """The named genes, which both the field and the AnnData must hold; all such genes if None."""
    check_var_names(adata)
    if genes is not None:
        return known_genes(field_genes(stored, genes), list(adata.var_names), "genes in `adata.var_names`")
    left = [gene for gene in stored.field.genes.tolist() if gene in adata.var_names]
    if not left:
        msg = (
            f"none of the {len(stored.field.genes)} genes of the field is in `adata.var_names`: `neurtv_query` and `neurtv_superres` still work under the "
            f"names of the fit; give the genes back these names ({str(stored.field.genes[0])!r}, ...), or refit with `{keys.refit(stored.key)}`"
        )
        raise ValueError(msg)
    return left


def masked_points(adata: AnnData, stored: StoredFit) -> NDArray:
    """(n_obs,) mask of points that a query set to NaN as outside the tissue; all False for measured spots."""
    if stored.query is None or stored.query.get("outside") != "nan":
        return np.zeros(adata.n_obs, dtype=bool)
    if "in_support" not in adata.obs:
        msg = "`adata.obs['in_support']`, which `neurtv_query` wrote, is missing: run the query again"
        raise KeyError(msg)
    return ~adata.obs["in_support"].to_numpy(dtype=bool)


def _table(adata: AnnData, genes: Sequence[str], layer: Slot, table: Slot) -> NDArray | None:
    """(n_obs, G) stored values of genes from a layer, or from a table of the fitted genes alone; None if there is neither."""
    if layer.present(adata):
        return read_genes(adata, genes, layer.name)
    if table.present(adata):
        frame = adata.obsm[table.name]
        return frame.reindex(columns=list(genes)).to_numpy(dtype=float)
    return None


def read_values(adata: AnnData, stored: StoredFit, genes: Sequence[str]) -> NDArray:
    """(n_obs, G) values of the field at the spots, or at the points of a query."""
    key = stored.key
    if stored.query is not None:
        return read_genes(adata, genes, None)
    values = _table(adata, genes, keys.values_slot(key), keys.values_slot(key, "obsm"))
    if values is None:
        msg = (
            f"`adata` holds no values of the field under {key!r}, they were dropped or were too large to be written: read the field first, "
            "`neurst.tl.neurtv_superres(adata, genes=[...])`"
        )
        raise KeyError(msg)
    return values


def read_measured(
    adata: AnnData,
    stored: StoredFit,
    genes: Sequence[str],
    layer: str | None,
    size_factors: str | Sequence[float] | None,
) -> NDArray:
    """(n_obs, G) measured expression in the unit of the field; for counts, NaN at spots without counts."""
    matrix = read_matrix(adata, layer)
    check_var_names(adata)
    values = dense(matrix[:, adata.var_names.get_indexer(genes)])
    if stored.field.link.name != "log":
        return values
    size = read_size(adata, matrix, size_factors)
    size = np.where(size > 0, size, np.nan)
    median, target = np.median(size[size > 0]) if (size > 0).any() else np.nan, stored.field.target_sum
    if max(median / target, target / median) > 2:
        warn(
            f"the median library size of the spots is {median:.4g}, that of the fit was {target:.4g}: pass all genes, and the "
            "`size_factors` of the fit if it was given any"
        )
    return values * (target / size)[:, None]


def fitted_from(stored: StoredFit) -> tuple[str | None, str, str | None]:
    """The layer, the `spatial_key` and the column of library sizes (None if they were totals or an array) of a fit."""
    params = stored.slot["params"]
    layer, size = params.get("layer"), params.get("size_factors")
    column = str(size) if isinstance(size, str) else None
    return None if layer is None else str(layer), str(params["spatial_key"]), column


def read_gradient(adata: AnnData, stored: StoredFit, genes: Sequence[str], n_dims: int) -> NDArray:
    """(n_obs, G, d) stored derivatives."""
    pairs = zip(
        keys.derivative_slots(stored.key, n_dims), keys.derivative_slots(stored.key, n_dims, "obsm"), strict=True
    )
    parts = [_table(adata, genes, layer, table) for layer, table in pairs]
    first = keys.derivative_slots(stored.key, 1)[0]
    _check_gradient(all(part is not None for part in parts), f"{first} is missing", stored.key)
    gradient = np.stack(parts, axis=-1)
    without = [g for g, known in zip(genes, np.isfinite(gradient).any((0, 2)), strict=True) if not known]
    _check_gradient(not without, f"{first} does not hold genes {without[:3]}", stored.key)
    return gradient


def read_boundary(adata: AnnData, stored: StoredFit) -> NDArray:
    """(n_obs,) stored strength of boundaries."""
    slot = keys.boundary_slot(stored.key)
    _check_gradient(slot.present(adata), f"{slot} is missing", stored.key)
    return adata.obs[slot.name].to_numpy(dtype=float)


def _check_gradient(found: bool, what: str, key: str) -> None:
    if not found:
        option = "" if key == keys.DEFAULT_KEY else f", key={key!r}"
        msg = f"{what}: call `neurst.tl.neurtv_gradient(adata{option})` first"
        raise KeyError(msg)


def read_tissue(adata: AnnData, stored: StoredFit) -> tuple[NDArray, NDArray]:
    """Positions (n_obs, d), and a mask (n_obs,) of those in the tissue."""
    return read_coords(adata, stored.spatial_key), in_tissue(adata)


def read_history(stored: StoredFit) -> tuple[Mapping[str, NDArray], Mapping[str, NDArray], Mapping[str, float]]:
    """History of the final fits, the strengths that were tried with their scores, and the strength of each penalty."""
    return stored.slot["history"], stored.slot["lam_search"], stored.slot["lam"]


def read_scores(adata: AnnData, key: str) -> tuple[pd.DataFrame, NDArray, NDArray]:
    """The table of held-out scores, and for each gene those of the field and of the best baseline, (n_vars,) each."""
    table, field, baseline = keys.score_slots(key)
    if not keys.is_score_table(adata.uns.get(key)) or not (field.present(adata) and baseline.present(adata)):
        option = "" if key == keys.DEFAULT_SCORE_KEY else f", key_added={key!r}"
        msg = f"`key={key!r}`: `adata` holds no held-out scores under it: call `neurst.tl.holdout_score(adata{option})` first"
        raise KeyError(msg)
    columns: Any = (adata.var[slot.name].to_numpy(dtype=float) for slot in (field, baseline))
    return adata.uns[table.name], *columns


def gene_labels(adata: AnnData, genes: Sequence[str], gene_symbols: str | None) -> list[str]:
    """Labels of genes in a figure: from a column of `var`, or their names."""
    if gene_symbols is None:
        return list(genes)
    return [str(label) for label in adata.var.loc[list(genes), _symbols(adata, gene_symbols)]]


def genes_of_symbols(adata: AnnData, genes: Sequence[str] | str, gene_symbols: str | None) -> list[str]:
    """The names in `var_names` of genes that are given as in a column of `var`."""
    genes = [genes] if isinstance(genes, str) else list(genes)
    if gene_symbols is None:
        return genes
    column = adata.var[_symbols(adata, gene_symbols)].astype(str)
    known_genes(genes, column.tolist(), f"genes in `adata.var[{gene_symbols!r}]`")
    twice = [gene for gene in genes if (column == gene).sum() > 1]
    if twice:
        msg = f"`gene_symbols={gene_symbols!r}`: {twice[0]!r} names several genes: use the names in `adata.var_names`"
        raise ValueError(msg)
    return [str(column.index[column == gene][0]) for gene in genes]


def _symbols(adata: AnnData, gene_symbols: str) -> str:
    if gene_symbols not in adata.var:
        msg = f"`gene_symbols={gene_symbols!r}` is not in `adata.var`, which holds {keys.names_of(adata.var)}: pass one of these columns"
        raise KeyError(msg)
    return gene_symbols
