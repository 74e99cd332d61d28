"""Bad input: what is wrong, where, and what to do next is said in words, and the AnnData stays as it was.

Words are parts of one message in their order, with ``...`` for what stands between them.
"""

import re
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, concat, read_h5ad
from scipy import sparse
from tqdm.auto import tqdm

from neurst.core.nets import Siren
from neurst.core.penalty import NuclearTV
from neurst.get import field
from neurst.spatial import choice, model, packing, slots
from neurst.tl import _neurtv, neurtv_fit, neurtv_gradient, neurtv_query, neurtv_superres

SIDE, GENES = 8, 12
N = SIDE**2
QUICK = {
    "penalty": "nuclear",
    "lam": 400,
    "n_members": 1,
    "steps": 5,
    "rank": 3,
    "network": Siren(width=16, depth=1),
    "device": "cpu",
    "progress": False,
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
    """What is refused at the door is refused before any work."""

    def train(*args, **options):
        pytest.fail("a fit was started")

    monkeypatch.setattr(model, "fit_field", train)


PARTS = ("X", "obs", "var", "layers", "obsm", "varm", "obsp", "varp", "uns")


def frozen(x):
    """A nested value as plain ones that can be compared: NaN is NaN, a type is part of the value."""
    if isinstance(x, AnnData):
        return {part: frozen(getattr(x, part)) for part in PARTS} | {"view": x.is_view}
    if isinstance(x, pd.DataFrame):
        return {"index": list(x.index)} | {name: (str(x[name].dtype), repr(x[name].tolist())) for name in x}
    if isinstance(x, Mapping):
        return {name: frozen(value) for name, value in x.items()}
    if sparse.issparse(x):
        return type(x).__name__, frozen(x.toarray())
    if isinstance(x, np.ndarray):
        return x.shape, str(x.dtype), repr(x.tolist())
    return repr(x)


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


SECTION = put("obs", "section", "a")
TWO_PICTURES = put("uns", "spatial", {"A": {}, "B": {}})
OTHER = {"of": "someone else"}

# name: what is broken, options of the fit, error, words
FITS = {
    "positions are missing": (drop("obsm", "spatial"), {}, KeyError, "`spatial_key='spatial'` is not in `adata.obsm`, which holds nothing: ... store the positions"),
    "positions are elsewhere": (whole, {"spatial_key": "xy"}, KeyError, "`spatial_key='xy'` ... holds 'spatial': pass one of these"),
    "one column": (moved(lambda x: x[:, :1]), {}, ValueError, "`adata.obsm['spatial']` has shape (64, 1): expected (n_obs, 2) or (n_obs, 3)"),
    "four columns": (moved(lambda x: np.hstack([x, x])), {}, ValueError, "`adata.obsm['spatial']` has shape (64, 4): expected"),
    "positions are NaN": (moved(at(([3, 5], 0), np.nan)), {}, ValueError, "`adata.obsm['spatial']` is not finite at 2 of 64 spots (first: ['spot3', 'spot5']): drop them"),
    "positions are infinite": (moved(at(([3, 5, 7, 9], 1), -np.inf)), {}, ValueError, "not finite at 4 of 64 spots (first: ['spot3', 'spot5', 'spot7'])"),
    "positions are words": (moved(lambda x: np.full(x.shape, "left")), {}, ValueError, "`adata.obsm['spatial']` cannot be read as numbers ... 'left' ... convert it"),
    "three spots": (lambda adata: adata[:3].copy(), {}, ValueError, "3 of 3 spots ... expected at least 4; check"),
    "no spots": (lambda adata: adata[:0].copy(), {}, ValueError, "0 of 0 spots ... expected at least 4"),
    "no genes": (lambda adata: adata[:, :0].copy(), {}, ValueError, "`adata` has 0 genes: expected at least 1; look for"),
    "one row of spots": (lambda adata: adata[:SIDE].copy(), {}, ValueError, "the 8 distinct positions in `adata.obsm['spatial']` lie on a line: ... check its columns"),
    "a tilted line": (moved(lambda x: x[:, :1] * [[1, 3]] + 1e7), {}, ValueError, "lie on a line"),
    "z is constant": (moved(lambda x: np.column_stack([x, np.full(N, 5.0)])), {}, ValueError, "the 64 distinct positions ... lie on a plane ... pass the 2-d positions ... first two columns"),
    "one point": (moved(lambda x: 0 * x + 7), {}, ValueError, "all 64 spots of `adata.obsm['spatial']` are at one point, [7.0, 7.0]: store the positions"),
    "two points": (moved(lambda x: (x[:, :1] > 300) * [[1.0, 1.0]]), {}, ValueError, "the 2 distinct positions ... lie on a line"),
    "negative counts": (with_x(at((2, 3), -1)), {"likelihood": "poisson"}, ValueError, "`adata.X` holds 1 negative values, which 'poisson' cannot have: pass a layer of raw counts, or likelihood='gaussian'"),
    "negative counts again": (with_x(at((2, 3), -1)), {"likelihood": "negative_binomial"}, ValueError, "1 negative values, which 'negative_binomial' cannot have"),
    "NaN among counts": (with_x(at((2, 3), np.nan)), {"likelihood": "poisson"}, ValueError, "`adata.X` holds 1 NaN or infinite values: replace or drop them"),
    "NaN under auto": (with_x(at((2, slice(3)), np.nan)), {}, ValueError, "`adata.X` holds 3 NaN or infinite values"),
    "infinity among normalised values": (with_x(at((2, 3), np.inf)), {"likelihood": "gaussian"}, ValueError, "`adata.X` holds 1 NaN or infinite values"),
    "a fill value": (with_x(at((2, 3), 9.97e36)), {}, ValueError, "`adata.X` holds values from 0 to 9.97e+36: expected less than 1e+30; look for ... fill value"),
    "values beyond float32": (with_x(lambda x: x.astype(float) * 1e300), {"likelihood": "gaussian"}, ValueError, "`adata.X` holds values ... expected less than 1e+30"),
    "nothing but zeros": (with_x(np.zeros_like), {}, ValueError, "0 of 64 spots are in the tissue and hold expression: ... check ... `layer`"),
    "nothing varies": (with_x(np.ones_like), {"likelihood": "gaussian"}, ValueError, "none of the 12 genes varies between spots ... check `layer` and `genes`"),
    "X is None": (lambda adata: adata.layers.update(raw=adata.X.copy()) or setattr(adata, "X", None), {}, ValueError, "`adata.X` is None: pass `layer=` ... holds 'raw'"),
    "X is of objects": (with_x(lambda x: x.astype(object)), {}, ValueError, "`adata.X` holds values of type object: expected numbers; convert them"),
    "layer is missing": (normalised_with_counts, {"layer": "counts"}, KeyError, "`layer='counts'` is not in `adata.layers`, which holds 'raw_counts': pass one of these"),
    "genes are unknown": (whole, {"genes": ["gene3", "Foo", "Gene5"]}, KeyError, "`genes`: 2 of 3 names are not among the 12 genes in `adata.var_names`. 'gene3': did you mean 'Gene3'?; 'Foo': nothing is alike"),
    "a gene is misspelt": (whole, {"genes": "Gnee3"}, KeyError, "`genes`: 1 of 1 names ... 'Gnee3': did you mean ... 'Gene3'"),
    "genes are empty": (whole, {"genes": []}, ValueError, "`genes` is empty: name at least one gene, or pass None"),
    "genes share a name": (lambda adata: setattr(adata, "var_names", ["A", "A", *adata.var_names[2:]]), {}, ValueError, "`adata.var_names` are not unique (first: 'A'): call `adata.var_names_make_unique()`"),
    "library sizes are negative": (whole, {"size_factors": [1.0] * 62 + [-2.0] * 2}, ValueError, "`size_factors` is negative or not finite at 2 of 64 spots (first: 'spot62', -2.0): expected library sizes"),
    "library sizes are NaN": (whole, {"size_factors": [np.nan] + [1.0] * 63}, ValueError, "`size_factors` ... at 1 of 64 spots (first: 'spot0', nan)"),
    "library sizes are infinite": (whole, {"size_factors": [1.0] * 63 + [np.inf]}, ValueError, "`size_factors` ... at 1 of 64 spots (first: 'spot63', inf)"),
    "library sizes are too few": (whole, {"size_factors": [1.0] * 60}, ValueError, "`size_factors` has shape (60,): expected (64,)"),
    "library sizes are words": (whole, {"size_factors": ["big"] * N}, ValueError, "`size_factors` cannot be read as numbers ... 'big'"),
    "library sizes are of other spots": (whole, {"size_factors": pd.Series(np.ones(N))}, ValueError, "`size_factors` is a Series whose index is not `adata.obs_names`: align it"),
    "library sizes are nowhere": (whole, {"size_factors": "depth"}, KeyError, "`size_factors='depth'` is not in `adata.obs`, which holds 'total': pass one of these"),
    "a column of library sizes with NaN": (put("obs", "total", [np.nan] + [1.0] * 63), {"size_factors": "total"}, ValueError, "`adata.obs['total']`, is negative or not finite at 1 of 64 spots"),
    "library sizes are zero": (whole, {"size_factors": np.zeros(N)}, ValueError, "0 of 64 spots are in the tissue and hold expression"),
    "key with a slash": (whole, {"key_added": "a/b"}, ValueError, "`key_added='a/b'`: expected a name ... no '/'"),
    "key is empty": (whole, {"key_added": ""}, ValueError, "`key_added=''`: expected a name, at least one letter"),
    "key is None": (whole, {"key_added": None}, ValueError, "`key_added=None`: expected a name"),
    "key of someone's uns": (put("uns", "neurtv", OTHER), {}, ValueError, "`key_added='neurtv'` would overwrite `adata.uns['neurtv']` ... pass another `key_added`, or delete it"),
    "key of someone's layer": (put("layers", "neurtv", np.ones((N, GENES))), {}, ValueError, "would overwrite `adata.layers['neurtv']`"),
    "key of someone's gradient": (put("layers", "mine_dx", np.ones((N, GENES))), {"key_added": "mine"}, ValueError, "`key_added='mine'` would overwrite `adata.layers['mine_dx']`"),
    "key of someone's obsm": (put("obsm", "X_pca", np.ones((N, 2))), {"key_added": "pca"}, ValueError, "would overwrite `adata.obsm['X_pca']`"),
    "key of someone's column": (put("var", "neurtv_empty", True), {}, ValueError, "would overwrite `adata.var['neurtv_empty']`"),
    "likelihood is unknown": (whole, {"likelihood": "nb"}, ValueError, "`likelihood='nb'` is unknown: choose one of ... 'negative_binomial'"),
    "penalty is unknown": (whole, {"penalty": "tv"}, ValueError, "`penalty='tv'` is unknown: choose 'auto', or one or more of ... 'isotropic'"),
    "penalty is of cubes": (whole, {"penalty": "mixed"}, ValueError, "`penalty='mixed'` is for cubes ... choose 'auto', or one or more of ['anisotropic'"),
    "one penalty of several is of cubes": (whole, {"penalty": ["nuclear", "mixed"]}, ValueError, "`penalty='mixed'` is for cubes ... choose 'auto', or one or more of"),
    "one penalty of several is unknown": (whole, {"penalty": ("nuclear", "tv")}, ValueError, "`penalty='tv'` is unknown: choose 'auto', or one or more of ... 'nuclear'"),
    "one penalty of several is a number": (whole, {"penalty": ["nuclear", 3]}, ValueError, "`penalty=3` is unknown: choose 'auto', or one or more of"),
    "one penalty of several is a list": (whole, {"penalty": ["nuclear", ["tgv"]]}, ValueError, "`penalty=['tgv']` is unknown: choose 'auto', or one or more of"),
    "auto is one of several": (whole, {"penalty": ["auto", "tgv"]}, ValueError, "`penalty='auto'` stands alone: choose 'auto', or one or more of"),
    "penalties are empty": (whole, {"penalty": []}, ValueError, "`penalty=[]` is empty: choose one or more of ['anisotropic', ... 'nuclear', ... or 'auto'"),
    **{f"penalty is {penalty!r}": (whole, {"penalty": penalty}, ValueError, f"`penalty={penalty!r}` is unknown: choose 'auto', or one or more of") for penalty in (None, 3)},
    "penalty is a class": (whole, {"penalty": NuclearTV}, ValueError, "`penalty=<class ... NuclearTV'>` is unknown: choose 'auto'"),
    **{f"for_gaps is {value!r}": (whole, {"for_gaps": value}, ValueError, f"`for_gaps={value!r}`: expected True or False") for value in ("block", None, 2)},
    **{f"n_members is {n!r}": (whole, {"n_members": n}, ValueError, f"`n_members={n!r}`: expected a whole number >= 1") for n in (0, -1, 1.5, "2", None)},
    "network is unknown": (whole, {"network": "mlp"}, ValueError, "`network='mlp'` is unknown: choose one of ... 'siren'"),
    "network is a class": (whole, {"network": Siren}, ValueError, "`network=<class ... is unknown: ... pass e.g. `Siren(width=64)`"),
    "device is not here": (whole, {"device": "cuda:99"}, ValueError, "`device='cuda:99'` cannot be used on this machine: choose one of ['auto', 'cpu'"),
    "device is unknown": (whole, {"device": "gpu"}, ValueError, "`device='gpu'` cannot be used on this machine: choose one of ['auto', 'cpu'"),
    "random_state is None": (whole, {"random_state": None}, ValueError, "`random_state=None`: expected a whole number >= 0"),
    "random_state is negative": (whole, {"random_state": -1}, ValueError, "`random_state=-1`: expected a whole number >= 0"),
    **{f"lam is {lam!r}": (whole, {"lam": lam}, ValueError, f"`lam={lam!r}`: expected 'auto' or a finite number >= 0 ... suits") for lam in (-1, np.nan, np.inf, "strong", None, [1, 2])},
    **{f"rank is {rank!r}": (whole, {"rank": rank}, ValueError, f"`rank={rank!r}`: expected a whole number >= 1") for rank in (0, 2.5, "3")},
    **{f"steps is {steps!r}": (whole, {"steps": steps}, ValueError, f"`steps={steps!r}`: expected a whole number >= 1") for steps in (0, -1, 1.5)},
    **{f"footprint is {footprint!r}": (whole, {"footprint": footprint}, ValueError, f"`footprint={footprint!r}`: expected None (values at points), 'auto', or the diameter") for footprint in (0, -5.0, np.nan, np.inf, "spot", True, [55])},
    "spots of another scale": (put("uns", "spatial", {"A": {"scalefactors": {"spot_diameter_fullres": 550.0}}}), {"footprint": "auto"}, ValueError, "`footprint='auto'`: `spot_diameter_fullres` in `adata.uns['spatial']` is 550, but the spots are 100 apart: expected 0.2 to 1.2 of this; pass"),
    "a spot diameter that is a word": (put("uns", "spatial", {"A": {"scalefactors": {"spot_diameter_fullres": "wide"}}}), {"footprint": "auto"}, ValueError, "`spot_diameter_fullres` in `adata.uns['spatial']` cannot be read as numbers ... 'wide'"),
    "two pictures": (TWO_PICTURES, {}, ValueError, "`adata.uns['spatial']` names 2 sections ('A', 'B') ... split by section ... library_key="),
    "two sections": (section_b_on_odd_spots, {"library_key": "section"}, ValueError, "`adata.obs['section']` names 2 sections ('a', 'b') ... split by section ... `one = adata[adata.obs['section'] == 'a'].copy()`"),
    "sections are nowhere": (whole, {"library_key": "slide"}, KeyError, "`library_key='slide'` is not in `adata.obs`, which holds 'total': pass one of these"),
    "in_tissue is NaN": (put("obs", "in_tissue", np.where(np.arange(N) < 60, 1.0, np.nan)), {}, ValueError, "`adata.obs['in_tissue']` is neither 0 nor 1 at 4 of 64 spots (first: 'spot60', nan): set it to 0 or 1 there, or delete the column"),
    "in_tissue is something else": (put("obs", "in_tissue", "yes"), {}, ValueError, "`adata.obs['in_tissue']` is neither 0 nor 1 at 64 of 64 spots (first: 'spot0', yes)"),
    "no tissue": (put("obs", "in_tissue", 0), {}, ValueError, "0 of 64 spots are in the tissue ... check `adata.obs['in_tissue']`"),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "options", "error", "words"), FITS.values(), ids=FITS)
def test_a_fit_is_refused_in_words_before_any_work(no_training, broken, options, error, words):
    adata = after(broken, section())
    with refused(adata, error, words):
        fit(adata, **options)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_that_is_not_in_memory_is_refused_but_its_field_can_be_queried(tmp_path, fitted, mode):
    fitted.write_h5ad(tmp_path / "a.h5ad")
    backed = read_h5ad(tmp_path / "a.h5ad", backed=mode)
    with pytest.raises(
        ValueError, match="`adata` is backed by the file .*a.h5ad: .*`adata = adata.to_memory()`".replace("()", r"\(\)")
    ):
        fit(backed)
    np.testing.assert_array_equal(neurtv_query(backed, HERE).X, neurtv_query(fitted, HERE).X)
    backed.file.close()


def query(coords=HERE, **options):
    return lambda adata: neurtv_query(adata, coords, **options)


def superres(**options):
    return lambda adata: neurtv_superres(adata, **options)


def gradient(**options):
    return lambda adata: neurtv_gradient(adata, **options)


def renamed(adata):
    adata.obs_names = [f"cell{i}" for i in range(N)]


def genes_renamed(adata):
    adata.var_names = [f"Other{i}" for i in range(GENES)]


POSITIVE = "expected a positive, finite number"

# name: what is broken after a fit, what is called, error, words
READS = {
    "coords is one point": (whole, query(HERE[0]), ValueError, "`coords` has shape (2,): expected (N, 2) with N >= 1, one row for each point"),
    "coords is empty": (whole, query(np.empty((0, 2))), ValueError, "`coords` has shape (0, 2): expected (N, 2) with N >= 1"),
    "coords of another dimension": (whole, query(np.ones((4, 3))), ValueError, "`coords` has shape (4, 3): expected (N, 2)"),
    "coords is NaN": (whole, query([[1.0, 2.0], [0.0, np.nan]]), ValueError, "`coords` is not finite in 1 of 2 rows (first: row 1, [0.0, nan]): drop them"),
    "coords is words": (whole, query([["left", "right"]]), ValueError, "`coords` cannot be read as numbers ... 'left'"),
    "coords is ragged": (whole, query([[1, 2], [3]]), ValueError, "`coords` cannot be read as numbers"),
    "a point is outside": (whole, query(HERE + [[0, 0], [5000, 0]], outside="raise"), ValueError, "`coords`: 1 of 2 points are more than 105 from a spot (first: row 1, [5250.0, 300.0]): drop them, or pass outside='nan' or 'extrapolate'"),
    "outside is unknown": (whole, query(outside="clip"), ValueError, "`outside='clip'` is unknown: choose 'nan', 'extrapolate' or 'raise'"),
    "radius of a query is negative": (whole, query(support_radius=-1), ValueError, f"`support_radius=-1`: {POSITIVE}"),
    "gene of a query is not in the field": (whole, query(genes="gene3"), KeyError, "`genes`: 1 of 1 names are not among the 12 genes of the field. 'gene3': did you mean 'Gene3'?"),
    "genes of a query are empty": (whole, query(genes=[]), ValueError, "`genes` is empty"),
    "key of a query is unknown": (whole, query(key="mine"), KeyError, "`key='mine'` is not in `adata.uns`, which holds 'neurtv': call `neurst.tl.neurtv_fit(adata, key_added='mine')`"),
    "factor and spacing": (whole, superres(factor=3, spacing=50), ValueError, "`factor=3` and `spacing=50` were both given: pass one of them"),
    **{f"factor is {value!r}": (whole, superres(factor=value), ValueError, f"`factor={value!r}`: {POSITIVE}") for value in (0, -1, np.nan, np.inf, "2", None)},
    **{f"spacing is {value!r}": (whole, superres(spacing=value), ValueError, f"`spacing={value!r}`: {POSITIVE}") for value in (0, -50.0, np.nan)},
    "radius of a lattice is zero": (whole, superres(support_radius=0), ValueError, f"`support_radius=0`: {POSITIVE}"),
    "spacing is too fine": (whole, superres(spacing=1e-3), ValueError, "`spacing` is 0.001, too fine: the lattice would have more than 20,000,000 points. Use ... or more"),
    "lattice is unknown": (whole, superres(lattice="hex"), ValueError, "`lattice='hex'` is unknown: choose one of ... 'hexagonal'"),
    "lattice of another dimension": (whole, superres(lattice="cubic"), ValueError, "`lattice` is 'cubic': in 2-d choose one of 'auto', 'hexagonal', 'square'"),
    "key of your own is unknown": (whole, superres(key="mine"), KeyError, "`key='mine'` is not in `adata.uns`, which holds 'neurtv': call `neurst.tl.neurtv_fit(adata, key_added='mine')`"),
    "spots were renamed": (renamed, superres(), ValueError, "the field in `adata.uns['neurtv']` was fitted to other spots ... names ... Refit with `neurst.tl.neurtv_fit(adata)`"),
    "spots changed places": (moved(lambda x: x[::-1]), superres(), ValueError, "was fitted to other coordinates than `adata.obsm['spatial']` holds now. Refit with"),
    "spots were moved": (moved(lambda x: x + 1), superres(), ValueError, "was fitted to other coordinates than `adata.obsm['spatial']` holds now. Refit with"),
    "positions have become 3-d": (moved(lambda x: np.column_stack([x, x[:, 0]])), superres(), ValueError, "was fitted to other coordinates"),
    "spots were dropped": (lambda adata: adata[:30].copy(), superres(), ValueError, "was fitted to other spots than the 30 of `adata` now"),
    "spots were dropped in a view": (lambda adata: adata[:30], superres(), ValueError, "was fitted to other spots than the 30 of `adata` now"),
    "positions were dropped": (drop("obsm", "spatial"), superres(), KeyError, "`spatial_key='spatial'` is not in `adata.obsm`"),
    "gene of a gradient is not in the field": (whole, gradient(genes=["gene3"]), KeyError, "not among the 12 genes of the field. 'gene3': did you mean 'Gene3'?"),
    "gene of a gradient was dropped": (lambda adata: adata[:, :3].copy(), gradient(genes="Gene7"), KeyError, "not among the 3 genes in `adata.var_names`. 'Gene7'"),
    "genes were renamed": (genes_renamed, gradient(), ValueError, "none of the 12 genes of the field is in `adata.var_names`: give them back their names, or refit"),
    "there is no fit to differentiate": (drop("uns", "neurtv"), gradient(), KeyError, "`key='neurtv'` is not in `adata.uns`, which holds nothing: call `neurst.tl.neurtv_fit(adata)` first"),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "call", "error", "words"), READS.values(), ids=READS)
def test_reading_a_field_is_refused_in_words(no_training, fitted, broken, call, error, words):
    adata = after(broken, fitted.copy())
    with refused(adata, error, words):
        call(adata)


WITHOUT_A_FIT = {
    "lattice is unknown": (superres(lattice="hex"), ValueError, "`lattice='hex'` is unknown"),
    "factor is zero": (superres(factor=0), ValueError, "`factor=0`"),
    "gene is unknown": (superres(genes="gene3"), KeyError, "'gene3': did you mean 'Gene3'?"),
}


@pytest.mark.parametrize(("call", "error", "words"), WITHOUT_A_FIT.values(), ids=WITHOUT_A_FIT)
def test_bad_options_are_refused_before_a_field_is_fitted_for_them(no_training, call, error, words):
    adata = section()
    with refused(adata, error, words):
        call(adata)


@pytest.mark.parametrize("lattice", ["hexagonal", "square"])
def test_a_lattice_of_the_plane_is_refused_in_space(lattice):
    adata = section(d=3)
    fit(adata)
    with refused(adata, ValueError, f"`lattice` is '{lattice}': in 3-d choose one of 'auto', 'cubic'"):
        neurtv_superres(adata, lattice=lattice)


# ---- a stored field that was cut, damaged, or written by someone else


def spoil(*path, value):
    """Put `value`, or what it makes of the present value, at a path in the slot of a fit."""

    def change(adata):
        slot = adata.uns["neurtv"]
        for name in path[:-1]:
            slot = slot[name]
        slot[path[-1]] = value(slot[path[-1]]) if callable(value) else value

    return change


def in_field(*path, value):
    return spoil("field", *path, value=value)


def without_a_weight(adata):
    del adata.uns["neurtv"]["field"]["weights"]["nets-0-1-bias"]


REFIT = "refit with `neurst.tl.neurtv_fit(adata)`"
DAMAGED = "`adata.uns['neurtv']` is damaged"

# name: what is spoilt, words
STORED = {
    "written by someone else": (put("uns", "neurtv", OTHER), "`adata.uns['neurtv']` was not written by neurst: pass the `key_added` of a fit"),
    "not even a mapping": (put("uns", "neurtv", 3), "`adata.uns['neurtv']` was not written by neurst"),
    "of a newer schema": (spoil("neurst_schema", value=99), f"has schema 99, written by a newer neurst ... reads up to {slots.SCHEMA}: upgrade it ... or {REFIT}"),
    "of a schema in words": (spoil("neurst_schema", value="one"), f"{DAMAGED} (neurst_schema is 'one'): {REFIT}"),
    "field is cut": (lambda adata: adata.uns["neurtv"].pop("field"), f"is incomplete, its 'field' lacks everything: {REFIT}"),
    "field is None": (spoil("field", value=None), "is incomplete, its 'field' lacks everything"),
    "weights are NaN": (in_field("weights", "nets-0-1-bias", value=lambda w: w * np.nan), f"{DAMAGED} ... nets.0.1.bias is not finite): {REFIT}"),
    "weights of another shape": (in_field("weights", "nets-0-1-bias", value=np.ones(5)), f"{DAMAGED} ... nets.0.1.bias has shape (5,), expected (3,)"),
    "weights are words": (in_field("weights", "nets-0-1-bias", value="abc"), DAMAGED),
    "weights are a word": (in_field("weights", value="abc"), DAMAGED),
    "a weight is missing": (without_a_weight, f"{DAMAGED} ... nets.0.1.bias"),
    "a weight is of another network": (in_field("weights", "nets-0-9-bias", value=np.ones(3)), f"{DAMAGED} ... nets.0.9.bias"),
    "network is unknown": (in_field("network", value={"name": "mlp"}), f"{DAMAGED} ... 'mlp'"),
    "network is a word": (in_field("network", value="siren"), DAMAGED),
    "network is wider": (in_field("network", "width", value=32), f"{DAMAGED} ... has shape (16, 2), expected (32, 2)"),
    "genes are too few": (in_field("genes", value=lambda g: g[:3]), f"{DAMAGED} ... loadings has shape (12, 3), expected (3, 3)"),
    "genes are a number": (in_field("genes", value=3), DAMAGED),
    "loadings are NaN": (in_field("loadings", value=lambda v: v * np.nan), f"{DAMAGED} ... loadings is not finite"),
    "loadings are cut": (in_field("loadings", value=lambda v: v[:, :1]), f"{DAMAGED} ... loadings has shape (12, 1), expected (12, 3)"),
    "intercept is NaN": (in_field("intercept", value=lambda v: v * np.nan), f"{DAMAGED} ... intercept is not finite"),
    "rotation is of another rank": (in_field("rotation", value=np.eye(5)), f"{DAMAGED} ... rotation has shape (5, 5), expected (3, 3)"),
    "shift is None": (in_field("shift", value=None), DAMAGED),
    "link is a word": (in_field("log_link", value="log"), DAMAGED),
    "target_sum is negative": (in_field("target_sum", value=-1.0), f"{DAMAGED} ... target_sum is -1.0, expected a positive number"),
    "box is empty": (in_field("box_scale", value=0.0), f"{DAMAGED} ... box_scale is 0.0, expected a positive number"),
    "box of another dimension": (in_field("box_center", value=np.ones(3)), DAMAGED),
    "spots of another dimension": (in_field("spots", value=np.ones((9, 3))), f"{DAMAGED} ... spots has shape (9, 3), expected (9, 2)"),
    "no spots": (in_field("spots", value=np.empty((0, 2))), f"{DAMAGED} ... spots has shape (0, 2)"),
    "spots are NaN": (in_field("spots", value=lambda x: x * np.nan), f"{DAMAGED} ... spots is not finite"),
    **{f"{part} is missing": (lambda adata, part=part: adata.uns["neurtv"]["field"].pop(part), f"is incomplete, its 'field' lacks {part}: {REFIT}") for part in packing.FIELD_PARTS},
}  # fmt: skip


@pytest.mark.parametrize(
    "call", [query(), superres(), gradient(), field], ids=["query", "superres", "gradient", "field"]
)
@pytest.mark.parametrize(("spoilt", "words"), STORED.values(), ids=STORED)
def test_a_stored_field_that_is_not_whole_is_refused_by_every_reader(fitted, spoilt, words, call):
    adata = fitted.copy()
    spoilt(adata)
    with refused(adata, ValueError, words):
        call(adata)


# name: what is spoilt in the field of two members, words
MEMBERS = {
    "members' weights are cut": (in_field("members", "weights", value=np.ones(1)), f"{DAMAGED} ... weights has shape (1,), expected (2,)): {REFIT}"),
    "members' weights are NaN": (in_field("members", "weights", value=lambda w: w * np.nan), f"{DAMAGED} ... weights is not finite): {REFIT}"),
    "members' weights are no shares": (in_field("members", "weights", value=np.array([0.2, 1.8])), f"{DAMAGED} ... weights are [0.2 1.8], expected shares that sum to 1): {REFIT}"),
    "one member has all the weight": (in_field("members", "weights", value=np.array([1.0, 0.0])), f"{DAMAGED} ... weights are [1. 0.], expected shares"),
    "members' loadings are cut": (in_field("members", "loadings", value=lambda v: v[:, :3]), f"{DAMAGED} ... loadings has shape (12, 3), expected (12, 6)"),
    "members' loadings are NaN": (in_field("members", "loadings", value=lambda v: v * np.nan), f"{DAMAGED} ... loadings is not finite"),
    "members' intercepts are of other genes": (in_field("members", "intercepts", value=lambda b: b[:3]), f"{DAMAGED} ... intercepts has shape (3, 2), expected (12, 2)"),
    "members lack their loadings": (lambda adata: adata.uns["neurtv"]["field"]["members"].pop("loadings"), f"{DAMAGED} ... 'loadings'"),
    "members are a word": (in_field("members", value="abc"), DAMAGED),
    "members are gone": (in_field("members", value={}), f"{DAMAGED} ... 'weights'"),
    "weights of a member are missing": (lambda adata: adata.uns["neurtv"]["field"]["weights"].pop("nets-1-1-bias"), f"{DAMAGED} ... nets.1.1.bias"),
    "weights of a member are NaN": (in_field("weights", "nets-1-1-bias", value=lambda w: w * np.nan), f"{DAMAGED} ... nets.1.1.bias is not finite"),
    "outputs of a member are missing": (in_field("n_outputs", value=lambda n: n[:1]), f"{DAMAGED} ... widths has shape (2,), expected (1,)"),
    "widths are cut": (in_field("widths", value=lambda w: w[:1]), f"{DAMAGED} ... widths has shape (1,), expected (2,)"),
    "widths are one": (in_field("widths", value=np.array([6])), f"{DAMAGED} ... widths has shape (1,), expected (2,)"),
    "a member is wider than its outputs": (in_field("widths", value=np.array([2, 4])), f"{DAMAGED} ... widths are [2 4], expected 1 to [3 3]"),
    "widths are words": (in_field("widths", value=["a", "b"]), DAMAGED),
}  # fmt: skip


@pytest.fixture(scope="module")
def averaged():
    adata = section()
    fit(adata, n_members=2)
    return adata


@pytest.mark.parametrize(
    "call", [query(), superres(), gradient(), field], ids=["query", "superres", "gradient", "field"]
)
@pytest.mark.parametrize(("spoilt", "words"), MEMBERS.values(), ids=MEMBERS)
def test_members_that_are_not_whole_are_refused_by_every_reader(averaged, spoilt, words, call):
    adata = averaged.copy()
    call(adata.copy())  # before it is spoilt
    spoilt(adata)
    with refused(adata, ValueError, words):
        call(adata)


# ---- nothing is half written


def stopped(error):
    def stop(*args, **options):
        raise error

    return stop


STOPS = {
    "interrupted while fitting": (tqdm, "update", KeyboardInterrupt),
    "failed while reading the field": (slots, "_read", MemoryError),
    "failed while packing the field": (slots, "pack", RuntimeError),
    "failed while spreading over the genes": (slots, "_spread", MemoryError),
    "failed while turning a view into a copy": (slots, "make_actual", MemoryError),
}


@pytest.mark.parametrize(
    "earlier", [whole, fit, lambda adata: fit(adata) or neurtv_gradient(adata)], ids=["", "refit", "gradient"]
)
@pytest.mark.parametrize(("owner", "name", "error"), STOPS.values(), ids=STOPS)
def test_a_fit_that_is_stopped_leaves_the_data_as_it_was(monkeypatch, earlier, owner, name, error):
    adata = section()
    earlier(adata)
    monkeypatch.setattr(owner, name, stopped(error))
    with unchanged(adata), pytest.raises(error):
        fit(adata)


def test_a_gradient_that_is_stopped_leaves_the_data_as_it_was(monkeypatch, fitted):
    adata = fitted.copy()
    monkeypatch.setattr(slots, "make_actual", stopped(MemoryError))
    with unchanged(adata), pytest.raises(MemoryError):
        neurtv_gradient(adata)


@pytest.mark.parametrize(
    "options",
    [{}, {"genes": ["Gene1", "Gene7"], "rank": 2}, {"likelihood": "gaussian"}, {"n_members": 4}],
    ids=["same", "genes", "gaussian", "members"],
)
def test_a_refit_leaves_what_a_first_fit_leaves(fitted, options):
    adata, fresh = fitted.copy(), section()
    neurtv_gradient(adata)
    fit(adata, **options)
    fit(fresh, **options)
    assert frozen(adata) == frozen(fresh)


# ---- what looks odd but is fine


def dask_x(make):
    def change(adata):
        array = pytest.importorskip("dask.array")
        adata.X = array.from_array(adata.X.toarray(), chunks=(20, GENES)).map_blocks(make)

    return change


def frame(adata):
    adata.obsm["spatial"] = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names, columns=["x", "y"])


def in_a_layer(adata):
    adata.layers["raw"], adata.X = adata.X, None


BACKWARDS = [f"Gene{i}" for i in reversed(range(GENES))]
SPARSE = (sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.csc_array)

# name: how the same data are brought, options of the fit
SAME = {
    **{f"X is {dtype}": (with_x(lambda x, dtype=dtype: x.astype(dtype)), {}) for dtype in ("int64", "int32", "uint8", "float16", "float64")},
    **{f"X is {make.__name__}": (with_x(make), {}) for make in SPARSE},
    **{f"X is {make.__name__} of int32": (with_x(lambda x, make=make: make(x.astype("int32"))), {}) for make in SPARSE},
    "X is dense": (with_x(np.asfortranarray), {}),
    "X is dask": (dask_x(np.asarray), {}),
    **{f"X is dask of {make.__name__}": (dask_x(make), {}) for make in SPARSE},
    "X is a layer": (in_a_layer, {"layer": "raw"}),
    "positions are a DataFrame": (frame, {}),
    "positions are objects": (moved(lambda x: x.astype(object)), {}),
    "genes are backwards": (whole, {"genes": BACKWARDS}),
    "genes are an Index": (whole, {"genes": pd.Index(BACKWARDS)}),
    "genes are named twice": (whole, {"genes": BACKWARDS * 2}),
    "library sizes are a column": (whole, {"size_factors": "total"}),
    "library sizes are row sums": (whole, {"size_factors": section().X.sum(1)}),
    "library sizes are a Series": (whole, {"size_factors": section().obs["total"]}),
    "likelihood is named": (whole, {"likelihood": "poisson"}),
    "penalty is one of a list": (whole, {"penalty": ["nuclear"]}),
    "penalties are named twice": (whole, {"penalty": ("nuclear", "nuclear")}),
    "for_gaps is of numpy": (whole, {"for_gaps": np.False_}),
    "numbers are of numpy": (whole, {"lam": np.float32(400), "rank": np.int32(3), "steps": np.int64(5), "random_state": np.uint8(0), "n_members": np.int64(1)}),
    "one section is named": (SECTION, {"library_key": "section"}),
    "one section of two pictures": (lambda adata: SECTION(adata) or TWO_PICTURES(adata), {"library_key": "section"}),
    "a section without spots": (put("obs", "section", pd.Categorical(["a"] * N, ["a", "b"])), {"library_key": "section"}),
    "one picture": (put("uns", "spatial", {"A": {}}), {}),
    "tissue is everywhere": (put("obs", "in_tissue", 1), {}),
}  # fmt: skip


@pytest.mark.parametrize(("brought", "options"), SAME.values(), ids=SAME)
def test_the_same_data_give_the_same_field_however_they_are_brought(fitted, brought, options):
    adata = section()
    brought(adata)
    x = frozen(adata.X)
    fit(adata, **options)
    np.testing.assert_array_equal(adata.layers["neurtv"], fitted.layers["neurtv"])
    assert frozen(adata.X) == x


def test_booleans_are_counts_of_one():
    there, once = section(), section()
    there.X, once.X = there.X > 0, (once.X > 0).astype(np.float32)
    fit(there)
    fit(once)
    np.testing.assert_array_equal(there.layers["neurtv"], once.layers["neurtv"])


def test_a_view_gets_its_own_fit_and_its_parent_stays_as_it_was():
    parent = section()
    part, copy = parent[::2, :6], parent[::2, :6].copy()
    with unchanged(parent):
        fit(part)
        neurtv_gradient(part)
    fit(copy)
    assert not part.is_view
    np.testing.assert_array_equal(part.layers["neurtv"], copy.layers["neurtv"])


def test_spots_at_one_place_are_fitted_and_support_it_once(fitted):
    twice = concat([section(), section()], index_unique="-")
    fit(twice)
    assert np.isfinite(twice.layers["neurtv"]).all()
    once, twice = neurtv_superres(fitted), neurtv_superres(twice)
    np.testing.assert_allclose(twice.obsm["spatial"], once.obsm["spatial"], atol=1e-9)


def test_spots_and_genes_without_counts_are_kept_flagged_and_predicted():
    adata = section()
    with_x(at((5, slice(None)), 0))(adata)
    with_x(at((slice(None), 4), 0))(adata)
    fit(adata)
    expected = adata.layers["neurtv"]
    assert np.isfinite(expected).all()
    assert list(adata.var_names[adata.var["neurtv_empty"]]) == ["Gene4"]
    assert adata.var["neurtv_fitted"].all()
    assert not expected[:, 4].any()
    assert (np.delete(expected[5], 4) > 0).all()
    assert len(adata.uns["neurtv"]["field"]["spots"]) == N - 1


def test_normalised_genes_that_do_not_vary_are_kept_flagged_and_get_their_mean():
    adata = section()
    with_x(lambda x: at((slice(None), 4), 0.1)(np.log1p(x)))(adata)
    fit(adata)
    assert list(adata.var_names[adata.var["neurtv_empty"]]) == ["Gene4"]
    np.testing.assert_allclose(adata.layers["neurtv"][:, 4], 0.1, rtol=1e-6)
    assert np.isfinite(adata.layers["neurtv"]).all()


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
def test_spots_off_the_tissue_are_not_fitted_and_support_nothing(mark):
    adata, other = section(), section()
    with_x(lambda x: at(OFF, 3 * x[OFF] + 1)(x))(other)
    for each in (adata, other):
        each.obs["in_tissue"] = mark
        fit(each)
    np.testing.assert_array_equal(adata.layers["neurtv"], other.layers["neurtv"])
    coords = adata.obsm["spatial"]
    np.testing.assert_array_equal(adata.uns["neurtv"]["field"]["spots"], coords[~OFF])
    np.testing.assert_array_equal(neurtv_query(adata, coords[[0, 1, 4]]).obs["in_support"], [False, False, True])


# name: values or spots, options of the fit, rank that is left
EXTREMES = {
    "large counts": (with_x(lambda x: 1e6 * x), {}, 3),
    "larger counts": (with_x(lambda x: (1e12 * x).astype("int64")), {}, 3),
    "one large count": (with_x(at((3, 3), 1e9)), {}, 3),
    "one huge count": (with_x(at((3, 3), 1e29)), {}, 3),
    "one huge overdispersed count": (with_x(at((3, 3), 1e29)), {"likelihood": "negative_binomial"}, 3),
    # beside 1e29 double precision need not see the other channels
    "one huge value": (with_x(at((3, 3), 1e29)), {"likelihood": "gaussian"}, range(1, 4)),
    "tiny values": (with_x(lambda x: 1e-30 * x), {"likelihood": "gaussian"}, 3),
    "values on a pedestal": (with_x(lambda x: 1e5 + x), {"likelihood": "gaussian"}, 3),
    "a gene with a single count": (with_x(lambda x: at((7, 2), 1)(at((slice(None), 2), 0)(x))), {}, 3),
    "a gene with a single value": (with_x(lambda x: at((7, 2), 0.5)(at((slice(None), 2), 0)(x))), {}, 3),
    "library sizes far apart": (whole, {"size_factors": np.logspace(-10, 10, N)}, 3),
    "more channels than genes": (whole, {"rank": 100}, GENES),
    "more channels than spots": (lambda adata: adata[[0, 1, 2, 8, 9]].copy(), {"rank": 100}, 4),
    "one gene": (lambda adata: adata[:, 3].copy(), {}, 1),
    "four spots": (lambda adata: adata[[0, 1, 8, 9]].copy(), {}, 3),
    "one gene at four spots": (lambda adata: adata[[0, 1, 8, 9], 3].copy(), {"lam": "auto"}, 1),
}  # fmt: skip


@pytest.mark.parametrize(("change", "options", "rank"), EXTREMES.values(), ids=EXTREMES)
def test_extremes_are_fitted_without_nan(monkeypatch, change, options, rank):
    monkeypatch.setattr(_neurtv, "LamSearch", partial(choice.LamSearch, steps=3, reach=1))
    adata = after(change, section())
    fit(adata, **options)
    slot = adata.uns["neurtv"]
    written = [
        adata.layers["neurtv"],
        adata.obsm["X_neurtv"],
        adata.varm["neurtv_loadings"],
        adata.var["neurtv_deviance_explained"],
    ]
    for values in [*written, slot["score"], slot["history"]["objective"], neurtv_superres(adata).X]:
        assert np.isfinite(np.asarray(values)).all()
    assert adata.obsm["X_neurtv"].shape[1] in (rank if isinstance(rank, range) else [rank])


def test_one_gene_may_be_a_string_and_the_others_are_not_fitted():
    adata = section()
    fit(adata, genes="Gene5")
    assert list(adata.var_names[adata.var["neurtv_fitted"]]) == ["Gene5"]
    np.testing.assert_array_equal(np.isfinite(adata.layers["neurtv"]).any(0), adata.var["neurtv_fitted"])
    assert list(neurtv_superres(adata, genes="Gene5").var_names) == ["Gene5"]


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
