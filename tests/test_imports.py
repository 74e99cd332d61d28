import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(ROOT.glob("neurst/**/*.py"))
# rooms of neurst that a room may import, besides itself; the public list at the top may import every room
ARROWS = {
    "core": set(),
    "imaging": {"core"},
    "spatial": {"core"},
    "datasets": set(),
    "pp": {"core", "imaging", "spatial"},
    "tl": {"core", "imaging", "spatial"},
    "get": {"core", "imaging", "spatial"},
    "pl": {"get", "spatial"},
}
# packages a room may import besides the standard library; a room not listed is free
PACKAGES = {
    "core": {"torch"},
    "imaging": {"numpy", "scipy", "skimage", "torch", "tqdm"},
    "spatial": {"numpy", "scipy", "torch"},
}
SLOTS = PACKAGES["spatial"] | {"anndata", "pandas"}  # the only reader and writer of AnnData
OPTIONAL = {"smoother"}  # of the baselines
FORBIDDEN = {"pl": {"torch"}}
HEAVY = {"matplotlib.pyplot", "scanpy", "squidpy", "spatialdata"}  # only inside functions


def room(path):
    """The part of neurst a file belongs to: a folder, or the name of a file at the top."""
    return path.relative_to(ROOT / "neurst").parts[0].removesuffix(".py")


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
    parts = [name.split(".") for name in imports(parse(path)) if name != "neurst.__version__"]
    found = {(rest or ["the whole package"])[0] for top, *rest in parts if top == "neurst"}
    return found - ARROWS[room(path)] - {room(path)}


def wrong_packages(path):
    """Packages that a file imports and may not."""
    found = {name.split(".")[0] for name in imports(parse(path))} - set(sys.stdlib_module_names) - {"neurst"}
    allowed = SLOTS if path.name in ("door.py", "slots.py") else PACKAGES.get(room(path), found)
    allowed = allowed | OPTIONAL if path.name == "baselines.py" else allowed
    return (found - allowed) | (found & FORBIDDEN.get(room(path), set()))


def heavy_on_import(path):
    """Heavy packages that importing a file would load."""
    return {
        name for name in imports(_TopLevel().visit(parse(path))) if any(f"{name}.".startswith(f"{h}.") for h in HEAVY)
    }


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ARROWS], ids=name)
def test_imports_between_rooms_point_down(path):
    assert not wrong_rooms(path)


def test_every_room_has_its_arrows():
    assert {room(p) for p in MODULES} <= {*ARROWS, "__init__"}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_room_imports_only_the_packages_it_may(path):
    assert not wrong_packages(path)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_heavy_packages_are_imported_inside_functions(path):
    assert not heavy_on_import(path)


@pytest.mark.parametrize(
    ("file", "source", "check", "expected"),
    [
        ("core/x.py", "from neurst.spatial import tissue", wrong_rooms, {"spatial"}),
        ("spatial/x.py", "import neurst.imaging.restore", wrong_rooms, {"imaging"}),
        ("pl/x.py", "from neurst import tl", wrong_rooms, {"tl"}),
        ("spatial/x.py", "import neurst", wrong_rooms, {"the whole package"}),
        ("tl/x.py", "from neurst import spatial", wrong_rooms, set()),
        ("core/x.py", "def f():\n    import numpy", wrong_packages, {"numpy"}),
        ("spatial/x.py", "from anndata import AnnData", wrong_packages, {"anndata"}),
        ("spatial/slots.py", "from anndata import AnnData", wrong_packages, set()),
        ("pl/x.py", "import torch.nn", wrong_packages, {"torch"}),
        ("pl/x.py", "from matplotlib import pyplot as plt", heavy_on_import, {"matplotlib.pyplot"}),
        ("pl/x.py", "try:\n    import scanpy.pl\nexcept ImportError: ...", heavy_on_import, {"scanpy.pl"}),
        ("pl/x.py", "def f():\n    import squidpy\nfrom matplotlib.axes import Axes", heavy_on_import, set()),
        ("pl/x.py", "if TYPE_CHECKING:\n    from spatialdata import SpatialData", heavy_on_import, set()),
    ],
)
def test_a_wrong_arrow_would_be_seen(tmp_path, monkeypatch, file, source, check, expected):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "neurst" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert check(path) == expected


PROBE = f"""
import sys, time
import anndata, torch
begin = time.process_time()  # of the processor: other work does not count
import neurst
print(time.process_time() - begin, *sorted({HEAVY!r} & set(sys.modules)))
"""


def test_import_neurst_is_light():
    runs = [
        subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds, heavy = zip(*((float(s), names) for s, *names in (run.stdout.split() for run in runs)), strict=True)
    assert heavy[0] == []
    assert min(seconds) < 0.3
