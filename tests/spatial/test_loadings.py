import dataclasses

import numpy as np
import pytest
import torch
from scipy import optimize, sparse, stats

from neurst.spatial import loadings
from neurst.spatial.loadings import solve_loadings
from neurst.spatial.problem import Problem, moments

N, G, R = 301, 9, 3
PHI = np.where(np.arange(G) % 3 == 0, 0.0, 0.4)  # Poisson genes among over-dispersed ones
LIKELIHOODS = {"poisson": None, "negative_binomial": PHI, "gaussian": None}
each_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)


def latent():
    x = np.random.default_rng(0).uniform(0, 6, (N, 2))
    return np.column_stack([np.sin(x[:, 0]), np.cos(x[:, 1]), 0.5 * np.sin(x.sum(1))])


def problem_of(name):
    """Genes with loadings of their own; the last has none."""
    rng = np.random.default_rng(1)
    true, size = 0.6 * rng.standard_normal((G, R)), rng.uniform(20, 60, N)
    true[-1] = 0
    eta = latent() @ true.T
    if name == "gaussian":
        values, size = 5 + 3 * eta + rng.standard_normal((N, G)), None
    else:
        mean = size[:, None] * np.exp(eta - 2)
        values = rng.poisson(mean if name == "poisson" else mean * rng.gamma(2.5, 0.4, mean.shape))
    return Problem(latent(), values.astype(np.float32), size, np.array([f"g{i}" for i in range(G)]))


def solve(name, problem=None, phi=None):
    problem = problem_of(name) if problem is None else problem
    return solve_loadings(latent(), problem, inverse_dispersion=LIKELIHOODS[name] if phi is None else phi)


def objective(name, problem, g):
    """Objective of gene g as a function of (b, V) in float64, written from the likelihoods themselves."""
    y, f = (
        torch.from_numpy(problem.values[:, g].astype(float)),
        torch.from_numpy(np.column_stack([np.ones(N), latent()])),
    )
    if name == "gaussian":  # the noise at its best: N/2 log of the residual sum of squares
        mean, sd = (float(part[g]) for part in moments(problem.values))
        return lambda beta: N / 2 * (y - f @ beta).square().sum().log() + (beta[1:] / sd).square().sum() / 2
    size = torch.from_numpy(problem.size)

    def negative_log_likelihood(beta):
        mean = size * torch.exp(f @ beta)
        if name == "poisson" or PHI[g] == 0:
            log_p = torch.distributions.Poisson(mean).log_prob(y)
        else:
            theta = torch.tensor(1 / PHI[g])
            log_p = torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log()).log_prob(y)
        return -log_p.sum() + beta[1:].square().sum() / 2

    return negative_log_likelihood


@each_likelihood
def test_the_solution_is_stationary(name):
    problem = problem_of(name)
    v, b = solve(name, problem)
    for g in range(G):
        cost, beta = objective(name, problem, g), torch.tensor([b[g], *v[g]], dtype=torch.double)
        slope = torch.func.grad(cost)(beta)
        step = torch.linalg.solve(torch.func.hessian(cost)(beta), slope)
        assert 0 <= step @ slope / 2 < 1e-3  # nats that Newton would still gain
        assert step.abs().max() < 5e-3
        away = torch.func.grad(cost)(beta + 0.05)
        assert away.norm() > 5 * slope.norm()  # the law can fail


@each_likelihood
def test_the_solution_is_that_of_a_general_solver(name):
    problem = problem_of(name)
    v, b = solve(name, problem)
    for g in (0, 1, G - 1):
        cost = objective(name, problem, g)
        start = np.append(np.log(problem.null()[g]) if name != "gaussian" else problem.null()[g], np.zeros(R))
        best = optimize.minimize(lambda beta, cost=cost: float(cost(torch.from_numpy(beta))), start).x
        np.testing.assert_allclose([b[g], *v[g]], best, atol=5e-3)


def test_without_over_dispersion_the_negative_binomial_is_poisson():
    for a, b in zip(solve("poisson", phi=np.full(G, 1e-6)), solve("poisson"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert np.abs(solve("poisson", phi=np.full(G, 2.0))[0] - solve("poisson")[0]).max() > 0.01


@each_likelihood
@pytest.mark.parametrize("container", [sparse.csr_array, sparse.csr_matrix])
def test_sparse_and_dense_values_give_the_same_loadings(name, container):
    dense = problem_of(name)
    for a, b in zip(solve(name, dataclasses.replace(dense, values=container(dense.values))), solve(name), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@each_likelihood
@pytest.mark.parametrize(("number", "value"), [("CELLS", 1), ("CELLS", 4 * N), ("ROWS", 7), ("ROWS", 300)])
def test_loadings_do_not_depend_on_how_the_work_is_divided(name, number, value, monkeypatch):
    whole = solve(name)
    monkeypatch.setattr(loadings, number, value)
    for a, b in zip(solve(name), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


@each_likelihood
def test_a_gene_has_the_loadings_that_it_has_alone(name):
    problem, (v, b) = problem_of(name), solve(name)
    for g in (1, 2):
        alone = problem.take(np.arange(N), np.array([g]))
        phi = None if LIKELIHOODS[name] is None else PHI[[g]]
        one, intercept = solve_loadings(latent(), alone, inverse_dispersion=phi)
        np.testing.assert_allclose(one[0], v[g], atol=2e-3)
        np.testing.assert_allclose(intercept[0], b[g], atol=2e-3)


@each_likelihood
def test_a_gene_that_does_not_follow_the_field_has_loadings_near_zero(name):
    problem = problem_of(name)
    v = np.abs(solve(name, problem)[0]) / (moments(problem.values)[1][:, None] if name == "gaussian" else 1)
    assert v[-1].max() < 0.2
    assert np.median(v[:-1].max(1)) > 0.35


@each_likelihood
def test_the_unit_of_values_and_libraries_does_not_matter(name):
    problem, (v, b) = problem_of(name), solve(name)
    if name == "gaussian":
        other, intercept = solve(name, dataclasses.replace(problem, values=64 * problem.values - 32))
        np.testing.assert_allclose(other, 64 * v, rtol=1e-5)
        np.testing.assert_allclose(intercept, 64 * b - 32, rtol=1e-5)
    else:
        other, intercept = solve(name, dataclasses.replace(problem, size=1000 * problem.size))
        np.testing.assert_allclose(other, v, atol=2e-3)
        np.testing.assert_allclose(intercept, b - np.log(1000), atol=2e-3)


# name: values of one gene, from its row number
RARE = {
    "one count": lambda i: i == 7,
    "one large count": lambda i: 1e6 * (i == 7),
    "a count everywhere but at one spot": lambda i: i != 7,
    "counts where the first latent is high": lambda i: 40.0 * (latent()[:, 0] > 0.9),
}


@pytest.mark.parametrize("make", RARE.values(), ids=RARE)
@pytest.mark.parametrize("phi", [0.0, 1.0])
def test_loadings_of_a_rare_gene_are_finite_and_keep_its_mean(make, phi):
    values = np.asarray(make(np.arange(N)), dtype=np.float32)[:, None]
    problem = Problem(latent(), values, np.full(N, 10.0), np.array(["a"]))
    v, b = solve_loadings(latent(), problem, inverse_dispersion=np.array([phi]))
    assert np.isfinite(v).all()
    assert np.isfinite(b).all()
    if phi == 0:  # the slope of the intercept is zero: the total is met
        total = (10 * np.exp(latent() @ v.T + b)).sum()
        assert total == pytest.approx(values.sum(), rel=0.02)


@pytest.mark.parametrize("phi", [0.0, 0.4])
@pytest.mark.parametrize("count", [5.0, 50.0, 5000.0])
def test_a_step_that_goes_too_far_is_shortened(count, phi):
    z = np.where(np.arange(N) < 3, 10.0, 0.0)[:, None]  # a full step from the null ends near exp(100)
    y = np.where(np.arange(N) < 3, count, np.arange(N) % 10 == 0).astype(np.float32)[:, None]
    v, b = solve_loadings(z, Problem(latent(), y, np.ones(N), np.array(["a"])), inverse_dispersion=np.array([phi]))
    mean = np.exp(z * v + b)
    pull = (y - mean) / (1 + phi * mean)
    curve = mean / (1 + phi * mean)
    assert abs(pull.sum()) < 0.05 * curve.sum() ** 0.5  # the slopes, in units of what they scatter by
    assert abs((pull * z).sum() - v.item()) < 0.05 * (curve * z**2).sum() ** 0.5


def test_a_latent_that_vanished_gets_no_loadings():
    problem = problem_of("poisson")
    v, b = solve_loadings(np.zeros((N, 2)), problem)
    np.testing.assert_allclose(v, 0, atol=1e-12)
    np.testing.assert_allclose(b, np.log(problem.null()), rtol=1e-6)


def test_the_prior_shrinks_what_few_counts_say():
    y = np.random.default_rng(0).poisson(0.05 * np.exp(2 * latent()[:, :1])).astype(np.float32)
    v, _ = solve_loadings(latent()[:, :1], Problem(latent(), y, np.ones(N), np.array(["a"])))
    many, _ = solve_loadings(latent()[:, :1], Problem(latent(), 1000 * y, np.ones(N), np.array(["a"])))
    assert stats.variation(y) > 2
    assert 0.2 < v.item() < 0.95 * many.item()
