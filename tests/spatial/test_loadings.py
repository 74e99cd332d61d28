import numpy as np
import pytest
import torch
from scipy import sparse

from neurst.spatial import loadings, matrix
from neurst.spatial.loadings import count_loadings, gaussian_loadings
from neurst.spatial.matrix import moments

N, G, R = 301, 9, 3
PHI = np.where(np.arange(G) % 3 == 0, 0.0, 0.4)  # Poisson genes among over-dispersed ones
each_model = pytest.mark.parametrize("model", ["poisson", "negative_binomial", "gaussian"])
SIZE = np.random.default_rng(2).uniform(20, 60, N)


def latent():
    x = np.random.default_rng(0).uniform(0, 6, (N, 2))
    return np.column_stack([np.sin(x[:, 0]), np.cos(x[:, 1]), 0.5 * np.sin(x.sum(1))])


def values_of(model):
    """Genes with loadings of their own; the last has none."""
    rng = np.random.default_rng(1)
    true = 0.6 * rng.standard_normal((G, R))
    true[-1] = 0
    eta = latent() @ true.T
    if model == "gaussian":
        return (5 + 3 * eta + rng.standard_normal((N, G))).astype(np.float32)
    mean = SIZE[:, None] * np.exp(eta - 2)
    return rng.poisson(mean if model == "poisson" else mean * rng.gamma(2.5, 0.4, mean.shape)).astype(np.float32)


def solve(model, values=None, *, size=SIZE, phi=None, z=None):
    values, z = values_of(model) if values is None else values, latent() if z is None else z
    if model == "gaussian":
        return gaussian_loadings(z, values)
    rate = np.asarray(values.sum(0)).ravel() / size.sum()
    return count_loadings(z, values, size, rate, PHI if model == "negative_binomial" and phi is None else phi)


def objective(model, values, g):
    """Objective of gene g as a function of (b, V) in float64, written from the likelihoods themselves."""
    y = torch.from_numpy(values[:, g].astype(float))
    f = torch.from_numpy(np.column_stack([np.ones(N), latent()]))
    if model == "gaussian":  # the noise at its best: N/2 log of the residual sum of squares
        sd = float(moments(values)[1][g])
        return lambda beta: N / 2 * (y - f @ beta).square().sum().log() + (beta[1:] / sd).square().sum() / 2
    size = torch.from_numpy(SIZE)

    def negative_log_posterior(beta):
        mean = size * torch.exp(f @ beta)
        if model == "poisson" or PHI[g] == 0:
            log_p = torch.distributions.Poisson(mean).log_prob(y)
        else:
            theta = torch.tensor(1 / PHI[g])
            log_p = torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log()).log_prob(y)
        return -log_p.sum() + beta[1:].square().sum() / 2

    return negative_log_posterior


@each_model
def test_the_solution_is_stationary_so_that_it_is_the_minimum_of_a_convex_objective(model):
    values = values_of(model)
    v, b = solve(model, values)
    for g in range(G):
        cost, beta = objective(model, values, g), torch.tensor([b[g], *v[g]], dtype=torch.double)
        slope = torch.func.grad(cost)(beta)
        step = torch.linalg.solve(torch.func.hessian(cost)(beta), slope)
        assert 0 <= step @ slope / 2 < 1e-3  # nats that Newton would still gain
        assert step.abs().max() < 5e-3
        assert torch.func.grad(cost)(beta + 0.05).norm() > 5 * slope.norm()  # the law can fail


def test_without_over_dispersion_the_negative_binomial_is_poisson():
    for a, b in zip(solve("poisson", phi=np.full(G, 1e-6)), solve("poisson"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert np.abs(solve("poisson", phi=np.full(G, 2.0))[0] - solve("poisson")[0]).max() > 0.01


@each_model
def test_loadings_do_not_depend_on_the_container_nor_on_how_the_work_is_divided(model, monkeypatch):
    whole = solve(model)
    for container in (sparse.csr_array, sparse.csr_matrix):
        for a, b in zip(solve(model, container(values_of(model))), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for genes, spots in ((1, 10**6), (4, 7), (10**6, 300)):  # most at once; with one gene at a time each is on its own
        monkeypatch.setattr(matrix, "DENSE_VALUES", genes * N)
        monkeypatch.setattr(loadings, "SPOTS_AT_ONCE", spots)
        for a, b in zip(solve(model), whole, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


@each_model
def test_the_unit_of_values_and_libraries_does_not_matter(model):
    v, b = solve(model)
    if model == "gaussian":
        other, intercept = solve(model, 64 * values_of(model) - 32)
        np.testing.assert_allclose(other, 64 * v, rtol=1e-5)
        np.testing.assert_allclose(intercept, 64 * b - 32, rtol=1e-5)
    else:
        other, intercept = solve(model, size=1000 * SIZE)
        np.testing.assert_allclose(other, v, atol=2e-3)
        np.testing.assert_allclose(intercept, b - np.log(1000), atol=2e-3)


RARE = {  # values of one gene
    "one count": np.arange(N) == 7,
    "one large count": 1e6 * (np.arange(N) == 7),
    "counts where the first latent is high": 40.0 * (latent()[:, 0] > 0.9),
}


@pytest.mark.parametrize("gene", RARE.values(), ids=RARE)
def test_loadings_of_a_rare_gene_are_finite_and_keep_its_mean(gene):
    values = gene.astype(np.float32)[:, None]
    for phi in (1.0, 0.0):
        v, b = solve("poisson", values, size=np.full(N, 10.0), phi=np.array([phi]))
        assert np.isfinite(v).all()
        assert np.isfinite(b).all()
    # without over-dispersion the slope of the intercept is zero: the total is met
    assert (10 * np.exp(latent() @ v.T + b)).sum() == pytest.approx(values.sum(), rel=0.02)


@pytest.mark.parametrize(("count", "phi"), [(5.0, 0.0), (5000.0, 0.0), (5000.0, 0.4)])
def test_a_step_that_goes_too_far_is_shortened(count, phi):
    z = np.where(np.arange(N) < 3, 10.0, 0.0)[:, None]  # a full step from the mean rate ends near exp(100)
    y = np.where(np.arange(N) < 3, count, np.arange(N) % 10 == 0).astype(np.float32)[:, None]
    v, b = solve("poisson", y, size=np.ones(N), phi=np.array([phi]), z=z)
    mean = np.exp(z * v + b)
    pull, curve = (y - mean) / (1 + phi * mean), mean / (1 + phi * mean)
    assert abs(pull.sum()) < 0.05 * curve.sum() ** 0.5  # the slopes, in units of what they scatter by
    assert abs((pull * z).sum() - v.item()) < 0.05 * (curve * z**2).sum() ** 0.5
