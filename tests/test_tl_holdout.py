"""Held-out scores through the verb: what is written, that it is what the array functions say, and what is refused."""

from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from real import load, needs_data
from scipy import sparse
from sections import section
from tqdm.auto import tqdm

from neurst import tl
from neurst.core.nets import Siren
from neurst.spatial import kriging, slots
from neurst.spatial.baselines import BASELINES, MEANS, kernel_cv
from neurst.spatial.choice import LamSearch
from neurst.spatial.fitting import fit_expression
from neurst.spatial.holdout import deviance_explained, deviance_explained_per_gene, median_gene_correlation, split

QUICK = {"lam": 50, "steps": 10, "rank": 3, "network": Siren(width=16, depth=2), "device": "cpu", "progress": False}
SOME = ["Layer4_01", "Layer2_01", "Flat_02"]


def scored(adata, **options):
    tl.holdout_score(adata, **(QUICK | options))
    return adata.uns[options.get("key_added", "holdout_score")]


def arrays(adata):
    counts = adata.X.toarray().astype(float)
    return adata.obsm["spatial"], counts, counts.sum(1)


@pytest.fixture(scope="module")
def done():
    """A scored section that no test changes."""
    adata = section()
    scored(adata, seeds=(0, 3))
    return adata


def test_scores_write_the_slots_they_promise_and_nothing_else(done):
    before = section()
    assert set(done.uns) - set(before.uns) == {"holdout_score"}
    assert list(done.var.columns) == [*before.var.columns, "holdout_score", "holdout_score_baseline"]
    for part in ("obs", "obsm", "varm", "layers"):
        assert set(getattr(done, part)) == set(getattr(before, part))
    pd.testing.assert_frame_equal(done.var[before.var.columns], before.var)
    np.testing.assert_array_equal(done.X.toarray(), before.X.toarray())


def test_the_table_has_a_row_for_each_seed_and_method(done):
    table = done.uns["holdout_score"]
    assert tuple(table.columns) == slots.SCORE_COLUMNS
    assert list(zip(table["seed"], table["method"], strict=True)) == [
        (s, m) for s in (0, 3) for m in ("nearest", "kernel", "field")
    ]
    assert (table["mode"] == "random").all()
    assert (table["n_test"] == int(0.2 * done.n_obs)).all()
    assert (table["n_train"] + table["n_test"] == done.n_obs).all()
    assert (table["seconds"] > 0).all()
    np.testing.assert_array_equal(table["lam"], [np.nan, np.nan, 50] * 2)


@pytest.mark.parametrize("mode", ["random", "block"])
def test_scores_are_those_of_the_array_functions_on_the_same_split(mode):
    adata = section()
    table = scored(adata, mode=mode, seeds=(5,), fraction=0.3).set_index("method")
    coords, counts, size = arrays(adata)
    train, test = split(coords, mode, random_state=5, fraction=0.3)
    rate = kernel_cv(coords[train], counts[train], size[train], coords[test])
    held, null = (counts[test], size[test]), counts[train].sum(0) / size[train].sum()
    assert table.loc["kernel", "score"] == pytest.approx(deviance_explained(*held, rate, null))
    assert table.loc["kernel", "median_r"] == pytest.approx(median_gene_correlation(*held, rate))
    assert table.loc["kernel", "score"] > table.loc["nearest", "score"]
    best = deviance_explained_per_gene(*held, rate, null)
    np.testing.assert_allclose(adata.var["holdout_score_baseline"], best, rtol=1e-10)


def test_the_field_sees_the_training_spots_only(monkeypatch):
    adata, spoilt = section(), section()
    counts = spoilt.X.toarray()
    _, test = split(spoilt.obsm["spatial"], "random", random_state=0, fraction=0.2)
    total = counts[test].sum(1)
    counts[test] = 0
    counts[test, 0] = total  # other genes, the same library sizes
    spoilt.X = counts
    fit, predicted = tl._holdout._Fit.__call__, []
    monkeypatch.setattr(tl._holdout._Fit, "__call__", lambda *a: predicted.append(fit(*a)) or predicted[-1])
    scores = [scored(each)["score"].iloc[-1] for each in (adata, spoilt)]
    np.testing.assert_array_equal(predicted[0][0], predicted[1][0])
    assert scores[0] > scores[1]


def test_the_field_of_a_seed_is_that_of_a_fit_to_its_training_spots():
    adata = section()
    table = scored(adata, seeds=(3,), penalty="isotropic")
    coords, counts, size = arrays(adata)
    train, test = split(coords, random_state=3)
    part = adata[train].copy()
    tl.neurtv_fit(part, **QUICK, penalty="isotropic", random_state=3)
    out = tl.neurtv_query(part, coords[test], outside="extrapolate")
    rate = out.X.astype(float) / out.uns["neurtv_query"]["target_sum"]
    want = deviance_explained(counts[test], size[test], rate, counts[train].sum(0) / size[train].sum())
    assert table["score"].iloc[-1] == pytest.approx(want, abs=1e-6)


def test_every_baseline_has_a_name(monkeypatch):
    names = [name for name in (*BASELINES, "no_tv", "lognorm") if name != "smoother"]
    short = partial(fit_expression, search=LamSearch(steps=3, reach=1))
    monkeypatch.setattr(tl._holdout, "fit_expression", short)
    table = scored(section(radius=6), baselines=names).set_index("method")
    assert set(table.index) == {*names, "field"}
    assert np.isfinite(table[["score", "median_r"]]).all(axis=None)
    assert table.loc["no_tv", "lam"] == 0
    assert table.loc["lognorm", "lam"] != table.loc["field", "lam"] == 50  # a strength of its own
    assert table.loc[["nearest", "kernel", "kriging", "kriging_log"], "lam"].isna().all()


def test_normalised_values_are_scored_by_variance():
    adata = section()
    counts = adata.X.toarray()
    adata.X = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    table = scored(adata, baselines=[*MEANS, "no_tv"]).set_index("method")
    assert table.loc["kriging", "score"] > table.loc["nearest", "score"]
    assert table["score"].between(-1, 1).all()
    with pytest.raises(ValueError, match="'lognorm' is no method for normalised values: choose from"):
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


def test_per_gene_scores_are_means_over_seeds(done):
    parts = []
    for seed in (0, 3):
        adata = section()
        scored(adata, seeds=seed)
        parts.append(adata.var["holdout_score"])
    np.testing.assert_allclose(done.var["holdout_score"], (parts[0] + parts[1]) / 2)


def test_without_baselines_there_is_only_the_field():
    adata = section()
    assert list(scored(adata, baselines=())["method"]) == ["field"]
    assert adata.var["holdout_score_baseline"].isna().all()


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_scores_come_back_from_a_file_and_can_be_written_again(done, tmp_path, kind):
    getattr(done, f"write_{kind}")(tmp_path / f"a.{kind}")
    read = getattr(ad, f"read_{kind}")(tmp_path / f"a.{kind}")
    table, field, _ = slots.read_scores(read, "holdout_score")
    pd.testing.assert_frame_equal(table, done.uns["holdout_score"], check_dtype=False, check_index_type=False)
    np.testing.assert_array_equal(field, done.var["holdout_score"])
    scored(read, baselines=())  # ours to replace
    assert len(read.uns["holdout_score"]) == 1


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_request(progress, capfd):
    scored(section(radius=4), baselines=("nearest",), progress=progress)
    out, err = capfd.readouterr()
    assert ("/200" in err) is progress
    assert not out


REFUSED = {
    "mode": ({"mode": "blocks"}, "`mode` is 'blocks': choose one of 'random', 'block'"),
    "fraction": ({"fraction": 1.5}, "`fraction` is 1.5: give a number between 0 and 1"),
    "fraction hides all": ({"fraction": 0.99}, "`fraction=0.99` hides .* and leaves .* expected at least 1 and 4"),
    "fraction hides none": ({"fraction": 0.001}, "`fraction=0.001` hides 0 of .* pass another `fraction`"),
    "seeds are empty": ({"seeds": ()}, r"`seeds=\(\)` is empty: name at least one"),
    "a seed is negative": ({"seeds": (0, -1)}, "`seeds=-1`: expected a whole number >= 0"),
    "a baseline is unknown": ({"baselines": ["kernel", "knn"]}, "`baselines`: 'knn' is no method for counts: choose from"),
    "members": ({"n_members": 0}, "`n_members=0`: expected a whole number >= 1"),
    "penalty": ({"penalty": "tv"}, "`penalty='tv'` is unknown"),
    "lam": ({"lam": -1}, "`lam=-1`: expected 'auto' or"),
    "device": ({"device": "gpu"}, "`device='gpu'` cannot be used"),
    "key": ({"key_added": "a/b"}, "`key_added='a/b'`: expected a name"),
    "key of someone else": ({"key_added": "layer_colors"}, "would overwrite `adata.uns\\['layer_colors'\\]`.*held-out scores"),
    "key of a column": ({"key_added": "length"}, "would overwrite `adata.var\\['length'\\]`"),
}  # fmt: skip


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, **options):
        pytest.fail("a fit was started")

    monkeypatch.setattr(tl._holdout, "fit_expression", train)


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused_in_words_before_any_work(no_training, options, words):
    adata = section(radius=4)
    columns, uns = list(adata.var.columns), set(adata.uns)
    with pytest.raises(ValueError, match=words):
        scored(adata, **options)
    assert (list(adata.var.columns), set(adata.uns)) == (columns, uns)


def test_too_many_spots_for_kriging_are_refused_before_a_fit(no_training, monkeypatch):
    monkeypatch.setattr(kriging, "MOST_SPOTS", 30)
    with pytest.raises(ValueError, match="expected at most 30; leave it out"):
        scored(section(radius=6), baselines=["kriging"])


def test_a_fit_does_not_overwrite_scores_nor_scores_a_fit(done):
    adata = done.copy()
    with pytest.raises(ValueError, match="which is not from a fit"):
        tl.neurtv_fit(adata, key_added="holdout_score", **QUICK)
    tl.neurtv_fit(adata, **QUICK)
    with pytest.raises(ValueError, match="which is not from held-out scores"):
        scored(adata, key_added="neurtv")


@pytest.mark.parametrize("where", [(tqdm, "update"), (slots, "_spread"), (slots, "make_actual")])
def test_a_call_that_is_stopped_leaves_the_data_as_it_was(monkeypatch, where):
    def stop(*args, **options):
        raise KeyboardInterrupt

    adata = section(radius=4)
    columns, uns = list(adata.var.columns), set(adata.uns)
    monkeypatch.setattr(*where, stop)
    with pytest.raises(KeyboardInterrupt):
        scored(adata, baselines=())
    assert (list(adata.var.columns), set(adata.uns)) == (columns, uns)


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
