"""Whether an AnnData holds one section or several, which have no common coordinates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from neurst.core.samples import MAX_SIDE_RATIO
from neurst.spatial.adata.keys import check_column, names_of
from neurst.spatial.geometry import overlap, spacing_ratio

LEAST_TO_JUDGE = 16  # spots from which their distances can tell several sections
COINCIDENT = 0.1  # least `spacing_ratio` of one section; it is 0.02 to 0.1 for several sections on the same array
SECTION_WORDS = (
    "section",
    "slice",
    "sample",
    "slide",
    "library",
    "batch",
    "donor",
    "patient",
    "replicate",
    "specimen",
    "puck",
    "fov",
)
MOST_SECTIONS = 50


def check_one_section(adata: AnnData, library_key: str | None, coords: NDArray) -> None:
    """Refuse several sections, as they have no common coordinates. If `library_key` names one section, nothing else is checked."""
    if library_key is not None:
        check_column(adata, "library_key", library_key)
        values = adata.obs[library_key]
        if values.isna().any():
            msg = f"`library_key={library_key!r}` has missing values at {values.isna().sum()} of {len(values)} spots: name the section of every spot"
            raise ValueError(msg)
        sections = values.unique().tolist()
        if len(sections) > 1:
            raise _several(f"`adata.obs[{library_key!r}]` names", sections, library_key)
        return
    images = adata.uns.get("spatial", {})
    sections = list(images) if isinstance(images, Mapping) else []
    if len(sections) > 1:
        raise _several("`adata.uns['spatial']` names", sections, None)
    column = _section_column(adata, coords)
    if column is not None:
        sections = adata.obs[column].unique().tolist()
        raise _several(f"`adata.obs[{column!r}]` looks like it names", sections, column, " that cover the same area")
    if len(coords) >= LEAST_TO_JUDGE and _coincide(coords):
        msg = (
            "the typical spot has another spot at its place or right beside it, as when several sections lie on top of each other in one frame: "
            "fit each section on its own, or, if this is one section, say so with a column of one value, "
            "`adata.obs['section'] = 'one'` and `library_key='section'`"
        )
        raise ValueError(msg)


def _coincide(coords: NDArray) -> bool:
    """Whether the typical position has another one at its place or right beside it."""
    _, count = np.unique(coords, axis=0, return_counts=True)
    if count[count > 1].sum() > len(coords) / 2:
        return True
    sides = np.ptp(coords, axis=0)
    # if the axes have different units, spots with one equal coordinate seem close together; the fit itself warns of that
    return sides.max() <= MAX_SIDE_RATIO * sides.min() and spacing_ratio(coords) < COINCIDENT


def _several(found: str, sections: list, column: str | None, more: str = "") -> ValueError:
    name, first = ("column", "section") if column is None else (repr(column), repr(sections[0]))
    return ValueError(
        f"{found} {len(sections)} sections ({names_of(sections)}){more}, each with coordinates of its own: split by section and fit each on its own, "
        f"`one = adata[adata.obs[{name}] == {first}].copy()` and `neurst.tl.neurtv_fit(one, library_key={name})`"
    )


def _section_column(adata: AnnData, coords: NDArray) -> str | None:
    """A column of `obs` whose name suggests sections, and whose groups of spots cover the same area; None if there is none."""
    if coords.shape[1] != 2:
        return None
    for column in adata.obs:
        values = adata.obs[column]
        if (
            isinstance(column, str)
            and any(word in column.lower() for word in SECTION_WORDS)
            and values.dtype.kind != "f"
        ):
            codes, names = pd.factorize(values)
            if 2 <= len(names) <= MOST_SECTIONS and overlap(coords[codes >= 0], codes[codes >= 0]):
                return column
    return None
