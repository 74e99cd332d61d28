"""How well the boundary map finds annotated layers: DLPFC 151673 and 151674, 1,000 genes, defaults.

``NEURST_DATA=folder python benchmarks/boundaries.py`` writes the table "boundaries" of docs/benchmarks_tables.md, and docs/figures/boundaries.png.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from anndata import AnnData
from protocol import load, read
from scipy import sparse
from scipy.stats import mannwhitneyu
from tables import ROOT, write

import neurst
from neurst.spatial.geometry import kd_tree

SECTIONS = ("visium_dlpfc_151673", "visium_dlpfc_151674")


def area_under_roc(score: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive spot has a larger score than a negative one."""
    return mannwhitneyu(score[positive], score[negative]).statistic / (positive.sum() * negative.sum())


def section(name: str) -> AnnData:
    """A fitted section with its boundary map and annotation."""
    coords, counts, size, genes = load(name, 1000)
    whole = read(name)
    kept = np.asarray(whole.X.sum(1)).ravel() > 20
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)))
    adata.var_names, adata.obsm["spatial"], adata.obs["total"] = genes, coords, size
    adata.obs["layer"] = whole.obs["layer"].astype(str).to_numpy()[kept]
    neurst.tl.neurtv_fit(adata, size_factors="total", progress=False)
    neurst.tl.neurtv_gradient(adata, genes=list(genes[:2]))
    return adata


def main() -> None:
    lines, fig = [], plt.figure(figsize=(11, 9))
    axes = fig.subplots(2, 2)
    for row, name in zip(axes, SECTIONS, strict=True):
        adata = section(name)
        labelled = adata[~adata.obs["layer"].isin(["nan", "None", "NA", ""]).to_numpy()]
        layer, score = labelled.obs["layer"].to_numpy(), labelled.obs["neurtv_boundary"].to_numpy()
        tree = kd_tree(labelled.obsm["spatial"])
        pitch = np.median(tree.query(labelled.obsm["spatial"], k=2)[0][:, 1])
        near = tree.query_ball_point(labelled.obsm["spatial"], 1.3 * pitch)
        mixed = [{layer[i], *layer[each]} for i, each in enumerate(near)]
        positive = np.array([len(kinds) > 1 for kinds in mixed])
        areas = [area_under_roc(score, positive, ~positive)]
        for kind in np.unique(layer):
            areas.append(area_under_roc(score, positive & np.array([kind in kinds for kinds in mixed]), ~positive))
        lines.append(f"| {name} | {' | '.join(f'{area:.3f}' for area in areas)} |")
        print(lines[-1], flush=True)
        neurst.pl.gradient(adata, ax=row[0])
        codes = {kind: k for k, kind in enumerate(np.unique(layer))}
        row[1].scatter(*labelled.obsm["spatial"].T, c=[codes[kind] for kind in layer], s=5, cmap="tab10")
        row[1].invert_yaxis()
        row[1].set(aspect="equal", title="annotated layers", xticks=[], yticks=[])
        row[0].set_title(f"boundary map, {name.removeprefix('visium_dlpfc_')}")
    header = f"| section | any border | {' | '.join(np.unique(layer))} |"
    setting = "Area under the ROC curve of the boundary map for spots next to another annotated layer, against spots that are not; then for the borders of each layer. 1,000 genes, defaults."
    write("boundaries", __file__, setting, [header, "|---" * header[1:].count("|") + "|", *lines])
    fig.savefig(ROOT / "docs" / "figures" / "boundaries.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
