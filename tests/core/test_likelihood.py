import numpy as np
import pytest
import torch
from draws import normal, uniform
from scipy import stats
from scipy.optimize import minimize_scalar

from neurst.core.likelihood import Gaussian, NegativeBinomial, Poisson, RootGaussian, Truncated

N, C = 7, 3
ETA, OTHER_ETA = normal(N, C, seed=1), normal(N, C, seed=2)
Y = torch.from_numpy(np.random.default_rng(0).poisson(2.0, (N, C)).astype(float))
WEIGHT = torch.tensor([0.0, 1.0, 2.0]).double()[torch.from_numpy(np.random.default_rng(1).integers(0, 3, (N, C)))]
SCALES, DISPERSIONS = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.7, 3.0, 20.0])

# likelihood -> log p(y | eta) of every entry by scipy
DENSITIES = {
    "gaussian": (lambda: Gaussian(0.7), lambda y, eta: stats.norm.logpdf(y, eta, 0.7)),
    "gaussian, by channel": (lambda: Gaussian(SCALES), lambda y, eta: stats.norm.logpdf(y, eta, SCALES.numpy())),
    "poisson": (Poisson, lambda y, eta: stats.poisson.logpmf(y, np.exp(eta))),
    "negative binomial": (lambda: NegativeBinomial(3.0), lambda y, eta: nb_logpmf(y, eta, 3.0)),
    "negative binomial, by channel": (
        lambda: NegativeBinomial(DISPERSIONS),
        lambda y, eta: nb_logpmf(y, eta, DISPERSIONS.numpy()),
    ),
}
LIKELIHOODS = {
    **{name: make for name, (make, _) in DENSITIES.items()},
    "root gaussian": RootGaussian,
    "truncated": lambda: Truncated(0.8),
}
# one noise parameter for all channels, or none: entries may be rearranged
EXCHANGEABLE = [name for name in LIKELIHOODS if "by channel" not in name]


def nb_logpmf(y, eta, theta):
    return stats.nbinom.logpmf(y, theta, theta / (theta + np.exp(eta)))


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
    ("cls", "values", "logpdf"),
    [
        (Gaussian, (0.4, 1.3), lambda y, eta, s: stats.norm.logpdf(y, eta, s)),
        (NegativeBinomial, (0.6, 9.0), nb_logpmf),
    ],
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
def test_the_truncated_form_is_the_minimum_over_a_sparse_term(tau):
    r = Y - ETA
    # entry by entry, S is 0 or takes the whole residual at the price tau^2
    joint = torch.minimum(r.square(), torch.full_like(r, tau**2)).sum()
    soft = r.sign() * (r.abs() - tau).clamp_min(0)
    found = Truncated(tau).double()(ETA, Y)
    torch.testing.assert_close(found, (N * C * joint).sqrt())
    torch.testing.assert_close(found, (N * C) ** 0.5 * (r - soft).norm())
    if tau == 100.0:
        torch.testing.assert_close(found, RootGaussian()(ETA, Y))


def test_residuals_beyond_the_threshold_stop_pulling():
    eta = ETA.clone().requires_grad_()
    (slope,) = torch.autograd.grad(Truncated(0.8)(eta, Y), eta)
    beyond = (Y - ETA).abs() > 0.8
    assert beyond.any()
    assert (slope[beyond] == 0).all()
    assert (slope[~beyond] != 0).all()


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["all", "weighted"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_gradients_agree_with_finite_differences(name, weight):
    likelihood = make(name)
    names = [key for key, _ in likelihood.named_parameters()]
    starts = [p.detach().clone().requires_grad_() for p in likelihood.parameters()]

    def value(eta, *parameters):
        return torch.func.functional_call(likelihood, dict(zip(names, parameters, strict=True)), (eta, Y, weight))

    assert torch.autograd.gradcheck(value, (ETA.clone().requires_grad_(), *starts))


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_missing_entries_count_as_if_dropped_even_if_nan(name):
    likelihood, seen = make(name), WEIGHT > 0
    eta = ETA.clone().requires_grad_()
    value = likelihood(eta, torch.where(seen, Y, torch.nan), seen.double())
    (slope,) = torch.autograd.grad(value, eta)
    kept = ETA[seen][:, None].requires_grad_()
    dropped = likelihood(kept, Y[seen][:, None])
    (expected,) = torch.autograd.grad(dropped, kept)
    torch.testing.assert_close(value, dropped)
    torch.testing.assert_close(slope[seen], expected[:, 0])
    assert (slope[~seen] == 0).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_missing_entries_do_not_move_the_noise_parameters(name):
    likelihood, seen = make(name), WEIGHT > 0
    likelihood.requires_grad_()
    values = [likelihood(ETA, torch.where(seen, Y, hidden), seen.double()) for hidden in (torch.nan, 5.0)]
    assert torch.equal(*values)
    for parameter in likelihood.parameters():
        slopes = [torch.autograd.grad(value, parameter, retain_graph=True)[0] for value in values]
        assert slopes[0].isfinite().all()
        assert torch.equal(*slopes)


@pytest.mark.parametrize("name", EXCHANGEABLE)
def test_an_entry_of_weight_two_counts_twice(name):
    likelihood, times = make(name), WEIGHT.flatten().long()
    repeated = [torch.repeat_interleave(part.flatten(), times)[:, None] for part in (ETA, Y)]
    torch.testing.assert_close(likelihood(ETA, Y, WEIGHT), likelihood(*repeated))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_no_weight_is_weight_one_and_a_column_serves_all_channels(name):
    likelihood = make(name)
    torch.testing.assert_close(likelihood(ETA, Y), likelihood(ETA, Y, torch.ones(N, C).double()))
    torch.testing.assert_close(likelihood(ETA, Y, WEIGHT[:, 1:2]), likelihood(ETA, Y, WEIGHT[:, 1:2].expand(N, C)))


@pytest.mark.parametrize("name", DENSITIES)
def test_a_subset_of_channels_takes_its_own_parameters(name):
    likelihood, parts = make(name), [torch.tensor([2, 0]), torch.tensor([1])]
    for weight in (None, WEIGHT):
        pieces = [likelihood(ETA[:, c], Y[:, c], None if weight is None else weight[:, c], c) for c in parts]
        torch.testing.assert_close(sum(pieces), likelihood(ETA, Y, weight))


def test_a_negative_binomial_with_large_dispersion_is_poisson():
    found, expected = (
        torch.func.grad(lambda eta, likelihood=likelihood: likelihood(eta, Y))(ETA)
        for likelihood in (NegativeBinomial(1e7).double(), lambda eta, y: Poisson()(eta, y, torch.ones(N, C).double()))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_perfect_fit_has_zero_gradient_not_nan():
    for likelihood in (RootGaussian(), Truncated()):
        for weight in (None, WEIGHT):
            eta = Y.clone().requires_grad_()
            (slope,) = torch.autograd.grad(likelihood(eta, Y, weight), eta)
            assert (slope == 0).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_mean_is_the_predictor_or_its_exponential(name):
    counts = name.startswith(("poisson", "negative"))
    torch.testing.assert_close(make(name).mean(ETA), ETA.exp() if counts else ETA)


@pytest.mark.parametrize("shift", [0.0, 200.0])  # exp(200) is beyond float32
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_average_predictor_expects_the_mean_of_what_its_parts_expect(name, shift):
    likelihood, eta = make(name), normal(4, N, C) + shift
    torch.testing.assert_close(likelihood.mean(likelihood.average(eta)), likelihood.mean(eta).mean(0))
    assert likelihood.average(eta.float()).isfinite().all()
    torch.testing.assert_close(likelihood.average(ETA[None]), ETA)


def test_a_noise_level_is_learned_only_if_asked():
    assert not any(p.requires_grad for p in Gaussian().parameters())
    likelihood = Gaussian(3.0, learned=True).double()
    optimiser = torch.optim.LBFGS(likelihood.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = likelihood(ETA, Y)
        value.backward()
        return value

    optimiser.step(closure)
    torch.testing.assert_close(
        likelihood.log_scale.exp().item(), (Y - ETA).square().mean().sqrt().item(), rtol=1e-4, atol=0.0
    )


def test_large_predictors_of_a_negative_binomial_stay_finite():
    eta = torch.full((1, 1), 200.0, requires_grad=True)
    value = NegativeBinomial(2.0)(eta, torch.ones(1, 1))
    value.backward()
    assert value.isfinite()
    assert eta.grad.isfinite().all()


def test_a_threshold_is_positive():
    with pytest.raises(ValueError, match=r"`tau=0`: expected a positive threshold in the units of the data"):
        Truncated(0)


def test_float32_agrees_with_float64():
    eta, y, weight = (part.float() for part in (ETA, Y, uniform(N, C, low=0.5, high=2.0)))
    for name in LIKELIHOODS:
        single = LIKELIHOODS[name]()(eta, y, weight)
        assert single.dtype == torch.float32
        torch.testing.assert_close(
            single.double(), make(name)(eta.double(), y.double(), weight.double()), rtol=1e-4, atol=1e-4
        )
