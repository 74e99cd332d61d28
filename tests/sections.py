"""Small sections for tests of the verbs, a fit of them that takes a moment, and comparisons of AnnData."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from neurst import tl
from neurst.core.nets import Siren
from neurst.datasets import SyntheticTissue, synthetic_visium

PITCH = SyntheticTissue.pitch
SOME = ["Layer4_01", "Layer2_01", "Flat_02"]  # of the 20 genes, not in the order of var_names
QUICK = {
    "penalty": "nuclear",
    "lam": 400,
    "n_members": 2,
    "steps": 10,
    "network": Siren(width=16, depth=2),
    "progress": False,
}


@cache
def _whole():
    return synthetic_visium(n_genes=20)


def section(radius=8):
    """The spots of a synthetic section up to `radius` pitches from its middle, 20 genes; all of them if None."""
    adata = _whole()
    if radius is not None:
        away = np.linalg.norm(adata.obsm["spatial"] - np.median(adata.obsm["spatial"], axis=0), axis=1)
        adata = adata[away <= radius * PITCH]
    adata = adata.copy()
    adata.var["length"] = np.arange(20) * 1000
    adata.var["symbol"] = [name.upper() for name in adata.var_names]
    adata.uns["layer_colors"] = ["#102030"] * 6
    return adata


def fitted(radius=8, **options):
    """A section with a field."""
    adata = section(radius)
    tl.neurtv_fit(adata, **(QUICK | options))
    return adata


def stack(n_sections=None):
    """Cells in space, 4 genes, one of them brighter along z: 300 anywhere, or 100 in each of a few sections."""
    rng = np.random.default_rng(0)
    coords = rng.uniform([0, 100, -50], [80, 160, -10], (100 * (n_sections or 3), 3))
    if n_sections is not None:
        coords[:, 2] = np.linspace(-50, -10, n_sections).repeat(100)
    rate = 4 * np.exp(np.column_stack([coords[:, 2] / 20 + 1.5, np.zeros((len(coords), 3))]))
    names = pd.Index([f"cell{i}" for i in range(len(coords))])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(4)])
    return AnnData(
        rng.poisson(rate).astype(np.float32), obs=pd.DataFrame(index=names), var=var, obsm={"spatial": coords}
    )


def dense(matrix):
    """A matrix as a dense array."""
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def slots_of(adata):
    """Every named slot of an AnnData, as ``part/name``."""
    parts = ("obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns")
    return {f"{part}/{name}" for part in parts for name in getattr(adata, part) if name is not None}


PARTS = ("X", "obs", "var", "layers", "obsm", "varm", "obsp", "varp", "uns")


def frozen(x):
    """A nested value as plain ones that can be compared: NaN equals NaN, and a type is part of the value."""
    if isinstance(x, AnnData):
        return {part: frozen(getattr(x, part)) for part in PARTS} | {"view": x.is_view}
    if isinstance(x, pd.DataFrame):
        return {"index": list(x.index)} | {name: (str(x[name].dtype), repr(x[name].tolist())) for name in x}
    if isinstance(x, Mapping):
        return {name: frozen(value) for name, value in x.items()}
    if sparse.issparse(x):
        return type(x).__name__, frozen(x.toarray())
    if isinstance(x, np.ndarray):
        return x.shape, str(x.dtype), x.tobytes() if x.dtype != object else repr(x.tolist())
    return repr(x)


def assert_same(a, b):
    """Two AnnData hold the same, bit by bit."""
    assert frozen(a) == frozen(b)
