import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import sparse

from neurst.core.fit import FitConfig
from neurst.core.nets import NETWORKS, Fourier, LowRank, Siren, Spline
from neurst.core.penalty import PENALTIES, as_penalty
from neurst.core.samples import Box
from neurst.spatial import holdout
from neurst.spatial.fitting import LamPath, Model, batch_points, fit_expression, planned_steps, vertex
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


def model(problem, *, penalty="isotropic", network=SMALL["siren"], rank=4, likelihood=None, **numbers):
    likelihood = likelihood or ("gaussian" if problem.size is None else "poisson")
    config = {"steps": 60, "learning_rate": 1e-2, "n_regularisation": 64, "device": "cpu"} | numbers
    return Model(likelihood, as_penalty(penalty), network, rank, FitConfig(**config))


def fit(problem, *, lam=30.0, target_sum=100.0, on_step=None, path=LamPath(), **options):
    target_sum = 1.0 if problem.size is None else target_sum
    chosen = model(problem, **options)
    return fit_expression(problem, chosen, lam=lam, target_sum=target_sum, on_step=on_step, path=path)


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
        (3639, 300, 0),
        (8192, 13, 0),
        (8193, 13, 8192),
        (4000, 1000, 0),
        (4001, 1000, 4000),
        (260, 15_928, 251 + 5),  # never fewer than 256
        (200, 15_928, 0),
        (178_180, 73, 8192),
    ],
)
def test_a_step_takes_all_spots_unless_they_are_too_many_values(n_spots, n_genes, expected):
    assert batch_points(n_spots, n_genes) == expected


# ---- the choice of lam


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (LamPath(start=100, ratio=2, stop=800), [100, 200, 400, 800]),
        (LamPath(start=100, ratio=2, stop=799), [100, 200, 400]),
        (LamPath(start=10, ratio=10, stop=1000), [10, 100, 1000]),
        (LamPath(start=1, ratio=10, stop=1000), [1, 10, 100, 1000]),  # 2.9999999999999996 stages
        (LamPath(start=50, ratio=2.5, stop=50), [50]),
    ],
)
def test_strengths_rise_by_the_ratio_from_start_to_stop(path, expected):
    np.testing.assert_allclose(path.strengths, expected, rtol=1e-12)


def test_the_vertex_of_a_parabola_in_log_lam_is_found_exactly():
    lam = [100 * 2.0**k for k in range(6)]
    for best in (310.0, 400.0, 700.0):
        score = [0.3 - 0.01 * math.log(x / best) ** 2 for x in lam]
        assert vertex(lam, score) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("score", [[0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.2, 0.2, 0.2], [0.3]])
def test_without_two_neighbours_the_best_strength_is_taken_as_it_is(score):
    lam = [100.0, 200.0, 400.0][: len(score)]
    assert vertex(lam, score) == lam[int(np.argmax(score))]


@pytest.mark.parametrize("score", [[0.29, 0.3, 0.29], [0.1, 0.3, 0.3], [0.3 - 1e-9, 0.3, 0.0]])
def test_the_vertex_stays_within_half_a_stage_of_the_best(score):
    assert 200 / math.sqrt(2) <= vertex([100.0, 200.0, 400.0], score) <= 200 * math.sqrt(2) * (1 + 1e-12)


SHORT = LamPath(start=3, ratio=4, stop=2000, first_steps=40, stage_steps=15, n_genes=99)


@each_problem
def test_the_path_goes_from_weak_to_strong_until_the_score_falls(make):
    fitted = fit(make(), lam="auto", path=SHORT, steps=20)
    lam, score = fitted.path["lam"], fitted.path["score"]
    np.testing.assert_allclose(lam, SHORT.strengths[: len(lam)])
    assert 1 < len(lam) < len(SHORT.strengths)  # it stopped before the end
    best = score[:-1].max()
    assert score[-1] < best == score[-2]
    assert fitted.lam == vertex(list(lam), list(score))
    assert fitted.score == pytest.approx(best, abs=1e-6)


def test_a_stage_of_the_path_goes_on_from_the_last_one():
    path = LamPath(start=30, ratio=1.1, stop=34, first_steps=100, stage_steps=1)
    first, second = fit(counted(), lam="auto", path=path, steps=1).path["score"][:2]
    assert second == pytest.approx(first, abs=0.1)
    assert fit(counted(), steps=1).score < first - 0.2  # what one step from nothing gives


@pytest.mark.parametrize("lam", [30.0, 0.0])
def test_the_steps_of_a_fit_at_a_known_lam_are_as_planned(lam):
    seen = []
    fit(counted(), lam=lam, steps=7, on_step=lambda *now: seen.append(now))
    assert [done for done, _, _ in seen] == list(range(1, 15))
    assert {planned for _, planned, _ in seen} == {planned_steps(lam, G, FitConfig(steps=7), LamPath())} == {14}
    assert [stage for _, _, stage in seen] == ["held-out score"] * 7 + ["fitting"] * 7


@pytest.mark.parametrize("n_genes", [99, 5])
@pytest.mark.parametrize("stop", [12, 2000])  # the end of the path is reached, or not
def test_the_steps_of_a_path_are_no_more_than_planned(n_genes, stop):
    path, seen = dataclasses.replace(SHORT, n_genes=n_genes, stop=stop), []
    fitted = fit(counted(), lam="auto", path=path, steps=9, on_step=lambda *now: seen.append(now))
    stages = len(fitted.path["lam"])
    done = 40 + 15 * (stages - 1) + 9 * (1 if n_genes == 99 else 2)
    assert [now[0] for now in seen] == list(range(1, done + 1))
    assert {now[1] for now in seen} == {planned_steps("auto", G - 1, FitConfig(steps=9), path)}
    assert done <= seen[0][1]
    assert done == seen[0][1] or stages < len(path.strengths)


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
    alone = model(problem).fit(train, Box.of(torch.from_numpy(problem.coords)), 30.0)
    rate = alone(torch.from_numpy(test.coords)).double().numpy()
    expected = holdout.deviance_explained(test.values, test.size, rate, train.null())
    assert fit(counted()).score == pytest.approx(expected, rel=1e-9)


def test_the_score_of_spots_with_a_footprint_is_that_of_their_averages():
    whole = dataclasses.replace(counted(), footprint=8.0)
    problem = known(whole)
    train, test = (problem.take(i) for i in holdout.split(problem.coords, "random", random_state=0, fraction=0.2))
    alone = model(problem).fit(train, Box.of(torch.from_numpy(problem.coords)), 30.0)
    parts = [alone(torch.from_numpy(test.coords + offset)).double().numpy() for offset in disc_quadrature(8.0, 2)]
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
    fitted = fit(Problem(problem.coords, values, problem.size, problem.genes[:1]), lam=lam, path=SHORT, steps=5)
    assert fitted.lam == (30 if lam == 30 else SHORT.start)
    assert fitted.score == fitted.gene_scores[0] == fitted.path["score"][0] == 0
    assert (fitted.field(problem.coords) > 0).all()


def test_the_same_seed_gives_the_same_numbers():
    a, b = fit(counted()), fit(counted())
    np.testing.assert_array_equal(a.field(counted().coords), b.field(counted().coords))
    np.testing.assert_array_equal(a.gene_scores, b.gene_scores)
    assert a.history["objective"].tolist() == b.history["objective"].tolist()


def test_a_fit_leaves_the_global_random_state_alone():
    before, state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(counted(), lam="auto", path=SHORT, steps=3)
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


def test_units_of_normalised_values_do_not_matter():
    problem, unit = normalised(), 2.0 ** np.arange(-6, 7)  # exact in floating point
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


def test_genes_whose_counts_are_shuffled_over_spots_are_not_explained():
    problem = counted(1501)
    values = problem.values.copy()
    shuffled = [1, 2, 6, 10]
    for g in shuffled:
        values[:, g] = np.random.default_rng(g).permutation(values[:, g])
    fitted = fit(dataclasses.replace(problem, values=values), steps=200, lam=60.0)
    assert fitted.gene_scores[shuffled].max() <= 0.02
    assert fitted.gene_scores[[0, 3, 4, 9, 11]].min() > 0.1


def test_a_field_of_points_in_space_is_found():
    rng = np.random.default_rng(0)
    coords = rng.uniform(0, 40, (500, 3))
    pattern = np.sin(coords[:, 2] / 8)[:, None] * [1, -1, 0.5]
    counts = rng.poisson(3 * np.exp(pattern)).astype(np.float32)
    problem = Problem(coords, counts, np.full(500, 10.0), np.array(["a", "b", "c"]))
    fitted = fit(problem, steps=200, target_sum=10.0)
    assert fitted.field.gradient(coords).shape == (500, 3, 3)
    assert np.corrcoef(np.log(fitted.field(coords)[:, 0]), pattern[:, 0])[0, 1] > 0.9
