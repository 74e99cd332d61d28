"""The picture of the rooms: which may import which, which packages each may use, and who touches an AnnData."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(ROOT.glob("neurst/**/*.py"))
# rooms that a room may import, besides itself; the public list at the top may import every room
ARROWS = {
    "core": set(),
    "imaging": {"core"},
    "spatial": {"core"},
    "spatial/adata": {"core", "spatial"},
    "datasets": {"core"},
    "tl": {"core", "spatial", "spatial/adata"},
    "get": {"core", "spatial", "spatial/adata"},
    "pl": {"core", "spatial", "spatial/adata"},
}
# packages that a room may import besides the standard library
PACKAGES = {
    "core": {"numpy", "safetensors", "torch", "tqdm"},
    "imaging": {"numpy", "pywt", "scipy", "skimage", "torch"},
    "spatial": {"numpy", "scipy", "torch"},
    "spatial/adata": {"anndata", "numpy", "pandas", "scipy"},
    "datasets": {"anndata", "numpy", "pandas", "scipy"},
    "tl": {"anndata", "numpy"},
    "get": {"anndata"},
    "pl": {"anndata", "matplotlib", "numpy", "pandas"},
}
OPTIONAL = {"smoother"}  # of the baselines
HEAVY = {"matplotlib.pyplot", "scanpy", "squidpy", "spatialdata"}  # only inside functions
# parts of an AnnData that only `spatial/adata` and `datasets`, which makes one, may name
SLOTS = {"uns", "obsm", "varm", "obsp", "varp", "layers", "obs", "var"}


def room(path):
    """The part of neurst that a file belongs to: a folder, or the name of a file at the top."""
    *folders, file = path.relative_to(ROOT / "neurst").parts
    both = "/".join(folders[:2])
    return both if both in ARROWS else folders[0] if folders else file.removesuffix(".py")


def room_of(dotted):
    """The room that a dotted name of neurst is in."""
    parts = dotted.split(".")[1:]
    return "/".join(parts[:2]) if "/".join(parts[:2]) in ARROWS else (parts or ["the whole package"])[0]


def imports(tree):
    """Dotted names imported anywhere in a tree; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class _TopLevel(ast.NodeTransformer):
    """Drops what does not run on import: function bodies and blocks for type checkers."""

    def visit_FunctionDef(self, node):
        return None

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node):
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def parse(path):
    return ast.parse(path.read_text())


def wrong_rooms(path):
    """Rooms of neurst that a file imports and may not."""
    found = {room_of(name) for name in imports(parse(path)) if name.split(".")[0] == "neurst"}
    return found - ARROWS[room(path)] - {room(path)}


def wrong_packages(path):
    """Packages that a file imports and may not."""
    found = {name.split(".")[0] for name in imports(parse(path))} - set(sys.stdlib_module_names) - {"neurst"}
    return found - PACKAGES.get(room(path), set()) - (OPTIONAL if path.name == "baselines.py" else set())


def heavy_on_import(path):
    """Heavy packages that importing a file would load."""
    names = imports(_TopLevel().visit(parse(path)))
    return {name for name in names if any(f"{name}.".startswith(f"{heavy}.") for heavy in HEAVY)}


def slots_named(path):
    """Parts of an AnnData that a file reads or writes as attributes."""
    if room(path) in ("spatial/adata", "datasets"):
        return set()
    return {node.attr for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)} & SLOTS


CHECKS = (wrong_rooms, wrong_packages, heavy_on_import, slots_named)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_room_keeps_to_its_place(check):
    found = {str(path.relative_to(ROOT)): check(path) for path in MODULES if room(path) in ARROWS}
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_every_room_has_its_arrows_and_no_two_rooms_import_each_other():
    assert {room(p) for p in MODULES} == {*ARROWS, "__init__"}
    below = {}
    while len(below) < len(ARROWS):  # a room is placed when all rooms that it imports are
        placed = {name for name, arrows in ARROWS.items() if name not in below and arrows <= set(below)}
        assert placed, f"the rooms {set(ARROWS) - set(below)} import each other"
        below |= dict.fromkeys(placed)


@pytest.mark.parametrize("package", ["core", "imaging", "spatial"])
def test_files_of_a_room_do_not_import_each_other_in_a_circle(package):
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in MODULES if f"neurst/{package}/" in str(p)}
    graph = {}
    for name, path in files.items():
        if not name.endswith("__init__"):
            names = [f"{other}." for other in imports(_TopLevel().visit(parse(path)))]
            graph[name] = {f for f in files if f != name and any(n.startswith(f"{f}.") for n in names)}
    while graph:
        ready = [name for name, needs in graph.items() if not needs & set(graph)]
        assert ready, f"these files import each other: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in ready}


@pytest.mark.parametrize(("file", "source", "check", "expected"), [
    ("core/x.py", "from neurst.spatial import tissue", wrong_rooms, {"spatial"}),
    ("spatial/x.py", "from neurst.spatial.adata import keys", wrong_rooms, {"spatial/adata"}),
    ("pl/x.py", "from neurst import tl", wrong_rooms, {"tl"}),
    ("spatial/x.py", "import neurst", wrong_rooms, {"the whole package"}),
    ("core/x.py", "def f():\n    import pandas", wrong_packages, {"pandas"}),
    ("spatial/x.py", "from anndata import AnnData", wrong_packages, {"anndata"}),
    ("pl/x.py", "try:\n    import scanpy.pl\nexcept ImportError: ...", heavy_on_import, {"scanpy.pl"}),
    ("pl/x.py", "def f():\n    import squidpy\nfrom matplotlib.axes import Axes", heavy_on_import, set()),
    ("pl/x.py", "if TYPE_CHECKING:\n    from spatialdata import SpatialData", heavy_on_import, set()),
    ("tl/x.py", "def f(adata):\n    adata.uns['a'] = adata.obs_names", slots_named, {"uns"}),
    ("spatial/x.py", "f = lambda a: getattr(a, 'x').layers", slots_named, {"layers"}),
    ("spatial/adata/x.py", "def f(adata):\n    return adata.uns", slots_named, set()),
])  # fmt: skip
def test_a_wrong_arrow_would_be_seen(tmp_path, monkeypatch, file, source, check, expected):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "neurst" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert check(path) == expected


PROBE = f"""
import gc, sys, time
import anndata, torch
gc.disable()  # a collection of the objects of other packages would be counted here
begin = time.process_time()  # of the processor: other work does not count
import neurst
print(time.process_time() - begin, sorted({HEAVY!r} & set(sys.modules)))
"""


def test_import_neurst_is_light():
    def probe():
        run = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, heavy = run.stdout.split()
        assert heavy == "[]"
        return float(seconds)

    assert probe() < 0.3 or probe() < 0.3  # the first one may be slowed down by an empty cache
