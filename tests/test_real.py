import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from real import load, needs_data

from neurst.spatial.evaluate.scores import deviance_explained
from neurst.spatial.evaluate.splits import split
from neurst.tl import neurtv_fit, neurtv_query


@needs_data
@pytest.mark.parametrize(("name", "holdout", "steps", "floor"), [
    ("st_mob_rep11", "random", "auto", 0.4156),
    ("st_mob_rep11", "block", 200, 0.255),
])  # fmt: skip
def test_held_out_spots_of_real_sections_are_predicted(name, holdout, steps, floor):
    coords, counts, size, genes = load(name, 300)
    train, test = split(coords, holdout)
    names = pd.DataFrame(index=[f"spot{i}" for i in train])
    adata = AnnData(counts[train], obs=names, var=pd.DataFrame(index=genes), obsm={"spatial": coords[train]})
    neurtv_fit(
        adata, size_factors=size[train], steps=steps, progress=False
    )  # sizes are totals over all genes of the file
    out = neurtv_query(adata, coords[test], outside="extrapolate")
    rate = out.X.astype(float) / out.uns["neurtv"]["query"]["target_sum"]
    score = deviance_explained(counts[test], size[test], rate, counts[train].sum(0) / size[train].sum())
    print(f"{name}, {holdout}: {score:.4f} at lam = {adata.uns['neurtv']['lam']}, {np.median(size):.0f} counts a spot")
    assert score >= floor
