"""Names of the slots in which results are stored, and checks of which slots may be written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from neurst.core.arguments import shown

SCHEMA = 4  # version of the layout of uns[key]; raise it when the layout changes
DEFAULT_KEY = "neurtv"
DEFAULT_SCORE_KEY = "holdout_score"
AXES = "xyz"
MOST_NAMES = 12  # most names listed in an error
RESERVED = ("_index",)  # column names of AnnData files


class Slot(NamedTuple):
    """A place in an AnnData, such as ``layers["neurtv"]``."""

    part: str
    name: str

    def __str__(self) -> str:
        return f"`adata.{self.part}[{self.name!r}]`"

    def present(self, adata: AnnData) -> bool:
        """Whether something is stored there."""
        return self.name in getattr(adata, self.part)


def values_slot(key: str, part: str = "layers") -> Slot:
    """Expected expression at the spots."""
    return Slot(part, key)


def std_slot(key: str, part: str = "layers") -> Slot:
    """Posterior standard deviation."""
    return Slot(part, f"{key}_std")


def derivative_slots(key: str, n_dims: int, part: str = "layers") -> list[Slot]:
    """First derivatives along each axis."""
    return [Slot(part, f"{key}_d{axis}") for axis in AXES[:n_dims]]


def latent_slot(key: str) -> Slot:
    """Latent coordinates of the spots."""
    return Slot("obsm", f"X_{key}")


def loadings_slot(key: str) -> Slot:
    """Gene loadings."""
    return Slot("varm", f"{key}_loadings")


def gene_slot(key: str, what: str) -> Slot:
    """A column of `var`: ``fitted``, ``empty``, ``dispersion``, ``gradient``, or the held-out score."""
    return Slot("var", f"{key}_{what}")


def boundary_slot(key: str) -> Slot:
    """Strength of tissue boundaries at the spots."""
    return Slot("obs", f"{key}_boundary")


def fit_slot(key: str) -> Slot:
    """The entry that holds the field, parameters and history of a fit."""
    return Slot("uns", key)


def score_slots(key: str) -> tuple[Slot, Slot, Slot]:
    """The table of held-out scores, and the columns of `var` for the field and for the best baseline."""
    return Slot("uns", key), Slot("var", key), Slot("var", f"{key}_baseline")


def refit(key: str) -> str:
    """The call that repeats a fit, for messages."""
    return f"neurst.tl.neurtv_fit(adata{'' if key == DEFAULT_KEY else f', key_added={key!r}'})"


def names_of(mapping: Iterable) -> str:
    """The names in a mapping, for an error."""
    names = [repr(name) for name in mapping if name is not None]
    return ", ".join(names[:MOST_NAMES] + ["..."] * (len(names) > MOST_NAMES)) or "nothing"


def check_column(adata: AnnData, argument: str, column: str) -> None:
    """Require a column of `obs` that an argument names."""
    if column not in adata.obs:
        msg = f"`{argument}={column!r}` is not in `adata.obs`, which holds {names_of(adata.obs)}: pass one of these columns"
        raise KeyError(msg)


def check_name(key: Any) -> str:
    """A name under which AnnData can store and read results in h5ad and zarr files."""
    reason = "expected a name"
    if isinstance(key, str):
        bad = [c for c in key if c == "/" or not c.isprintable()]
        if not key or bad:
            reason = "expected a name of one letter or more" + (f" without {bad[0]!r}" if bad else "")
        elif key.startswith((".", "__")) or key in RESERVED:
            reason = "expected a name that files can store: it may not begin with '.' or '__', nor be '_index'"
        elif any(0xD800 <= ord(c) <= 0xDFFF for c in key):
            reason = "expected a name that can be encoded in UTF-8"
        else:
            return str(key)
    msg = f"`key_added={shown(key)}`: {reason}; files cannot store anything else"
    raise (ValueError if isinstance(key, str) else TypeError)(msg)


def check_free(adata: AnnData, slots: Iterable[Slot], own: Iterable[Slot], key: str, what: str) -> None:
    """Refuse to overwrite slots other than `own`, the slots of the result that is to be replaced."""
    own = set(own)
    taken = [slot for slot in slots if slot.present(adata) and slot not in own]
    if taken:
        msg = (
            f"`key_added={key!r}` would overwrite {', '.join(map(str, taken))}, which is not from {what} `adata.uns[{key!r}]`: pass another "
            "`key_added`, or delete it first"
        )
        raise ValueError(msg)


def is_fit(slot: Any) -> bool:
    """Whether an entry of `uns` is a fit."""
    return isinstance(slot, Mapping) and "neurst_schema" in slot


def written_slots(slot: Any) -> list[Slot]:
    """The slots that a fit recorded as its own, besides its entry of `uns`."""
    if not is_fit(slot) or "slots" not in slot:
        return []
    return [Slot(*str(name).split("/", 1)) for name in np.asarray(slot["slots"]).ravel() if "/" in str(name)]


def recorded(slots: Iterable[Slot]) -> np.ndarray:
    """Slots as an entry of `uns`, from which :func:`written_slots` reads them."""
    return np.array(sorted("/".join(slot) for slot in set(slots)), dtype=object)


def holds_fit(adata: AnnData) -> bool:
    """Whether any fit is stored, under whatever name."""
    return any(is_fit(slot) for slot in adata.uns.values())


def is_score_table(slot: Any) -> bool:
    """Whether an entry of `uns` is a table of held-out scores."""
    return isinstance(slot, pd.DataFrame) and {"holdout", "seed", "method", "score"} <= set(slot.columns)
