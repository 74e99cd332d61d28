import subprocess
import sys
import textwrap
from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from draws import NETWORKS
from scipy import sparse
from scipy.spatial import cKDTree
from sections import PITCH, QUICK, SOME, assert_same, dense, fitted, section, slots_of, stack
from torch import nn

from neurst import get, tl
from neurst.core.nets import NETWORKS as REGISTRY
from neurst.core.nets import Network, Spline
from neurst.core.penalty import PENALTIES, HigherOrderTV, IsotropicTV, Penalty
from neurst.core.tuning import LineSearch
from neurst.spatial.adata import write
from neurst.spatial.priors import GaussianProcess
from neurst.spatial.spec import ExpressionConfig

NO_BUMPS = ExpressionConfig(most_bumps=0)


@pytest.fixture(scope="module")
def done():
    """A fitted section that no test changes."""
    return fitted()


@pytest.fixture(scope="module")
def spread():
    """A section with a field that has a standard deviation."""
    return fitted(penalty=["nuclear", "gaussian_process"])


def fit(adata, **options):
    tl.neurtv_fit(adata, **(QUICK | options))
    return adata


# ---- neurtv_fit: what is written


def plain(value):
    """Whether nested dictionaries hold what every file format takes: arrays, texts, numbers, and lists of one type."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and "/" not in key and plain(inner) for key, inner in value.items())
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "fiUb" or all(type(v) is str for v in value)
    if isinstance(value, list):
        return len({type(v) for v in value}) == 1 and type(value[0]) in (int, float, str)
    return type(value) in (str, int, float, bool)


def test_a_fit_writes_float32_tables_and_plain_values_and_leaves_everything_else_as_it_was():
    before, adata = section(), section()
    assert tl.neurtv_fit(adata, key_added="smooth 2", **QUICK | {"network": Spline((2, 4))}) is None
    assert adata.layers["smooth 2"].dtype == adata.obsm["X_smooth 2"].dtype == np.float32
    assert plain(adata.uns["smooth 2"])
    for slot in slots_of(adata) - slots_of(before):
        part, name = slot.split("/", 1)
        values = getattr(adata, part)[name]
        if part != "uns":
            assert len(values) == getattr(adata, "n_obs" if part in ("layers", "obsm") else "n_vars")
            assert np.isfinite(np.asarray(values, dtype=float)).all(), slot
        del getattr(adata, part)[name]
    assert_same(adata, before)


def test_a_fit_of_few_genes_adds_at_most_twice_the_size_of_the_fitted_values(tmp_path):
    adata, size = section(radius=12), []
    x = sparse.hstack([adata.X, sparse.csr_matrix((adata.n_obs, 2000), dtype=np.float32)], format="csr")
    wide = AnnData(x, var=pd.DataFrame(index=[f"g{i}" for i in range(2020)]), obsm={"spatial": adata.obsm["spatial"]})
    for change in (lambda: None, lambda: fit(wide, genes=[f"g{i}" for i in range(20)], rank=2, config=NO_BUMPS)):
        change()
        wide.write_h5ad(tmp_path / "a")
        size.append((tmp_path / "a").stat().st_size)
    overhead = 200_000  # the empty groups and small arrays of a file, whatever the section
    assert size[1] - size[0] < 2 * 4 * wide.n_obs * 20 + overhead + 32 * wide.n_obs


def test_few_fitted_genes_are_stored_as_a_table_of_their_own():
    adata, whole = fitted(genes=SOME, penalty=["nuclear", "gaussian_process"], radius=4), section(4)
    asked = adata.var_names.isin(SOME)
    assert not adata.layers
    assert list(adata.obsm["neurtv"].columns) == list(adata.var_names[asked])
    values = get.field(adata)(adata.obsm["spatial"])
    np.testing.assert_array_equal(adata.obsm["neurtv"].to_numpy(), values.astype(np.float32))
    assert adata.obsm["neurtv_std"].shape == adata.obsm["neurtv"].shape
    np.testing.assert_array_equal(adata.var["neurtv_fitted"], asked)
    for column in ("neurtv_deviance_explained", "neurtv_dispersion"):
        np.testing.assert_array_equal(adata.var[column].notna(), asked)
    tl.neurtv_gradient(adata)
    np.testing.assert_array_equal(
        adata.obsm["neurtv_dx"], get.field(adata).jacobian(whole.obsm["spatial"])[..., 0].astype(np.float32)
    )
    fit(adata, genes=list(adata.var_names[:15]))  # now most of them: the tables give way to layers with NaN
    assert set(adata.layers) == {"neurtv"}
    assert not {"neurtv", "neurtv_std", "neurtv_dx"} & set(adata.obsm)
    np.testing.assert_array_equal(np.isnan(adata.layers["neurtv"]).all(0), np.arange(20) >= 15)


def test_a_table_above_the_limit_is_not_written_but_can_be_queried(monkeypatch, done):
    monkeypatch.setattr(write, "LAYER_LIMIT", 1000)
    adata = section()
    with pytest.warns(UserWarning, match=r"layers\['neurtv'\]` would take .* is not written"):
        fit(adata)
    assert "neurtv" not in adata.layers
    np.testing.assert_array_equal(tl.neurtv_query(adata, adata.obsm["spatial"]).X, done.layers["neurtv"])
    with pytest.raises(ValueError, match="each derivative would take .* GiB: name the `genes` you need"):
        tl.neurtv_gradient(adata)


# ---- neurtv_fit: what is read


def test_the_library_is_the_total_over_all_genes_whichever_are_fitted():
    adata = section()
    total = dense(adata.X).sum(1, dtype=float)
    adata.obs["total"], adata.obs["of the genes"] = total, dense(adata[:, SOME].X).sum(1)
    found = {}
    for name, size in {"default": None, "array": total, "column": "total", "genes": "of the genes"}.items():
        fit(adata, genes=SOME, size_factors=size)
        found[name] = adata.obsm["neurtv"].to_numpy(), adata.uns["neurtv"]["field"]["target_sum"]
    assert found["default"][1] == np.median(total)
    for name in ("array", "column"):
        np.testing.assert_array_equal(found[name][0], found["default"][0])
        assert found[name][1] == found["default"][1]
    assert found["genes"][1] == np.median(adata.obs["of the genes"]) < np.median(total) / 2


@pytest.mark.parametrize("how", ["off the tissue", "without counts"])
def test_spots_off_the_tissue_or_without_counts_are_predicted_but_tell_the_fit_nothing(how):
    a, b = section(), section()
    off = np.arange(a.n_obs) % 7 == 3
    for adata, fill in ((a, 0.0), (b, 99.0 if how == "off the tissue" else 0.0)):
        counts = dense(adata.X)
        counts[off] = fill
        adata.X = counts
        if how == "off the tissue":
            adata.obs["in_tissue"] = (~off).astype(int)
        fit(adata)
    np.testing.assert_array_equal(a.layers["neurtv"], b.layers["neurtv"])
    assert (a.layers["neurtv"] > 0).all()
    np.testing.assert_array_equal(a.uns["neurtv"]["supports"], ~off)
    kept = fit(a[~off].copy())
    np.testing.assert_array_equal(kept.layers["neurtv"], a.layers["neurtv"][~off])
    tl.neurtv_gradient(b)
    if how == "off the tissue":  # the mean gradient is that of the tissue
        norm = np.linalg.norm(get.field(b).jacobian(b.obsm["spatial"][~off]), axis=2).mean(0)
        np.testing.assert_allclose(b.var["neurtv_gradient"], norm, rtol=1e-10)


def test_a_gene_that_holds_nothing_to_fit_is_flagged_and_gets_its_mean():
    adata, values = section(), dense(section().X)
    values[:, 4] = 0
    adata.X = np.where(np.arange(20) == 4, 0.1, np.log1p(values)).astype(np.float32)
    fit(adata)
    np.testing.assert_array_equal(np.flatnonzero(adata.var["neurtv_empty"]), [4])
    assert adata.var["neurtv_fitted"].all()
    np.testing.assert_allclose(adata.layers["neurtv"][:, 4], 0.1, rtol=1e-6)
    tl.neurtv_gradient(adata)
    assert not adata.layers["neurtv_dx"][:, 4].any()


def test_a_layer_and_positions_of_other_names_are_fitted(done):
    adata = section()
    adata.layers["counts"], adata.X = adata.X, None
    adata.obsm["pixels"] = pd.DataFrame(adata.obsm.pop("spatial"), index=adata.obs_names)
    fit(adata, layer="counts", spatial_key="pixels")
    np.testing.assert_array_equal(adata.layers["neurtv"], done.layers["neurtv"])
    out = tl.neurtv_superres(adata)
    np.testing.assert_array_equal(out.X, tl.neurtv_superres(done).X)
    for each in (adata, out):
        tl.neurtv_gradient(each)
        assert np.isfinite(each.layers["neurtv_dx"]).all()


def footprint_of(adata, **options):
    return fit(adata, steps=1, **options).uns["neurtv"]["params"].get("footprint")


def test_a_footprint_is_a_number_or_that_of_the_picture_or_that_of_visium_or_none():
    stored = section().uns["spatial"]["synthetic"]["scalefactors"]["spot_diameter_fullres"]
    assert footprint_of(section()) is None
    assert footprint_of(section(), footprint=90) == 90.0
    assert footprint_of(section(), footprint="auto") == stored
    bare, slides = section(), section()
    del bare.uns["spatial"]
    assert footprint_of(bare, footprint="auto") == pytest.approx(0.55 * PITCH, rel=1e-3)
    assert footprint_of(stack(), footprint="auto") is None  # cells, not spots
    picture = {"scalefactors": {"spot_diameter_fullres": 60.0}}
    slides.obs["slide"], slides.uns["spatial"] = "B", {"A": slides.uns["spatial"]["synthetic"], "B": picture}
    assert footprint_of(slides, footprint="auto", library_key="slide") == 60.0
    assert np.isfinite(fit(stack(), footprint=8.0).layers["neurtv"]).all()


# ---- neurtv_fit: what is fitted


def test_each_penalty_has_a_distinct_name_in_what_is_stored():
    penalty = ("vectorial", HigherOrderTV(3), "constant", HigherOrderTV(2), "gaussian_process")
    slot = fitted(radius=4, penalty=penalty, steps=3).uns["neurtv"]
    labels = ["vectorial", "second_order", "second_order_2", "gaussian_process"]
    assert list(dict.fromkeys(slot["lam_search"]["penalty"])) == list(slot["lam"]) == labels
    assert [slot["lam"][name] for name in labels[:3]] == [400.0] * 3
    assert list(slot["member_weights"]) == [*labels, "constant"]
    assert sum(slot["member_weights"].values()) == pytest.approx(1)
    alone = fitted(radius=4, steps=3).uns["neurtv"]["member_weights"]
    assert alone == {"nuclear": 1.0}


def test_a_search_that_ends_at_its_edge_warns():
    with pytest.warns(UserWarning, match="`lam` ended at its weakest value, .* pass a `LineSearch"):
        fitted(lam="auto", search=LineSearch(start=1e6, ratio=2, max_steps=1, steps=20))


def test_numbers_of_the_method_can_be_changed(done):
    adata = fitted(config=ExpressionConfig(learning_rate=1e-2, latent_genes=10))
    assert adata.uns["neurtv"]["params"]["config"]["latent_genes"] == 10
    assert not np.allclose(adata.layers["neurtv"], done.layers["neurtv"], rtol=1e-3)


REFITS = {
    "quick": ({}, None),
    "chosen": ({"lam": "auto", "penalty": ["space_variant", HigherOrderTV(3)], "search": LineSearch(max_steps=1)}, "zarr"),
    "all members": ({"penalty": "auto", "network": ["siren", Spline((2, 4))], "rank": "auto"}, "h5ad"),
    "a process": ({"penalty": GaussianProcess(lengths=(3.0, 9.0), functions=50), "n_members": 1}, "zarr"),
    "genes, footprint, array of sizes": ({"genes": SOME, "footprint": 60.0, "size_factors": np.arange(1.0, 131.0)}, "h5ad"),
    "normalised, spline": ({"likelihood": "gaussian", "network": Spline((2, 4)), "random_state": 3, "steps": 4}, "zarr"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the search for `lam`")
@pytest.mark.parametrize(("options", "suffix"), REFITS.values(), ids=REFITS)
def test_stored_parameters_repeat_the_same_fit(tmp_path, options, suffix):
    adata, again = section(radius=6), section(radius=6)
    read = fit(adata, **options)
    if suffix is not None:
        getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        read = getattr(anndata, f"read_{suffix}")(tmp_path / f"a.{suffix}")
    tl.neurtv_fit(again, **get.params(read), progress=False)
    assert_same(again, adata)


@dataclass(frozen=True)
class Ripples(Network):
    """A user's own network: one hidden layer."""

    width: int = 16

    def n_weights(self, n_in, n_out):
        return self.width * (n_in + 1) + n_out * (self.width + 1)

    def build(self, n_in, n_out, generator):
        net = nn.Sequential(nn.Linear(n_in, self.width), nn.Tanh(), nn.Linear(self.width, n_out))
        for weights in net.parameters():
            nn.init.normal_(weights, generator=generator)
        return net


@dataclass(frozen=True)
class Doubled(Penalty):
    """A user's own penalty: twice isotropic TV."""

    factor: float = 2.0

    def __call__(self, f):
        return self.factor * IsotropicTV()(f)


def test_a_network_and_a_penalty_of_ones_own_are_refused_before_a_fit_unless_they_can_be_stored(tmp_path):
    for options, words in (
        ({"network": Ripples()}, "NETWORKS.register"),
        ({"penalty": Doubled()}, "PENALTIES.register"),
    ):
        with pytest.raises(TypeError, match=f"cannot be stored.*{words}"):
            fit(section(4), **options)
    REGISTRY.register("ripples")(Ripples)
    PENALTIES.register("doubled")(Doubled)
    try:
        adata = fitted(network=Ripples(8), penalty=[Doubled(3.0), "doubled"], n_members=1)
        adata.write_h5ad(tmp_path / "own.h5ad")
        read = anndata.read_h5ad(tmp_path / "own.h5ad")
        np.testing.assert_array_equal(tl.neurtv_superres(read).X, tl.neurtv_superres(adata).X)
        assert get.params(read)["network"] == [Ripples(8)]
        assert get.params(read)["penalty"] == [Doubled(3.0), Doubled()]
    finally:
        del REGISTRY["ripples"], PENALTIES["doubled"]
    with pytest.raises(ValueError, match="the network 'ripples' is unknown here: register its class"):
        get.field(read)


# ---- members


def test_a_fit_with_a_gaussian_process_has_a_standard_deviation_at_the_spots_and_between_them(spread, done):
    field, spots = get.field(spread), spread.obsm["spatial"]
    np.testing.assert_allclose(spread.layers["neurtv_std"], field.std(spots), rtol=1e-4)
    assert (spread.layers["neurtv_std"] > 0).all()
    for out in (tl.neurtv_superres(spread), tl.neurtv_query(spread, spots + 20.0, outside="extrapolate")):
        assert set(out.layers) == {"neurtv_std"}
        np.testing.assert_allclose(out.layers["neurtv_std"], field.std(out.obsm["spatial"]), rtol=1e-5)
    assert "neurtv_std" not in done.layers  # of networks alone
    assert not tl.neurtv_superres(done).layers
    with pytest.raises(ValueError, match="none of its members is a Gaussian process: refit with `penalty='auto'`"):
        get.field(done).std(spots)


def test_the_default_fit_is_an_average_with_a_gaussian_process_and_the_constant_and_has_a_standard_deviation():
    adata = section(4)
    tl.neurtv_fit(adata, lam=100, steps=5, progress=False)
    names = ["nuclear", "space_variant", "gaussian_process", "constant"]
    assert list(adata.uns["neurtv"]["member_weights"]) == names
    assert (adata.layers["neurtv_std"] > 0).all()
    assert plain(adata.uns["neurtv"])


# ---- a refit replaces what the fit wrote, and nothing else


def test_a_refit_leaves_what_a_first_fit_leaves(spread, done):
    adata = spread.copy()
    tl.neurtv_gradient(adata)
    assert_same(fit(adata), done)
    adata.X = np.log1p(dense(adata.X))
    fit(adata)
    assert not {"neurtv_dispersion", "neurtv_deviance_explained"} & set(adata.var)  # those of counts
    assert (adata.uns["neurtv"]["params"]["likelihood"], adata.uns["neurtv"]["field"]["link"]) == (
        "gaussian",
        "identity",
    )


def test_a_refit_leaves_alone_what_other_fits_and_the_user_have_stored():
    adata = fitted(key_added="a_std", radius=4)
    adata.obs["a_boundary"], adata.layers["a_dx"] = 1.0, np.zeros(adata.shape)
    before = slots_of(adata)
    fit(adata, key_added="a")
    fit(adata, key_added="a")
    assert before <= slots_of(adata)
    with pytest.raises(ValueError, match=r"would overwrite `adata.layers\['a_std'\]`.*not from the fit in"):
        fit(adata, key_added="a", penalty="gaussian_process")
    with pytest.raises(ValueError, match=r"would overwrite `adata.layers\['a_dx'\]`, `adata.obs\['a_boundary'\]`"):
        tl.neurtv_gradient(adata, key="a")


def test_a_view_becomes_an_object_of_its_own_and_the_original_stays():
    adata = section()
    part, copy = adata[:, SOME], adata[:, SOME].copy()
    fit(part)
    tl.neurtv_gradient(part)
    assert not part.is_view
    np.testing.assert_array_equal(part.layers["neurtv"], fit(copy).layers["neurtv"])
    assert_same(adata, section())


def test_an_interrupt_leaves_the_data_as_they_were(monkeypatch):
    steps, step = [], torch.optim.Adam.step

    def interrupted(*arguments, **options):
        steps.append(1)
        if len(steps) == 15:  # in the second fit
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    adata = section()
    with pytest.raises(KeyboardInterrupt):
        fit(adata)
    assert_same(adata, section())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_request(progress, capfd):
    fitted(radius=4, progress=progress)
    out, err = capfd.readouterr()
    assert ("step/s" in err) is progress
    assert not out


# ---- files

READ = """
    import resource, sys
    import anndata, numpy as np, neurst
    folder = sys.argv[1]
    points = np.load(f"{folder}/points.npy")
    for name in sys.argv[2:]:
        read = anndata.read_zarr if name.endswith("zarr") else anndata.read_h5ad
        adata = read(f"{folder}/{name}")
        out = neurst.tl.neurtv_query(adata, points, outside="extrapolate")
        dense = neurst.tl.neurtv_superres(adata, factor=2)
        neurst.tl.neurtv_gradient(dense)
        np.savez(f"{folder}/{name}.npz", out.X, dense.X, dense.layers["neurtv_dx"], *dense.layers.values())
    million = np.random.default_rng(0).uniform(points.min(0), points.max(0), (1_000_000, 2))
    out = neurst.tl.neurtv_query(adata, million, genes=adata.var_names[:3], outside="extrapolate")
    assert out.shape == (1_000_000, 3)
    assert np.isfinite(out.X).all()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
FILES = {
    "siren": ({"penalty": ["nuclear", "tgv", "gaussian_process"]}, "h5ad"),  # TGV has more outputs than latents
    "lowrank": ({"genes": SOME}, "h5ad"),
    "spline": ({"n_members": 1}, "zarr"),
    "cosine": ({"penalty": "auto"}, "zarr"),
    "fourier": ({}, "zarr"),
}


def test_files_read_in_another_process_give_the_same_numbers_and_a_million_points_stay_below_two_gigabytes(tmp_path):
    points = np.random.default_rng(0).uniform(3400, 5200, (37, 2))
    np.save(tmp_path / "points.npy", points)
    expected = {}
    for name, (options, suffix) in FILES.items():
        adata = fitted(radius=5, network=NETWORKS[name], steps=3, **options)
        out, dense_ = tl.neurtv_query(adata, points, outside="extrapolate"), tl.neurtv_superres(adata, factor=2)
        tl.neurtv_gradient(dense_)
        expected[f"{name}.{suffix}"] = out.X, dense_.X, dense_.layers["neurtv_dx"], *dense_.layers.values()
        getattr(adata, f"write_{suffix}")(tmp_path / f"{name}.{suffix}")
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(READ), str(tmp_path), *expected]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    for name, arrays in expected.items():
        for here, there in zip(arrays, np.load(tmp_path / f"{name}.npz").values(), strict=True):
            np.testing.assert_array_equal(there, here, err_msg=name)
    peak = int(process.stdout)  # KiB on Linux, bytes on macOS
    assert peak / (1 if sys.platform == "darwin" else 1 / 1024) < 2e9


# ---- neurtv_superres


def test_superres_holds_the_field_and_what_is_needed_to_read_it_on():
    done = fitted(radius=None, steps=2)
    before = done.copy()
    out, spots = tl.neurtv_superres(done, factor=2), done.obsm["spatial"]
    assert_same(done, before)
    assert out.n_obs / done.n_obs == pytest.approx(4, rel=0.15)
    np.testing.assert_allclose(
        cKDTree(out.obsm["spatial"]).query(spots)[0], 0, atol=1e-6 * PITCH
    )  # every spot is there
    assert out.obs["in_support"].all()
    np.testing.assert_allclose(out.obs["distance_to_spot"], cKDTree(spots).query(out.obsm["spatial"])[0])
    np.testing.assert_array_equal(out.X, get.field(done)(out.obsm["spatial"]).astype(np.float32))
    assert out.X.dtype == np.float32
    assert out.obs_names.is_unique
    np.testing.assert_array_equal(get.field(out)(out.obsm["spatial"]).astype(np.float32), out.X)
    query = out.uns["neurtv"]["query"]
    assert query["support_radius"] == pytest.approx(1.05 * PITCH)
    assert query["spacing"] == pytest.approx(PITCH / 2)
    assert query["target_sum"] == np.median(dense(done.X).sum(1))
    finer = tl.neurtv_superres(out, factor=4)  # a dense section can be read on a finer lattice
    assert 3.5 < finer.n_obs / out.n_obs < 4.5


def test_superres_copies_the_picture_and_draws_smaller_spots(done):
    out = tl.neurtv_superres(done, factor=4)
    old, new = done.uns["spatial"]["synthetic"], out.uns["spatial"]["synthetic"]
    assert new["scalefactors"]["spot_diameter_fullres"] == pytest.approx(0.55 * PITCH / 4)
    assert old["scalefactors"]["spot_diameter_fullres"] == pytest.approx(0.55 * PITCH)
    assert new["scalefactors"]["tissue_hires_scalef"] == old["scalefactors"]["tissue_hires_scalef"]
    for name, image in old["images"].items():
        np.testing.assert_array_equal(new["images"][name], image)
        assert not np.shares_memory(new["images"][name], image)


def test_superres_of_some_genes_keeps_their_columns_of_var(done):
    out = tl.neurtv_superres(done, genes=SOME)
    assert list(out.var_names) == SOME
    pd.testing.assert_frame_equal(out.var, done.var.loc[SOME])
    assert out.var["pattern"].dtype == "category"
    np.testing.assert_array_equal(out.X, tl.neurtv_superres(done)[:, SOME].X)
    np.testing.assert_array_equal(tl.neurtv_superres(done, genes=SOME[0]).X, out[:, SOME[:1]].X)


def test_superres_takes_a_spacing_a_lattice_and_a_radius(done):
    out = tl.neurtv_superres(done, spacing=50.0, lattice="square", support_radius=60.0)
    np.testing.assert_allclose(np.diff(np.unique(out.obsm["spatial"][:, 0])), 50)  # along the axes
    assert 55 < out.obs["distance_to_spot"].max() <= 60


def test_superres_fits_first_if_nothing_is_stored(monkeypatch, done):
    calls, module, adata = [], sys.modules["neurst.tl._read"], section()

    def quick(adata, *, key_added, progress):
        calls.append(key_added)
        tl.neurtv_fit(adata, key_added=key_added, **QUICK)

    monkeypatch.setattr(module, "neurtv_fit", quick)
    first = tl.neurtv_superres(adata, progress=False)
    assert calls == ["neurtv"]
    assert_same(adata, done)
    np.testing.assert_array_equal(tl.neurtv_superres(adata).X, first.X)
    assert calls == ["neurtv"]


def test_superres_of_some_of_the_spots_fills_their_tissue_only(done):
    left = done.obsm["spatial"][:, 0] < np.median(done.obsm["spatial"][:, 0])
    part, whole = tl.neurtv_superres(done[left]), tl.neurtv_superres(done)
    distance = cKDTree(done.obsm["spatial"][left]).query(part.obsm["spatial"])[0]
    assert distance.max() <= 1.05 * PITCH * (1 + 1e-6)
    near = cKDTree(done.obsm["spatial"][left]).query(whole.obsm["spatial"])[0] <= 1.05 * PITCH
    np.testing.assert_allclose(part.obsm["spatial"], whole.obsm["spatial"][near])
    np.testing.assert_array_equal(part.X, whole.X[near])


def test_a_lattice_that_is_too_large_is_refused_with_its_points_and_size(done):
    with pytest.raises(
        ValueError, match=r"20 genes .* \d+.\d GB, above `max_gb=8`: .* spacing 0.2 .* about 12\d,\d{3},\d{3} points"
    ):
        tl.neurtv_superres(done, spacing=0.2)
    n = tl.neurtv_superres(done, factor=4).n_obs
    size = n * (4 * 20 + 32 + 90) / 1e9
    assert tl.neurtv_superres(done, factor=4, max_gb=1.3 * size).n_obs == n
    with pytest.raises(ValueError, match="`max_gb=.* Pass a larger `spacing`"):
        tl.neurtv_superres(done, factor=4, max_gb=0.7 * size)


def test_results_go_into_scanpy_and_squidpy(done):
    import scanpy as sc
    import squidpy as sq
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    out = tl.neurtv_superres(done, factor=1)
    sc.pp.pca(out, n_comps=3)
    sc.pl.pca(out, color=SOME[0], show=False)
    sq.pl.spatial_scatter(out, color=SOME[0])
    without = out.copy()
    del without.uns["spatial"]
    sq.pl.spatial_scatter(without, color=SOME[0], shape=None)
    assert len(plt.get_fignums()) == 3
    plt.close("all")


# ---- neurtv_query


def test_a_query_answers_each_point_in_the_order_asked(done):
    points = done.obsm["spatial"][[5, 3, 3, 80]] + 20.0
    out = tl.neurtv_query(done, points)
    np.testing.assert_array_equal(out.obsm["spatial"], points)
    np.testing.assert_allclose(out.X, get.field(done)(points), rtol=1e-6)
    np.testing.assert_array_equal(out.X[1], out.X[2])
    np.testing.assert_allclose(tl.neurtv_query(done, points[::-1].tolist()).X, out.X[::-1], rtol=1e-6)


def test_a_query_outside_the_tissue_is_nan_unless_asked_otherwise(done):
    spots = done.obsm["spatial"]
    low = spots[np.argmin(spots[:, 0])]
    points = np.array([spots[7], low - [1.0 * PITCH, 0], low - [1.2 * PITCH, 0], low - [3 * PITCH, 0]])
    out, beyond = tl.neurtv_query(done, points), tl.neurtv_query(done, points, outside="extrapolate")
    np.testing.assert_array_equal(out.obs["in_support"], [True, True, False, False])
    np.testing.assert_array_equal(np.isnan(out.X).any(1), [False, False, True, True])
    np.testing.assert_array_equal(out.X[:2], beyond.X[:2])
    np.testing.assert_allclose(beyond.X, get.field(done)(points), rtol=1e-6)
    wide = tl.neurtv_query(done, points, support_radius=1.5 * PITCH)
    np.testing.assert_array_equal(np.isnan(wide.X).any(1), [False, False, False, True])
    np.testing.assert_array_equal(tl.neurtv_query(done, points[:2], outside="raise").X, out.X[:2])


def test_a_query_needs_the_field_only(done):
    points = done.obsm["spatial"][:9] + 3.0
    bare = AnnData(obs=pd.DataFrame(index=["a"]), uns={"neurtv": done.uns["neurtv"]})
    np.testing.assert_array_equal(tl.neurtv_query(bare, points).X, tl.neurtv_query(done, points).X)
    part = done[:12, SOME].copy()
    np.testing.assert_array_equal(tl.neurtv_query(part, points, genes=SOME).X, tl.neurtv_query(done, points)[:, SOME].X)


# ---- neurtv_gradient


@pytest.mark.parametrize("key", ["neurtv", "other"])
def test_layers_are_the_field_and_its_derivatives(key):
    before = fitted(key_added=key)
    adata, field, spots = before.copy(), get.field(before, key), before.obsm["spatial"]
    assert tl.neurtv_gradient(adata, key=key) is None
    jacobian = field.jacobian(spots)
    assert list(field.genes) == list(adata.var_names)
    np.testing.assert_array_equal(adata.layers[key], field(spots).astype(np.float32))
    np.testing.assert_array_equal(adata.obsm[f"X_{key}"], field.latent(spots).astype(np.float32))
    for axis, name in enumerate("xy"):
        np.testing.assert_array_equal(adata.layers[f"{key}_d{name}"], jacobian[:, :, axis].astype(np.float32))
    np.testing.assert_allclose(adata.obs[f"{key}_boundary"], field.boundary(spots), rtol=1e-12)
    np.testing.assert_allclose(adata.var[f"{key}_gradient"], np.linalg.norm(jacobian, axis=2).mean(0), rtol=1e-10)
    for slot in slots_of(adata) - slots_of(before):
        part, name = slot.split("/", 1)
        del getattr(adata, part)[name]
    adata.uns[key]["slots"] = before.uns[key]["slots"]
    assert_same(adata, before)


def test_the_predictor_is_latents_times_loadings_and_reading_a_field_changes_nothing():
    adata, before = fitted(), fitted()
    field, again = get.field(adata), get.field(adata)
    eta = adata.obsm["X_neurtv"] @ adata.varm["neurtv_loadings"].T + field.intercept
    np.testing.assert_allclose(field.target_sum * np.exp(eta), field(adata.obsm["spatial"]), rtol=1e-4)
    np.testing.assert_array_equal(again(adata.obsm["spatial"] + 9.0), field(adata.obsm["spatial"] + 9.0))
    assert_same(adata, before)


def test_the_gradient_of_some_genes_leaves_the_others_unmarked():
    most = list(section().var_names[3:])
    adata, whole = fitted(), fitted()
    tl.neurtv_gradient(adata, genes=most)
    tl.neurtv_gradient(whole)
    asked = adata.var_names.isin(most)
    for name in ("neurtv_dx", "neurtv_dy"):
        np.testing.assert_allclose(adata.layers[name][:, asked], whole.layers[name][:, asked], rtol=1e-5)
        assert np.isnan(adata.layers[name][:, ~asked]).all()
    np.testing.assert_array_equal(adata.var["neurtv_gradient"].notna(), asked)
    np.testing.assert_allclose(adata.obs["neurtv_boundary"], whole.obs["neurtv_boundary"])  # of all fitted genes
    tl.neurtv_gradient(adata, genes=SOME)  # few of them: tables of their own, and the layers go
    assert set(adata.layers) == {"neurtv"}
    assert list(adata.obsm["neurtv_dx"].columns) == SOME


@pytest.mark.parametrize("outside", ["nan", "extrapolate"])
def test_the_gradient_and_deviation_of_a_query_are_masked_as_its_values_are(spread, outside):
    coords = spread.obsm["spatial"][:9].copy()
    coords[4] -= 1e4
    read = tl.neurtv_query(spread, coords, outside=outside)
    tl.neurtv_gradient(read)
    known = [outside == "extrapolate" or i != 4 for i in range(9)]
    for part in (read.X, read.layers["neurtv_std"], read.layers["neurtv_dx"], read.obs[["neurtv_boundary"]]):
        np.testing.assert_array_equal(np.isfinite(part).all(1), known)
    assert np.isfinite(read.var["neurtv_gradient"]).all()


MOVES = {
    "shifted": lambda x: x + 1,
    "rescaled": lambda x: 0.5 * x,
    "one spot elsewhere": lambda x: np.where(np.arange(len(x))[:, None] == 3, x + 10, x),
    "in 3-d": lambda x: np.column_stack([x, x[:, 0]]),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_spots_that_were_moved_since_the_fit_are_refused(done, move):
    for adata in (done.copy(), tl.neurtv_superres(done)):
        adata.obsm["spatial"] = move(adata.obsm["spatial"])
        for verb in (tl.neurtv_gradient, tl.neurtv_superres):
            with pytest.raises(ValueError, match="of the .* positions in .* were they moved or rescaled?"):
                verb(adata)


def test_renamed_reordered_and_fewer_spots_are_read_as_they_are(done):
    adata = done[::-2].copy()
    adata.obs_names = [f"other{i}" for i in range(adata.n_obs)]
    adata.obsm["spatial"] = adata.obsm["spatial"].astype(np.float32)
    tl.neurtv_gradient(adata)
    expected = get.field(done).jacobian(done[::-2].obsm["spatial"])[..., 0]
    np.testing.assert_allclose(adata.layers["neurtv_dx"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# ---- coordinates in space


def test_cells_in_space_are_served_throughout():
    adata = fit(stack(), steps=100, lam=30)
    tl.neurtv_gradient(adata)
    assert (adata.layers["neurtv_dz"][:, 0] > 0).mean() > 0.9  # the gene that is brighter along z
    out = tl.neurtv_superres(adata, factor=1)
    steps = (out.obsm["spatial"] - out.obsm["spatial"][0]) / out.uns["neurtv"]["query"]["spacing"]
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)  # cubic
    pitch = np.median(cKDTree(adata.obsm["spatial"]).query(adata.obsm["spatial"], 2)[0][:, 1])
    assert out.uns["neurtv"]["query"]["spacing"] == pytest.approx(pitch)
    tl.neurtv_gradient(out)
    assert np.isfinite(out.layers["neurtv_dz"]).all()


def test_no_tissue_is_invented_above_or_below_a_stack_of_sections():
    adata = fit(stack(n_sections=4))
    out = tl.neurtv_superres(adata, factor=2)
    heights = np.unique(adata.obsm["spatial"][:, 2])
    levels = np.unique(out.obsm["spatial"][:, 2])
    np.testing.assert_allclose(levels, np.linspace(heights[0], heights[-1], 7))  # each gap is halved
    assert out.obs["in_support"].all()
    above = np.array([[40.0, 130.0, heights[-1] + 1], [40.0, 130.0, heights[0] - 1], [40.0, 130.0, heights[1] + 3]])
    np.testing.assert_array_equal(tl.neurtv_query(adata, above).obs["in_support"], [False, False, True])


# ---- sequences of calls


def test_a_refit_of_what_a_query_returned_is_no_longer_a_query(done):
    dense = tl.neurtv_superres(done)
    dense.obsm["turned"], dense.layers["other"] = 0.5 * dense.obsm["spatial"][:, ::-1] + 7, dense.X * 2 + 1
    fit(dense, layer="other", spatial_key="turned", likelihood="gaussian")
    tl.neurtv_gradient(dense)
    slope = get.field(dense).jacobian(dense.obsm["turned"])[:, :, 0]
    np.testing.assert_allclose(dense.layers["neurtv_dx"], slope, rtol=1e-4, atol=1e-5)
    assert get.params(dense)["spatial_key"] == "turned"


def test_entries_of_others_with_a_name_like_ours_do_no_harm():
    adata = section(4)
    adata.uns["neurtv_query"] = "my notes"
    fit(adata)
    fit(adata, key_added="neurtv_query2")
    tl.neurtv_gradient(adata)
    assert adata.uns["neurtv_query"] == "my notes"


@pytest.mark.parametrize("n_members", [1, 2])
def test_a_field_survives_concat_if_uns_is_merged_and_else_the_error_says_what_to_do(n_members):
    adata = fitted(4, n_members=n_members)
    parts = [adata[:20], adata[20:]]
    kept = anndata.concat(parts, uns_merge="first", merge="same")
    np.testing.assert_allclose(tl.neurtv_superres(kept).X, tl.neurtv_superres(adata).X, rtol=1e-5)
    with pytest.raises(KeyError, match="the field is lost.* delete the results and refit, or refit under another"):
        tl.neurtv_gradient(anndata.concat(parts, merge="same"))


def test_the_diameter_of_spots_follows_the_spacing_also_of_a_lattice_read_from_a_lattice():
    adata = fitted(4)
    adata.uns["spatial"] = {"one": {"scalefactors": {"spot_diameter_fullres": 55.0}}}
    diameter = lambda out: out.uns["spatial"]["one"]["scalefactors"]["spot_diameter_fullres"]
    dense = tl.neurtv_superres(adata, factor=2)
    assert diameter(dense) == pytest.approx(27.5, rel=0.01)
    assert diameter(tl.neurtv_superres(dense, factor=2)) == pytest.approx(diameter(dense))


def test_a_section_with_an_outlying_spot_is_fitted_as_a_disc_is_not_held_out_there():
    adata = section(8)
    adata.obsm["spatial"] = adata.obsm["spatial"].copy()
    adata.obsm["spatial"][0] = 14 * adata.obsm["spatial"].max(0)
    with pytest.raises(ValueError, match="`holdout='block'` hides .* look for outlying spots"):
        tl.holdout_score(adata, holdout="block", baselines=(), progress=False)
    assert np.isfinite(fit(adata).layers["neurtv"]).all()


class Frequencies(nn.Module):
    """A network that keeps what was drawn at random where no file finds it."""

    def __init__(self, frequencies, linear):
        super().__init__()
        self.frequencies, self.linear = frequencies, linear

    def forward(self, x):
        return self.linear(torch.sin(nn.functional.linear(x, self.frequencies)))


@dataclass(frozen=True)
class Forgetful(Network):
    count: int = 0  # weights too few in n_weights

    def n_weights(self, n_in, n_out):
        return 9 * n_out - self.count

    def build(self, n_in, n_out, generator):
        return Frequencies(torch.randn(8, n_in, generator=generator), nn.Linear(8, n_out))


def test_a_network_that_would_be_read_back_as_another_one_is_refused_before_the_fit(monkeypatch):
    monkeypatch.setitem(REGISTRY, "forgetful", Forgetful)
    for network, words in ((Forgetful(), "gives other values"), (Forgetful(1), "weights are stored")):
        with pytest.raises(ValueError, match=f"`network=Forgetful.*cannot be stored.*{words}"):
            fit(section(4), network=network)
