"""What local fields read from AnnData, and what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from neurst.spatial.adata import keys, read, write
from neurst.spatial.adata.changes import apply_changes
from neurst.spatial.adata.keys import Slot, check_column, names_of
from neurst.spatial.data import SpotData
from neurst.spatial.observation import Counts

METHOD = "lofi"  # marks entries of `uns` that local fields wrote


def split_sections(adatas: Sequence[AnnData], library_key: str | None) -> list[AnnData]:
    """One AnnData for each section: each given one as it is, or its parts by a column of `obs`."""
    if library_key is None:
        return list(adatas)
    parts = []
    for adata in adatas:
        check_column(adata, "library_key", library_key)
        values = adata.obs[library_key]
        if values.isna().any():
            msg = f"`library_key={library_key!r}` has missing values at {values.isna().sum()} of {len(values)} spots: name the section of every spot"
            raise ValueError(msg)
        parts += [adata[(values == name).to_numpy()] for name in values.unique()]
    return parts


def read_section(
    adata: AnnData,
    genes: Sequence[str] | str | None,
    layer: str | None,
    spatial_key: str,
    library_key: str | None,
    size_factors: str | Sequence[float] | None,
) -> read.Measured:
    """The counts of one section; anything else is refused."""
    measured = read.read_spots(adata, genes, layer, spatial_key, library_key, "auto", size_factors)
    if not isinstance(measured.data.observation, Counts):
        where = "`adata.X`" if layer is None else f"`adata.layers[{layer!r}]`"
        msg = (
            f"{where} holds values that are not whole numbers >= 0: local fields need counts; pass `layer=`, the name of a layer of raw counts "
            f"(`adata.layers` holds {names_of(adata.layers)})"
        )
        raise ValueError(msg)
    return measured


def read_sections(
    adatas: Sequence[AnnData],
    genes: Sequence[str] | str | None,
    layer: str | None,
    spatial_key: str,
    library_key: str | None,
    size_factors: str | None,
) -> list[SpotData]:
    """The counts of all sections; those after the first may lack some of its genes."""
    sections, names, parts = [], genes, split_sections(adatas, library_key)
    for number, adata in enumerate(parts):
        try:
            if number:
                read.check_var_names(adata)
                names = shared_genes(adata, sections[0].genes, f"section {number + 1}", "section 1")
            sections.append(read_section(adata, names, layer, spatial_key, library_key, size_factors).data)
        except (KeyError, TypeError, ValueError) as error:
            if len(parts) == 1:
                raise
            name = f" ({library_key}: {str(adata.obs[library_key].iloc[0])!r})" if library_key else ""
            msg = f"section {number + 1} of {len(parts)}{name}: {error.args[0]}"
            raise type(error)(msg) from None
    dims = {data.coords.shape[1] for data in sections}
    if len(dims) > 1:
        msg = f"`adata.obsm[{spatial_key!r}]` has 2 columns in some sections and 3 in others: pass sections with the same number of dimensions"
        raise ValueError(msg)
    return sections


def shared_genes(adata: AnnData, known: NDArray, what: str, whose: str) -> list[str]:
    """The genes of an AnnData among known ones; it is an error if there are none."""
    among = set(known)
    found = [str(name) for name in adata.var_names if name in among]
    if not found:
        msg = (
            f"`adata.var_names` of {what} ({', '.join(map(repr, adata.var_names[:3]))}, ...) hold none of the {len(known)} genes of {whose} "
            f"({', '.join(map(repr, map(str, known[:3])))}, ...): use the same kind of gene names"
        )
        raise ValueError(msg)
    return found


def _own(adata: AnnData, key: str) -> list[Slot]:
    """The slots of an earlier prediction under this name."""
    entry = adata.uns.get(key)
    if not isinstance(entry, Mapping) or entry.get("method") != METHOD or "slots" not in entry:
        return []
    return [keys.fit_slot(key), *(Slot(*str(name).split("/", 1)) for name in np.asarray(entry["slots"]).ravel())]


def prediction_slots(adata: AnnData, key: str, n_genes: int) -> list[Slot]:
    """The slots that a prediction writes; an error if one of them is not from an earlier prediction."""
    keys.check_name(key)
    slots = [keys.values_slot(key, write.table_part(n_genes, adata.n_vars)), keys.fit_slot(key)]
    keys.check_free(adata, slots, _own(adata, key), key, "the prediction in")
    return slots


def check_size(adata: AnnData, key: str, n_genes: int) -> None:
    """Require a table that is not too large to write."""
    size = write.table_size(adata.n_obs, n_genes, adata.n_vars)
    if size > write.LAYER_LIMIT:
        part = write.table_part(n_genes, adata.n_vars)
        msg = (
            f"`adata.{part}[{key!r}]` would take {size / 1024**3:.1f} GiB: pass an AnnData with fewer genes, such as "
            "`adata[:, genes].copy()`, or read the points you need with `neurst.tl.lofi_query`"
        )
        raise ValueError(msg)


def write_prediction(
    adata: AnnData, key: str, values: NDArray, columns: NDArray, target_sum: float, params: Mapping[str, Any]
) -> None:
    """Write predicted counts (n_obs, C) of some genes; slots of an earlier prediction of this name are removed."""
    table, entry = prediction_slots(adata, key, len(columns))
    about = {
        "method": METHOD,
        "params": dict(params),
        "target_sum": target_sum,
        "versions": write.versions(),
        "slots": keys.recorded([table]),
    }
    apply_changes(adata, {table: write.as_table(adata, values, columns), entry: about}, _own(adata, key))


def new_prediction(
    adata: AnnData,
    coords: NDArray,
    values: NDArray,
    genes: Sequence[str],
    *,
    distance: NDArray,
    in_support: NDArray,
    about: Mapping[str, Any],
) -> AnnData:
    """An AnnData of predicted counts (M, C) at points."""
    obs = pd.DataFrame(
        {"distance_to_spot": distance, "in_support": in_support},
        index=pd.Index([f"{METHOD}_{i}" for i in range(len(coords))]),
    )
    out = AnnData(values, obs=obs, var=adata.var.loc[list(genes)].copy())
    out.obsm["spatial"] = coords
    out.uns[METHOD] = {"method": METHOD, "versions": write.versions(), **about}
    return out
