import dataclasses

import numpy as np
import pytest
import torch
from heldout import (
    CONTAINERS,
    EMPTY,
    FLAT,
    NETWORKS,
    G,
    N,
    counted,
    each_kind,
    known,
    log_rate,
    normalised,
    small_config,
    small_spec,
    stored_as,
)
from scipy import sparse

from neurst.core.nets import Cosine, Siren
from neurst.core.penalty import HessianTV, IsotropicTV
from neurst.core.tuning import LineSearch, parabola_peak
from neurst.spatial import member as member_module
from neurst.spatial.evaluate.scores import deviance_explained, deviance_explained_per_gene
from neurst.spatial.evaluate.splits import split
from neurst.spatial.field import ExpressionField
from neurst.spatial.fit import fit_expression, fit_tuned
from neurst.spatial.geometry import disc_quadrature
from neurst.spatial.member import fit_member, start_directions
from neurst.spatial.observation import Counts, IdentityLink, LogLink, Normalised, Observation
from neurst.spatial.priors import POSITION_PENALTIES
from neurst.spatial.spec import ExpressionSpec, specify
from neurst.spatial.tune import Tuning, average_weights, hold_out, tune

FILLED = np.delete(np.arange(G), EMPTY)


def fit(data, *, target_sum=None, on_progress=None, **options):
    return fit_expression(data, small_spec(**options), target_sum=target_sum, on_progress=on_progress)


def rmse(a, b):
    return np.sqrt(np.mean((a - b) ** 2))


def log_expected(fitted, coords):
    """Log expected expression of the genes that have any, in the order of their names."""
    return np.log(fitted.field.select([f"g{i}" for i in FILLED])(coords))


# ---- what held-out spots decide


@pytest.mark.parametrize(("footprint", "folds"), [(None, 1), (8.0, 1), (None, 3)])
def test_the_score_is_the_deviance_that_a_short_fit_to_the_other_spots_explains(footprint, folds):
    data = dataclasses.replace(counted(), footprint=footprint)
    numbers = {"steps": 40, "learning_rate": 2e-2}  # of a trial
    config = small_config(trial_learning_rate=numbers["learning_rate"], most_folds=folds)
    spec, as_trial = small_spec(search=LineSearch(steps=numbers["steps"]), config=config), small_spec(**numbers)
    offsets, expected = np.zeros((1, 2)) if footprint is None else disc_quadrature(footprint, 2), []
    for k in range(folds):
        some = known(data)
        parts = split(some.coords, "mixed", random_state=(0, k) if k else 0, fraction=0.2)
        train, test = (some.take(part) for part in parts)
        directions = start_directions(train, spec)
        member = fit_member(train, as_trial, IsotropicTV(), NETWORKS["siren"], 30.0, directions, data.box)
        rate = np.mean([member.field(test.coords + at) for at in offsets], axis=0)
        expected.append((test.values, test.observation.size, rate, train.mean_rate()))
    found = tune(data, spec)
    score, gene_scores = (
        np.mean([f(*each) for each in expected], axis=0) for f in (deviance_explained, deviance_explained_per_gene)
    )
    assert found.score == pytest.approx(score, rel=1e-5)
    np.testing.assert_allclose(found.gene_scores[FILLED], gene_scores, atol=1e-6)
    assert found.gene_scores[EMPTY] == 0
    assert found.search["score"] == pytest.approx([found.score])
    assert found.score > 0.1


@pytest.mark.parametrize(("n", "folds"), [(N, 3), (1001, 2), (1501, 1), (4, 3)])
def test_each_fold_holds_out_other_spots_and_all_have_the_same_genes(n, folds):
    data, spec = known(counted(n)), small_spec(config=small_config(most_folds=3, trial_genes=5))
    found = hold_out(data, spec)
    assert len(found) == folds
    for fold in found:
        assert min(len(fold.train.coords), len(fold.test.coords)) >= 1
        assert len(fold.train.coords) + len(fold.test.coords) == n
        np.testing.assert_array_equal(fold.train.genes, found[0].train.genes)
        np.testing.assert_array_equal(fold.test.genes[fold.few], fold.few_test.genes)
        np.testing.assert_array_equal(fold.few_train.genes, fold.few_test.genes)
        assert len(fold.few) == min(5, len(fold.train.genes))
        assert len(fold.train.informative_genes()) == len(fold.train.genes)
    if n > 4:
        held_out = [frozenset(map(tuple, fold.test.coords)) for fold in found]
        assert len(set(held_out)) == folds


@pytest.mark.filterwarnings("ignore:the search for `lam` ended")
@each_kind
def test_each_penalty_has_a_strength_of_its_own_and_a_share_of_the_average(make):
    data = make()
    config = small_config(weight_prior=0.0, least_weight=0.0)
    spec = small_spec(
        lam=None, steps=20, penalty=("isotropic", "hessian", "gaussian_process", "constant"), config=config
    )
    found = tune(data, spec)
    assert found.lam.shape == found.weights.shape == (3,)
    assert found.weights.sum() + found.constant == pytest.approx(1)
    assert set(found.search["penalty"]) == {0, 1, 2}
    for k, candidate in enumerate(spec.candidates()):
        lam, score = (found.search[name][found.search["penalty"] == k] for name in ("lam", "score"))
        search = spec.search_of(candidate)
        assert 2 <= len(lam) <= search.max_steps + 2
        np.testing.assert_allclose(lam[1:] / lam[:-1], search.ratio)
        factor = data.observation.refit_factor if candidate.network is not None else 1
        assert found.lam[k] == factor * parabola_peak(list(lam), list(score))
        # the average is not below the best of those it is made of, but for what a step of the weights rounds
        assert found.score > score.max() - 2e-3


def test_a_given_strength_is_that_of_the_networks_and_not_of_a_gaussian_process():
    found = tune(counted(), small_spec(steps=5, penalty=("isotropic", "gaussian_process")))
    assert found.lam[0] == 30.0
    assert 0.01 <= found.lam[1] <= 100  # in units of the marginal likelihood
    assert [(found.search["penalty"] == k).sum() for k in (0, 1)] == [1, pytest.approx(4, abs=2)]


@pytest.mark.filterwarnings("ignore:the search for `lam` ended")
def test_a_fit_is_tuning_and_then_a_fit_as_tuned_and_both_repeat_themselves():
    spec = small_spec(lam=None, steps=15, penalty=("isotropic", "hessian", "gaussian_process", "constant"), members=2)
    data, states = counted(), (torch.random.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    whole, tuning = fit_expression(data, spec), tune(data, spec)
    for name in ("lam", "weights", "score", "gene_scores"):
        np.testing.assert_array_equal(getattr(whole.tuning, name), getattr(tuning, name))
    tuned = fit_tuned(data, spec, tuning)
    assert tuned.tuning is tuning
    for read in ("__call__", "std"):
        a, b = (getattr(each.field, read)(data.coords) for each in (tuned, whole))
        np.testing.assert_array_equal(a, b)
    for name, values in whole.history.items():
        np.testing.assert_array_equal(tuned.history[name], values)
    assert torch.equal(torch.random.get_rng_state(), states[0])  # the global random states are left alone
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


def test_fits_at_the_same_time_give_what_fits_one_after_the_other_give(monkeypatch):
    options = {"penalty": ("isotropic", "hessian", "gaussian_process"), "members": 3, "steps": 10}
    together = fit(counted(), **options)
    assert small_spec(**options).together
    monkeypatch.setattr(ExpressionSpec, "together", False)
    alone = fit(counted(), **options)
    np.testing.assert_allclose(alone.field(counted().coords), together.field(counted().coords), rtol=1e-5)
    np.testing.assert_allclose(alone.tuning.weights, together.tuning.weights, atol=1e-5)


@pytest.mark.parametrize(("lam", "start", "trials"), [(30.0, 1.0, (1, 1)), (None, 1e-3, (2, 5))])
@pytest.mark.filterwarnings("ignore:the search for `lam` ended")
def test_the_steps_are_counted_by_stage_and_no_more_than_planned(lam, start, trials):
    seen, search = [], LineSearch(start, 30.0, 3, steps=4)
    config = small_config(most_folds=2)
    options = {"lam": lam, "search": search, "steps": 3, "penalty": ("isotropic", "tgv"), "members": 2}
    fitted = fit(counted(), on_progress=lambda *now: seen.append(now), config=config, **options)
    tried = len(fitted.tuning.search["lam"])
    assert 2 * trials[0] <= tried <= 2 * trials[1]
    done, planned, stages = zip(*seen, strict=True)
    assert done == tuple(range(1, 2 * 4 * tried + 2 * 3 + 1))  # in two folds
    assert set(planned) == {small_spec(config=config, **options).planned_steps(N)}
    assert done[-1] <= planned[0]
    tuning = "choosing lam" if lam is None else "held-out score"
    assert list(stages) == [tuning] * 2 * 4 * tried + ["fitting 2 members"] * 2 * 3


def test_trials_may_look_at_fewer_genes_and_all_are_scored():
    few, whole = (tune(counted(), small_spec(config=small_config(trial_genes=n))) for n in (5, 99))
    assert few.gene_scores.shape == few.dispersion.shape == (G,)  # others get loadings on the same field
    assert (few.gene_scores[FILLED] != 0).all()
    assert (few.gene_scores[FILLED] != whole.gene_scores[FILLED]).all()
    np.testing.assert_allclose(few.gene_scores[[0, 1, 2]], whole.gene_scores[[0, 1, 2]], atol=0.1)


def test_so_many_held_out_values_are_scored_and_no_more():
    data, some = counted(), small_config(scored_values=20 * 12)
    few, whole = tune(data, small_spec(config=some)), tune(data, small_spec())
    np.testing.assert_array_equal(few.search["score"], whole.search["score"])  # the choice sees all of them
    assert few.score != whole.score
    assert few.score == pytest.approx(whole.score, abs=0.15)


# ---- the weights of an average


def even(n):
    return np.full(n, 1 / n)


@each_kind
@pytest.mark.parametrize("mixture", [[], [0.35], [0.0], [0.2, 0.5], [1.0, 0.0]], ids=str)
def test_the_weights_of_an_average_are_those_that_made_the_values(make, mixture):
    test, rng = known(make()), np.random.default_rng(1)
    expected, log = np.array([*mixture, 1 - sum(mixture)]), make is counted
    at_rest = test.observation.intercept(test.mean_rate())
    etas = [at_rest + 0.3 * rng.standard_normal(test.values.shape) for _ in expected]
    values = sum(w * eta for w, eta in zip(expected, etas, strict=True))
    if log:
        test = dataclasses.replace(test, observation=Counts(np.full(N, 1e4)))
        values = np.round(1e4 * np.exp(values))
    for container in CONTAINERS.values():
        whole = stored_as(container, dataclasses.replace(test, values=values.astype(np.float32)))
        halves = np.arange(100), np.arange(100, N)  # of two folds
        divided = [whole.take(part) for part in halves], [[eta[part] for eta in etas] for part in halves]
        for tests, predicted in (([whole], [etas]), divided):
            found = average_weights(predicted, tests, even(len(etas)), strength=0.0)
            np.testing.assert_allclose(found, expected, atol=0.03)
            assert found.sum() == pytest.approx(1)
            assert (found >= 0).all()


def test_the_better_of_two_predictors_takes_the_average_and_on_noise_the_constant_does():
    test, rng = known(counted(2001)), np.random.default_rng(1)
    truth = np.log(0.03) + log_rate(test.coords)[:, FILLED]
    constant = np.broadcast_to(test.observation.intercept(test.mean_rate()), truth.shape)
    wrong = constant + 0.5 * rng.standard_normal(truth.shape)
    found = average_weights([[wrong, truth, constant]], [test], np.array([0.5, 0.5, 0.0]))
    assert found[1] > 0.97
    assert average_weights([[wrong, constant]], [test], np.array([1.0, 0.0]))[1] > 0.97  # nothing but noise is known


@each_kind
def test_the_weights_are_drawn_towards_a_target_the_more_the_stronger(make):
    test, rng, target = known(make()), np.random.default_rng(2), np.array([0.7, 0.2, 0.1])
    etas = [
        test.observation.intercept(test.mean_rate()) + s * rng.standard_normal(test.values.shape) for s in (0.4, 0.1, 0)
    ]
    away = [
        np.linalg.norm(average_weights([etas], [test], target, strength=s) - target) for s in (0, 10, 1e3, 1e5, 1e12)
    ]
    assert (np.diff(away) <= 1e-3).all()
    assert away[0] > 0.5
    assert away[-1] < 1e-6


def noise(n=N):
    """Counts that do not depend on the position."""
    data = counted(n)
    values = np.random.default_rng(7).permutation(data.values)
    rates = values.sum(0) / data.observation.size.sum()
    counts = np.random.default_rng(8).poisson(data.observation.size[:, None] * rates)
    return dataclasses.replace(data, values=counts.astype(np.float32))


@pytest.mark.filterwarnings("ignore:the search for `lam` ended")
def test_nothing_is_explained_on_a_section_whose_positions_were_shuffled():
    data = counted(801)
    order = np.random.default_rng(3).permutation(801)
    shuffled = dataclasses.replace(data, coords=data.coords[order])
    penalty, config = ("nuclear", "gaussian_process", "constant"), small_config(most_folds=3)
    found, whole = (
        fit(each, penalty=penalty, lam=None, steps=40, config=config, search=LineSearch(30.0, 4.0, 2))
        for each in (shuffled, data)
    )
    assert -0.01 <= found.tuning.score <= 0.01 < 0.2 < whole.tuning.score
    assert np.log(found.field(data.coords)[:, FILLED]).std(0).max() < 0.2  # nearly the same everywhere


def test_a_field_is_left_where_the_constant_explains_most():
    config = small_config(weight_prior=0.0, trial_learning_rate=2e-2)  # overfits
    found = fit(noise(), penalty=("isotropic", "constant"), lam=1e-3, steps=300, config=config)
    assert 0 < found.tuning.weights[0] < 0.1
    assert found.tuning.constant == 1 - found.tuning.weights[0]
    rate = np.log(np.median(counted().observation.size) * noise().mean_rate()[FILLED])
    np.testing.assert_allclose(log_expected(found, counted().coords), np.tile(rate, (N, 1)), atol=0.5)


# ---- genes with little to fit


@each_kind
def test_genes_without_training_values_score_nothing_but_are_fitted(make):
    data = make()
    train, test = split(data.coords, "mixed", random_state=0, fraction=0.2)
    values = data.values.copy()
    values[:, 2] = 0
    values[test[:3], 2] = 4  # seen on held-out spots only
    fitted = fit(dataclasses.replace(data, values=values), steps=10)
    assert fitted.tuning.gene_scores[2] == 0
    assert np.isfinite(fitted.tuning.score)
    assert fitted.field(data.coords)[:, 2].any()


@each_kind
@pytest.mark.parametrize("lam", [30.0, None])
def test_a_gene_seen_on_held_out_spots_only_can_be_fitted_on_its_own(make, lam):
    data = make()
    values = np.zeros((N, 1), dtype=np.float32)
    values[split(data.coords, "mixed", random_state=0, fraction=0.2)[1][:2]] = 1
    alone = dataclasses.replace(data, values=values, genes=data.genes[:1])
    fitted = fit(alone, lam=lam, steps=5, penalty=("isotropic", "gaussian_process", "constant"))
    tuning = fitted.tuning
    np.testing.assert_array_equal(tuning.lam, [lam or small_spec().search.start, 1.0])
    np.testing.assert_array_equal(tuning.weights, [1.0, 0.0])  # of the network alone
    assert tuning.score == tuning.gene_scores[0] == tuning.search["score"][0] == 0
    assert np.isfinite(fitted.field(data.coords)).all()


def test_genes_with_nothing_to_fit_are_at_their_mean_everywhere():
    counts, values = fit(counted(), steps=5), fit(normalised(), steps=5)
    assert np.isneginf(counts.field.intercept[EMPTY])
    assert np.isfinite(counts.field.intercept[FILLED]).all()
    assert not counts.field(counted().coords)[:, EMPTY].any()
    np.testing.assert_allclose(values.field(counted().coords)[:, EMPTY], 5.1, rtol=1e-6)
    assert not values.field.jacobian(counted().coords)[:, EMPTY].any()


@each_kind
def test_genes_none_of_which_varies_are_refused(make):
    data = make().take_genes(np.array([EMPTY]))
    for refused in (tune, fit_expression):
        with pytest.raises(ValueError, match="none of the 1 genes varies between spots, so there is no field to fit"):
            refused(data, small_spec())


# ---- laws of a fit


@each_kind
def test_a_fit_finds_the_patterns(make):
    data = make()
    fitted = fit(data, steps=200)
    assert fitted.tuning.score > (0.35 if make is counted else 0.3)
    assert fitted.tuning.gene_scores.shape == (G,)
    assert fitted.tuning.gene_scores[EMPTY] == 0
    assert fitted.tuning.gene_scores[FLAT] < 0.02 < fitted.tuning.gene_scores[:3].min()
    np.testing.assert_array_equal(fitted.field.genes, data.genes)
    if make is counted:
        assert fitted.field.link == LogLink(np.median(data.observation.size))
        assert np.corrcoef(np.log(fitted.field(data.coords)[:, 0]), log_rate(data.coords)[:, 0])[0, 1] > 0.9
    else:
        assert fitted.field.link == IdentityLink()
        assert fitted.tuning.dispersion is None


@each_kind
@pytest.mark.parametrize("footprint", [None, 8.0])
def test_expected_totals_over_the_spots_are_the_observed_ones(make, footprint):
    data = known(dataclasses.replace(make(), footprint=footprint))
    field = fit(data, config=small_config(most_bumps=0), target_sum=1.0).field
    offsets = [0.0] if footprint is None else disc_quadrature(footprint, 2)
    mean = np.mean([field(data.coords + at) for at in offsets], axis=0)
    left = data.observation.balance(data.mean_rate(), data.observation.intercept(mean))
    np.testing.assert_allclose(left, 0, atol=1e-5)


def test_expected_counts_are_those_of_a_spot_with_the_target_sum():
    data = counted()
    a, b = (fit(data, target_sum=target).field(data.coords) for target in (100.0, 250.0))
    np.testing.assert_allclose(b, 2.5 * a, rtol=1e-12)
    np.testing.assert_allclose((data.observation.size[:, None] * a / 100).sum(0), data.values.sum(0), rtol=0.1)


@pytest.fixture(scope="module")
def seeds():
    """A fit, and how far another one is away that differs in its seed only."""
    a, b = (log_expected(fit(counted(), steps=150, random_state=seed), counted().coords) for seed in (0, 1))
    return a, rmse(a, b)


@pytest.mark.parametrize("order", ["seed", "genes", "spots"])
def test_seed_order_of_genes_and_order_of_spots_matter_slightly(seeds, order):
    one, noise = seeds
    assert 0 < noise < 0.3 * one.std(0)[:3].mean()
    rng, data = np.random.default_rng(0), counted()
    if order != "seed":
        data = data.take_genes(rng.permutation(G)) if order == "genes" else data.take(rng.permutation(N))
        again = fit(data, steps=150)
        np.testing.assert_array_equal(again.field.genes, data.genes)
        same = log_expected(again, counted().coords)
        assert rmse(same, one) <= 1.5 * noise
        assert np.corrcoef(same.ravel(), one.ravel())[0, 1] > 0.99


UNITS = [("siren", counted), ("spline", normalised)]


@pytest.mark.parametrize(("network", "make"), UNITS)
def test_units_of_the_coordinates_do_not_matter(network, make):
    data = make()
    moved = dataclasses.replace(data, coords=137 * data.coords + [-3000.0, 500.0])
    here, there = (fit(part, network=NETWORKS[network], steps=20) for part in (data, moved))
    for read, unit in (("__call__", 1), ("jacobian", 137), ("hessian", 137**2), ("boundary", 137)):
        a, b = getattr(here.field, read)(data.coords), unit * getattr(there.field, read)(moved.coords)
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * np.abs(a).max(), err_msg=read)
    assert there.tuning.score == pytest.approx(here.tuning.score, abs=1e-3)


GENE_UNITS = {  # powers of two: exact in floating point
    "of each gene": 2.0 ** np.arange(-6, 7),
    "of one gene far from the others": np.where(np.arange(G) == 0, 2.0**20, 1.0),
}


@pytest.mark.parametrize("unit", GENE_UNITS.values(), ids=GENE_UNITS)
def test_units_of_normalised_values_do_not_matter(unit):
    data = normalised()
    other = dataclasses.replace(data, values=(data.values * unit).astype(np.float32))
    here, there = (fit(part, members=2, steps=30, penalty=("isotropic", "gaussian_process")) for part in (data, other))
    for read, rtol in (("__call__", 1e-3), ("std", 1e-2)):
        a, b = getattr(here.field, read)(data.coords), getattr(there.field, read)(data.coords) / unit
        np.testing.assert_allclose(b, a, rtol=rtol, atol=1e-3 * np.abs(a).max())
    np.testing.assert_allclose(there.tuning.gene_scores, here.tuning.gene_scores, atol=1e-3)


@pytest.mark.parametrize(("make", "batch"), [(counted, 64), (normalised, 0)], ids=["batches", "all spots"])
def test_the_container_and_type_of_the_values_do_not_matter(make, batch):
    data, config = make(), small_config(dense_values=9)
    dense, *others = (fit(stored_as(c, data), batch_points=batch, steps=20, config=config) for c in CONTAINERS.values())
    others.append(fit(stored_as(sparse.csr_array, data), batch_points=batch, steps=20))  # made dense for the fit
    if make is counted:
        others.append(
            fit(stored_as(lambda v: sparse.csr_array(v.astype(np.uint16)), data), batch_points=batch, steps=20)
        )
    for other in others:
        np.testing.assert_allclose(other.field(data.coords), dense.field(data.coords), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(other.tuning.gene_scores, dense.tuning.gene_scores, atol=1e-4)


def test_every_penalty_for_positions_can_be_fitted():
    n = len(POSITION_PENALTIES) - 1  # the constant is none
    config = small_config(least_weight=0.01)
    spec = small_spec(penalty=POSITION_PENALTIES, members=n - 1, steps=6, refresh_every=2, config=config)
    tuning = Tuning(np.full(n, 30.0), np.full(n, 0.9 / n), {}, 0.0, np.zeros(G), np.full(G, 0.1))
    fitted = fit_tuned(counted(), spec, tuning)
    for read in (fitted.field, fitted.field.jacobian, fitted.field.std):
        assert np.isfinite(read(counted().coords)).all()
    assert set(fitted.history["member"]) == set(range(n - 1))  # a Gaussian process has no steps
    assert (fitted.history["penalty"].reshape(n - 1, -1)[:, -1] > 0).all()
    assert fitted.field.net.widths[:n] == (4,) * n  # the rank, also for a network with further outputs
    assert [type(network) for network in fitted.field.networks[:n]] == [Siren] * (n - 1) + [Cosine]


def test_a_penalty_that_reads_pictures_is_refused_in_three_dimensions():
    data = counted()
    coords = np.column_stack([data.coords, np.random.default_rng(0).uniform(0, 40, N)])
    with pytest.raises(ValueError, match="`penalty='learned_tgv'` .* needs 2 coordinates, and there are 3: use 'tgv'"):
        fit(dataclasses.replace(data, coords=coords), penalty="learned_tgv")


@pytest.mark.parametrize(("n", "rank"), [(4, 20), (6, 3), (40, 20)])
def test_few_spots_or_genes_lower_the_rank(n, rank):
    data = counted().take(np.arange(n))
    fitted = fit(data, rank=rank, steps=5)
    assert fitted.field.net.widths[:1] == (min(rank, n - 1, len(data.informative_genes())),)
    assert np.isfinite(fitted.field(data.coords)).all()


def test_genes_whose_counts_are_shuffled_over_spots_are_not_explained():
    data, few = counted(1001), 8
    values, shuffled = data.values.copy(), np.array([1, 2, 6, 10])
    for g in shuffled:
        values[:, g] = np.random.default_rng(g).permutation(values[:, g])
    data = dataclasses.replace(data, values=values)
    fitted_genes = data.informative_genes()[known(data).most_variable(few)]
    inside = np.isin(shuffled, fitted_genes)
    assert inside.any()
    assert not inside.all()  # some of them get loadings on the field of others
    config = small_config(latent_genes=few, trial_genes=few)
    scores = fit(data, steps=150, lam=60.0, config=config).tuning.gene_scores
    assert np.abs(scores[shuffled]).max() <= 0.03
    assert scores[[0, 3, 4, 9, 11]].min() > 0.1


BEYOND = {
    "over-dispersed counts": stored_as(sparse.csr_array, counted(noise="negative_binomial")),
    "normalised": stored_as(sparse.csr_array, normalised()),
}


@pytest.mark.parametrize("data", BEYOND.values(), ids=BEYOND)
def test_genes_beyond_those_fitted_do_as_well_as_in_a_joint_fit(data):
    configs = (small_config(latent_genes=n, trial_genes=n) for n in (7, 99))
    few, whole = (fit(data, steps=80, config=config) for config in configs)
    beyond = np.setdiff1d(data.informative_genes(), data.informative_genes()[known(data).most_variable(7)])
    assert len(beyond) == 5
    np.testing.assert_allclose(few.tuning.gene_scores[beyond], whole.tuning.gene_scores[beyond], atol=0.04)
    assert whole.tuning.gene_scores[beyond].max() > 0.1  # there is something to explain
    a, b = (f.field(data.coords)[:, beyond[beyond != FLAT]] for f in (few, whole))  # what is flat has no shape
    for one, other in zip(a.T, b.T, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.95


def test_genes_beyond_those_fitted_are_solved_for_on_the_mean_latents_over_the_footprint():
    data, spec = known(dataclasses.replace(counted(), footprint=8.0)), small_spec(steps=10)
    few, genes = data.take_genes(np.arange(5)), np.arange(5)
    directions = start_directions(few, spec)
    member = fit_member(few, spec, IsotropicTV(), NETWORKS["siren"], 30.0, directions, data.box)
    whole = member.with_all_genes(data, genes)
    z = np.mean([member.field.latent(data.coords + at) for at in disc_quadrature(8.0, 2)], axis=0)
    rest = data.observation.solve_loadings(z, data.values[:, 5:], member.field.likelihood)
    for found, fitted, solved in zip(
        (whole.loadings, whole.intercept), (member.loadings, member.intercept), rest, strict=True
    ):
        np.testing.assert_array_equal(found[:5], fitted)
        np.testing.assert_allclose(found[5:], solved, rtol=1e-5, atol=1e-6)


def test_dispersion_is_that_of_the_held_out_counts_about_the_field():
    data, rng = counted(1501), np.random.default_rng(3)
    phi = np.where(np.arange(G) % 2, 0.8, 0.1)
    mean = 0.1 * data.observation.size[:, None] * np.exp(log_rate(data.coords))
    values = rng.poisson(mean * rng.gamma(1 / phi, phi, mean.shape)).astype(np.float32)
    found = tune(dataclasses.replace(data, values=values), small_spec(steps=150)).dispersion
    np.testing.assert_allclose(np.log(found), np.log(phi), atol=0.9)  # with what the field does not know of the discs


# ---- an average of members


# weights found for two penalties, members -> the penalty of each member, and its weight
TURNS = {
    "in turn, the better first": ([0.3, 0.7], 3, [1, 0, 1], [0.35, 0.3, 0.35]),
    "one member is of the better one and takes the weight of both": ([0.7, 0.3], 1, [0], [1.0]),
    "equal ones in their order": ([0.5, 0.5], 2, [0, 1], [0.5, 0.5]),
    "a small share is taken": ([0.05, 0.95], 2, [1, 0], [0.95, 0.05]),
    "no share is never taken": ([1.0, 0.0], 2, [0, 0], [0.5, 0.5]),
    "the constant keeps its share": ([0.2, 0.4], 3, [1, 0, 1], [0.2, 0.2, 0.2]),
    "one member, and the constant keeps its share": ([0.2, 0.4], 1, [1], [0.6]),
}


@pytest.mark.parametrize(("found", "members", "turns", "weights"), TURNS.values(), ids=TURNS)
def test_members_are_in_turn_of_the_penalties_that_help(found, members, turns, weights, monkeypatch):
    calls, averages = [], []

    def noted(data, spec, penalty, network, lam, *rest, **numbers):
        calls.append((penalty, lam, numbers["random_state"]))
        return fit_member(data, spec, penalty, network, lam, *rest, **numbers)

    def average(cls, genes, box, networks, nets, loadings, intercepts, weights, **rest):
        averages.append(weights)
        return whole.__func__(cls, genes, box, networks, nets, loadings, intercepts, weights, **rest)

    whole = ExpressionField.average
    monkeypatch.setattr(member_module, "fit_member", noted)
    monkeypatch.setattr(ExpressionField, "average", classmethod(average))
    spec = small_spec(steps=3, penalty=("isotropic", "hessian", "constant"), members=members)
    tuning = Tuning(np.array([10.0, 20.0]), np.array(found), {}, 0.0, np.zeros(G), np.full(G, 0.1))
    fit_tuned(counted(), spec, tuning)
    expected = [((IsotropicTV(), HessianTV())[k], (10.0, 20.0)[k], spec.member_seed(m)) for m, k in enumerate(turns)]
    assert sorted(calls, key=lambda call: expected.index(call)) == expected  # at the same time
    np.testing.assert_allclose(averages, [weights])


@pytest.mark.parametrize(
    ("weights", "kinds"), [([0.6, 0.3], [Siren, Cosine]), ([0.6, 0.0], [Siren]), ([0.0, 0.6], [Cosine])]
)
def test_a_gaussian_process_gives_the_spread_also_where_it_has_no_share(weights, kinds):
    spec = small_spec(steps=3, penalty=("isotropic", "gaussian_process", "constant"))
    tuning = Tuning(np.array([10.0, 2.0]), np.array(weights), {}, 0.0, np.zeros(G), np.full(G, 0.1))
    field = fit_tuned(counted(), spec, tuning).field
    assert [type(network) for network in field.networks[: len(kinds)]] == kinds
    sd = np.sqrt(field.predictor_variance(counted().coords))
    assert (sd[:, FILLED] > 0).all()
    assert (sd[:, EMPTY] < 1e-6).all()
    assert not field.std(counted().coords)[:, EMPTY].any()


def test_the_history_tells_the_members_apart():
    history, one = (fit(counted(), steps=25, members=n).history for n in (3, 1))
    np.testing.assert_array_equal(history["member"], np.repeat([0, 1, 2], 4))
    np.testing.assert_array_equal(history["step"], [0, 10, 20, 24] * 3)
    np.testing.assert_array_equal(history["objective"][:4], one["objective"])  # the first has the seed of a single fit
    assert (history["objective"][4:8] != one["objective"]).all()


def test_a_large_section_has_a_spline_as_a_member():
    config = small_config(growth_from=200, space_variant_to=200, spline_steps=20, spline_regularisation=64, lam=30.0)
    spec = specify(N, rank=4, lam=30.0, steps=10, config=config, device="cpu")
    fitted = fit_expression(counted(), spec)
    assert [candidate.name for candidate in spec.candidates()] == ["nuclear", "nuclear_spline", "gaussian_process"]
    assert fitted.tuning.weights.shape == (3,)
    assert np.isfinite(fitted.field.std(counted().coords)).all()
    assert not spec.together


# ---- a third kind of observation


@pytest.mark.filterwarnings("ignore:the search for `lam` ended")
def test_another_kind_of_observation_is_fitted_without_a_change_of_the_package():
    members = {name: part for name, part in vars(Normalised).items() if not name.startswith("__")}
    other = type("Other", (Observation,), members | {"kind": "others", "refit_factor": 1.0})()  # no subclass of the two
    config, penalty = small_config(latent_genes=8, trial_genes=6), ("isotropic", "gaussian_process", "constant")
    options = {"lam": None, "search": LineSearch(2.0, 4.0, 2), "steps": 20, "config": config, "penalty": penalty}
    data = normalised()
    one, two = (fit(dataclasses.replace(data, observation=kind), **options) for kind in (Normalised(), other))
    np.testing.assert_allclose(two.tuning.lam * Normalised.refit_factor, one.tuning.lam)
    np.testing.assert_array_equal(two.tuning.gene_scores, one.tuning.gene_scores)
    assert np.isfinite(two.field.std(data.coords)).all()
