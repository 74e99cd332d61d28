"""Figures: what the artists hold is what is stored."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sections import frozen, section

import neurst
from neurst.pl._draw import Cloud, tile

plt = pytest.importorskip("matplotlib.pyplot")
GENE, OTHER = "Layer2_01", "Nucleus_01"


@pytest.fixture(autouse=True)
def _no_window():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def fitted():
    adata = neurst.datasets.synthetic_visium(n_genes=20)
    neurst.tl.neurtv_fit(adata, lam=400, steps=30, progress=False)
    neurst.tl.neurtv_gradient(adata)
    return adata


@pytest.fixture(scope="module")
def dense(fitted):
    dense = neurst.tl.neurtv_superres(fitted, factor=2)
    neurst.tl.neurtv_gradient(dense)
    return dense


@pytest.fixture(scope="module")
def normalised():
    """A 3-d fit of values that are not counts."""
    rng = np.random.default_rng(0)
    coords = rng.uniform(-50, 50, (200, 3))
    values = np.sin(coords[:, :1] / 20) + rng.normal(0, 0.1, (200, 4))
    adata = ad.AnnData(values.astype(np.float32), obsm={"spatial": coords})
    adata.var_names = list("ABCD")
    neurst.tl.neurtv_fit(adata, lam=10, steps=10, progress=False)
    neurst.tl.neurtv_gradient(adata)
    return adata


def points(ax):
    return ax.collections[0]


def bar(ax):
    """The Axes of the colour bar."""
    return ax.child_axes[0]


def test_what_is_stored_is_drawn_as_it_is_in_axes_of_the_shape_that_was_asked(fitted, dense):
    ax = neurst.pl.superres(dense, GENE)
    np.testing.assert_array_equal(points(ax).get_array(), dense[:, GENE].X[:, 0])
    np.testing.assert_array_equal(points(ax).get_offsets(), dense.obsm["spatial"])
    assert ax.get_title() == GENE
    assert points(ax).get_rasterized()
    (spots,) = neurst.pl.superres(fitted, [GENE])
    np.testing.assert_array_equal(points(spots).get_array(), fitted[:, GENE].layers["neurtv"][:, 0])
    assert neurst.pl.superres(fitted, [GENE, OTHER, "Flat_01"]).shape == (3,)
    assert neurst.pl.superres(dense, [GENE, OTHER], spots=fitted).shape == (2, 2)
    boundaries = neurst.pl.gradient(dense)
    np.testing.assert_array_equal(points(boundaries).get_array(), dense.obs["neurtv_boundary"])
    assert [boundaries.get_title(), bar(boundaries).get_ylabel()] == ["Boundaries", "boundary strength per unit length"]


def test_a_layer_is_drawn_as_it_is_and_may_hold_genes_that_were_not_fitted(fitted):
    adata = fitted.copy()
    neurst.tl.neurtv_fit(adata, genes=[GENE, "Flat_01"], lam=400, steps=2, key_added="two", progress=False)
    adata.layers["counts"] = adata.X
    ax = neurst.pl.superres(adata, OTHER, key="two", layer="counts")
    np.testing.assert_array_equal(points(ax).get_array(), adata[:, OTHER].X.toarray()[:, 0])
    assert [ax.get_title(), bar(ax).get_ylabel()] == [OTHER, "counts"]
    with pytest.raises(KeyError, match="not among the 2 genes"):
        neurst.pl.superres(adata, OTHER, key="two")


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_array, sparse.csr_matrix.toarray])
def test_measured_expression_is_in_the_unit_of_the_field(fitted, dense, kind):
    spots = ad.AnnData(kind(fitted.X.tocsr()), obs=fitted.obs, var=fitted.var, obsm={"spatial": fitted.obsm["spatial"]})
    counts = fitted.X.toarray()
    total = counts.sum(1, keepdims=True)
    measured, field = neurst.pl.superres(dense, GENE, spots=spots)
    expected = (counts / total * np.median(total))[:, fitted.var_names == GENE]
    np.testing.assert_allclose(points(measured).get_array(), expected[:, 0], rtol=1e-6)
    assert [measured.get_title(), field.get_title()] == [f"{GENE}, measured", f"{GENE}, field"]
    assert bar(field).get_ylabel() == f"counts (library size {np.median(total):,.0f})"


def test_size_factors_of_the_fit_set_the_unit(fitted):
    adata = fitted.copy()
    adata.obs["size"] = np.linspace(1, 2, adata.n_obs)
    neurst.tl.neurtv_fit(adata, size_factors="size", lam=400, steps=2, progress=False)
    measured, field = neurst.pl.superres(adata, GENE, spots=adata, size_factors="size")
    expected = adata[:, GENE].X.toarray()[:, 0] / adata.obs["size"] * 1.5
    np.testing.assert_allclose(points(measured).get_array(), expected, rtol=1e-5)
    assert bar(field).get_ylabel() == "counts (library size 1.5)"


def test_spots_with_another_library_size_than_the_fit_are_reported(fitted):
    with pytest.warns(UserWarning, match="the median library size of the spots is .*pass all genes"):
        neurst.pl.superres(fitted, GENE, spots=fitted[:, [GENE, OTHER]])


def test_measured_and_field_share_colour_scale_and_limits(fitted, dense):
    measured, field = neurst.pl.superres(dense, GENE, spots=fitted)
    assert points(measured).norm is points(field).norm
    assert points(field).get_clim() == (0, pytest.approx(np.percentile(dense[:, GENE].X, 99.5)))
    assert measured.get_xlim() == field.get_xlim()
    assert measured.get_ylim() == field.get_ylim()
    assert not measured.child_axes


def test_the_colour_bar_is_pointed_only_where_values_go_beyond_it(dense):
    values = dense[:, GENE].X
    whole = neurst.pl.superres(dense, GENE, vmin=float(values.min()), vmax=float(values.max()))
    cut = neurst.pl.superres(dense, GENE, vmin="p10", vmax="p90")
    extends = [points(ax).colorbar.extend for ax in (whole, cut, neurst.pl.superres(dense, GENE))]
    assert extends == ["neither", "both", "max"]
    np.testing.assert_allclose(points(cut).get_clim(), np.percentile(values, [10, 90]))


def test_spatial_axes_have_one_scale_no_ticks_and_y_downwards(dense):
    ax = neurst.pl.superres(dense, GENE)
    assert ax.get_aspect() == 1
    assert ax.yaxis_inverted()
    assert not len(ax.get_xticks())
    assert not len(ax.get_yticks())
    neurst.pl.superres(dense, OTHER, ax=ax)
    assert ax.yaxis_inverted(), "drawing twice must not turn the picture over"


@pytest.mark.parametrize(("figsize", "factor"), [((4, 3), 2), ((9, 5), 3)])
def test_points_are_as_wide_as_their_spacing_in_any_figure(fitted, figsize, factor):
    dense = neurst.tl.neurtv_superres(fitted, factor=factor, genes=GENE)
    _, ax = plt.subplots(figsize=figsize)
    neurst.pl.superres(dense, GENE, ax=ax)
    ax.figure.canvas.draw()
    outline = points(ax).get_paths()[0].transformed(points(ax).get_transform())
    share = dense.uns["neurtv"]["query"]["spacing"] / np.ptp(ax.get_xlim())
    assert outline.get_extents().width / ax.bbox.width == pytest.approx(share, rel=1e-3)


def test_the_canvas_has_the_colour_of_the_value_at_each_point(fitted):
    ax = neurst.pl.superres(fitted, GENE)
    ax.figure.set_dpi(200)
    ax.figure.canvas.draw()
    column, row = np.floor(ax.transData.transform(fitted.obsm["spatial"])).astype(int).T
    canvas = np.asarray(ax.figure.canvas.buffer_rgba())[::-1].astype(int)
    expected = points(ax).to_rgba(fitted[:, GENE].layers["neurtv"][:, 0], bytes=True)
    np.testing.assert_allclose(canvas[row, column], expected, atol=1)


def lattice(kind, angle=0.3):
    i, j = np.indices((12, 9)).reshape(2, -1)
    basis = {"hexagonal": [[1, 0], [0.5, np.sqrt(0.75)]], "square": [[1, 0], [0, 1]]}[kind]
    turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return 137 * np.column_stack([i, j]) @ np.array(basis) @ np.array(turn)


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
def test_tiles_of_a_lattice_cover_every_point_once(kind):
    coords = lattice(kind)
    outline = tile(Cloud(coords, np.zeros((len(coords), 1))))
    assert len(outline.vertices) == {"hexagonal": 7, "square": 5}[kind]
    inner = coords.mean(0) + np.random.default_rng(0).uniform(-200, 200, (500, 2))
    covered = sum(outline.contains_points(inner - centre).astype(int) for centre in coords)
    np.testing.assert_array_equal(covered, 1)


def test_cells_off_a_lattice_are_discs_as_wide_as_their_usual_distance():
    coords = np.random.default_rng(0).uniform(0, 1000, (400, 2))
    distance = np.sort(np.linalg.norm(coords[:, None] - coords, axis=-1), axis=1)[:, 1]
    outline = tile(Cloud(coords, np.zeros((400, 1))), size=2.0)
    np.testing.assert_allclose(outline.get_extents().size, 2 * np.median(distance))


def test_spots_off_the_tissue_and_missing_values_are_not_drawn(fitted):
    spots = fitted.copy()
    spots.obs["in_tissue"] = (np.arange(spots.n_obs) >= 10).astype(int)
    spots.X[20] = 0
    measured, field = neurst.pl.superres(spots, GENE, spots=spots)
    assert len(points(measured).get_offsets()) == len(points(field).get_offsets()) == spots.n_obs - 10
    assert np.flatnonzero(np.ma.getmaskarray(points(measured).get_array())).tolist() == [10]
    assert points(measured).get_cmap().get_bad()[3] == 0


def test_one_point_and_only_points_outside_can_be_drawn(fitted):
    one = neurst.tl.neurtv_query(fitted, fitted.obsm["spatial"][:1])
    neurst.pl.superres(one, GENE).figure.canvas.draw()
    far = fitted.obsm["spatial"].max(0) + [[500.0, 500.0]]
    with pytest.warns(UserWarning, match="outside the tissue"):
        outside = neurst.tl.neurtv_query(fitted, far)
    ax = neurst.pl.superres(outside, GENE)
    ax.figure.canvas.draw()
    assert points(ax).get_array().mask.all()


@pytest.mark.parametrize("which", ["fitted", "dense"])
def test_arrows_are_stored_derivatives(request, which):
    adata = request.getfixturevalue(which)
    ax = neurst.pl.gradient(adata, GENE)
    (arrows,) = (c for c in ax.collections if hasattr(c, "U"))
    at = {tuple(x): i for i, x in enumerate(adata.obsm["spatial"])}
    rows = [at[tuple(x)] for x in arrows.XY]
    view = adata[rows, GENE]
    np.testing.assert_array_equal(arrows.U, view.layers["neurtv_dx"][:, 0])
    np.testing.assert_array_equal(arrows.V, view.layers["neurtv_dy"][:, 0])
    np.testing.assert_array_equal(points(ax).get_array(), neurst.pl.superres(adata, GENE).collections[0].get_array())
    assert [arrows.angles, arrows.scale_units, arrows.units] == ["xy", "xy", "xy"]
    assert 20 < len(rows) < 20**2


def test_genes_can_be_named_by_a_column_of_var(fitted):
    adata = named(fitted)
    which = int(np.flatnonzero(adata.var_names == GENE)[0])
    for draw in (neurst.pl.superres, neurst.pl.gradient):
        (ax,) = draw(adata, [f"symbol {which}"], gene_symbols="symbol")
        assert ax.get_title() == f"symbol {which}"
        np.testing.assert_array_equal(points(ax).get_array(), adata[:, GENE].layers["neurtv"][:, 0])


def test_a_fit_of_few_genes_is_drawn_from_its_table(fitted):
    adata = fitted.copy()
    neurst.tl.neurtv_fit(adata, genes=[GENE, OTHER], lam=400, steps=2, key_added="few", progress=False)
    neurst.tl.neurtv_gradient(adata, key="few")
    ax = neurst.pl.gradient(adata, OTHER, key="few")
    np.testing.assert_array_equal(points(ax).get_array(), adata.obsm["few"][OTHER])


def test_history_draws_what_is_stored(fitted):
    fit, choice = neurst.pl.history(fitted)
    (penalty,) = (ax for ax in fit.figure.axes if ax not in (fit, choice))
    trace = pd.DataFrame(fitted.uns["neurtv"]["history"])
    drawn = {"objective": fit.lines[::2], "likelihood": fit.lines[1::2], "penalty": penalty.lines}
    for name, lines in drawn.items():
        assert len({line.get_color() for line in lines}) == 1
        for line, (_, member) in zip(lines, trace.groupby("member"), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), member[["step", name]])
            assert len(member) > 2
    assert [text.get_text() for text in fit.get_legend().get_texts()] == ["objective", "negative log-likelihood"]
    assert fit.get_title() == "Final fits"
    process = f"gaussian-process, {fitted.uns['neurtv']['lam']['gaussian_process']:.2f}"
    names = [text.get_text() for text in choice.get_legend().get_texts()]
    assert names == ["nuclear, 400", "space-variant, 400", process]
    assert choice.get_xscale() == "log"


@pytest.fixture(scope="module")
def scored(fitted):
    adata = fitted.copy()
    neurst.tl.holdout_score(adata, seeds=(0, 1), lam=400, steps=20, progress=False)
    return adata


def test_scores_are_drawn_as_they_are_the_best_method_on_top(scored):
    methods, genes = neurst.pl.holdout_score(scored)
    table = scored.uns["holdout_score"]
    means = table.groupby("method")["score"].mean().sort_values()
    names = [label.get_text() for label in methods.get_yticklabels()]
    assert names == list(means.index)
    dots = [line for line in methods.lines if line.get_marker() == "o"]
    bars = [bar.get_segments()[0][0, 0] for bar in methods.collections]
    np.testing.assert_allclose(bars, means)
    for row, (name, line) in enumerate(zip(names, dots, strict=True)):
        np.testing.assert_array_equal(line.get_xdata(), table.loc[table["method"] == name, "score"])
        np.testing.assert_array_equal(line.get_ydata(), [row, row])
    drawn = np.column_stack([scored.var["holdout_score_baseline"], scored.var["holdout_score"]])
    np.testing.assert_array_equal(points(genes).get_offsets(), drawn)
    best = means.drop("field").idxmax()
    assert [genes.get_xlabel(), genes.get_ylabel()] == [best, "field"]
    assert genes.texts[0].get_text() == f"{(drawn[:, 1] > drawn[:, 0]).sum()} of {len(drawn)} above"
    assert genes.get_xlim() == genes.get_ylim()


def test_the_history_of_a_gaussian_process_alone_has_no_steps():
    adata = section(4)
    neurst.tl.neurtv_fit(adata, penalty="gaussian_process", progress=False)
    fit, choice = neurst.pl.history(adata)
    assert not fit.lines
    assert len(choice.lines) == 2


def test_history_draws_every_strength_that_was_tried(fitted):
    adata = fitted.copy()
    slot = adata.uns["neurtv"]
    names = np.array(["nuclear"] * 3 + ["space_variant"] * 2, dtype=object)
    slot["lam_search"] = {"penalty": names, "lam": np.array([133.0, 400, 1200, 400, 1200]), "score": np.arange(5) / 9}
    slot["lam"] = {"nuclear": 500.0, "space_variant": 400.0}
    choice = neurst.pl.history(adata)[1]
    one, _, two, _ = choice.lines
    np.testing.assert_array_equal(one.get_xydata(), [[133, 0], [400, 1 / 9], [1200, 2 / 9]])
    np.testing.assert_array_equal(two.get_xydata(), [[400, 3 / 9], [1200, 4 / 9]])
    assert [line.get_xdata()[0] for line in choice.lines[1::2]] == [500, 400]
    assert [line.get_color() for line in choice.lines[::2]] == [line.get_color() for line in choice.lines[1::2]]
    assert [label.get_text() for label in choice.get_xticklabels()] == ["133", "400", "1200"]


CALLS = {
    "superres": (lambda adata, ax: neurst.pl.superres(adata, GENE, ax=ax), ()),
    "beside": (lambda adata, ax: neurst.pl.superres(adata, GENE, spots=adata, ax=ax), (2,)),
    "gradient": (lambda adata, ax: neurst.pl.gradient(adata, GENE, ax=ax), ()),
    "boundaries": (lambda adata, ax: neurst.pl.gradient(adata, ax=ax), ()),
    "history": (lambda adata, ax: neurst.pl.history(adata, ax=ax), (2,)),
    "holdout_score": (lambda adata, ax: neurst.pl.holdout_score(adata, ax=ax), (2,)),
}


@pytest.mark.parametrize(("call", "shape"), CALLS.values(), ids=CALLS)
def test_given_axes_are_used_and_neither_a_figure_is_made_nor_the_data_changed(scored, call, shape):
    before, figure = frozen(scored), plt.figure()
    given = figure.subplots(1, int(np.prod(shape)), squeeze=False).ravel().reshape(shape)[()]
    returned = call(scored, given)
    assert np.all(np.asarray(returned, dtype=object) == np.asarray(given, dtype=object))
    assert plt.get_fignums() == [figure.number]
    assert frozen(scored) == before
    with pytest.raises(ValueError, match=r"`ax` is an array of Axes of shape \(5,\): expected"):
        call(scored, plt.figure().subplots(1, 5))


def test_normalised_values_in_3d_are_drawn_in_their_own_unit(normalised):
    ax = neurst.pl.superres(normalised, "A", spots=normalised)[0]
    assert ax.name == "3d"
    np.testing.assert_allclose(points(ax).get_array(), normalised.X[:, 0])
    np.testing.assert_allclose(np.column_stack(points(ax)._offsets3d), normalised.obsm["spatial"])
    ax = neurst.pl.superres(normalised, "A")
    assert bar(ax).get_ylabel() == "expression"
    assert points(ax).norm.vmin < 0
    np.testing.assert_array_equal(points(neurst.pl.gradient(normalised)).get_array(), normalised.obs["neurtv_boundary"])
    ax.figure.canvas.draw()
    assert neurst.pl.history(normalised)[1].get_ylabel() == "held-out variance explained"
    with pytest.raises(ValueError, match="positions in 3-d need Axes with projection='3d'"):
        neurst.pl.superres(normalised, "A", ax=plt.figure().subplots())
    with pytest.raises(ValueError, match="arrows of 3-d positions cannot be read"):
        neurst.pl.gradient(normalised, "A")


def without(adata, *, layers=(), obs=()):
    adata = adata.copy()
    for name in layers:
        del adata.layers[name]
    adata.obs = adata.obs.drop(columns=list(obs))
    return adata


def part(adata):
    """Gradients of one gene only."""
    adata = without(adata, layers=["neurtv_dx", "neurtv_dy"])
    neurst.tl.neurtv_gradient(adata, genes=GENE)
    return adata


def named(adata):
    adata = adata.copy()
    adata.var["symbol"] = SYMBOLS
    return adata


flat = lambda adata: ad.AnnData(adata.X, obs=adata.obs, var=adata.var, obsm={"spatial": np.ones((adata.n_obs, 3))})
SYMBOLS = [f"symbol {i}" for i in range(19)] + ["symbol 18"]
ERRORS = {
    "no column of symbols": (lambda a: neurst.pl.superres(a, "A", gene_symbols="symbol"), KeyError, "`gene_symbols='symbol'` is not in `adata.var`"),
    "unknown symbol": (lambda a: neurst.pl.superres(named(a), GENE, gene_symbols="symbol"), KeyError, r"not among the 20 genes in `adata.var\['symbol'\]`"),
    "two genes of one symbol": (lambda a: neurst.pl.superres(named(a), "symbol 18", gene_symbols="symbol"), ValueError, "'symbol 18' names several genes"),
    "unknown gene": (lambda a: neurst.pl.superres(a, "Layer2_1"), KeyError, "did you mean 'Layer2_01'"),
    "gene not measured": (lambda a: neurst.pl.superres(a, GENE, spots=a[:, 5:8]), KeyError, "not among the 3 genes"),
    "no fit": (lambda a: neurst.pl.superres(a, GENE, key="other"), KeyError, "neurtv_fit.*first"),
    "no fit, gradient": (lambda a: neurst.pl.gradient(a, key="other"), KeyError, "neurtv_fit.*first"),
    "no fit, history": (lambda a: neurst.pl.history(a, key="other"), KeyError, "neurtv_fit.*first"),
    "no scores": (lambda a: neurst.pl.holdout_score(a), KeyError, r"call `neurst.tl.holdout_score\(adata\)` first"),
    "layer dropped": (lambda a: neurst.pl.superres(without(a, layers=["neurtv"]), GENE), KeyError, "holds no values of the field.*neurtv_superres"),
    "unknown layer": (lambda a: neurst.pl.superres(a, GENE, layer="raw"), KeyError, "`layer='raw'` is not in"),
    "layer beside spots": (lambda a: neurst.pl.superres(a, GENE, layer="neurtv", spots=a), ValueError, "pass one of them"),
    "spots in 3-d": (lambda a: neurst.pl.superres(a, GENE, spots=flat(a)), ValueError, "3 coordinates, the field has 2"),
    "no derivatives": (lambda a: neurst.pl.gradient(without(a, layers=["neurtv_dx"]), GENE), KeyError, r"call `neurst.tl.neurtv_gradient\(adata\)` first"),
    "derivatives of other genes": (lambda a: neurst.pl.gradient(part(a), OTHER), KeyError, "does not hold genes"),
    "no boundary map": (lambda a: neurst.pl.gradient(without(a, obs=["neurtv_boundary"])), KeyError, r"call `neurst.tl.neurtv_gradient\(adata\)` first"),
    "no arrows": (lambda a: neurst.pl.gradient(a, GENE, arrows=0), ValueError, "`arrows=0`: expected"),
    "percentile": (lambda a: neurst.pl.superres(a, GENE, vmax="p101"), ValueError, "`vmax='p101'`: expected a number"),
    "limits crossed": (lambda a: neurst.pl.superres(a, GENE, vmin=9, vmax=1), ValueError, "`vmin=9.0` is 9, above"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_the_next_step_and_leaves_no_figure(fitted, call, error, message):
    with pytest.raises(error, match=message):
        call(fitted)
    assert not plt.get_fignums()


def test_what_was_written_to_a_file_can_be_drawn(fitted, dense, tmp_path):
    dense.write_h5ad(tmp_path / "dense.h5ad")
    read = ad.read_h5ad(tmp_path / "dense.h5ad")
    assert neurst.pl.superres(read, GENE, spots=fitted).shape == (2,)
    assert neurst.pl.gradient(read, GENE).get_title() == GENE
    assert neurst.pl.history(read).shape == (2,)
