"""Save and load nested plain values as one safetensors file with a JSON header. Without pickle, reading a file runs no code."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

Model = TypeVar("Model")
SCHEMA = 1  # of the file; raise it when the layout changes
HEADER = "neurst"  # name of the JSON text in the metadata of the file


def save(path: str | os.PathLike, kind: str, content: Mapping[str, Any]) -> None:
    """Write nested dictionaries of arrays, numbers and texts to one file.

    Numeric arrays become the tensors of the file, everything else becomes its JSON header. An existing file is replaced in one step at
    the end, so an interrupted save leaves it unchanged.

    Parameters
    ----------
    path
        Path of the file, usually ``*.safetensors``.
    kind
        A name for the kind of content, which :func:`load` returns.
    content
        Nested dictionaries. Keys are texts without ``"/"``.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder + "/a.safetensors", "example", {"x": np.arange(3), "more": {"name": "a", "n": 2}})
    ...     load(folder + "/a.safetensors")
    ('example', {'x': array([0, 1, 2]), 'more': {'name': 'a', 'n': 2}})
    """
    from safetensors.numpy import save as to_bytes

    path = Path(path)
    if path.is_dir():
        msg = f"`path={str(path)!r}` is a folder: expected the name of a file in it"
        raise IsADirectoryError(msg)
    if not path.parent.is_dir():
        msg = f"`path={str(path)!r}`: the folder {str(path.parent)!r} does not exist: create it first"
        raise FileNotFoundError(msg)
    arrays: dict[str, np.ndarray] = {}
    tree = _split(content, (), arrays)
    header = {"schema": SCHEMA, "kind": kind, "version": written_by(), "content": tree}
    text = json.dumps(header)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        half = Path(folder, "half")
        half.write_bytes(
            to_bytes(arrays, metadata={HEADER: text})
        )  # `save_file` would make a file that only its owner can read
        half.replace(path)


def load(path: str | os.PathLike) -> tuple[str, dict[str, Any]]:
    """The kind and the content of a file that :func:`save` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, was not written by neurst, or was written by a newer version with another layout.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        msg = f"`path={str(path)!r}`: there is no such file"
        raise FileNotFoundError(msg)
    try:
        with safe_open(str(path), "numpy") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        schema, kind = header["schema"], str(header["kind"])
        content = _joined(header["content"], arrays) if schema == SCHEMA else None
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        msg = (
            f"`path={str(path)!r}` is not a file that neurst saved, or it is damaged ({type(error).__name__}: {error})"
        )
        raise ValueError(msg) from None
    if schema != SCHEMA:
        msg = (
            f"`path={str(path)!r}` has layout {schema!r}, written by neurst {header.get('version')}; this is neurst {written_by()}, which "
            f"reads layout {SCHEMA}: upgrade with `pip install -U neurst-spatial`"
        )
        raise ValueError(msg)
    return kind, content


def restore(path: str | os.PathLike, kind: str, form: int, build: Callable[[dict[str, Any]], Model]) -> Model:
    """What `build` makes of the content of a file, of a kind whose content has a ``"format"``.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`load`; and if the file holds another kind or format, or `build` fails.
    """
    found, content = load(path)
    if found != kind or content.get("format") != form:
        msg = (
            f"`path={str(path)!r}` holds {found!r} of format {content.get('format')}: expected {kind!r} of format {form}, "
            "which the `save` of such a model writes in this version"
        )
        raise ValueError(msg)
    try:
        return build(content)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        msg = f"`path={str(path)!r}` is damaged ({type(error).__name__}: {error}): save the model again"
        raise ValueError(msg) from None


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a module as arrays, which :func:`save` can write."""
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def fill(module: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Give a module the weights that :func:`weights_of` returned.

    Raises
    ------
    RuntimeError, ValueError
        If weights are missing, have another shape, or are not finite.
    """
    module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    if not all(bool(value.isfinite().all()) for value in module.state_dict().values()):
        msg = "some weights are not finite"
        raise ValueError(msg)


def written_by() -> str:
    """The installed version of neurst."""
    try:
        return version("neurst-spatial")
    except PackageNotFoundError:  # run from a folder without being installed
        return "unknown"


def _split(content: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray]) -> Any:
    """The content with its numeric arrays moved to `arrays`. Each is replaced by ``{"array": path}``, its key in `arrays`."""
    if isinstance(content, Mapping):
        wrong = [name for name in content if not isinstance(name, str) or "/" in name]
        if wrong:
            msg = f"the key {wrong[0]!r} cannot be stored: expected a text without '/'"
            raise ValueError(msg)
        return {"dict": {name: _split(part, (*path, name), arrays) for name, part in content.items()}}
    if isinstance(content, np.ndarray) and content.dtype.kind in "biuf":
        name = "/".join(path)
        arrays[name] = np.asarray(content, order="C")
        return {"array": name}
    return {"value": content.tolist() if isinstance(content, (np.ndarray, np.generic)) else content}


def _joined(tree: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse of :func:`_split`."""
    if "dict" in tree:
        return {name: _joined(part, arrays) for name, part in tree["dict"].items()}
    return arrays[tree["array"]] if "array" in tree else tree["value"]
