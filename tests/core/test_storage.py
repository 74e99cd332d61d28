import json
import pickle
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from neurst.core import storage
from neurst.core.storage import load, save

CONTENT = {
    "arrays": {
        **{t: np.arange(6).reshape(2, 3).astype(t) for t in ("float16", "float32", "float64", "uint8", "int64")},
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "reversed": np.arange(4.0)[::-1],
        "special": np.array([np.nan, -np.inf, -0.0, 5e-324]),
    },
    "values": {"text": "ä/b", "empty": "", "n": 3, "x": 0.1, "flag": True, "none": None, "list": [1, "a", [2.5]]},
    "deep": {"a": {"b": {"c": np.arange(3), "d": {}}}},
    "n": np.float32(0.1),
    "no axes": np.array(3.0),
}


def equal(a, b):
    """Whether two contents are the same, types and all."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_nested_content_comes_back_with_its_types(path):
    save(path, "example", CONTENT)
    kind, found = load(str(path))
    assert kind == "example"
    assert equal(found, CONTENT | {"n": float(np.float32(0.1))})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_file(path, monkeypatch, error):
    save(path, "example", {"x": np.zeros(3)})
    before = path.read_bytes()

    def stop(self, data):
        with self.open("wb") as file:
            file.write(data[:4])
        raise error("full")

    monkeypatch.setattr("pathlib.Path.write_bytes", stop)
    with pytest.raises(error, match="full"):
        save(path, "example", {"x": np.ones(3)})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "value", [np.array([print]), np.array([1j]), {1, 2}, [np.zeros(3)], b"a", np.datetime64("2020")], ids=repr
)
def test_what_is_neither_number_nor_text_is_refused_and_leaves_no_file(path, value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(path, "example", {"x": value})
    assert not list(path.parent.iterdir())


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    words = r"`path='.*/no/a.safetensors'`: the folder '.*/no' does not exist: create"
    with pytest.raises(FileNotFoundError, match=words):
        save(tmp_path / "no" / "a.safetensors", "example", {})


@pytest.mark.parametrize("name", ["no.safetensors", "."])
def test_a_file_that_does_not_exist_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"`path='.*'`: there is no such file"):
        load(tmp_path / name)


class Runs:
    """Code that would run if a pickle of it were read."""

    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def header(**parts):
    return {"neurst": json.dumps({"schema": storage.SCHEMA, "kind": "example", "version": "9", "content": {}} | parts)}


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("neurst"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Runs())),
    "no header": lambda path: save_file({"x": np.zeros(3)}, path),
    "no JSON": lambda path: save_file({}, path, metadata={"neurst": "{"}),
    "a list": lambda path: save_file({}, path, metadata={"neurst": "[1]"}),
    "deep nesting": lambda path: save_file({}, path, metadata={"neurst": "[" * 10**5}),
    "a missing array": lambda path: save_file({}, path, metadata=header(content={"dict": {"x": {"array": "y"}}})),
    "no tree": lambda path: save_file({}, path, metadata=header(content=[1])),
    "no dictionary": lambda path: save_file({}, path, metadata=header(content={"dict": [1]})),
    "one byte too few": lambda path: save(path, "example", CONTENT) or path.write_bytes(path.read_bytes()[:-1]),
    "a cut header": lambda path: save(path, "example", CONTENT) or path.write_bytes(path.read_bytes()[:200]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_by_its_path(path, name):
    FOREIGN[name](path)
    with pytest.raises(ValueError, match=r"`path='.*a.safetensors'` is not a file that neurst saved, or it is damaged"):
        load(path)


def test_another_layout_is_refused_with_what_to_do(path):
    save_file({}, path, metadata=header(schema=storage.SCHEMA + 1))
    words = r"a.safetensors'` has layout 2, written by neurst 9; this is neurst .*, which reads layout 1: upgrade with"
    with pytest.raises(ValueError, match=words):
        load(path)


def test_a_damaged_byte_of_the_header_gives_an_error_that_names_the_path_or_other_values(path):
    save(path, "example", {"x": np.arange(3.0), "more": {"n": 2, "y": np.arange(2)}})
    whole = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    for i in range(8 + length):
        whole[i] ^= 4
        path.write_bytes(whole)
        whole[i] ^= 4
        try:
            load(path)
        except ValueError as error:
            assert "a.safetensors'`" in str(error)


def test_the_file_is_plain_safetensors_with_a_json_header(path):
    save(path, "example", {"a": {"x": np.arange(3)}, "n": 2})
    with safe_open(path, "numpy") as file:
        assert list(file.keys()) == ["a/x"]
        found = json.loads(file.metadata()["neurst"])
    assert found["schema"] == storage.SCHEMA
    assert found["kind"] == "example"
    assert found["version"] == storage.written_by()
    assert b"pickle" not in path.read_bytes()
