import subprocess
import sys
import textwrap
from functools import partial

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from scipy.spatial import cKDTree
from sections import PITCH, QUICK, fitted, section, stack

from neurst import get, tl
from neurst.core.nets import NETWORKS, Fourier, LowRank, Siren, Spline
from neurst.core.penalty import PENALTIES, HigherOrderTV
from neurst.spatial import expression, slots
from neurst.spatial.choice import LamSearch

SMALL = {
    "siren": Siren(width=16, depth=2),
    "fourier": Fourier(width=16, depth=1, n_features=8),
    "lowrank": LowRank(rank=4, width=16),
    "spline": Spline(cells=(2, 4)),
}
SOME = ["Layer4_01", "Layer2_01", "Flat_02"]  # not in the order of var_names


@pytest.fixture(scope="module")
def done():
    """A fitted section that no test changes."""
    return fitted()


def dense(matrix):
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def run(script, *arguments):
    """Standard output of a script in a process of its own, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def assert_same(a, b):
    """Two AnnData hold the same, bit by bit."""
    for part in ("obs", "var"):
        pd.testing.assert_frame_equal(getattr(a, part), getattr(b, part))
    np.testing.assert_array_equal(dense(a.X), dense(b.X))
    for part in ("layers", "obsm", "varm"):
        assert set(getattr(a, part)) == set(getattr(b, part))
        for name, values in getattr(a, part).items():
            np.testing.assert_array_equal(values, getattr(b, part)[name])
    assert set(a.uns) == set(b.uns)


# ---- neurtv_fit


@pytest.mark.parametrize("key", ["neurtv", "smooth 2"])
def test_a_fit_writes_the_slots_it_promises_and_nothing_else(key):
    before, adata = section(), section()
    assert tl.neurtv_fit(adata, key_added=key, **QUICK) is None
    n_obs, n_vars = adata.shape
    written = {
        "layers": {key: (n_obs, n_vars)},
        "obsm": {f"X_{key}": (n_obs, 20)},
        "varm": {f"{key}_loadings": (n_vars, 20)},
        "var": {f"{key}_{name}": (n_vars,) for name in ("fitted", "empty", "deviance_explained", "dispersion")},
        "obs": {},
    }
    for part, shapes in written.items():
        slot = getattr(adata, part)
        new = set(slot) - set(getattr(before, part))
        assert {name: slot[name].shape for name in new} == shapes
        for name in shapes:
            kind = bool if name.endswith(("_fitted", "_empty")) else float if part == "var" else np.float32
            assert slot[name].dtype == kind
            assert np.isfinite(np.asarray(slot[name])).all()
            del slot[name]
    slot = adata.uns.pop(key)
    chosen = {"lam", "penalty_weights", "lam_search", "score"}
    assert set(slot) == {"neurst_schema", "versions", "params", "history", "field"} | chosen
    assert_same(adata, before)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(adata.X, name), getattr(before.X, name))
    for name, image in before.uns["spatial"]["synthetic"]["images"].items():
        np.testing.assert_array_equal(adata.uns["spatial"]["synthetic"]["images"][name], image)


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, str), path
            assert "/" not in key, path
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


@pytest.mark.parametrize("network", SMALL.values(), ids=SMALL)
def test_a_stored_field_is_plain_arrays_strings_and_numbers(network):
    for path, value in leaves(fitted(network=network).uns["neurtv"]):
        listed = isinstance(value, list) and len({type(v) for v in value}) == 1 and type(value[0]) in (int, str)
        assert listed or type(value) in (str, int, float, bool, np.ndarray), path
        if isinstance(value, np.ndarray):
            assert value.dtype.kind in "fiU" or all(type(v) is str for v in value), path


def test_the_parameters_of_a_fit_are_kept(done):
    params = done.uns["neurtv"]["params"]
    expected = {"lam": 400, "steps": 10, "rank": 20, "likelihood": "poisson", "layer": "X", "random_state": 0}
    expected |= {"penalties": ["nuclear"], "n_members": 2, "for_gaps": False}
    assert expected.items() <= params.items()
    assert (params["n_spots"], params["n_genes"]) == done.shape
    assert params["target_sum"] == np.median(np.asarray(done.X.sum(1)))
    assert done.uns["neurtv"]["lam"] == {"nuclear": 400.0}
    assert done.uns["neurtv"]["penalty_weights"] == {"nuclear": 1.0}
    assert set(done.uns["neurtv"]["versions"]) == {"neurst", "torch", "numpy", "anndata"}


def diameter_of(adata, **options):
    tl.neurtv_fit(adata, **QUICK | {"steps": 1} | options)
    return adata.uns["neurtv"]["params"]["footprint"]


def test_a_footprint_is_a_number_that_of_the_picture_that_of_visium_or_none():
    assert diameter_of(section()) == 0.0  # points
    assert diameter_of(section(), footprint=90) == 90.0
    assert (
        diameter_of(section(), footprint="auto")
        == section().uns["spatial"]["synthetic"]["scalefactors"]["spot_diameter_fullres"]
    )
    bare = section()
    del bare.uns["spatial"]
    assert diameter_of(bare, footprint="auto") == pytest.approx(0.55 * PITCH, rel=1e-3)
    assert diameter_of(stack(), footprint="auto") == 0.0  # cells


def test_the_footprint_of_one_section_of_several_pictures_is_its_own():
    adata = section()
    picture = {"scalefactors": {"spot_diameter_fullres": 60.0}}
    adata.obs["slide"], adata.uns["spatial"] = "B", {"A": adata.uns["spatial"]["synthetic"], "B": picture}
    assert diameter_of(adata, footprint="auto", library_key="slide") == 60.0


def test_a_section_with_a_footprint_is_fitted_in_the_plane_and_in_space(done):
    assert not np.array_equal(fitted(footprint="auto").layers["neurtv"], done.layers["neurtv"])
    adata = stack()
    tl.neurtv_fit(adata, footprint=8.0, **QUICK)
    assert np.isfinite(adata.layers["neurtv"]).all()


def test_the_layer_is_the_field_at_the_spots(done):
    values = get.field(done)(done.obsm["spatial"])
    np.testing.assert_array_equal(done.layers["neurtv"], values.astype(np.float32))
    latent = get.field(done).latent(done.obsm["spatial"])
    np.testing.assert_array_equal(done.obsm["X_neurtv"], latent.astype(np.float32))


def test_genes_that_were_not_asked_for_are_marked():
    adata = fitted(genes=SOME)
    asked = adata.var_names.isin(SOME)
    np.testing.assert_array_equal(adata.var["neurtv_fitted"], asked)
    np.testing.assert_array_equal(np.isnan(adata.layers["neurtv"]), np.broadcast_to(~asked, adata.shape))
    np.testing.assert_array_equal(np.isnan(adata.varm["neurtv_loadings"]).all(1), ~asked)
    np.testing.assert_array_equal(adata.var["neurtv_deviance_explained"].isna(), ~asked)
    assert not adata.var["neurtv_empty"].any()
    assert list(get.field(adata).genes) == list(adata.var_names[asked])


def test_the_library_is_the_total_over_all_genes_whichever_are_fitted():
    adata = section()
    total = dense(adata.X).sum(1, dtype=float)
    adata.obs["total"], adata.obs["of the genes"] = total, dense(adata[:, SOME].X).sum(1)
    found = {}
    for name, size in {"default": None, "array": total, "column": "total", "genes": "of the genes"}.items():
        tl.neurtv_fit(adata, genes=SOME, size_factors=size, **QUICK)
        found[name] = adata.layers["neurtv"], adata.uns["neurtv"]["field"]["target_sum"]
    assert found["default"][1] == np.median(total)
    for name in ("array", "column"):
        np.testing.assert_array_equal(found[name][0], found["default"][0])
        assert found[name][1] == found["default"][1]
    assert found["genes"][1] == np.median(adata.obs["of the genes"]) < np.median(total) / 2


def test_spots_off_the_tissue_are_predicted_but_tell_the_fit_nothing():
    a, b = section(), section()
    off = np.arange(a.n_obs) % 7 == 3
    for adata, fill in ((a, 0.0), (b, 99.0)):
        counts = dense(adata.X)
        counts[off] = fill
        adata.X, adata.obs["in_tissue"] = counts, (~off).astype(int)
        tl.neurtv_fit(adata, **QUICK)
        tl.neurtv_gradient(adata)
    np.testing.assert_array_equal(a.layers["neurtv"], b.layers["neurtv"])
    assert np.isfinite(a.layers["neurtv"]).all()
    assert len(a.uns["neurtv"]["field"]["spots"]) == a.uns["neurtv"]["params"]["n_spots"] == (~off).sum()
    assert a.uns["neurtv"]["field"]["target_sum"] == np.median(dense(a.X)[~off].sum(1))
    norm = np.linalg.norm(get.field(a).gradient(a.obsm["spatial"][~off]), axis=2).mean(0)
    np.testing.assert_allclose(a.var["neurtv_gradient"], norm, rtol=1e-10)


def test_spots_without_counts_are_predicted_but_tell_the_fit_nothing():
    adata, counts = section(), dense(section().X)
    counts[:9] = 0
    adata.X = counts
    tl.neurtv_fit(adata, **QUICK)
    assert adata.uns["neurtv"]["params"]["n_spots"] == adata.n_obs - 9
    kept = adata[9:].copy()
    tl.neurtv_fit(kept, **QUICK)
    np.testing.assert_array_equal(kept.layers["neurtv"], adata.layers["neurtv"][9:])
    assert (adata.layers["neurtv"][:9] > 0).all()


def test_a_gene_without_counts_is_empty_and_expected_nowhere():
    adata, counts = section(), dense(section().X)
    counts[:, 4] = 0
    adata.X = counts
    tl.neurtv_fit(adata, **QUICK)
    np.testing.assert_array_equal(np.flatnonzero(adata.var["neurtv_empty"]), [4])
    assert adata.var["neurtv_fitted"].all()
    assert not adata.layers["neurtv"][:, 4].any()
    assert adata.var["neurtv_deviance_explained"].iloc[4] == 0
    tl.neurtv_gradient(adata)
    assert not adata.layers["neurtv_dx"][:, 4].any()


def test_spots_at_one_place_are_allowed():
    adata = section()
    adata.obsm["spatial"][:20] = adata.obsm["spatial"][20:40]
    tl.neurtv_fit(adata, **QUICK)
    np.testing.assert_array_equal(adata.layers["neurtv"][:20], adata.layers["neurtv"][20:40])
    out = tl.neurtv_superres(adata)
    assert np.isfinite(out.X).all()
    assert len(np.unique(out.obsm["spatial"], axis=0)) == out.n_obs


CONTAINERS = {
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "dense": dense,
    "dense float64": lambda x: dense(x).astype(float),
    "int64": lambda x: x.astype(np.int64),
    "dense uint16": lambda x: dense(x).astype(np.uint16),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_however_counts_are_stored_the_fit_is_the_same(done, container):
    adata = section()
    adata.X = container(adata.X)
    tl.neurtv_fit(adata, **QUICK)
    np.testing.assert_allclose(adata.layers["neurtv"], done.layers["neurtv"], rtol=1e-4)


def test_a_layer_is_fitted_instead_of_x(done):
    adata = section()
    adata.layers["counts"], adata.X = adata.X, None
    tl.neurtv_fit(adata, layer="counts", **QUICK)
    np.testing.assert_array_equal(adata.layers["neurtv"], done.layers["neurtv"])
    assert adata.X is None
    assert adata.uns["neurtv"]["params"]["layer"] == "counts"


def test_coordinates_may_have_another_name(done):
    adata = section()
    adata.obsm["pixels"] = adata.obsm.pop("spatial")
    tl.neurtv_fit(adata, spatial_key="pixels", **QUICK)
    np.testing.assert_array_equal(adata.layers["neurtv"], done.layers["neurtv"])
    out = tl.neurtv_superres(adata)
    np.testing.assert_array_equal(out.X, tl.neurtv_superres(done).X)
    for a in (adata, out):
        tl.neurtv_gradient(a)
        assert np.isfinite(a.layers["neurtv_dx"]).all()


def test_normalised_data_are_fitted_with_the_identity_link():
    adata = section(radius=12)
    adata.X = np.log1p(1e4 * dense(adata.X) / dense(adata.X).sum(1, keepdims=True))
    tl.neurtv_fit(adata, **(QUICK | {"lam": 20, "steps": 150}))
    assert adata.uns["neurtv"]["params"]["likelihood"] == "gaussian"
    assert not get.field(adata).log_link
    assert adata.uns["neurtv"]["field"]["target_sum"] == 1
    assert 0.25 < adata.uns["neurtv"]["score"] < 0.9
    assert adata.var["neurtv_deviance_explained"].max() < 1
    np.testing.assert_allclose(adata.layers["neurtv"].mean(0), adata.X.mean(0), atol=0.05)


@pytest.mark.parametrize("penalty", sorted(set(PENALTIES) - {"mixed"}))
def test_every_penalty_has_a_name_in_fit(penalty):
    adata = fitted(penalty=penalty, steps=3)
    assert np.isfinite(adata.layers["neurtv"]).all()
    assert adata.uns["neurtv"]["params"]["penalties"] == [penalty]
    tl.neurtv_gradient(adata)
    assert np.isfinite(adata.layers["neurtv_dy"]).all()
    assert tl.neurtv_superres(adata).shape[1] == 20


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial", "gaussian"])
@pytest.mark.filterwarnings("error")
def test_every_network_and_likelihood_has_a_name_in_fit(network, likelihood):
    adata = fitted(radius=4, network=network, likelihood=likelihood, steps=3, n_members=1)
    assert np.isfinite(adata.layers["neurtv"]).all()
    assert adata.uns["neurtv"]["params"]["network"]["name"] == network
    np.testing.assert_array_equal(get.field(adata)(adata.obsm["spatial"]).astype(np.float32), adata.layers["neurtv"])


def test_lam_is_chosen_on_held_out_spots(monkeypatch):
    module = sys.modules["neurst.tl._neurtv"]
    monkeypatch.setattr(module, "LamSearch", partial(LamSearch, steps=20, reach=1))
    slot = fitted(lam="auto").uns["neurtv"]
    search = slot["lam_search"]
    assert len(search["penalty"]) == len(search["lam"]) == len(search["score"]) > 1
    assert set(search["penalty"]) == {"nuclear"}
    assert search["lam"].min() <= slot["lam"]["nuclear"] <= search["lam"].max()
    assert slot["score"] == pytest.approx(search["score"].max(), abs=1e-6)
    assert slot["params"]["lam"] == "auto"


PENALTY_NAMES = {
    "auto": ("auto", ["nuclear", "space_variant"]),
    "several": (["tgv", "isotropic", "tgv"], ["tgv", "isotropic"]),
    "an object": (HigherOrderTV(3), ["HigherOrderTV(order=3)"]),
    "objects and names": (("vectorial", HigherOrderTV(3)), ["vectorial", "HigherOrderTV(order=3)"]),
}


@pytest.mark.parametrize(("penalty", "names"), PENALTY_NAMES.values(), ids=PENALTY_NAMES)
def test_penalties_are_named_in_what_is_stored(penalty, names):
    slot = fitted(radius=4, penalty=penalty, steps=3).uns["neurtv"]
    assert slot["params"]["penalties"] == list(slot["lam_search"]["penalty"]) == names
    assert slot["lam"] == dict.fromkeys(names, 400.0)
    assert list(slot["penalty_weights"]) == names
    assert sum(slot["penalty_weights"].values()) == pytest.approx(1)


def test_discs_are_held_out_for_gaps(done):
    adata = fitted(for_gaps=True)
    assert adata.uns["neurtv"]["params"]["for_gaps"] is True
    assert (adata.var["neurtv_deviance_explained"] != done.var["neurtv_deviance_explained"]).all()
    np.testing.assert_array_equal(adata.layers["neurtv"], done.layers["neurtv"])  # at the same lam, of the same spots


@pytest.fixture(scope="module")
def spread():
    """A section with a field of four members."""
    return fitted(n_members=4, penalty=["nuclear", "space_variant"])


def test_four_members_have_a_standard_deviation_at_the_spots_and_between_them(spread, done):
    field, spots = get.field(spread), spread.obsm["spatial"]
    assert spread.layers["neurtv_std"].dtype == np.float32
    np.testing.assert_array_equal(spread.layers["neurtv_std"], field.std(spots).astype(np.float32))
    assert (spread.layers["neurtv_std"] > 0).all()
    for out in (tl.neurtv_superres(spread), tl.neurtv_query(spread, spots + 20.0, outside="extrapolate")):
        assert set(out.layers) == {"neurtv_std"}
        np.testing.assert_allclose(out.layers["neurtv_std"], field.std(out.obsm["spatial"]), rtol=1e-5)
    some = tl.neurtv_superres(spread, genes=SOME)
    np.testing.assert_allclose(some.layers["neurtv_std"], tl.neurtv_superres(spread)[:, SOME].layers["neurtv_std"])
    assert "neurtv_std" not in done.layers  # of two members
    assert not tl.neurtv_superres(done).layers


def test_the_standard_deviation_of_a_query_is_masked_as_its_values_are(spread):
    coords = spread.obsm["spatial"][:9].copy()
    coords[4] -= 1e4
    read, beyond = (tl.neurtv_query(spread, coords, outside=outside) for outside in ("nan", "extrapolate"))
    known = np.arange(9) != 4
    np.testing.assert_array_equal(np.isfinite(read.layers["neurtv_std"]).all(1), known)
    np.testing.assert_array_equal(np.isnan(read.layers["neurtv_std"]).all(1), ~known)
    np.testing.assert_array_equal(read.layers["neurtv_std"][known], beyond.layers["neurtv_std"][known])
    assert np.isfinite(beyond.layers["neurtv_std"]).all()


def test_the_standard_deviation_of_genes_that_were_not_asked_for_is_nan():
    adata = fitted(genes=SOME, n_members=4, radius=4)
    asked = adata.var_names.isin(SOME)
    np.testing.assert_array_equal(np.isfinite(adata.layers["neurtv_std"]), np.broadcast_to(asked, adata.shape))
    np.testing.assert_array_equal(adata.var["neurtv_dispersion"].notna(), asked)


def test_a_refit_of_fewer_members_removes_the_standard_deviation(spread, done):
    adata = spread.copy()
    tl.neurtv_fit(adata, **QUICK)
    assert_same(adata, done)
    adata.X = np.log1p(dense(adata.X))
    tl.neurtv_fit(adata, **QUICK)
    assert "neurtv_dispersion" not in adata.var  # that of counts


def test_a_fit_can_be_repeated_under_the_same_key(done):
    adata = fitted(random_state=3)
    assert (adata.layers["neurtv"] != done.layers["neurtv"]).any()
    tl.neurtv_fit(adata, **QUICK)
    assert_same(adata, done)


def test_a_view_becomes_an_object_of_its_own_and_the_original_stays():
    adata = section()
    part = adata[:, SOME]
    tl.neurtv_fit(part, **QUICK)
    assert not part.is_view
    assert part.layers["neurtv"].shape == part.shape
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
        tl.neurtv_fit(adata, **QUICK)
    assert_same(adata, section())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_request(progress, capfd):
    fitted(radius=4, progress=progress)
    out, err = capfd.readouterr()
    assert ("step/s" in err) is progress
    assert not out


def test_a_layer_above_the_limit_is_not_written_but_can_be_queried(monkeypatch, done):
    monkeypatch.setattr(slots, "LAYER_LIMIT", 1000)
    adata = section()
    with pytest.warns(UserWarning, match=r"layers\['neurtv'\] would take .* is not written"):
        tl.neurtv_fit(adata, **QUICK)
    assert "neurtv" not in adata.layers
    out = tl.neurtv_query(adata, adata.obsm["spatial"])
    np.testing.assert_array_equal(out.X, done.layers["neurtv"])


# ---- files


FORMATS = {"siren": ["h5ad", "zarr"], "fourier": ["h5ad"], "lowrank": ["h5ad"], "spline": ["h5ad", "zarr"]}
MEMBERS = {"siren": 4, "spline": 1}  # else 2
READ = """
    import sys
    import anndata, numpy as np, neurst
    folder = sys.argv[1]
    points = np.load(f"{folder}/points.npy")
    for name in sys.argv[2:]:
        read = anndata.read_zarr if name.endswith("zarr") else anndata.read_h5ad
        adata = read(f"{folder}/{name}")
        out = neurst.tl.neurtv_query(adata, points, outside="extrapolate")
        dense = neurst.tl.neurtv_superres(adata, factor=2)
        neurst.tl.neurtv_gradient(dense)
        arrays = {"query": out.X, "dense": dense.X, "dx": dense.layers["neurtv_dx"]}
        if "neurtv_std" in dense.layers:
            arrays["std"] = dense.layers["neurtv_std"]
        np.savez(f"{folder}/{name}.npz", **arrays)
"""


def test_a_file_read_in_another_process_answers_with_the_same_numbers(tmp_path):
    points = np.random.default_rng(0).uniform(3400, 5200, (37, 2))
    np.save(tmp_path / "points.npy", points)
    expected = {}
    for name, network in SMALL.items():
        adata = fitted(network=network, steps=3, n_members=MEMBERS.get(name, 2))
        out, dense_ = tl.neurtv_query(adata, points, outside="extrapolate"), tl.neurtv_superres(adata, factor=2)
        tl.neurtv_gradient(dense_)
        for suffix in FORMATS[name]:
            getattr(adata, f"write_{suffix}")(tmp_path / f"{name}.{suffix}")
            arrays = {"query": out.X, "dense": dense_.X, "dx": dense_.layers["neurtv_dx"]}
            if name == "siren":
                arrays["std"] = dense_.layers["neurtv_std"]
            expected[f"{name}.{suffix}"] = arrays
    run(READ, tmp_path, *expected)
    for name, arrays in expected.items():
        found = np.load(tmp_path / f"{name}.npz")
        assert set(found) == set(arrays)
        for part, values in arrays.items():
            np.testing.assert_array_equal(found[part], values, err_msg=f"{name} {part}")


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_file_holds_the_members_of_a_field(tmp_path, spread, suffix):
    getattr(spread, f"write_{suffix}")(tmp_path / f"section.{suffix}")
    again = getattr(anndata, f"read_{suffix}")(tmp_path / f"section.{suffix}")
    np.testing.assert_array_equal(again.layers["neurtv_std"], spread.layers["neurtv_std"])
    here, there = get.field(spread), get.field(again)
    for name in ("weights", "loadings", "intercepts"):
        np.testing.assert_array_equal(getattr(there.members, name), getattr(here.members, name))
    assert there.net.widths == here.net.widths
    np.testing.assert_array_equal(there.std(spread.obsm["spatial"]), here.std(spread.obsm["spatial"]))
    for name in ("lam", "penalty_weights"):
        assert dict(again.uns["neurtv"][name]) == spread.uns["neurtv"][name]
    assert list(again.uns["neurtv"]["params"]["penalties"]) == ["nuclear", "space_variant"]


def as_schema_1(adata):
    """The field of one fit as the first layout had it: one network, its outputs a number."""
    slot = adata.uns["neurtv"]
    part = slot["field"]
    part["weights"] = {name.removeprefix("nets-0-"): w for name, w in part["weights"].items()}
    part["n_outputs"] = int(part["n_outputs"][0])
    del part["widths"], part["members"], slot["penalty_weights"], slot["lam_search"]
    slot["lam"], slot["neurst_schema"] = 400.0, 1


@pytest.mark.parametrize("file", [False, True], ids=["in memory", "from a file"])
@pytest.mark.parametrize("penalty", ["nuclear", "tgv"])  # as many outputs as latents, or more
def test_a_field_of_the_first_layout_is_read_to_the_same_numbers(tmp_path, penalty, file):
    adata = fitted(n_members=1, penalty=penalty, rank=3)
    assert adata.uns["neurtv"]["field"]["rotation"].shape == (3, 3)  # as it was: no component was left out
    points = adata.obsm["spatial"] + 20.0
    old = adata.copy()
    as_schema_1(old)
    if file:
        old.write_h5ad(tmp_path / "old.h5ad")
        old = anndata.read_h5ad(tmp_path / "old.h5ad")
    for read in (tl.neurtv_superres, lambda a: tl.neurtv_query(a, points, outside="extrapolate")):
        np.testing.assert_array_equal(read(old).X, read(adata).X)
    assert get.field(old).members is None
    for each in (old, adata):
        tl.neurtv_gradient(each)
    np.testing.assert_array_equal(old.layers["neurtv_dx"], adata.layers["neurtv_dx"])


def test_a_dense_section_can_be_written_and_read_further(tmp_path, done):
    out = tl.neurtv_superres(done)
    out.write_h5ad(tmp_path / "dense.h5ad")
    again = tl.neurtv_query(anndata.read_h5ad(tmp_path / "dense.h5ad"), out.obsm["spatial"])
    np.testing.assert_array_equal(again.X, out.X)


# ---- neurtv_superres


def test_superres_has_about_factor_squared_times_the_spots_on_the_lattice_of_the_spots():
    adata = fitted(radius=None, steps=2)
    spots = adata.obsm["spatial"]
    for factor in (1, 2, 3):
        out = tl.neurtv_superres(adata, factor=factor)
        assert out.n_obs / adata.n_obs == pytest.approx(factor**2, rel=0.15)
        coords = out.obsm["spatial"]
        tree = cKDTree(coords)
        np.testing.assert_allclose(tree.query(spots)[0], 0, atol=1e-6 * PITCH)  # every spot is there
        near = tree.query(coords, 7)[0][:, 1:] * factor / PITCH
        np.testing.assert_allclose(near[:, 0], 1, rtol=1e-6)
        inner = np.linalg.norm(coords - spots.mean(0), axis=1) < 15 * PITCH
        np.testing.assert_allclose(near[inner], 1, rtol=1e-6)  # six neighbours: hexagonal
        assert out.obs["in_support"].all()
        np.testing.assert_allclose(out.obs["distance_to_spot"], cKDTree(spots).query(coords)[0])
        assert out.obs["distance_to_spot"].max() <= 1.05 * PITCH * (1 + 1e-6)


def test_superres_holds_the_field_and_what_is_needed_to_read_it_on(done):
    out = tl.neurtv_superres(done, factor=2)
    field = get.field(done)
    np.testing.assert_array_equal(out.X, field(out.obsm["spatial"]).astype(np.float32))
    assert out.X.dtype == np.float32
    assert out.obs_names.is_unique
    np.testing.assert_array_equal(get.field(out)(out.obsm["spatial"]).astype(np.float32), out.X)
    query = out.uns["neurtv_query"]
    assert query["support_radius"] == pytest.approx(1.05 * PITCH)
    assert query["spacing"] == pytest.approx(PITCH / 2)
    assert query["target_sum"] == np.median(dense(done.X).sum(1))
    assert query["log_link"] == 1


def test_superres_copies_the_picture_and_draws_smaller_spots(done):
    out = tl.neurtv_superres(done, factor=4)
    old, new = done.uns["spatial"]["synthetic"], out.uns["spatial"]["synthetic"]
    assert new["scalefactors"]["spot_diameter_fullres"] == pytest.approx(0.55 * PITCH / 4)
    assert old["scalefactors"]["spot_diameter_fullres"] == pytest.approx(0.55 * PITCH)
    assert new["scalefactors"]["tissue_hires_scalef"] == old["scalefactors"]["tissue_hires_scalef"]
    for name, image in old["images"].items():
        np.testing.assert_array_equal(new["images"][name], image)
        assert not np.shares_memory(new["images"][name], image)
    for path, value in leaves(dict(out.uns["neurtv"])):
        if isinstance(value, np.ndarray):
            assert not np.shares_memory(value, dict(leaves(done.uns["neurtv"]))[path]), path


def test_superres_keeps_the_columns_of_var(done):
    out = tl.neurtv_superres(done, genes=SOME)
    assert list(out.var_names) == SOME
    pd.testing.assert_frame_equal(out.var, done.var.loc[SOME])
    assert out.var["pattern"].dtype == done.var["pattern"].dtype == "category"
    np.testing.assert_array_equal(out.X, tl.neurtv_superres(done)[:, SOME].X)


def test_superres_of_one_gene_may_name_it_alone(done):
    np.testing.assert_array_equal(tl.neurtv_superres(done, genes=SOME[0]).X, tl.neurtv_superres(done, genes=SOME[:1]).X)


def test_superres_takes_a_spacing_a_lattice_and_a_radius(done):
    out = tl.neurtv_superres(done, spacing=50.0, lattice="square", support_radius=60.0)
    near = cKDTree(out.obsm["spatial"]).query(out.obsm["spatial"], 2)[0][:, 1]
    np.testing.assert_allclose(near, 50)
    columns = np.unique(out.obsm["spatial"][:, 0])
    np.testing.assert_allclose(np.diff(columns), 50)  # along the axes
    assert 55 < out.obs["distance_to_spot"].max() <= 60
    halved = (tl.neurtv_superres(done, **half).obsm["spatial"] for half in ({"spacing": PITCH / 2}, {"factor": 2}))
    np.testing.assert_allclose(*halved)


def test_superres_leaves_its_input_alone(done):
    adata = fitted()
    tl.neurtv_superres(adata)
    assert_same(adata, done)


def test_superres_fits_first_if_nothing_is_stored(monkeypatch, done):
    calls, module, adata = [], sys.modules["neurst.tl._neurtv"], section()

    def quick(adata, *, key_added, progress):
        calls.append(key_added)
        tl.neurtv_fit(adata, key_added=key_added, **QUICK)

    monkeypatch.setattr(module, "neurtv_fit", quick)
    first = tl.neurtv_superres(adata, progress=False)
    assert calls == ["neurtv"]
    assert_same(adata, done)
    again = tl.neurtv_superres(adata)
    assert calls == ["neurtv"]
    np.testing.assert_array_equal(first.X, again.X)


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
    assert list(out.var_names) == list(done.var_names)


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
    inside = tl.neurtv_query(done, points[:2], outside="raise")
    np.testing.assert_array_equal(inside.X, out.X[:2])


def test_a_query_does_not_depend_on_how_it_is_divided(done, monkeypatch):
    points = np.random.default_rng(0).uniform(3500, 5000, (101, 2))
    whole = tl.neurtv_query(done, points, outside="extrapolate").X
    parts = [tl.neurtv_query(done, p, outside="extrapolate").X for p in np.array_split(points, 7)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5)
    monkeypatch.setattr(expression, "CHUNK", 10)
    np.testing.assert_allclose(tl.neurtv_query(done, points, outside="extrapolate").X, whole, rtol=1e-5)


def test_a_query_needs_the_field_only(done):
    points = done.obsm["spatial"][:9] + 3.0
    bare = AnnData(obs=pd.DataFrame(index=["a"]), uns={"neurtv": done.uns["neurtv"]})
    np.testing.assert_array_equal(tl.neurtv_query(bare, points).X, tl.neurtv_query(done, points).X)
    part = done[:12, SOME].copy()
    np.testing.assert_array_equal(tl.neurtv_query(part, points, genes=SOME).X, tl.neurtv_query(done, points)[:, SOME].X)


MILLION = """
    import resource, sys
    import anndata, numpy as np, neurst
    adata = anndata.read_h5ad(sys.argv[1])
    spots = adata.obsm["spatial"]
    points = np.random.default_rng(0).uniform(spots.min(0), spots.max(0), (1_000_000, 2))
    out = neurst.tl.neurtv_query(adata, points, genes=sys.argv[2:], outside="extrapolate")
    assert out.shape == (1_000_000, 3)
    assert np.isfinite(out.X).all()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_million_points_stay_below_two_gigabytes(tmp_path):
    fitted(network=Siren(width=32, depth=2), steps=2).write_h5ad(tmp_path / "section.h5ad")
    peak = int(run(MILLION, tmp_path / "section.h5ad", *SOME))  # KiB on Linux, bytes on macOS
    assert peak / (1 if sys.platform == "darwin" else 1 / 1024) < 2e9


# ---- neurtv_gradient


def test_gradient_layers_are_the_derivatives_of_the_field(done):
    adata, field = fitted(), get.field(done)
    assert tl.neurtv_gradient(adata) is None
    gradient = field.gradient(adata.obsm["spatial"])
    for axis, name in enumerate(("neurtv_dx", "neurtv_dy")):
        assert adata.layers[name].dtype == np.float32
        np.testing.assert_array_equal(adata.layers[name], gradient[:, :, axis].astype(np.float32))
    np.testing.assert_allclose(adata.var["neurtv_gradient"], np.linalg.norm(gradient, axis=2).mean(0), rtol=1e-10)
    np.testing.assert_allclose(adata.obs["neurtv_edge"], field.edge(adata.obsm["spatial"]), rtol=1e-10)
    step = np.array([PITCH * 1e-4, 0])
    slope = (field(adata.obsm["spatial"] + step) - field(adata.obsm["spatial"] - step)) / (2 * step[0])
    np.testing.assert_allclose(adata.layers["neurtv_dx"], slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())
    new = {"layers": ["neurtv_dx", "neurtv_dy"], "var": ["neurtv_gradient"], "obs": ["neurtv_edge"]}
    for part, names in new.items():
        for name in names:
            del getattr(adata, part)[name]
    assert_same(adata, done)


def test_gradient_of_some_genes_leaves_the_others_unmarked(done):
    adata, whole = fitted(), fitted()
    tl.neurtv_gradient(adata, genes=SOME)
    tl.neurtv_gradient(whole)
    asked = adata.var_names.isin(SOME)
    for name in ("neurtv_dx", "neurtv_dy"):
        np.testing.assert_allclose(adata.layers[name][:, asked], whole.layers[name][:, asked], rtol=1e-5)
        assert np.isnan(adata.layers[name][:, ~asked]).all()
    np.testing.assert_array_equal(adata.var["neurtv_gradient"].notna(), asked)
    np.testing.assert_allclose(adata.obs["neurtv_edge"], whole.obs["neurtv_edge"])  # of all fitted genes


@pytest.mark.parametrize("outside", ["nan", "extrapolate"])
def test_the_gradient_of_a_query_is_masked_as_its_values_are(done, outside):
    coords = done.obsm["spatial"][:9].copy()
    coords[4] -= 1e4
    read = tl.neurtv_query(done, coords, outside=outside)
    tl.neurtv_gradient(read)
    known = np.isfinite(read.X).all(1)
    assert known.tolist() == [outside == "extrapolate" or i != 4 for i in range(9)]
    np.testing.assert_array_equal(np.isfinite(read.layers["neurtv_dx"]).all(1), known)
    np.testing.assert_array_equal(np.isfinite(read.obs["neurtv_edge"]), known)
    assert np.isfinite(read.var["neurtv_gradient"]).all()


def test_gradient_of_a_dense_section_is_that_of_its_field(done):
    out = tl.neurtv_superres(done, genes=SOME)
    tl.neurtv_gradient(out)
    gradient = get.field(done).select(SOME).gradient(out.obsm["spatial"])
    np.testing.assert_allclose(out.layers["neurtv_dy"], gradient[:, :, 1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.obs["neurtv_edge"], get.field(done).edge(out.obsm["spatial"]))


# ---- coordinates in space


def test_a_stack_of_positions_in_space_is_served_throughout():
    adata = stack()
    tl.neurtv_fit(adata, **(QUICK | {"steps": 100, "lam": 30}))
    tl.neurtv_gradient(adata)
    assert adata.layers["neurtv_dz"].shape == adata.shape
    assert (adata.layers["neurtv_dz"][:, 0] > 0).mean() > 0.9  # the gene that is brighter along z
    gradient = get.field(adata).gradient(adata.obsm["spatial"])
    np.testing.assert_array_equal(adata.layers["neurtv_dz"], gradient[:, :, 2].astype(np.float32))
    out = tl.neurtv_superres(adata, factor=1)
    assert out.obsm["spatial"].shape == (out.n_obs, 3)
    steps = (out.obsm["spatial"] - out.obsm["spatial"][0]) / out.uns["neurtv_query"]["spacing"]
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)  # cubic
    pitch = np.median(cKDTree(adata.obsm["spatial"]).query(adata.obsm["spatial"], 2)[0][:, 1])
    assert out.uns["neurtv_query"]["spacing"] == pytest.approx(pitch)
    tl.neurtv_gradient(out)
    assert np.isfinite(out.layers["neurtv_dz"]).all()
    point = adata.obsm["spatial"][:1]
    np.testing.assert_allclose(tl.neurtv_query(adata, point).X, adata.layers["neurtv"][:1], rtol=1e-5)
