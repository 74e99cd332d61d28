"""Bad input: what is wrong, where, and what to do next is said in words, and the AnnData stays as it was.

Words are parts of one message in their order, with ``...`` for what stands between them. Arguments of a wrong type or range are
generated in ``test_hostile.py``; here are those that depend on what an AnnData holds.
"""

import re
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from hostile import stopped
from real import needs_data, read
from scipy import sparse
from sections import frozen

from neurst.core.nets import Siren
from neurst.core.tuning import LineSearch
from neurst.get import field
from neurst.spatial import member
from neurst.spatial.adata import keys, serialise
from neurst.spatial.adata.read import read_spots
from neurst.spatial.spec import ExpressionConfig
from neurst.tl import neurtv_fit, neurtv_gradient, neurtv_query, neurtv_superres

SIDE, GENES = 8, 12
N = SIDE**2
QUICK = {
    "penalty": "nuclear",
    "lam": 400,
    "n_members": 1,
    "steps": 5,
    "rank": 3,
    "network": Siren(width=16, depth=1),
    "config": ExpressionConfig(most_bumps=0),
    "device": "cpu",
    "progress": False,
}
READ = dict.fromkeys(["genes", "layer", "library_key", "size_factors"]) | {
    "spatial_key": "spatial",
    "likelihood": "auto",
}
HERE = np.array([[100.0, 100.0], [250.0, 300.0]])  # inside the tissue


def section(d=2):
    """64 hexagonal spots (at random heights, in 3-d) with counts of 12 genes."""
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(N), SIDE)
    coords = np.column_stack([100 * (column + row % 2 / 2), 75**0.5 * 10 * row, rng.uniform(0, 300, N)])[:, :d]
    slope = np.outer(coords[:, 0] / 400 - 1, rng.normal(size=GENES))
    counts = rng.poisson(np.exp(rng.normal(1, 0.5, GENES) + slope))
    return AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame({"total": counts.sum(1)}, index=[f"spot{i}" for i in range(N)]),
        var=pd.DataFrame(index=[f"Gene{i}" for i in range(GENES)]),
        obsm={"spatial": coords},
    )


def fit(adata, **options):
    neurtv_fit(adata, **QUICK | options)


@pytest.fixture(scope="module")
def fitted():
    adata = section()
    fit(adata)
    return adata


@pytest.fixture
def no_training(monkeypatch):
    """What is refused is refused before any work."""

    def train(*args, **options):
        pytest.fail("a fit was started")

    monkeypatch.setattr(member, "fit_field", train)


@contextmanager
def unchanged(adata):
    before = frozen(adata)
    yield
    assert frozen(adata) == before


def pattern(words):
    return ".*".join(map(re.escape, words.split(" ... ")))


@contextmanager
def refused(adata, error, words):
    with unchanged(adata), pytest.raises(error, match=pattern(words)):
        yield


# How to break an AnnData: each function changes one in place, or returns another one.


def after(change, adata):
    other = change(adata)
    return other if isinstance(other, AnnData) else adata


def whole(adata):
    pass


def put(slot, name, value):
    def change(adata):
        getattr(adata, slot)[name] = value

    return change


def drop(slot, name):
    def change(adata):
        del getattr(adata, slot)[name]

    return change


def moved(change):
    return lambda adata: adata.obsm.update(spatial=change(adata.obsm["spatial"].copy()))


def with_x(change):
    def set_x(adata):
        adata.X = change(adata.X.toarray() if sparse.issparse(adata.X) else adata.X)

    return set_x


def at(where, value):
    def change(array):
        array = array.copy()
        array[where] = value
        return array

    return change


def normalised_with_counts(adata):
    adata.layers["raw_counts"] = adata.X.copy()
    adata.X = adata.X.log1p()


def section_b_on_odd_spots(adata):
    adata.obs["section"] = ["a", "b"] * (N // 2)


def two_halves_of_one_frame(adata):
    """Two sections of the same array: their spots lie at nearly the same places."""
    rng = np.random.default_rng(0)
    adata.obsm["spatial"] = np.repeat(adata.obsm["spatial"][::2], 2, axis=0) + rng.normal(0, 1, (N, 2))
    adata.obs["where"] = pd.Categorical(["left", "right"] * (N // 2))


def two_slides(adata):
    two_halves_of_one_frame(adata)
    adata.obs["Slide"] = adata.obs.pop("where")


SECTION = put("obs", "section", "a")
TWO_PICTURES = put("uns", "spatial", {"A": {}, "B": {}})
OTHER = {"of": "someone else"}

# name: what is broken, options of the fit, error, words
FITS = {
    "positions are missing": (drop("obsm", "spatial"), {}, KeyError, "`spatial_key='spatial'` is not in `adata.obsm`, which holds nothing: ... store the positions"),
    "positions are elsewhere": (whole, {"spatial_key": "xy"}, KeyError, "`spatial_key='xy'` ... holds 'spatial': pass one of these"),
    "four columns": (moved(lambda x: np.hstack([x, x])), {}, ValueError, "`adata.obsm['spatial']` has shape (64, 4): expected"),
    "positions are NaN": (moved(at(([3, 5], 0), np.nan)), {}, ValueError, "`adata.obsm['spatial']` is not finite at 2 of 64 spots (first: ['spot3', 'spot5']): drop them"),
    "positions are words": (moved(lambda x: np.full(x.shape, "left")), {}, TypeError, "`adata.obsm['spatial']` cannot be read as real numbers ... convert it"),
    "positions are masked": (moved(lambda x: np.ma.masked_array(x, x == x[5])), {}, ValueError, "`adata.obsm['spatial']` is a masked array with ... masked entries: fill or drop them"),
    "values are masked": (with_x(lambda x: np.ma.masked_array(x, x > 20)), {}, ValueError, "`adata.X` is a masked array with ... masked entries: fill them first"),
    "three spots": (lambda adata: adata[:3].copy(), {}, ValueError, "3 of 3 spots ... expected at least 4; check"),
    "no spots": (lambda adata: adata[:0].copy(), {}, ValueError, "`adata` has 0 spots in `adata.obsm['spatial']`: expected at least 4"),
    "no genes": (lambda adata: adata[:, :0].copy(), {}, ValueError, "`adata` has 0 genes: expected at least 1; look for"),
    "one row of spots": (lambda adata: adata[:SIDE].copy(), {}, ValueError, "the 8 distinct positions in `adata.obsm['spatial']` lie on a line: ... check its columns"),
    "z is constant": (moved(lambda x: np.column_stack([x, np.full(N, 5.0)])), {}, ValueError, "the 64 distinct positions ... lie on a plane ... pass the 2-d positions ... first two columns"),
    "one point": (moved(lambda x: 0 * x + 7), {}, ValueError, "all 64 spots of `adata.obsm['spatial']` are at one point, [7.0, 7.0]: store the positions"),
    "negative counts": (with_x(at((2, 3), -1)), {"likelihood": "poisson"}, ValueError, "`adata.X` holds 1 negative values, which 'poisson' cannot have: pass a layer of raw counts, or likelihood='gaussian'"),
    "NaN among counts": (with_x(at((2, 3), np.nan)), {"likelihood": "poisson"}, ValueError, "`adata.X` holds 1 NaN or infinite values: replace or drop them"),
    "NaN under auto": (with_x(at((2, slice(3)), np.nan)), {}, ValueError, "`adata.X` holds 3 NaN or infinite values"),
    "a fill value": (with_x(at((2, 3), 9.97e36)), {}, ValueError, "`adata.X` holds values from 0 to 9.97e+36: expected less than 1e+30; look for ... fill value"),
    "nothing but zeros": (with_x(np.zeros_like), {}, ValueError, "0 of 64 spots are in the tissue and hold expression: ... check ... `layer`"),
    "nothing varies": (with_x(np.ones_like), {"likelihood": "gaussian"}, ValueError, "none of the 12 genes varies between spots ... check `layer` and `genes`"),
    "X is None": (lambda adata: adata.layers.update(raw=adata.X.copy()) or setattr(adata, "X", None), {}, ValueError, "`adata.X` is None: pass `layer=` ... holds 'raw'"),
    "X is of objects": (with_x(lambda x: x.astype(object)), {}, ValueError, "`adata.X` holds values of type object: expected numbers; convert them"),
    "layer is missing": (normalised_with_counts, {"layer": "counts"}, KeyError, "`layer='counts'` is not in `adata.layers`, which holds 'raw_counts': pass one of these"),
    "genes are unknown": (whole, {"genes": ["gene3", "Foo", "Gene5"]}, KeyError, "`genes`: 2 of 3 names are not among the 12 genes in `adata.var_names`. 'gene3': did you mean 'Gene3'?; 'Foo': nothing is alike"),
    "a gene is misspelt": (whole, {"genes": "Gnee3"}, KeyError, "`genes`: 1 of 1 names ... 'Gnee3': did you mean ... 'Gene3'"),
    "genes share a name": (lambda adata: setattr(adata, "var_names", ["A", "A", *adata.var_names[2:]]), {}, ValueError, "`adata.var_names` are not unique (first: 'A'): call `adata.var_names_make_unique()`"),
    "library sizes are negative": (whole, {"size_factors": [1.0] * 62 + [-2.0] * 2}, ValueError, "`size_factors` is negative or not finite at 2 of 64 spots (first: 'spot62', -2.0): expected library sizes"),
    "library sizes are too few": (whole, {"size_factors": [1.0] * 60}, ValueError, "`size_factors` has shape (60,): expected (64,)"),
    "library sizes are of other spots": (whole, {"size_factors": pd.Series(np.ones(N))}, ValueError, "`size_factors` is a Series whose index is not `adata.obs_names`: align it"),
    "library sizes are nowhere": (whole, {"size_factors": "depth"}, KeyError, "`size_factors='depth'` is not in `adata.obs`, which holds 'total': pass one of these"),
    **{f"key is {key!r}": (whole, {"key_added": key}, ValueError, f"`key_added={key!r}`: expected a name") for key in (".", "..", "_index", "__a", "a\0", "a\n", "\ud800")},
    "key of someone's uns": (put("uns", "neurtv", OTHER), {}, ValueError, "`key_added='neurtv'` would overwrite `adata.uns['neurtv']` ... pass another `key_added`, or delete it"),
    "key of someone's obsm": (put("obsm", "X_pca", np.ones((N, 2))), {"key_added": "pca"}, ValueError, "would overwrite `adata.obsm['X_pca']`"),
    "key of someone's column": (put("var", "neurtv_empty", True), {}, ValueError, "would overwrite `adata.var['neurtv_empty']`"),
    "penalty is unknown": (whole, {"penalty": "tv"}, ValueError, "`penalty='tv'`: expected 'auto' alone, or one or more of ... 'isotropic'"),
    "spots of another scale": (put("uns", "spatial", {"A": {"scalefactors": {"spot_diameter_fullres": 550.0}}}), {"footprint": "auto"}, ValueError, "`footprint='auto'`: `spot_diameter_fullres` in `adata.uns['spatial']` is 550, but the spots are 100 apart: expected 0.2 to 1.2 of this; pass"),
    "a spot diameter that is a word": (put("uns", "spatial", {"A": {"scalefactors": {"spot_diameter_fullres": "wide"}}}), {"footprint": "auto"}, ValueError, "`spot_diameter_fullres` in `adata.uns['spatial']` is 'wide': expected a positive number"),
    "two pictures": (TWO_PICTURES, {}, ValueError, "`adata.uns['spatial']` names 2 sections ('A', 'B') ... split by section ... library_key="),
    "two sections": (section_b_on_odd_spots, {"library_key": "section"}, ValueError, "`adata.obs['section']` names 2 sections ('a', 'b') ... split by section ... `one = adata[adata.obs['section'] == 'a'].copy()`"),
    "sections are nowhere": (whole, {"library_key": "slide"}, KeyError, "`library_key='slide'` is not in `adata.obs`, which holds 'total': pass one of these"),
    "two sections in one frame": (two_slides, {}, ValueError, "`adata.obs['Slide']` looks like it names 2 sections ('left', 'right') that cover the same area ... `neurst.tl.neurtv_fit(one, library_key='Slide')`"),
    "sections without a name": (two_halves_of_one_frame, {}, ValueError, "the typical spot has another spot at its place or right beside it ... fit each section on its own, or, if this is one section, say so"),
    "a section is not named": (put("obs", "section", pd.Categorical(["a"] * (N - 1) + [None])), {"library_key": "section"}, ValueError, "`library_key='section'` has missing values at 1 of 64 spots: name the section of every spot"),
    "in_tissue is NaN": (put("obs", "in_tissue", np.where(np.arange(N) < 60, 1.0, np.nan)), {}, ValueError, "`adata.obs['in_tissue']` is neither 0 nor 1 at 4 of 64 spots (first: 'spot60', nan): set it to 0 or 1 there, or delete the column"),
    "no tissue": (put("obs", "in_tissue", 0), {}, ValueError, "0 of 64 spots are in the tissue ... check `adata.obs['in_tissue']`"),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "options", "error", "words"), FITS.values(), ids=FITS)
def test_a_fit_is_refused_in_words_before_any_work(no_training, broken, options, error, words):
    adata = after(broken, section())
    with refused(adata, error, words):
        fit(adata, **options)


@needs_data
def test_sections_of_one_frame_are_told_apart_from_one_section(no_training):
    adata = read("st_mob_4sections")
    with refused(adata, ValueError, "`adata.obs['section']` looks like it names 4 sections"):
        fit(adata)
    for section_of in adata.obs["section"].unique():
        one = adata[adata.obs["section"] == section_of]
        assert len(read_spots(one, **READ).data.coords) > 200
    del adata.obs["section"]
    with refused(adata, ValueError, "the typical spot has another spot at its place or right beside it"):
        fit(adata)


def test_a_file_that_is_not_in_memory_is_refused_but_its_field_can_be_queried(tmp_path, fitted):
    fitted.write_h5ad(tmp_path / "a.h5ad")
    backed = read_h5ad(tmp_path / "a.h5ad", backed="r+")
    with pytest.raises(ValueError, match=pattern("`adata` is backed by the file ... `adata = adata.to_memory()`")):
        fit(backed)
    np.testing.assert_array_equal(neurtv_query(backed, HERE).X, neurtv_query(fitted, HERE).X)
    backed.file.close()


def query(coords=HERE, **options):
    return lambda adata: neurtv_query(adata, coords, **options)


def superres(**options):
    return lambda adata: neurtv_superres(adata, **options)


def gradient(**options):
    return lambda adata: neurtv_gradient(adata, **options)


def genes_renamed(adata):
    adata.var_names = [f"Other{i}" for i in range(GENES)]


# name: what is broken after a fit, what is called, error, words
READS = {
    "coords is one point": (whole, query(HERE[0]), ValueError, "`coords` has shape (2,): expected (N, 2) with N >= 1, one row for each point"),
    "a point is outside": (whole, query(HERE + [[0, 0], [5000, 0]], outside="raise"), ValueError, "`coords`: 1 of 2 points are outside the tissue, more than 105 from a spot (first: row 1, [5250.0, 300.0]): drop them, or pass outside='nan' or 'extrapolate'"),
    "gene of a query is not in the field": (whole, query(genes="gene3"), KeyError, "`genes`: 1 of 1 names are not among the 12 genes of the field. 'gene3': did you mean 'Gene3'?"),
    "key of a query is unknown": (whole, query(key="mine"), KeyError, "`key='mine'` is not in `adata.uns`, which holds 'neurtv': call `neurst.tl.neurtv_fit(adata, key_added='mine')`"),
    "factor and spacing": (whole, superres(factor=3, spacing=50), ValueError, "`factor=3` and `spacing=50` were both given: pass one of them"),
    "positions were dropped": (drop("obsm", "spatial"), superres(), KeyError, "`spatial_key='spatial'` is not in `adata.obsm`"),
    "gene of a gradient was dropped": (lambda adata: adata[:, :3].copy(), gradient(genes="Gene7"), KeyError, "not among the 3 genes in `adata.var_names`. 'Gene7'"),
    "genes were renamed": (genes_renamed, gradient(), ValueError, "none of the 12 genes of the field is in `adata.var_names`: `neurtv_query` and `neurtv_superres` still work ... give the genes back these names ('Gene0', ...), or refit"),
    "there is no fit to differentiate": (drop("uns", "neurtv"), gradient(), KeyError, "`key='neurtv'` is not in `adata.uns`, which holds nothing: the AnnData still holds results of it, but the field is lost, as `concat` and some filters drop `uns`: concatenate with `uns_merge='first'` to keep it, or delete the results and refit, or refit under another `key_added`"),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "call", "error", "words"), READS.values(), ids=READS)
def test_reading_a_field_is_refused_in_words(no_training, fitted, broken, call, error, words):
    adata = after(broken, fitted.copy())
    with refused(adata, error, words):
        call(adata)


def test_bad_options_are_refused_before_a_field_is_fitted_for_them(no_training):
    adata = section()
    with refused(adata, ValueError, "`factor=0`"):
        neurtv_superres(adata, factor=0)
    with refused(adata, KeyError, "'gene3': did you mean 'Gene3'?"):
        neurtv_superres(adata, genes="gene3")


# ---- a stored field that was cut, damaged, or written by someone else


def spoil(*path, value):
    """Put `value`, or what it makes of the present value, at a path in the slot of a fit."""

    def change(adata):
        slot = adata.uns["neurtv"]
        for name in path[:-1]:
            slot = slot[name]
        slot[path[-1]] = value(slot[path[-1]]) if callable(value) else value

    return change


REFIT = "refit with `neurst.tl.neurtv_fit(adata)`"
DAMAGED = "`adata.uns['neurtv']` is damaged"

# name: what is spoilt, words
STORED = {
    "written by someone else": (put("uns", "neurtv", OTHER), "`adata.uns['neurtv']` was not written by `neurst.tl.neurtv_fit`: pass the `key_added` of a fit"),
    "of a newer schema": (spoil("neurst_schema", value=99), f"has schema 99, written by a newer neurst ... reads schema {keys.SCHEMA}: upgrade it ... or {REFIT}"),
    "of an early schema": (spoil("neurst_schema", value=1), f"has schema 1, written by an early neurst ... reads schema {keys.SCHEMA}: {REFIT}"),
    "field is cut": (lambda adata: adata.uns["neurtv"].pop("field"), f"is incomplete, its 'field' lacks everything: {REFIT}"),
    "weights are NaN": (spoil("field", "weights", "nets-0-1-bias", value=lambda w: w * np.nan), f"{DAMAGED} ... 1.bias is not finite): {REFIT}"),
    "positions of another dimension": (spoil("coords", value=np.ones((9, 3))), f"{DAMAGED} ... coords has shape (9, 3), expected (9, 2)"),
    "positions are NaN": (spoil("coords", value=lambda x: x * np.nan), f"{DAMAGED} ... coords is not finite"),
    "marks of other spots": (spoil("supports", value=np.ones(3, dtype=bool)), f"{DAMAGED} ... supports has shape (3,)"),
    **{f"{part} is missing": (lambda adata, part=part: adata.uns["neurtv"]["field"].pop(part), f"is incomplete, its 'field' lacks {part}: {REFIT}") for part in serialise.FIELD_PARTS},
}  # fmt: skip


@pytest.mark.parametrize(("spoilt", "words"), STORED.values(), ids=STORED)
def test_a_stored_fit_that_is_not_whole_is_refused(fitted, spoilt, words):
    adata = fitted.copy()
    spoilt(adata)
    with refused(adata, ValueError, words):
        field(adata)


@pytest.mark.parametrize("call", [query(), superres(), gradient()], ids=["query", "superres", "gradient"])
def test_every_verb_reads_a_stored_field_through_the_same_checks(fitted, call):
    adata = fitted.copy()
    adata.uns["neurtv"]["field"]["loadings"] *= np.nan
    with refused(adata, ValueError, f"{DAMAGED} ... loadings is not finite"):
        call(adata)


# ---- nothing is half written


def refit(adata):
    fit(adata, n_members=1, penalty=["nuclear", "tgv"], lam=30)


CHANGES = {
    "fit": (whole, fit),
    "refit": (fit, refit),
    "refit after a gradient": (lambda adata: fit(adata) or neurtv_gradient(adata), refit),
    "gradient": (fit, neurtv_gradient),
    "gradient of other genes": (lambda adata: fit(adata) or neurtv_gradient(adata), lambda adata: neurtv_gradient(adata, genes="Gene3")),
}  # fmt: skip


@pytest.mark.parametrize(("earlier", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_that_is_stopped_at_any_write_leaves_the_data_as_it_was(earlier, change):
    adata, n_writes, done = section(), 0, False
    earlier(adata)
    while not done:
        before = frozen(adata)
        try:
            with stopped((KeyboardInterrupt if n_writes % 2 else MemoryError, n_writes)):
                change(adata)
            done = True
        except (KeyboardInterrupt, MemoryError):
            assert frozen(adata) == before
            n_writes += 1
    assert n_writes >= 4


# ---- what looks odd but is fine


def in_halves(x):
    """The same matrix, with every entry stored as two halves."""
    repeated = sparse.csr_matrix((np.repeat(x.data / 2, 2), np.repeat(x.indices, 2), 2 * x.indptr), shape=x.shape)
    assert repeated.nnz == 2 * x.nnz
    return repeated


BACKWARDS = [f"Gene{i}" for i in reversed(range(GENES))]

# name: how the same data are brought, options of the fit
SAME = {
    **{f"X is {dtype}": (with_x(lambda x, dtype=dtype: x.astype(dtype)), {}) for dtype in ("int64", "uint8", "float16", "float64")},
    "X is by columns": (lambda adata: setattr(adata, "X", sparse.csc_matrix(adata.X)), {}),
    "X is a sparse array": (lambda adata: setattr(adata, "X", sparse.csr_array(adata.X)), {}),
    "X is dense by columns": (with_x(np.asfortranarray), {}),
    "X has every entry in two halves": (lambda adata: setattr(adata, "X", in_halves(adata.X)), {}),
    "X is a masked array without a mask": (with_x(np.ma.masked_array), {}),
    "X is a dask array": (with_x(lambda x: pytest.importorskip("dask.array").from_array(x, chunks=(20, 20))), {}),
    "positions are objects": (moved(lambda x: x.astype(object)), {}),
    "positions are backwards in memory": (moved(lambda x: x[::-1].copy()[::-1]), {}),
    "genes are backwards": (whole, {"genes": BACKWARDS}),
    "library sizes are row sums": (whole, {"size_factors": section().X.sum(1)}),
    "library sizes are a Series": (whole, {"size_factors": section().obs["total"]}),
    "penalties are named twice": (whole, {"penalty": ("nuclear", "nuclear")}),
    "numbers are of numpy": (whole, {"lam": np.float32(400), "rank": np.int32(3), "steps": np.uint16(5), "random_state": np.uint8(0), "n_members": np.int64(1)}),
    "one section is named": (SECTION, {"library_key": "section"}),
    "one section of two pictures": (lambda adata: SECTION(adata) or TWO_PICTURES(adata), {"library_key": "section"}),
    "a section without spots": (put("obs", "section", pd.Categorical(["a"] * N, ["a", "b"])), {"library_key": "section"}),
}  # fmt: skip


@pytest.mark.parametrize(("brought", "options"), SAME.values(), ids=SAME)
def test_the_same_data_give_the_same_field_however_they_are_brought(fitted, brought, options):
    adata = section()
    brought(adata)
    x = frozen(adata.X)
    fit(adata, **options)
    np.testing.assert_array_equal(adata.layers["neurtv"], fitted.layers["neurtv"])
    assert frozen(adata.X) == x


OFF = np.arange(N) % SIDE < 3  # three columns of spots, two of them far from the others
SPELLINGS = {
    "int": (~OFF).astype(int),
    "float": (~OFF).astype(float),
    "bool": ~OFF,
    "nullable": pd.array(~OFF, dtype="boolean"),
    "string": np.where(OFF, "0", "1"),
    "string of a float": np.where(OFF, "0.0", "1.0"),
    "word": np.where(OFF, "False", "True"),
    "category": pd.Categorical(np.where(OFF, "0", "1")),
    "category of words": pd.Categorical(np.where(OFF, "FALSE", "TRUE")),
    "category of bool": pd.Categorical(~OFF),
}


@pytest.mark.parametrize("mark", SPELLINGS.values(), ids=SPELLINGS)
def test_spots_off_the_tissue_are_left_out_however_that_is_written(mark):
    adata = section()
    adata.obs["in_tissue"] = mark
    np.testing.assert_array_equal(read_spots(adata, **READ).data.coords, adata.obsm["spatial"][~OFF])


# name: values or spots, options of the fit, rank that is left
EXTREMES = {
    "large counts": (with_x(lambda x: 1e6 * x), {}, 3),
    "one huge count": (with_x(at((3, 3), 1e29)), {}, 3),
    "one huge overdispersed count": (with_x(at((3, 3), 1e29)), {"likelihood": "negative_binomial"}, 3),
    # beside 1e29 double precision need not see the other channels
    "one huge value": (with_x(at((3, 3), 1e29)), {"likelihood": "gaussian"}, range(1, 4)),
    "tiny values": (with_x(lambda x: 1e-30 * x), {"likelihood": "gaussian"}, 3),
    "values on a pedestal": (with_x(lambda x: 1e5 + x), {"likelihood": "gaussian"}, 3),
    "a gene with a single count": (with_x(lambda x: at((7, 2), 1)(at((slice(None), 2), 0)(x))), {}, 3),
    "library sizes far apart": (whole, {"size_factors": np.logspace(-10, 10, N)}, 3),
    "one gene": (lambda adata: adata[:, 3].copy(), {}, 1),
    "four spots": (lambda adata: adata[[0, 1, 8, 9]].copy(), {}, 3),
    "one gene at four spots": (lambda adata: adata[[0, 1, 8, 9], 3].copy(), {"lam": "auto"}, 1),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "rank"), EXTREMES.values(), ids=EXTREMES)
def test_extremes_are_fitted_without_nan(change, options, rank):
    adata = after(change, section())
    fit(adata, search=LineSearch(steps=3, max_steps=1), **options)
    slot, loadings, latent = adata.uns["neurtv"], adata.varm["neurtv_loadings"], adata.obsm["X_neurtv"]
    written = [adata.layers["neurtv"], latent, loadings, adata.var.filter(like="_explained")]
    for values in [*written, slot["score"], slot["history"]["objective"], neurtv_superres(adata).X]:
        assert np.isfinite(np.asarray(values)).all()
    assert latent.shape[1] in (rank if isinstance(rank, range) else [rank])


# ---- what is done, but not silently

# name: what is odd, what is called, words
ODD = {
    "fractions under a count likelihood": (with_x(np.log1p), lambda adata: fit(adata, likelihood="poisson"), "`adata.X` holds values that are not whole numbers; 'poisson' takes them as expected counts. ... pass a layer of raw counts or likelihood='gaussian'"),
    "library sizes of normalised values": (with_x(np.log1p), lambda adata: fit(adata, size_factors="total"), "`size_factors` has no meaning for normalised values ... it is ignored"),
    "axes in different units": (moved(lambda x: x * [1, 1e-3]), fit, "sides of the coordinates' bounding box differ by a factor of 1.24e+03 (750, 0.606) ... different units, convert them"),
    "a query in other units": (fit, query(1000 * HERE), "2 of 2 points are outside the tissue: `coords` range from (100000, 100000) to (250000, 300000), but the field was fitted from (0, 0) to (750, 606.218); are the units the same?"),
    "an extrapolation in other units": (fit, query(1000 * HERE, outside="extrapolate"), "2 of 2 points are outside the tissue ... are the units the same?"),
    "a query beside the tissue": (fit, query(HERE - [400, 0]), "2 of 2 points are outside the tissue: `coords` range from (-300, 100) to (-150, 300)"),
}  # fmt: skip


@pytest.mark.parametrize(("odd", "call", "words"), ODD.values(), ids=ODD)
def test_what_may_be_a_mistake_is_done_with_a_warning(odd, call, words):
    adata = section()
    odd(adata)
    with pytest.warns(UserWarning, match=pattern(words)) as caught:
        call(adata)
    assert len(caught) == 1


def test_a_layer_of_counts_beside_normalised_values_is_pointed_out(caplog):
    adata = section()
    normalised_with_counts(adata)
    fit(adata, likelihood="gaussian")
    fit(adata, layer="raw_counts")
    assert not caplog.records
    fit(adata)
    (record,) = caplog.records
    assert "there is a layer 'raw_counts': pass layer='raw_counts' to fit counts" in record.message
    assert adata.uns["neurtv"]["params"]["likelihood"] == "gaussian"
