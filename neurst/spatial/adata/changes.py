"""Writing to an AnnData all at once: either every change is made, or none."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from anndata import AnnData, ImplicitModificationWarning

from neurst.spatial.adata.keys import Slot

log = logging.getLogger("neurst")
MISSING = object()


def apply_changes(adata: AnnData, write: Mapping[Slot, Any], remove: Iterable[Slot] = ()) -> None:
    """Remove slots and write values. If a change fails or is interrupted, the earlier changes are undone.

    A view becomes an AnnData of its own, as it does whenever something is written to it.
    """
    changes = dict.fromkeys(remove, MISSING) | dict(write)
    if adata.is_view:
        log.info("`adata` is a view: it becomes a copy of its own, and the original stays as it is")
        own = adata.copy()
        _make(own, changes)
        adata._init_as_actual(own)
    else:
        _make(adata, changes)


def _make(adata: AnnData, changes: Mapping[Slot, Any]) -> None:
    tables = {part: getattr(adata, part).copy(deep=False) for part in ("obs", "var")}
    entries = [slot for slot in changes if slot.part not in tables]
    before = {slot: getattr(adata, slot.part)[slot.name] if slot.present(adata) else MISSING for slot in entries}
    try:
        for slot, value in changes.items():
            _put(adata, slot, value)
    except BaseException:
        for slot, value in before.items():
            _put(adata, slot, value)
        for part, table in tables.items():
            setattr(adata, part, table)
        raise


def _put(adata: AnnData, slot: Slot, value: Any) -> None:
    """Store a value, or remove what is stored if the value is MISSING."""
    mapping = getattr(adata, slot.part)
    if value is not MISSING:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplicitModificationWarning)
            mapping[slot.name] = value
    elif slot.name in mapping:
        del mapping[slot.name]
