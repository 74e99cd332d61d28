import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse

from neurst.core.fit import FitConfig
from neurst.core.nets import NETWORKS, Fourier, LowRank, Siren, Spline
from neurst.core.penalty import PENALTIES, as_penalty
from neurst.core.samples import Box
from neurst.core.search import vertex
from neurst.spatial import choice, holdout
from neurst.spatial import model as model_module
from neurst.spatial.choice import LamSearch, average_weights
from neurst.spatial.fitting import fit_expression, planned_steps
from neurst.spatial.model import Model, batch_points
from neurst.spatial.problem import Problem, holds_counts, library_size, moments, residual_directions
from neurst.spatial.tissue import disc_quadrature

N, G = 241, 13
EMPTY = 5  # a gene without counts
CONTAINERS = {"dense": np.asarray, "csr_array": sparse.csr_array, "csr_matrix": sparse.csr_matrix}
each_container = pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
SMALL = {
    "siren": Siren(width=16, depth=2, omega=3.0),
    "fourier": Fourier(width=16, depth=1, n_features=8),
    "lowrank": LowRank(rank=4, width=16),
    "spline": Spline(cells=(2, 4)),
}


def log_rate(coords):  # (N, 2) in 0..40 -> (N, 13)
    """Three patterns, in four genes each, and one flat gene."""
    x, y = coords.T / 40
    patterns = np.stack([np.sin(4 * x) * np.cos(3 * y), np.where(x + y > 1, 0.8, -0.8), np.cos(5 * x + 2 * y)], 1)
    return np.concatenate([patterns, -patterns, 0.5 * patterns, patterns, np.zeros((len(x), 1))], 1)


def counted(n=N):
    """Counts of 13 genes, one of them without any."""
    rng = np.random.default_rng(0)
    coords, size = rng.uniform(0, 40, (n, 2)), rng.uniform(50, 200, n)
    counts = rng.poisson(0.03 * size[:, None] * np.exp(log_rate(coords))).astype(np.float32)
    counts[:, EMPTY] = 0
    return Problem(coords, counts, size, np.array([f"g{i}" for i in range(G)]))


def normalised():
    """Values that are not counts, with a gene that does not vary."""
    p = counted()
    values = np.log1p(100 * p.values / p.size[:, None]).astype(np.float32)
    values[:, EMPTY] = 5.1
    return Problem(p.coords, values, None, p.genes)


PROBLEMS = {"counts": counted, "normalised": normalised}
each_problem = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)


def stored_as(container, problem):
    return dataclasses.replace(problem, values=container(problem.values))


def known(problem):
    """The problem without the gene that holds nothing to fit."""
    return problem.take(np.arange(len(problem.coords)), problem.active())


def alone(problem, train):
    """The fit that scores :func:`fit`."""
    chosen, box = model(problem), Box.of(torch.from_numpy(problem.coords))
    return chosen.fit(train, box, as_penalty("isotropic"), 30.0, chosen.directions(train))


def as_long(config):
    """Trials as long as the fits: short ones of few steps would say little."""
    return LamSearch(steps=config.steps, learning_rate=config.learning_rate)


def most_variable(problem, n):
    """Indices of the genes that a fit of `n` genes takes."""
    return problem.active()[known(problem).most_variable(n)]


def model(
    problem, *, penalty="isotropic", network=SMALL["siren"], rank=4, likelihood=None, members=1, most=99, **numbers
):
    """`penalty` may be several, `members` fits are averaged, of the `most` variable genes."""
    likelihood = likelihood or ("gaussian" if problem.size is None else "poisson")
    config = {"steps": 60, "learning_rate": 1e-2, "n_regularisation": 64, "device": "cpu"} | numbers
    penalties = tuple(as_penalty(name) for name in ([penalty] if isinstance(penalty, str) else penalty))
    return Model(likelihood, penalties, network, rank, FitConfig(**config), members, most)


def fit(problem, *, lam=30.0, target_sum=100.0, on_step=None, search=None, for_gaps=False, **options):
    target_sum = 1.0 if problem.size is None else target_sum
    chosen = model(problem, **options)
    search = search or as_long(chosen.config)
    return fit_expression(
        problem, chosen, lam=lam, target_sum=target_sum, on_step=on_step, search=search, for_gaps=for_gaps
    )


def rmse(a, b):
    return np.sqrt(np.mean((a - b) ** 2))


def log_expected(fitted, coords, genes=None):
    """Log expected expression of the genes that have any."""
    genes = [g for g in fitted.field.genes if g != f"g{EMPTY}"] if genes is None else genes
    return np.log(fitted.field.select(genes)(coords))


# ---- what a fit starts from


@each_container
@each_problem
def test_mean_and_standard_deviation_are_those_of_numpy(make, container):
    values = make().values
    mean, sd = moments(container(values))
    np.testing.assert_allclose(mean, values.mean(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(sd, values.std(0, dtype=float), rtol=1e-12)


@each_container
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_narrow_whole_numbers_do_not_overflow(container, dtype):
    counts = np.random.default_rng(0).integers(0, 250, (101, 7)).astype(dtype)
    for found, expected in zip(moments(container(counts)), (counts.mean(0), counts.std(0)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(library_size(container(counts)), counts.sum(1, dtype=float))


@each_container
@pytest.mark.parametrize("value", [0.1, 5.1, -3.3])
@pytest.mark.parametrize("dtype", [np.float32, float])
def test_a_gene_that_does_not_vary_is_not_active(container, value, dtype):
    values = np.random.default_rng(0).standard_normal((10_001, 3)).astype(dtype)
    values[:, 1] = value
    problem = Problem(np.zeros((len(values), 2)), container(values), None, np.array(["a", "b", "c"]))
    np.testing.assert_array_equal(problem.active(), [0, 2])


@each_container
def test_genes_with_counts_are_active_even_where_they_do_not_vary(container):
    counts = np.array([[1.0, 0, 2], [1, 0, 0], [1, 0, 0]])
    problem = Problem(np.zeros((3, 2)), container(counts), np.ones(3), np.array(["a", "b", "c"]))
    np.testing.assert_array_equal(problem.active(), [0, 2])


@each_container
def test_the_null_is_the_mean_rate_or_the_mean(container):
    counts, values = stored_as(container, counted()), stored_as(container, normalised())
    np.testing.assert_allclose(counts.null(), counted().values.sum(0, dtype=float) / counts.size.sum(), rtol=1e-12)
    np.testing.assert_allclose(values.null(), normalised().values.mean(0, dtype=float), rtol=1e-12)


@each_container
def test_the_most_variable_genes_vary_most_about_their_mean_rate(container):
    rng = np.random.default_rng(0)
    factor = np.where(np.arange(6) % 2, rng.gamma(2, 0.5, (300, 1)), 1)  # every other gene is over-dispersed
    counts = rng.poisson(factor * [90, 3, 150, 20, 3, 60]).astype(np.float32)
    genes = np.array(list("abcdef"))
    problem = Problem(np.zeros((300, 2)), container(counts), np.ones(300), genes)
    np.testing.assert_array_equal(problem.most_variable(3), [1, 3, 5])
    np.testing.assert_array_equal(dataclasses.replace(problem, size=None).most_variable(3), [2, 3, 5])  # in all
    np.testing.assert_array_equal(problem.most_variable(99), range(6))


@each_container
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 3.0], [1, 2]], True),
        ([[0, 0.0], [0, 0]], True),
        ([[0, 3.5], [1, 2]], False),
        ([[0, -1.0], [1, 2]], False),
        ([[0, np.nan], [1, 2]], False),
        ([[0, 1e7], [1, 2]], True),
    ],
)
def test_counts_are_whole_numbers_from_zero(container, values, expected):
    assert holds_counts(container(np.array(values))) is expected


def pearson_residuals(problem):
    y = np.asarray(problem.values, dtype=float)
    if problem.size is None:
        return (y - y.mean(0)) / y.std(0)
    mean = np.outer(problem.size, y.sum(0) / problem.size.sum())
    return (y - mean) / np.sqrt(mean)


def densified(*_, **__):
    msg = "a sparse matrix was made dense"
    raise AssertionError(msg)


@each_container
@each_problem
@pytest.mark.parametrize(("n_spots", "rank"), [(N, 3), (9, 3), (9, 8), (N, 11)], ids=str)
def test_starting_directions_are_singular_vectors_of_pearson_residuals(make, container, n_spots, rank, monkeypatch):
    problem = known(known(make()).take(np.arange(n_spots)))
    iterative = min(problem.values.shape) > rank + 1
    _, s, vt = np.linalg.svd(pearson_residuals(problem), full_matrices=False)
    problem = stored_as(container, problem)
    if iterative:
        for kind in (sparse.csr_array, sparse.csr_matrix):
            monkeypatch.setattr(kind, "toarray", densified)
            monkeypatch.setattr(kind, "todense", densified)
    found = residual_directions(problem, rank)
    assert found.shape == (vt.shape[1], rank)
    gap = np.append(s, 0)[: rank + 1]
    assert (gap[:-1] - gap[1:] > 1e-6 * s[0]).all()  # otherwise the vectors are not defined
    leading = vt[:rank].T
    sign = np.sign(leading[np.abs(leading).argmax(0), np.arange(rank)])
    np.testing.assert_allclose(found, leading * sign, atol=1e-6)


@pytest.mark.parametrize(
    ("n_spots", "n_genes", "expected"),
    [
        (200, 13, 512),  # that is all of them
        (16_384, 13, 512),
        (16_416, 13, 513),  # a 32nd
        (178_180, 73, 5568),
        (400_000, 13, 8192),
        (16_384, 10_000, 400),  # 4 million values
        (3639, 15_928, 251 + 5),  # never fewer than 256
    ],
)
def test_a_step_takes_a_32nd_of_the_spots_within_limits(n_spots, n_genes, expected):
    assert batch_points(n_spots, n_genes) == expected


# ---- the choice of lam


SHORT = LamSearch(start=10, ratio=4, reach=2, steps=20, n_genes=99)


@each_problem
def test_lam_and_the_score_come_from_short_fits_on_held_out_spots(make):
    problem = make()
    fitted = fit(problem, lam="auto", search=SHORT, steps=20)
    lam, score = fitted.search["lam"], fitted.search["score"]
    assert set(fitted.search["penalty"]) == {0}
    assert 2 <= len(lam) <= SHORT.reach + 2
    np.testing.assert_allclose(lam[1:] / lam[:-1], SHORT.ratio)
    stretch = 1.0 if problem.size is None else 1.5  # normalised values take the choice itself
    assert fitted.lam == [stretch * vertex(list(lam), list(score))]
    assert fitted.score == pytest.approx(score.max(), abs=1e-6)
    assert fitted.weights == [1]


def test_a_short_fit_is_a_fit_of_so_many_steps_at_that_rate():
    numbers = {"steps": 20, "learning_rate": 7e-3}
    search = dataclasses.replace(SHORT, start=30, reach=0, **numbers)
    found = fit(counted(), lam="auto", search=search, steps=1).search
    assert found["score"][0] == fit(counted(), lam=30.0, **numbers).search["score"][0]
    assert found["score"][0] != fit(counted(), lam=30.0, steps=20).search["score"][0]


def test_short_fits_have_two_fifths_of_the_steps_unless_told():
    assert [LamSearch().steps_of(FitConfig(steps=n)) for n in (500, 7, 1)] == [200, 3, 1]
    assert SHORT.steps_of(FitConfig(steps=500)) == 20


def test_each_penalty_has_a_strength_of_its_own_and_a_share_of_the_average():
    fitted = fit(counted(), lam="auto", search=SHORT, steps=20, penalty=("isotropic", "hessian"), members=2)
    assert fitted.lam.shape == fitted.weights.shape == (2,)
    assert fitted.weights.sum() == pytest.approx(1)
    assert set(fitted.search["penalty"]) == {0, 1}
    for k in range(2):
        lam, score = (fitted.search[name][fitted.search["penalty"] == k] for name in ("lam", "score"))
        assert fitted.lam[k] == 1.5 * vertex(list(lam), list(score))
        # the average is not below the best of those it is made of, but for what a step of the weights rounds
        assert fitted.score > score.max() - 2e-3


@pytest.mark.parametrize("lam", [30.0, 0.0])
@pytest.mark.parametrize(("penalty", "members", "fits"), [("isotropic", 1, 2), (("isotropic", "tgv"), 3, 5)])
def test_the_steps_of_a_fit_at_a_known_lam_are_as_planned(lam, penalty, members, fits):
    seen, options = [], {"penalty": penalty, "members": members, "steps": 7}
    fit(counted(), lam=lam, on_step=lambda *now: seen.append(now), **options)
    assert [done for done, _, _ in seen] == list(range(1, 7 * fits + 1))
    chosen = model(counted(), **options)
    assert {planned for _, planned, _ in seen} == {planned_steps(lam, chosen, as_long(chosen.config))} == {7 * fits}
    stages = ["fitting"] if members == 1 else [f"fitting, {m} of 3" for m in (1, 2, 3)]
    expected = [*["held-out score"] * (fits - members), *stages]
    assert [stage for _, _, stage in seen] == [stage for stage in expected for _ in range(7)]


@pytest.mark.parametrize("reach", [0, 1, 3])
@pytest.mark.parametrize("start", [1e-3, 1e5])  # the search goes up, or down
def test_the_steps_of_a_search_are_no_more_than_planned(start, reach):
    search, seen = LamSearch(start=start, ratio=30, reach=reach, steps=4), []
    fitted = fit(counted(), lam="auto", search=search, steps=3, on_step=lambda *now: seen.append(now))
    tried = len(fitted.search["lam"])
    assert [now[0] for now in seen] == list(range(1, 4 * tried + 3 + 1))
    assert {now[1] for now in seen} == {planned_steps("auto", model(counted(), steps=3), search)}
    assert {now[2] for now in seen} == {"choosing lam", "fitting"}
    assert seen[-1][0] <= seen[-1][1]


def test_the_search_may_look_at_fewer_genes():
    few = fit(counted(), steps=15, search=dataclasses.replace(SHORT, n_genes=5))
    assert few.gene_scores.shape == few.dispersion.shape == (G,)  # genes beyond get loadings on the same field
    scored = np.delete(few.gene_scores, EMPTY)
    assert (scored != 0).all()
    assert (scored != np.delete(fit(counted(), steps=15, search=SHORT).gene_scores, EMPTY)).all()


@pytest.mark.parametrize("for_gaps", [False, True])
def test_spots_or_discs_are_held_out(for_gaps, monkeypatch):
    modes, split = [], holdout.split

    def noted(coords, mode, **options):
        modes.append(mode)
        return split(coords, mode, **options)

    monkeypatch.setattr(holdout, "split", noted)
    fitted = fit(counted(), steps=5, for_gaps=for_gaps)
    assert modes == ["block" if for_gaps else "random"]
    assert fitted.score != fit(counted(), steps=5, for_gaps=not for_gaps).score


# ---- the weights of the average


@each_container
@each_problem
@pytest.mark.parametrize(
    ("mixture", "n_fits"),
    [([0.35], 2), ([0.0], 2), ([1.0], 2), ([0.2, 0.5], 3), ([0.0, 0.0], 3), ([1.0, 0.0], 3)],
    ids=str,
)
def test_the_weights_of_an_average_are_those_that_made_the_values(make, container, mixture, n_fits):
    test, rng = known(make()), np.random.default_rng(1)
    expected = np.array([*mixture, 1 - sum(mixture)])
    if test.size is None:
        null = test.null()
    else:
        test, null = dataclasses.replace(test, size=np.full(N, 1e4)), np.log(known(make()).null())
    etas = [null + 0.3 * rng.standard_normal(test.values.shape) for _ in range(n_fits)]
    truth = sum(w * eta for w, eta in zip(expected, etas, strict=True))
    values = truth if test.size is None else np.round(test.size[:, None] * np.exp(truth))
    test = dataclasses.replace(test, values=container(values.astype(np.float32)))
    found = average_weights(etas, test)
    np.testing.assert_allclose(found, expected, atol=0.05)  # a step
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()


def test_one_fit_has_all_the_weight():
    problem = known(counted())
    np.testing.assert_array_equal(average_weights([np.zeros(problem.values.shape)], problem), [1])


# ---- laws of a fit


@each_problem
def test_a_fit_finds_the_patterns(make):
    fitted = fit(make(), steps=200)
    assert fitted.score > (0.35 if make is counted else 0.3)
    assert fitted.gene_scores.shape == (G,)
    assert fitted.gene_scores[EMPTY] == 0
    assert fitted.gene_scores[G - 1] < 0.02 < fitted.gene_scores[:3].min()  # the last gene is flat
    assert fitted.field.log_link is (make is counted)
    np.testing.assert_array_equal(fitted.field.genes, counted().genes)


def test_the_score_is_the_deviance_explained_on_spots_that_were_held_out():
    problem = known(counted())
    train, test = (problem.take(i) for i in holdout.split(problem.coords, "random", random_state=0, fraction=0.2))
    rate = alone(problem, train)(torch.from_numpy(test.coords)).double().numpy()
    expected = holdout.deviance_explained(test.values, test.size, rate, train.null())
    assert fit(counted()).score == pytest.approx(expected, rel=1e-5)


def test_the_score_of_spots_with_a_footprint_is_that_of_their_averages():
    whole = dataclasses.replace(counted(), footprint=8.0)
    problem = known(whole)
    train, test = (problem.take(i) for i in holdout.split(problem.coords, "random", random_state=0, fraction=0.2))
    found = alone(problem, train)
    parts = [found(torch.from_numpy(test.coords + offset)).double().numpy() for offset in disc_quadrature(8.0, 2)]
    expected = holdout.deviance_explained(test.values, test.size, np.mean(parts, axis=0), train.null())
    assert fit(whole).score == pytest.approx(expected, rel=1e-5)


def test_expected_counts_are_those_of_a_spot_with_the_target_sum():
    problem = counted()
    a, b = fit(problem, target_sum=100.0), fit(problem, target_sum=250.0)
    np.testing.assert_allclose(b.field(problem.coords), 2.5 * a.field(problem.coords), rtol=1e-12)
    expected = problem.size[:, None] * a.field(problem.coords) / 100
    np.testing.assert_allclose(expected.sum(0), problem.values.sum(0), rtol=0.1)


def test_a_gene_without_counts_is_expected_nowhere():
    fitted = fit(counted(), steps=5)
    assert np.isneginf(fitted.field.intercept[EMPTY])
    assert not fitted.field(counted().coords)[:, EMPTY].any()
    assert np.isfinite(np.delete(fitted.field.intercept, EMPTY)).all()


def test_a_gene_that_does_not_vary_is_its_value_everywhere():
    fitted = fit(normalised(), steps=5)
    np.testing.assert_allclose(fitted.field(counted().coords)[:, EMPTY], 5.1, rtol=1e-6)
    assert not fitted.field.gradient(counted().coords)[:, EMPTY].any()


@each_problem
def test_genes_without_training_values_score_nothing(make):
    problem = make()
    train, test = holdout.split(problem.coords, "random", random_state=0, fraction=0.2)
    values = problem.values.copy()
    values[:, 2] = 0
    values[test[:3], 2] = 4  # seen on held-out spots only
    fitted = fit(dataclasses.replace(problem, values=values), steps=10)
    assert fitted.gene_scores[2] == 0
    assert np.isfinite(fitted.score)
    assert fitted.field(problem.coords)[:, 2].any()  # but the final fit has seen it


@pytest.mark.parametrize("lam", [30.0, "auto"])
def test_a_gene_seen_on_held_out_spots_only_can_be_fitted_on_its_own(lam):
    problem = counted()
    held = holdout.split(problem.coords, "random", random_state=0, fraction=0.2)[1]
    values = np.zeros((N, 1), dtype=np.float32)
    values[held[:2]] = 1
    fitted = fit(Problem(problem.coords, values, problem.size, problem.genes[:1]), lam=lam, search=SHORT, steps=5)
    assert fitted.lam == (30 if lam == 30 else SHORT.start)
    assert fitted.score == fitted.gene_scores[0] == fitted.search["score"][0] == 0
    assert (fitted.field(problem.coords) > 0).all()


def test_the_same_seed_gives_the_same_numbers():
    a, b = fit(counted()), fit(counted())
    np.testing.assert_array_equal(a.field(counted().coords), b.field(counted().coords))
    np.testing.assert_array_equal(a.gene_scores, b.gene_scores)
    assert a.history["objective"].tolist() == b.history["objective"].tolist()


def test_a_fit_leaves_the_global_random_state_alone():
    before, state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(counted(), lam="auto", search=SHORT, steps=3, members=2)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.fixture(scope="module")
def seeds():
    """Two fits that differ in their seed only, and what their difference is."""
    a, b = (log_expected(fit(counted(), steps=200, random_state=s), counted().coords) for s in (0, 1))
    return a, rmse(a, b)


def test_another_seed_gives_another_field_that_differs_slightly(seeds):
    one, noise = seeds
    assert 0 < noise < 0.3 * one.std(0)[:3].mean()


def test_the_order_of_genes_matters_no_more_than_the_seed(seeds):
    one, noise = seeds
    order = np.random.default_rng(0).permutation(G)
    problem = counted()
    again = fit(problem.take(np.arange(N), order), steps=200)
    np.testing.assert_array_equal(again.field.genes, problem.genes[order])
    same = log_expected(again, problem.coords, [g for g in problem.genes if g != f"g{EMPTY}"])
    assert rmse(same, one) <= 1.5 * noise
    assert np.corrcoef(same.ravel(), one.ravel())[0, 1] > 0.99


def test_the_order_of_spots_matters_no_more_than_the_seed(seeds):
    one, noise = seeds
    again = fit(counted().take(np.random.default_rng(0).permutation(N)), steps=200)
    same = log_expected(again, counted().coords)
    assert rmse(same, one) <= 1.5 * noise
    assert np.corrcoef(same.ravel(), one.ravel())[0, 1] > 0.99


@each_problem
@pytest.mark.parametrize("network", SMALL.values(), ids=SMALL)
def test_units_of_the_coordinates_do_not_matter(make, network):
    problem = make()
    shift = np.array([-3000.0, 500.0])
    moved = dataclasses.replace(problem, coords=137 * problem.coords + shift)
    here, there = (fit(p, network=network, steps=25) for p in (problem, moved))
    pairs = {
        "field": (here.field(problem.coords), there.field(moved.coords)),
        "gradient": (here.field.gradient(problem.coords), 137 * there.field.gradient(moved.coords)),
        "hessian": (here.field.hessian(problem.coords), 137**2 * there.field.hessian(moved.coords)),
        "edge": (here.field.edge(problem.coords), 137 * there.field.edge(moved.coords)),
    }
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * np.abs(a).max(), err_msg=name)
    assert there.score == pytest.approx(here.score, abs=1e-3)


UNITS = {  # powers of two: exact in floating point
    "of each gene": 2.0 ** np.arange(-6, 7),
    "of one gene far from the others": np.where(np.arange(G) == 0, 2.0**20, 1.0),
}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_units_of_normalised_values_do_not_matter(unit):
    problem = normalised()
    other = dataclasses.replace(problem, values=(problem.values * unit).astype(np.float32))
    here, there = fit(problem), fit(other)
    a, b = here.field(problem.coords), there.field(problem.coords) / unit
    np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * np.abs(a).max())
    np.testing.assert_allclose(there.gene_scores, here.gene_scores, atol=1e-3)


@each_problem
@pytest.mark.parametrize("batch", [0, 64], ids=["all spots", "batches"])
def test_sparse_and_dense_matrices_give_the_same_fit(make, batch):
    problem = make()
    dense, *others = (fit(stored_as(c, problem), batch_points=batch, steps=30) for c in CONTAINERS.values())
    for other in others:
        np.testing.assert_allclose(other.field(problem.coords), dense.field(problem.coords), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(other.gene_scores, dense.gene_scores, atol=1e-4)


def test_counts_stored_as_whole_numbers_give_the_same_fit():
    problem = counted()
    a, b = (fit(stored_as(lambda v, t=t: sparse.csr_array(v.astype(t)), problem)) for t in (np.float32, np.uint16))
    np.testing.assert_allclose(a.field(problem.coords), b.field(problem.coords), rtol=1e-4)


def test_a_stronger_prior_gives_a_smoother_field():
    roughness = [fit(counted(), lam=lam, steps=100).field.edge(counted().coords).mean() for lam in (1, 100, 1000)]
    assert roughness[0] > 1.2 * roughness[1] > 1.2 * 1.2 * roughness[2]


@pytest.mark.parametrize("penalty", sorted(set(PENALTIES) - {"mixed"}))
@pytest.mark.parametrize("make", [counted, normalised], ids=PROBLEMS)
def test_every_penalty_runs(make, penalty):
    fitted = fit(make(), penalty=penalty, steps=6, refresh_every=2)
    assert np.isfinite(fitted.field(counted().coords)).all()
    assert np.isfinite(fitted.field.gradient(counted().coords)).all()
    assert (fitted.history["penalty"] > 0).any()
    assert fitted.field.latent(counted().coords).shape == (N, 4)


@pytest.mark.parametrize("network", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial", "gaussian"])
def test_every_network_runs_with_every_likelihood(network, likelihood):
    problem = normalised() if likelihood == "gaussian" else counted()
    fitted = fit(problem, likelihood=likelihood, network=network, steps=100, lam=10.0)
    assert np.isfinite(fitted.field(problem.coords)).all()
    assert fitted.score > 0.15
    assert set(SMALL) == set(NETWORKS)


@pytest.mark.parametrize(("n", "rank"), [(4, 20), (6, 3), (40, 20)])
def test_few_spots_lower_the_rank(n, rank):
    problem = counted().take(np.arange(n))
    fitted = fit(problem, rank=rank, steps=5)
    assert fitted.field.latent(problem.coords).shape[1] == min(rank, n - 1, len(problem.active()))
    assert np.isfinite(fitted.field(problem.coords)).all()


@pytest.mark.parametrize("n_genes", [99, 6], ids=["all are fitted", "six are fitted"])
def test_genes_whose_counts_are_shuffled_over_spots_are_not_explained(n_genes):
    problem = counted(1501)
    values = problem.values.copy()
    shuffled = np.array([1, 2, 6, 10])
    for g in shuffled:
        values[:, g] = np.random.default_rng(g).permutation(values[:, g])
    problem = dataclasses.replace(problem, values=values)
    inside = np.isin(shuffled, most_variable(problem, n_genes))
    assert inside.any()
    assert inside.all() == (n_genes == 99)  # else some of them get loadings on the field of others
    fitted = fit(
        problem, steps=200, lam=60.0, most=n_genes, search=LamSearch(n_genes=n_genes, steps=200, learning_rate=1e-2)
    )
    assert np.abs(fitted.gene_scores[shuffled]).max() <= 0.02
    assert fitted.gene_scores[[0, 3, 4, 9, 11]].min() > 0.1


@pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_array], ids=["dense", "csr_array"])
def test_genes_beyond_those_fitted_do_as_well_as_in_a_joint_fit(make, container):
    problem = stored_as(container, make())
    few, whole = (
        fit(problem, steps=200, most=n, search=LamSearch(n_genes=n, steps=200, learning_rate=1e-2)) for n in (7, 99)
    )
    beyond = np.setdiff1d(problem.active(), most_variable(problem, 7))
    assert len(beyond) == 5
    np.testing.assert_allclose(few.gene_scores[beyond], whole.gene_scores[beyond], atol=0.04)
    assert whole.gene_scores[beyond].max() > 0.1  # there is something to explain
    names = [g for g in problem.genes[beyond] if g != f"g{G - 1}"]  # that which is flat has no shape to agree on
    a, b = (f.field.select(names)(problem.coords) for f in (few, whole))
    for one, other in zip(a.T, b.T, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.95


def test_genes_beyond_those_fitted_are_over_dispersed_too():
    fitted = fit(counted(), steps=30, likelihood="negative_binomial", most=5, search=LamSearch(n_genes=5))
    assert np.isfinite(fitted.gene_scores).all()
    assert (np.delete(fitted.field(counted().coords), EMPTY, 1) > 0).all()


def test_dispersion_is_that_of_the_counts_about_the_field():
    problem, rng = counted(1501), np.random.default_rng(3)
    phi = np.where(np.arange(G) % 2, 0.8, 0.1)
    mean = 0.1 * problem.size[:, None] * np.exp(log_rate(problem.coords))
    values = rng.poisson(mean * rng.gamma(1 / phi, phi, mean.shape)).astype(np.float32)
    fitted = fit(dataclasses.replace(problem, values=values), steps=200)
    np.testing.assert_allclose(np.log(fitted.dispersion), np.log(phi), atol=0.7)
    assert fit(normalised(), steps=5).dispersion is None


# ---- an average of members


def by_hand(field, coords):
    """(M, N, G) predictors of the members of a field."""
    edges = np.cumsum((0, *field.net.widths))
    with torch.no_grad():
        u = field.net(field.box.inward(torch.from_numpy(coords))).numpy()
    parts = zip(edges[:-1], edges[1:], field.members.intercepts.T, strict=True)
    return np.array([u[:, a:b] @ field.members.loadings[:, a:b].T + intercept for a, b, intercept in parts])


@each_problem
@pytest.mark.parametrize("penalty", ["isotropic", ("isotropic", "tgv")], ids=["one penalty", "two penalties"])
def test_the_field_is_the_weighted_mean_of_its_members(make, penalty):
    problem = make()
    field = fit(problem, steps=20, penalty=penalty, members=3).field
    weights = field.members.weights
    assert weights.shape == (3,)
    assert weights.sum() == pytest.approx(1)
    genes = np.delete(np.arange(G), EMPTY)
    eta = by_hand(field, problem.coords)[:, :, genes]
    mean = np.tensordot(weights, eta, 1)
    expected = 100 * np.exp(mean) if make is counted else mean
    # but for components below 1e-4 of the first
    np.testing.assert_allclose(field(problem.coords)[:, genes], expected, rtol=1e-3, atol=1e-4)
    assert all(np.abs(one - mean).max() > 1e-3 for one in eta)  # the members differ
    deviation = np.tensordot(weights, (eta - mean) ** 2, 1) / (1 - (weights**2).sum())
    np.testing.assert_allclose(field.predictor_variance(problem.coords)[:, genes], deviation, rtol=1e-6)


def test_a_single_fit_has_no_members_and_no_spread():
    field = fit(counted(), steps=5).field
    assert field.members is None
    with pytest.raises(ValueError, match="the field is a single fit, which has no spread: refit with `n_members=4`"):
        field.std(counted().coords)


def test_members_have_seeds_of_their_own_and_the_first_has_that_of_the_fit():
    for state in (0, 1, 7):
        seeds = [model(counted(), random_state=state).seed(m) for m in range(9)]
        assert seeds[0] == state
        assert len(set(seeds)) == 9
    assert model(counted(), random_state=1).seed(1) != model(counted(), random_state=0).seed(1)


# weights found for two penalties, members -> the penalty of each member, and its weight
TURNS = {
    "in turn, the better first": ([0.3, 0.7], 3, [1, 0, 1], [0.35, 0.3, 0.35]),
    "one member is of the better one": ([0.7, 0.3], 1, [0], [1.0]),
    "equal ones in their order": ([0.5, 0.5], 2, [0, 1], [0.5, 0.5]),
    "a small share is left out": ([0.05, 0.95], 2, [1, 1], [0.5, 0.5]),
}


@pytest.mark.parametrize(("found", "members", "turns", "weights"), TURNS.values(), ids=TURNS)
def test_members_are_in_turn_of_the_penalties_that_help(found, members, turns, weights, monkeypatch):
    calls, fit_field = [], model_module.fit_field

    def noted(*samples, **options):
        calls.append((options["penalty"], options["config"].random_state))
        return fit_field(*samples, **options)

    monkeypatch.setattr(model_module, "fit_field", noted)
    monkeypatch.setattr(choice, "average_weights", lambda etas, test: np.array(found))
    names = ("isotropic", "vectorial")
    fitted = fit(counted(), steps=3, penalty=names, members=members)
    np.testing.assert_array_equal(fitted.weights, found)
    chosen = calls[2:]  # after one held-out fit of each
    assert [penalty for penalty, _ in chosen] == [as_penalty(names[k]) for k in turns]
    assert len({seed for _, seed in chosen}) == members
    if members > 1:
        np.testing.assert_allclose(fitted.field.members.weights, weights)


def test_the_history_tells_the_members_apart():
    history = fit(counted(), steps=25, members=3).history
    np.testing.assert_array_equal(history["member"], np.repeat([0, 1, 2], 4))
    np.testing.assert_array_equal(history["step"], [0, 10, 20, 24] * 3)
    one = fit(counted(), steps=25).history
    np.testing.assert_array_equal(history["objective"][:4], one["objective"])  # the first has the seed of a single fit
    assert (history["objective"][4:8] != one["objective"]).all()


def test_the_spread_of_normalised_values_has_their_unit():
    problem, unit = normalised(), 2.0 ** np.arange(-6, 7)  # exact in floating point
    other = dataclasses.replace(problem, values=(problem.values * unit).astype(np.float32))
    here, there = (fit(p, members=2, steps=30).field.std(p.coords) for p in (problem, other))
    np.testing.assert_allclose(there / unit, here, rtol=1e-2, atol=1e-3 * here.max())


def test_members_agree_less_where_there_are_no_spots():
    whole, centre = counted(601), np.array([20.0, 20.0])
    problem = whole.take(np.flatnonzero(np.linalg.norm(whole.coords - centre, axis=1) > 9))
    field = fit(problem, steps=100, members=4).field
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.column_stack([np.cos(angle), np.sin(angle)])
    at_spots, hole, far = (
        np.sqrt(np.delete(field.predictor_variance(x), EMPTY, 1).mean())
        for x in (problem.coords, np.concatenate([centre + 2 * ring, centre + 5 * ring]), centre + 50 * ring)
    )
    assert hole > 1.5 * at_spots > 0
    assert far > 1.5 * at_spots


def test_a_field_of_points_in_space_is_found():
    rng = np.random.default_rng(0)
    coords = rng.uniform(0, 40, (500, 3))
    pattern = np.sin(coords[:, 2] / 8)[:, None] * [1, -1, 0.5]
    counts = rng.poisson(3 * np.exp(pattern)).astype(np.float32)
    problem = Problem(coords, counts, np.full(500, 10.0), np.array(["a", "b", "c"]))
    fitted = fit(problem, steps=200, target_sum=10.0)
    assert fitted.field.gradient(coords).shape == (500, 3, 3)
    assert np.corrcoef(np.log(fitted.field(coords)[:, 0]), pattern[:, 0])[0, 1] > 0.9
