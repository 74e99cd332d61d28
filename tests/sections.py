"""Small sections for tests of the verbs, and a fit of them that takes a moment."""

from functools import cache

import numpy as np
import pandas as pd
from anndata import AnnData

from neurst import tl
from neurst.core.nets import Siren
from neurst.datasets import SyntheticTissue, synthetic_visium

PITCH = SyntheticTissue.pitch
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


def stack():
    """300 cells in space, 4 genes, one of them brighter along z."""
    rng = np.random.default_rng(0)
    coords = rng.uniform([0, 100, -50], [80, 160, -10], (300, 3))
    rate = 4 * np.exp(np.column_stack([coords[:, 2] / 20 + 1.5, np.zeros((300, 3))]))
    names = pd.Index([f"cell{i}" for i in range(300)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(4)])
    return AnnData(
        rng.poisson(rate).astype(np.float32), obs=pd.DataFrame(index=names), var=var, obsm={"spatial": coords}
    )
