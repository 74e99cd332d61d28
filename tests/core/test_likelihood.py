import numpy as np
import pytest
import torch
from draws import normal
from scipy import stats
from scipy.optimize import minimize_scalar

from neurst.core.jet import seed
from neurst.core.likelihood import Gaussian, NegativeBinomial, Poisson, RootGaussian, Truncated

N, C = 7, 3
ETA, OTHER_ETA = normal(N, C, seed=1), normal(N, C, seed=2)
Y = torch.from_numpy(np.random.default_rng(0).poisson(2.0, (N, C)).astype(float))
WEIGHT = torch.tensor([0.0, 1.0, 2.0]).double()[torch.from_numpy(np.random.default_rng(1).integers(0, 3, (N, C)))]
SEEN = WEIGHT > 0
SCALES, DISPERSIONS = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.7, 3.0, 20.0])


def nb_logpmf(y, eta, theta):
    return stats.nbinom.logpmf(y, theta, theta / (theta + np.exp(eta)))


# likelihood -> log p(y | eta) of every entry by scipy
DENSITIES = {
    "gaussian": (lambda: Gaussian(0.7), lambda y, eta: stats.norm.logpdf(y, eta, 0.7)),
    "gaussian, by channel": (lambda: Gaussian(SCALES), lambda y, eta: stats.norm.logpdf(y, eta, SCALES.numpy())),
    "poisson": (Poisson, lambda y, eta: stats.poisson.logpmf(y, np.exp(eta))),
    "negative binomial": (lambda: NegativeBinomial(3.0), lambda y, eta: nb_logpmf(y, eta, 3.0)),
    "negative binomial, by channel": (lambda: NegativeBinomial(DISPERSIONS), lambda y, eta: nb_logpmf(y, eta, DISPERSIONS.numpy())),
}  # fmt: skip
LIKELIHOODS = {
    **{name: make for name, (make, _) in DENSITIES.items()},
    "root gaussian": RootGaussian,
    "truncated": lambda: Truncated(0.8),
}
# one noise parameter for all channels, or none: entries may be rearranged
EXCHANGEABLE = [name for name in LIKELIHOODS if "by channel" not in name]


def make(name):
    return LIKELIHOODS[name]().double()


@pytest.mark.parametrize("name", DENSITIES)
def test_differences_between_two_predictors_are_those_of_log_densities(name):
    likelihood, logpdf = make(name), DENSITIES[name][1]
    for weight in (None, WEIGHT):
        w = np.ones((N, C)) if weight is None else weight.numpy()
        found = likelihood(ETA, Y, weight) - likelihood(OTHER_ETA, Y, weight)
        expected = -np.sum(w * (logpdf(Y.numpy(), ETA.numpy()) - logpdf(Y.numpy(), OTHER_ETA.numpy())))
        np.testing.assert_allclose(found.item(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("cls", "values", "logpdf"), [(Gaussian, (0.4, 1.3), stats.norm.logpdf), (NegativeBinomial, (0.6, 9.0), nb_logpmf)]
)
def test_differences_between_two_noise_levels_are_those_of_log_densities(cls, values, logpdf):
    # no constant that depends on a learned parameter is left out
    found = [cls(value).double()(ETA, Y).item() for value in values]
    expected = [-logpdf(Y.numpy(), ETA.numpy(), value).sum() for value in values]
    np.testing.assert_allclose(np.diff(found), np.diff(expected), rtol=1e-5)


def test_the_root_form_is_the_minimum_over_the_noise_level():
    r = (Y - ETA).square()
    for weight, n, square in [(None, N * C, r.sum()), (WEIGHT, WEIGHT.sum(), (WEIGHT * r).sum())]:
        best = minimize_scalar(
            lambda s, n=n, square=square: float(square / (2 * s) + n * s / 2),
            bounds=(1e-3, 1e2),
            options={"xatol": 1e-9},
        )
        np.testing.assert_allclose(RootGaussian()(ETA, Y, weight).item(), best.fun, rtol=1e-9)


@pytest.mark.parametrize("tau", [0.3, 1.0, 100.0])
def test_the_truncated_form_is_the_minimum_over_a_sparse_term_and_its_residuals_stop_pulling(tau):
    eta = ETA.clone().requires_grad_()
    r = Y - ETA
    # entry by entry, S is 0 or takes the whole residual at the price tau^2
    joint = torch.minimum(r.square(), torch.full_like(r, tau**2)).sum()
    soft = r.sign() * (r.abs() - tau).clamp_min(0)
    found = Truncated(tau)(eta, Y)
    torch.testing.assert_close(found.detach(), (N * C * joint).sqrt())
    torch.testing.assert_close(found.detach(), (N * C) ** 0.5 * (r - soft).norm())
    (slope,) = torch.autograd.grad(found, eta)
    assert torch.equal(slope == 0, r.abs() > tau)
    if tau == 100.0:
        torch.testing.assert_close(found.detach(), RootGaussian()(ETA, Y))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_agree_with_finite_differences(name):
    likelihood = make(name)
    names = [key for key, _ in likelihood.named_parameters()]
    starts = [p.detach().clone().requires_grad_() for p in likelihood.parameters()]
    for weight in (None, WEIGHT):

        def value(eta, *parameters, weight=weight):
            return torch.func.functional_call(likelihood, dict(zip(names, parameters, strict=True)), (eta, Y, weight))

        assert torch.autograd.gradcheck(value, (ETA.clone().requires_grad_(), *starts))


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_missing_entries_count_as_if_dropped_even_if_nan(name):
    likelihood = make(name).requires_grad_()
    eta, kept = ETA.clone().requires_grad_(), ETA[SEEN][:, None].requires_grad_()
    value, dropped = likelihood(eta, torch.where(SEEN, Y, torch.nan), SEEN.double()), likelihood(kept, Y[SEEN][:, None])
    slope, *here = torch.autograd.grad(value, (eta, *likelihood.parameters()))
    expected, *there = torch.autograd.grad(dropped, (kept, *likelihood.parameters()))
    torch.testing.assert_close([value, slope[SEEN], *here], [dropped, expected[:, 0], *there])
    assert (slope[~SEEN] == 0).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_entry_of_weight_two_counts_twice_and_a_column_of_weights_serves_all_channels(name):
    likelihood, times = make(name), WEIGHT.flatten().long()
    torch.testing.assert_close(likelihood(ETA, Y), likelihood(ETA, Y, torch.ones(N, C).double()))
    torch.testing.assert_close(likelihood(ETA, Y, WEIGHT[:, 1:2]), likelihood(ETA, Y, WEIGHT[:, 1:2].expand(N, C)))
    if name in EXCHANGEABLE:
        repeated = [torch.repeat_interleave(part.flatten(), times)[:, None] for part in (ETA, Y)]
        torch.testing.assert_close(likelihood(ETA, Y, WEIGHT), likelihood(*repeated))


@pytest.mark.parametrize("name", DENSITIES)
def test_a_subset_of_channels_takes_its_own_parameters(name):
    likelihood, parts = make(name), [torch.tensor([2, 0]), torch.tensor([1])]
    for weight in (None, WEIGHT):
        pieces = [likelihood(ETA[:, c], Y[:, c], None if weight is None else weight[:, c], c) for c in parts]
        torch.testing.assert_close(sum(pieces), likelihood(ETA, Y, weight))


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["all", "weighted"])
@pytest.mark.parametrize("likelihood", [RootGaussian(), Truncated()], ids=repr)
def test_a_perfect_fit_has_zero_gradient_not_nan(likelihood, weight):
    eta = Y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(likelihood(eta, Y, weight), eta)
    assert (slope == 0).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_mean_is_the_predictor_or_its_exponential_and_predictors_average_as_means_do(name):
    likelihood, counts = make(name), name.startswith(("poisson", "negative"))
    assert likelihood.log_link is counts
    torch.testing.assert_close(likelihood.mean(ETA), ETA.exp() if counts else ETA)
    jet = likelihood.mean(seed(ETA))
    torch.testing.assert_close(jet.derivative(1)[0, :, 0], ETA.exp()[:, 0] if counts else torch.ones(N).double())
    for shift in (0.0, 200.0):  # exp(200) is beyond float32
        eta = normal(4, N, C) + shift
        torch.testing.assert_close(likelihood.mean(likelihood.average(eta)), likelihood.mean(eta).mean(0))
        assert likelihood.average(eta.float()).isfinite().all()
    torch.testing.assert_close(likelihood.average(ETA[None]), ETA)


def test_large_predictors_of_a_negative_binomial_stay_finite():
    eta = torch.full((1, 1), 200.0, requires_grad=True)
    value = NegativeBinomial(2.0)(eta, torch.ones(1, 1))
    value.backward()
    assert value.isfinite()
    assert eta.grad.isfinite()


@pytest.mark.parametrize("name", DENSITIES)
def test_the_information_is_the_expected_second_derivative(name):
    likelihood = make(name).requires_grad_(False)
    if name.startswith("gaussian"):  # whose second derivative is the same for all values
        values, chance = [Y], [torch.ones(N, C).double()]
    else:
        values = [torch.full((N, C), float(y)).double() for y in range(1000)]
        chance = [torch.from_numpy(np.exp(DENSITIES[name][1](y.numpy(), ETA.numpy()))) for y in values]
        torch.testing.assert_close(sum(chance), torch.ones(N, C).double(), rtol=0, atol=1e-5)  # nearly all there are
    expected = torch.zeros(N, C).double()
    for y, p in zip(values, chance, strict=True):
        eta = ETA.clone().requires_grad_()
        if name == "poisson":  # has first derivatives only
            terms = eta.exp() - y * eta
            (slope,) = torch.autograd.grad(terms.sum(), eta, create_graph=True)
        else:
            (slope,) = torch.autograd.grad(likelihood(eta, y), eta, create_graph=True)
        expected += p * torch.autograd.grad(slope.sum(), eta)[0]
    torch.testing.assert_close(likelihood.information(ETA).expand(N, C), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("likelihood", [RootGaussian(), Truncated()], ids=repr)
def test_likelihoods_that_are_no_densities_have_no_information(likelihood):
    with pytest.raises(NotImplementedError, match=f"{type(likelihood).__name__} has no Fisher information: expected"):
        likelihood.information(ETA)
