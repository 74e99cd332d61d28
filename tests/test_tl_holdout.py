"""Held-out scores through the verb: what is written, that it is what the array functions say, and what is refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from real import load, needs_data
from scipy import sparse
from sections import SOME, assert_same, section, slots_of
from tqdm.auto import tqdm

from neurst import tl
from neurst.core.nets import Siren
from neurst.spatial.adata.results import read_scores
from neurst.spatial.evaluate import compare
from neurst.spatial.evaluate.baselines import VALUE_BASELINES
from neurst.spatial.evaluate.splits import split

QUICK = {
    "penalty": "nuclear",
    "lam": 50,
    "steps": 10,
    "rank": 3,
    "network": Siren(width=16, depth=2),
    "device": "cpu",
    "progress": False,
}
COLUMNS = ["holdout", "seed", "method", "score", "median_r", "seconds", "n_train", "n_test", "lam"]


def scored(adata, **options):
    tl.holdout_score(adata, **(QUICK | options))
    return adata.uns[options.get("key_added", "holdout_score")]


@pytest.fixture(scope="module")
def done():
    """A scored section that no test changes."""
    adata = section()
    scored(adata, seeds=(0, 3))
    return adata


def test_scores_write_the_slots_they_promise_and_nothing_else(done):
    adata, table = done.copy(), done.uns["holdout_score"]
    assert list(table.columns) == COLUMNS
    assert list(table["method"]) == ["nearest", "kernel", "field"] * 2
    np.testing.assert_array_equal(table["lam"], [np.nan, np.nan, 50] * 2)
    assert slots_of(adata) - slots_of(section()) == {
        "uns/holdout_score",
        "var/holdout_score",
        "var/holdout_score_baseline",
    }
    del adata.uns["holdout_score"], adata.var["holdout_score"], adata.var["holdout_score_baseline"]
    assert_same(adata, section())


def test_the_strength_in_a_table_is_that_of_the_network_with_the_largest_weight():
    given = {"baselines": ["no_tv"], "seeds": 0}
    table = scored(section(), penalty="auto", **given).set_index("method")
    assert list(table["lam"]) == [50, 0]
    assert np.isfinite(table["score"]).all()
    assert np.isnan(scored(section(), penalty="gaussian_process", **given).set_index("method").loc["field", "lam"])


def test_normalised_values_are_scored_by_variance():
    adata = section()
    adata.X = adata.X.log1p()
    table = scored(adata, baselines=[*VALUE_BASELINES, "no_tv"]).set_index("method")
    assert table.loc["kriging", "score"] > table.loc["nearest", "score"]
    assert table["score"].between(-1, 1).all()
    with pytest.raises(ValueError, match="'lognorm' is no method for normalised values: expected some of"):
        scored(adata, baselines="lognorm")


def test_genes_without_training_counts_score_zero_and_others_are_nan():
    adata = section()
    counts = adata.X.toarray()
    train, _ = split(adata.obsm["spatial"], random_state=0)
    counts[train, 4] = 0
    adata.X = sparse.csr_matrix(counts)
    asked = [*SOME, adata.var_names[4]]
    scored(adata, genes=asked)
    for column in ("holdout_score", "holdout_score_baseline"):
        assert adata.var[column].iloc[4] == 0
        np.testing.assert_array_equal(adata.var[column].notna(), adata.var_names.isin(asked))
    assert np.isfinite(adata.uns["holdout_score"]["score"]).all()


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_scores_come_back_from_a_file_and_can_be_written_again(done, tmp_path, kind):
    getattr(done, f"write_{kind}")(tmp_path / f"a.{kind}")
    read = getattr(ad, f"read_{kind}")(tmp_path / f"a.{kind}")
    table, field, _ = read_scores(read, "holdout_score")
    pd.testing.assert_frame_equal(table, done.uns["holdout_score"], check_dtype=False, check_index_type=False)
    np.testing.assert_array_equal(field, done.var["holdout_score"])
    assert list(scored(read, baselines=())["method"]) == ["field"]  # ours to replace
    assert read.var["holdout_score_baseline"].isna().all()


REFUSED = {
    "fraction hides all": ({"fraction": 0.94}, ValueError, "`fraction=0.94` hides .* and leaves .* expected at least 1 and 4"),
    "seeds are empty": ({"seeds": ()}, ValueError, r"`seeds=\(\)`: expected a whole number >= 0 .* list of 1 or more"),
    "a baseline is unknown": ({"baselines": ["kernel", "knn"]}, ValueError, "`baselines`: 'knn' is no method for counts: expected some of"),
    "penalty": ({"penalty": "tv"}, ValueError, "`penalty='tv'`: expected 'auto' alone, or"),
    "key of someone else": ({"key_added": "layer_colors"}, ValueError, "would overwrite `adata.uns\\['layer_colors'\\]`.*held-out scores"),
    "key of a column": ({"key_added": "length"}, ValueError, "would overwrite `adata.var\\['length'\\]`"),
}  # fmt: skip


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, **options):
        pytest.fail("a fit was started")

    monkeypatch.setattr(compare, "fit_expression", train)


@pytest.mark.parametrize(("options", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused_in_words_before_any_work(no_training, options, error, words):
    adata = section(radius=2)
    with pytest.raises(error, match=words):
        scored(adata, **options)
    assert_same(adata, section(radius=2))


def test_a_fit_does_not_overwrite_scores_nor_scores_a_fit(done):
    adata = done.copy()
    with pytest.raises(ValueError, match="which is not from the fit"):
        tl.neurtv_fit(adata, key_added="holdout_score", **QUICK)
    tl.neurtv_fit(adata, **QUICK)
    with pytest.raises(ValueError, match="which is not from held-out scores"):
        scored(adata, key_added="neurtv")


def test_a_call_that_is_stopped_leaves_the_data_as_it_was(monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    adata = section(radius=4)
    monkeypatch.setattr(tqdm, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        scored(adata, baselines=(), progress=True)
    assert_same(adata, section(radius=4))


@needs_data
def test_baselines_of_a_real_section_reach_the_reference_figures_and_the_field_beats_the_kernel():
    coords, counts, size, genes = load("st_mob_rep11", 300)
    adata = AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=genes), obsm={"spatial": coords})
    options = {"size_factors": size, "baselines": ["kernel", "kriging_log"], "lam": 300, "steps": 80, "progress": False}
    tl.holdout_score(adata, **options)
    table = adata.uns["holdout_score"].set_index("method")
    print(table[["score", "median_r"]])
    assert table.loc["kernel", "score"] == pytest.approx(0.2520, abs=1e-4)
    assert table.loc["kriging_log", "score"] == pytest.approx(0.3421, abs=1e-4)
    assert table.loc["field", "score"] > table.loc["kernel", "score"] + 0.05  # after so few steps
