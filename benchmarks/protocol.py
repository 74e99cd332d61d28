"""Real sections for tests and benchmarks: the folder named by NEURST_DATA, its spots and genes chosen in one way for all."""

import os
from pathlib import Path

import anndata as ad
import numpy as np


def read(name):
    """The AnnData `spatial/<name>.h5ad` of the folder."""
    return ad.read_h5ad(Path(os.environ["NEURST_DATA"]) / "spatial" / f"{name}.h5ad")


def load(name, n_genes, section=None, column="section"):
    """Spots with more than 20 counts: coords (N, 2), counts (N, G) of the most over-dispersed genes, size (N,), names."""
    adata = read(name)
    if section is not None:
        adata = adata[adata.obs[column].astype(str) == section]
    counts, coords = adata.X.toarray().astype(float), np.asarray(adata.obsm["spatial"], float)[:, :2]
    size = counts.sum(1, keepdims=True)  # over all genes
    keep = size[:, 0] > 20
    counts, coords, size = counts[keep], coords[keep], size[keep]
    detected = np.flatnonzero((counts > 0).mean(0) > 0.02)
    mean = size * (counts[:, detected].sum(0) / size.sum())
    dispersion = ((counts[:, detected] - mean) ** 2 / mean).mean(0)
    genes = detected[np.argsort(-dispersion)[:n_genes]]
    return coords, counts[:, genes], size[:, 0], np.asarray(adata.var_names)[genes]
