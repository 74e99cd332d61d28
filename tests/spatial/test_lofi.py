import numpy as np
import pytest
from anndata import read_h5ad
from real import needs_data
from scipy import sparse
from sections import SOME, assert_same, dense, section

from neurst import tl
from neurst.core import storage
from neurst.spatial.data import SpotData
from neurst.spatial.evaluate.scores import deviance_explained
from neurst.spatial.evaluate.splits import split
from neurst.spatial.lofi import KIND, LoFiConfig, LoFiSpots
from neurst.spatial.lofi_encoder import spacing
from neurst.spatial.lofi_fit import fit_lofi, learn_encoder
from neurst.spatial.observation import Counts

TRAINED = LoFiConfig(steps=45, n_members=1, width=16, rounds=4)
SMALL = LoFiConfig(steps=20, n_members=1, width=16, rounds=2)


def spots(seed=0, n=400, genes=8, place=1.0):
    """Counts of genes that vary smoothly over a square, at random positions."""
    rng = np.random.default_rng(seed)
    coords = place * rng.random((n, 2))
    x, y = (2 * np.pi * coords / place).T
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x) * np.cos(y), np.cos(x)], 1)
    loadings = np.random.default_rng(9).normal(size=(4, genes))
    size = rng.uniform(20, 60, n)
    counts = rng.poisson(size[:, None] * np.exp(0.7 * waves @ loadings - 2)).astype(np.float32)
    return SpotData(coords, counts, np.array([f"g{i}" for i in range(genes)]), Counts(size))


@pytest.fixture(scope="module")
def model():
    return fit_lofi([spots(0), spots(1)], SMALL, device="cpu")


def score(model, data, hidden):
    rate = model.rates(data, hidden.coords)
    return deviance_explained(hidden.values, hidden.observation.size, rate, data.mean_rate())


def test_hidden_spots_are_predicted_better_than_by_the_mean_also_on_a_section_that_was_not_seen(model):
    data = spots(2)
    train, test = split(data.coords, "mixed")
    other = score(model, data.take(train), data.take(test))
    own = score(fit_lofi([data.take(train)], SMALL, device="cpu"), data.take(train), data.take(test))
    assert other > 0.3
    assert own > 0.3


def test_nothing_is_found_where_position_tells_nothing():
    data = spots(3)
    shuffled = SpotData(np.random.default_rng(5).permutation(data.coords), *(data.values, data.genes, data.observation))
    train, test = split(shuffled.coords)
    fitted = fit_lofi([shuffled.take(train)], SMALL, device="cpu")
    assert abs(score(fitted, shuffled.take(train), shuffled.take(test))) < 0.05


def moved(coords):
    """Another unit, another origin, turned and mirrored."""
    turn = np.array([[np.cos(1.0), np.sin(1.0)], [np.sin(1.0), -np.cos(1.0)]])
    return 350.0 * coords @ turn + [4000.0, -70.0]


def test_units_turns_and_reflections_do_not_matter(model):
    data = spots(2)
    other = SpotData(moved(data.coords), data.values, data.genes, data.observation)
    np.testing.assert_allclose(model.rates(other), model.rates(data), rtol=1e-4)
    np.testing.assert_allclose(
        model.rates(other, moved(data.coords + 0.01)), model.rates(data, data.coords + 0.01), rtol=1e-4
    )
    assert spacing(moved(data.coords)) == pytest.approx(350 * spacing(data.coords))


def lattice(side=20):
    """Counts on a hexagonal lattice, on which many spots are equally far."""
    rows, columns = np.mgrid[:side, :side]
    coords = np.column_stack([(columns + rows % 2 / 2).ravel(), (rows * np.sqrt(3) / 2).ravel()])
    data = spots(4, n=side * side)
    return SpotData(coords, data.values, data.genes, data.observation)


def test_on_a_lattice_neither_the_order_of_the_spots_nor_turns_matter(model):
    data, order = lattice(), np.random.default_rng(0).permutation(400)
    np.testing.assert_allclose(model.rates(data.take(order)), model.rates(data)[order], rtol=1e-4)
    other = SpotData(moved(data.coords), data.values, data.genes, data.observation)
    np.testing.assert_allclose(model.rates(other), model.rates(data), rtol=1e-3)


def test_the_last_step_of_a_training_is_scored_and_training_helps(monkeypatch):
    data = spots(2)
    train, test = split(data.coords, "mixed")
    trained = fit_lofi([data.take(train)], TRAINED, device="cpu")
    monkeypatch.setattr("neurst.spatial.lofi_fit.train", lambda *args, **kwargs: None)
    started = fit_lofi([data.take(train)], TRAINED, device="cpu")
    assert float(trained.members[0].correction[-1].weight.detach().abs().max()) > 1e-3
    assert float(started.members[0].correction[-1].weight.detach().abs().max()) == 0
    values = [score(each, data.take(train), data.take(test)) for each in (trained, started)]
    assert values[0] > values[1]


def test_two_spots_at_one_position_are_no_neighbours_of_themselves():
    rng = np.random.default_rng(0)
    coords, size = rng.random((400, 2)).repeat(2, 0), np.full(800, 100.0)
    counts = rng.poisson(2.0, (800, 30)).astype(np.float32)
    data = SpotData(coords, counts, np.array([f"g{i}" for i in range(30)]), Counts(size))
    assert learn_encoder([data], LoFiConfig()).directions.shape[1] <= 6  # of 20; there is nothing but noise


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_there_are_always_spots_to_train_on_and_to_score(share):
    for seed in range(4):
        few = spots(seed, n=6)
        config = LoFiConfig(steps=3, n_members=1, width=8, rounds=1, held_out=share)
        assert np.isfinite(fit_lofi([few], config, device="cpu", random_state=seed).rates(few)).all()


def test_the_order_of_spots_and_genes_and_the_container_do_not_matter_to_a_prediction(model):
    data, rng = spots(2), np.random.default_rng(0)
    order, genes = rng.permutation(len(data.coords)), rng.permutation(len(data.genes))
    mixed = data.take(order, genes)
    stored = SpotData(mixed.coords, sparse.csr_array(mixed.values), mixed.genes, mixed.observation)
    for other in (mixed, stored):
        np.testing.assert_allclose(model.rates(other), model.rates(data)[order][:, genes], rtol=1e-4)


def test_the_order_of_spots_and_genes_does_not_matter_to_a_training_beyond_its_seed():
    data, rng = spots(2), np.random.default_rng(0)
    order, genes = rng.permutation(len(data.coords)), rng.permutation(len(data.genes))
    ours, theirs = (fit_lofi([d], SMALL, device="cpu").rates(d) for d in (data, data.take(order, genes)))
    seed = fit_lofi([data], SMALL, device="cpu", random_state=1).rates(data)
    noise = np.abs(np.log(seed / ours)).mean()
    assert np.abs(np.log(theirs / ours[order][:, genes])).mean() < 2 * noise + 0.01


def test_predictions_do_not_depend_on_the_points_that_are_predicted_with_them(model, monkeypatch):
    data = spots(2)
    whole = model.rates(data)
    monkeypatch.setattr("neurst.spatial.lofi.QUERIES", 7)
    np.testing.assert_allclose(model.rates(data), whole, rtol=1e-5)


def test_a_spot_is_predicted_without_its_own_counts_unless_asked_for(model):
    data = spots(2)
    changed = data.values.copy()
    changed[0] = changed[0][::-1]
    other = SpotData(data.coords, changed, data.genes, data.observation)
    mean = changed.sum(0) / data.values.sum(0)  # the mean rates of the section, which change with the counts
    alone = model.rates(other)[0] / model.rates(data)[0]
    assert np.abs(np.log(alone / mean)).max() < 0.05
    with_self = model.rates(other, include_self=True)[0] / model.rates(data, include_self=True)[0]
    assert np.abs(np.log(with_self / mean)).max() > 0.05


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_state():
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (fit_lofi([spots(0)], SMALL, device="cpu").rates(spots(1)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert torch.equal(before, torch.get_rng_state())


def test_sections_may_lack_genes_and_genes_beyond_the_most_variable_have_loadings():
    first, second = spots(0), spots(1).take_genes(np.array([0, 2, 3, 5]))
    config = LoFiConfig(steps=5, n_members=1, width=8, rounds=2, most_genes=5)
    fitted = fit_lofi([first, second], config, device="cpu")
    assert len(fitted.encoder.genes) == 5
    assert fitted.rates(first).shape == (400, 8)
    assert fitted.rates(second).shape == (400, 4)
    further = np.isin(fitted.genes, fitted.encoder.genes, invert=True)
    assert (np.abs(fitted.members[0].loadings.detach().numpy()[further]).sum(1) > 0.05).all()


def test_positions_in_three_dimensions_and_duplicated_ones_are_read():
    data, rng = spots(0), np.random.default_rng(0)
    solid = SpotData(np.column_stack([data.coords, 0.1 * rng.random(400)]), data.values, data.genes, data.observation)
    twice = data.take(np.arange(400).repeat(2))
    for each in (solid, twice):
        rates = fit_lofi([each], SMALL, device="cpu").rates(each)
        assert each.observation.score(each.values, rates, each.mean_rate()) > 0.3


def test_a_section_of_a_few_spots_is_no_obstacle(model):
    few = spots(4, n=6)
    assert np.isfinite(model.rates(few)).all()
    assert np.isfinite(fit_lofi([few], SMALL, device="cpu").rates(few, few.coords + 0.01)).all()


def test_a_saved_model_predicts_the_same(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    again = tl.lofi_load(tmp_path / "model.safetensors")
    assert again.config == model.config
    np.testing.assert_array_equal(again.rates(spots(2)), model.rates(spots(2)))


def test_a_file_that_is_not_a_complete_model_is_refused(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        LoFiSpots.load(path)
    storage.save(path, "field", {"format": 1})
    with pytest.raises(ValueError, match="expected 'lofi_spots' of format 1"):
        LoFiSpots.load(path)
    model.save(path)
    _, content = storage.load(path)
    for wrong in ({"members": {}}, {"genes": ["a"]}, {"config": {"rank": 0}}):
        storage.save(path, KIND, content | wrong)
        with pytest.raises(ValueError, match="is damaged"):
            LoFiSpots.load(path)


# ---- AnnData


@pytest.fixture(scope="module")
def trained():
    return tl.lofi_fit(section(), config=SMALL, device="cpu", progress=False)


def test_what_is_written_survives_a_file_and_a_repeated_prediction(trained, tmp_path):
    adata = section()
    tl.lofi_predict(adata, model=trained)
    assert adata.layers["lofi"].dtype == np.float32
    assert np.isfinite(adata.layers["lofi"]).all()
    before = dense(adata.X).mean(0)
    np.testing.assert_allclose(adata.layers["lofi"].mean(0), before, rtol=0.2, atol=0.2)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(again.layers["lofi"], adata.layers["lofi"])
    tl.lofi_predict(again, model=trained)  # replaces its own slots
    np.testing.assert_array_equal(again.layers["lofi"], adata.layers["lofi"])


def test_few_genes_are_stored_as_a_table():
    adata = section(radius=5)
    few = tl.lofi_fit(adata, genes=SOME, config=SMALL, device="cpu", progress=False)
    tl.lofi_predict(adata, model=few)
    assert sorted(adata.obsm["lofi"].columns) == sorted(SOME)
    assert "lofi" not in adata.layers


def test_sections_of_one_anndata_are_those_of_a_list():
    adata = section()
    adata.obs["part"] = np.where(adata.obsm["spatial"][:, 0] < np.median(adata.obsm["spatial"][:, 0]), "left", "right")
    first = adata.obs["part"].iloc[0]
    parts = [adata[adata.obs["part"] == name] for name in (first, {"left": "right", "right": "left"}[first])]
    one = tl.lofi_fit(adata, library_key="part", config=SMALL, device="cpu", progress=False)
    other = tl.lofi_fit(parts, config=SMALL, device="cpu", progress=False)
    np.testing.assert_array_equal(one.encoder.directions, other.encoder.directions)
    np.testing.assert_array_equal(one.members[0].loadings.detach(), other.members[0].loadings.detach())


def test_a_query_says_where_it_read_and_in_which_units(trained):
    adata = section()
    far = adata.obsm["spatial"].max(0) + 1e5
    out = tl.lofi_query(adata, [adata.obsm["spatial"][0] + 5.0, far], model=trained)
    assert out.obs["in_support"].tolist() == [True, False]
    assert out.X.dtype == np.float32
    assert np.isfinite(out.X).all()
    assert out.uns["lofi"]["target_sum"] == pytest.approx(np.median(np.asarray(adata.X.sum(1))))
    assert list(out.var) == list(adata.var)


def test_spots_outside_the_tissue_are_predicted_and_do_not_take_part(trained):
    adata = section()
    adata.obs["in_tissue"] = 1
    adata.obs.loc[adata.obs_names[:5], "in_tissue"] = 0
    tl.lofi_predict(adata, model=trained)
    assert np.isfinite(adata.layers["lofi"]).all()
    other = adata.copy()
    other.X[:5] = other.X[5:10]
    tl.lofi_predict(other, model=trained)
    np.testing.assert_array_equal(other.layers["lofi"], adata.layers["lofi"])


def wrong(adata, **changes):
    for name, value in changes.items():
        setattr(adata, name, value)
    return adata


def normalised():
    return wrong(section(), X=np.log1p(dense(section().X)))


def renamed():
    adata = section()
    adata.var_names = [f"other{i}" for i in range(adata.n_vars)]
    return adata


def of_another_section():
    return tl.lofi_fit([section(), normalised()], config=SMALL)


WRONG = {
    "values of the second section": (lambda m: of_another_section(), ValueError, "section 2 of 2: .*local fields need counts"),
    "an AnnData of predictions": (
        lambda m: tl.lofi_predict(tl.lofi_query(section(), section().obsm["spatial"], model=m), model=m), ValueError, "would overwrite|need counts",
    ),
    "a model of positions in the plane on solid ones": (
        lambda m: m.rates(SpotData(np.ones((4, 3)), np.ones((4, 1)), m.genes[:1], Counts(np.ones(4)))), ValueError, "trained on 2",
    ),
    "a gene that the model does not know": (
        lambda m: m.rates(SpotData(np.ones((4, 2)), np.ones((4, 1)), np.array(["z"]), Counts(np.ones(4)))), ValueError, "does not know, such as 'z'",
    ),
    "no AnnData": (lambda m: tl.lofi_fit([1]), TypeError, "`adatas=.*expected an AnnData"),
    "an empty list": (lambda m: tl.lofi_fit([]), ValueError, "`adatas="),
    "normalised values": (lambda m: tl.lofi_fit(normalised()), ValueError, "local fields need counts"),
    "an unknown layer": (lambda m: tl.lofi_fit(section(), layer="raw"), KeyError, "`layer='raw'` is not in"),
    "an unknown gene": (lambda m: tl.lofi_fit(section(), genes="Layer4"), KeyError, "did you mean"),
    "an unknown column": (lambda m: tl.lofi_fit(section(), library_key="slide"), KeyError, "`library_key='slide'`"),
    "no gene in common": (
        lambda m: tl.lofi_fit([section(), renamed()]), ValueError, "section 2 .* hold none of the 20 genes of section 1",
    ),
    "an array of library sizes": (
        lambda m: tl.lofi_fit(section(), size_factors=np.ones(3)), TypeError, "the name of a column of `obs`",
    ),
    "a config of another kind": (lambda m: tl.lofi_fit(section(), config={"rank": 3}), TypeError, "LoFiConfig"),
    "no rank": (lambda m: LoFiConfig(rank=0), ValueError, "`LoFiConfig.rank=0`: expected a whole number >= 1"),
    "no model": (lambda m: tl.lofi_predict(section(), model="a"), TypeError, "`model='a'`: expected a model"),
    "genes that the model does not know": (lambda m: tl.lofi_predict(renamed(), model=m), ValueError, "genes of the model"),
    "coordinates in three dimensions": (
        lambda m: tl.lofi_query(section(), np.zeros((2, 3)), model=m), ValueError, "`coords` has shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_what_was_found_and_what_to_do(case, trained):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(trained)


def test_what_is_not_from_a_local_field_is_not_overwritten(trained):
    adata = section()
    adata.layers["lofi"] = adata.X.copy()
    before = adata.copy()
    with pytest.raises(ValueError, match="would overwrite"):
        tl.lofi_predict(adata, model=trained)
    assert_same(adata, before)


@needs_data
def test_a_prior_of_other_sections_helps_on_real_tissue():
    from protocol import load

    names = ["Hippo1", "Hippo2", "Hippo3"]
    genes = load("st_mouse_hippocampus_4sections", 100, "Hippo1")[3]
    sections = []
    for name in names:
        coords, counts, size, found = load("st_mouse_hippocampus_4sections", 300, name)
        keep = np.isin(found, genes)
        sections.append(SpotData(coords, counts[:, keep], found[keep].astype(str), Counts(size)))
    train, test = split(sections[0].coords, random_state=0)
    target, hidden = sections[0].take(train), sections[0].take(test)
    config = LoFiConfig(steps=200, n_members=1)
    alone = score(fit_lofi([target], config, device="cpu"), target, hidden)
    helped = score(fit_lofi([target, *sections[1:]], config, device="cpu"), target, hidden)
    assert alone > 0.25
    assert helped > alone
