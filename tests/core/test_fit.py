from dataclasses import dataclass, field

import pytest
import torch
from draws import normal, uniform
from scipy.optimize import minimize_scalar

from neurst.core.check import state_of, units_do_not_matter
from neurst.core.fit import FitConfig, Loadings, fit_field, resolve_device
from neurst.core.jet import Jet
from neurst.core.likelihood import Gaussian, NegativeBinomial, Poisson, RootGaussian, Truncated
from neurst.core.nets import NETWORKS, Fourier, LowRank, Siren, Spline
from neurst.core.penalty import TGV, AnisotropicTV, IsotropicTV, Penalty, SpaceVariantTV, score
from neurst.core.samples import Box, Samples

N = 250
COORDS = uniform(N, 2, low=0.0, high=40.0)


def truth(coords):
    """Three smooth channels of coordinates from 0 to 40."""
    x, y = coords.T / 40
    return torch.stack([torch.sin(4 * x) * torch.cos(3 * y), x * y, torch.cos(5 * x + 2 * y)], 1)


NOISE = 0.3
NOISY = truth(COORDS) + NOISE * normal(N, 3, seed=1)
COUNTS = torch.poisson(2 * truth(COORDS).exp(), generator=torch.Generator().manual_seed(2))
SMALL = {
    "siren": Siren(width=16, depth=2, omega=3.0),
    "fourier": Fourier(width=16, depth=1, n_features=8),
    "lowrank": LowRank(rank=4, width=16),
    "spline": Spline(cells=(2, 4)),
}
LIKELIHOODS = {
    "gaussian": Gaussian(NOISE, learned=True),
    "root": RootGaussian(),
    "truncated": Truncated(2.0),
    "poisson": Poisson(),
    "negative binomial": NegativeBinomial(torch.tensor([5.0, 10.0, 20.0])),
}


def config(**numbers):
    return FitConfig(**({"steps": 30, "learning_rate": 1e-2, "n_regularisation": 64, "device": "cpu"} | numbers))


def fit(
    values=NOISY,
    *,
    coords=COORDS,
    network=SMALL["siren"],
    likelihood=Gaussian(NOISE),
    penalty=IsotropicTV(),
    lam=30.0,
    **rest,
):
    parts = {name: rest.pop(name) for name in ("weight", "offset", "footprint") if name in rest}
    options = {
        name: rest.pop(name) for name in ("head", "n_latent", "box", "region", "start", "on_step") if name in rest
    }
    samples = Samples(coords, values, **parts)
    return fit_field(
        samples, network=network, likelihood=likelihood, penalty=penalty, lam=lam, config=config(**rest), **options
    )


def same(a, b):
    """Whether two fields hold the same weights, bit by bit."""
    a, b = state_of(a.net) | state_of(a.head), state_of(b.net) | state_of(b.head)
    return all(torch.equal(a[key], b[key]) for key in a)


def objective(found, lam=30.0):
    """The full objective of a fitted field on NOISY, by its definition."""
    eta, x = found(COORDS), uniform(2000, 2)
    net = found.net.double()
    return (Gaussian(NOISE)(eta, NOISY) + lam * score(IsotropicTV(), net, x)).item()


@pytest.mark.parametrize("likelihood", ["gaussian", "root"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_smooth_field_is_recovered_better_than_its_noisy_data(network, likelihood):
    found = fit(network=SMALL[network], likelihood=LIKELIHOODS[likelihood], steps=200, lam=20.0)
    error = (found(COORDS) - truth(COORDS)).square().mean().sqrt()
    assert error < NOISE / 2


def test_the_recorded_objective_is_likelihood_plus_lam_times_penalty_and_falls():
    found = fit(steps=50, lam=12.0, record_every=7)
    assert found.history["step"] == [0, 7, 14, 21, 28, 35, 42, 49]
    for value, nll, penalty in zip(*(found.history[k] for k in ("objective", "likelihood", "penalty")), strict=True):
        assert value == pytest.approx(nll + 12.0 * penalty, rel=1e-5)
    assert found.history["objective"][-1] < 0.5 * found.history["objective"][0]


def test_an_entry_of_the_history_is_the_mean_since_the_one_before():
    each, seventh = (fit(steps=15, record_every=k).history["objective"] for k in (1, 7))
    assert seventh == pytest.approx([each[0], sum(each[1:8]) / 7, sum(each[8:]) / 7], rel=1e-6)


def test_the_prior_of_the_head_is_part_of_the_objective():
    weight = normal(3, 2)
    history = fit(head=Loadings(weight, torch.zeros(3)), n_latent=2, lam=12.0, steps=1).history
    rest = history["likelihood"][0] + 12.0 * history["penalty"][0]
    assert history["objective"][0] - rest == pytest.approx(weight.square().sum().item() / 2, rel=1e-4)


def test_a_seed_settles_a_fit_and_the_global_generator_is_not_touched():
    state = torch.get_rng_state()
    first, again, other = (fit(random_state=seed, batch_points=60, batch_channels=2) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again)
    assert first.history == again.history
    assert not same(first, other)


@pytest.mark.parametrize(
    "batches", [{"batch_points": 60}, {"batch_channels": 2}, {"batch_points": 60, "batch_channels": 1}], ids=str
)
def test_minibatches_reach_about_the_objective_of_the_full_batch(batches):
    full, start = objective(fit(steps=200)), objective(fit(steps=1, learning_rate=1e-9))
    assert abs(objective(fit(steps=200, **batches)) - full) < 0.05 * (start - full)


@pytest.mark.parametrize("batches", [{"batch_points": 60}, {"batch_channels": 2}], ids=str)
def test_the_likelihood_of_a_minibatch_is_scaled_to_the_whole(batches):
    likelihood = lambda **rest: fit(steps=1, record_every=1, likelihood=Poisson(), values=COUNTS, **rest).history[
        "likelihood"
    ][0]
    full = likelihood()
    drawn = torch.tensor(
        [likelihood(random_state=seed, **batches) / likelihood(random_state=seed) for seed in range(12)]
    )
    assert drawn.mean() == pytest.approx(1.0, abs=0.1)
    assert drawn.std() > 0
    assert full == likelihood(batch_points=N, batch_channels=3)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("batches", [{}, {"batch_points": 60}, {"batch_points": 60, "batch_channels": 2}], ids=str)
def test_sparse_values_give_the_fit_of_dense_ones(batches):
    dense, sparse = (fit(values, likelihood=Poisson(), **batches) for values in (COUNTS, COUNTS.to_sparse_csr()))
    assert same(dense, sparse)


@pytest.mark.parametrize("batches", [{}, {"batch_points": 60, "batch_channels": 2}], ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_what_a_missing_entry_holds_does_not_matter(likelihood, batches):
    seen = uniform(N, 3, seed=3) < 0.4
    fits = [
        fit(torch.where(seen, COUNTS, hidden), weight=seen.double(), likelihood=LIKELIHOODS[likelihood], **batches)
        for hidden in (torch.nan, 3.0)
    ]
    assert same(*fits)
    assert not same(fits[0], fit(COUNTS, likelihood=LIKELIHOODS[likelihood], **batches))


def test_an_offset_is_added_to_the_predictor():
    size = normal(N, 1, seed=4)
    counts = torch.poisson((truth(COORDS)[:, :1] + 1 + size).exp(), generator=torch.Generator().manual_seed(0))
    found = fit(counts, likelihood=Poisson(), offset=size, steps=200, lam=10.0)
    error = (found(COORDS).log() - truth(COORDS)[:, :1] - 1).square().mean().sqrt()
    assert error < 0.25


@pytest.mark.parametrize("penalty", [IsotropicTV(), SpaceVariantTV()], ids=repr)
def test_units_of_the_coordinates_do_not_matter(penalty):
    refresh = {"refresh_every": 10, "refresh_points": 100}
    units_do_not_matter(lambda coords: fit(coords=coords, penalty=penalty, double=True, **refresh), COORDS)


AREA = 4.0 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
EACH_BATCH = pytest.mark.parametrize("batches", [{}, {"batch_points": 60, "batch_channels": 2}], ids=["all", "batches"])


def averages(field, coords, footprint):
    """Mean of a field over a footprint, offset by offset."""
    return torch.stack([field(coords + offset) for offset in footprint]).mean(0)


@EACH_BATCH
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_tiny_footprint_is_a_point(likelihood, batches):
    options = {"likelihood": LIKELIHOODS[likelihood], "double": True} | batches
    point, tiny = (fit(COUNTS, footprint=footprint, **options) for footprint in (None, 1e-9 * AREA))
    torch.testing.assert_close(tiny(COORDS), point(COORDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("likelihood", [Poisson(), Gaussian(0.1)], ids=["log link", "identity"])
def test_the_average_of_a_field_over_a_footprint_is_that_of_its_expected_values(likelihood):
    found = fit(COUNTS, likelihood=likelihood, footprint=AREA, double=True)
    torch.testing.assert_close(found.averaged(COORDS, AREA), averages(found, COORDS, AREA))
    assert not torch.allclose(found.averaged(COORDS, AREA), found(COORDS), rtol=1e-3)


def waves(coords):
    """Rates that a footprint levels to a good part."""
    return 50 * torch.sin(coords @ torch.tensor([[0.25, 0.05], [0.05, 0.25]]).double()).exp()


@pytest.mark.parametrize("seen", [None, (uniform(N, 2, seed=3) < 0.8).double()], ids=["all seen", "some missing"])
@pytest.mark.parametrize(
    ("likelihood", "batches"),
    [
        (Poisson(), {}),
        (NegativeBinomial(torch.full((2,), 1e3)), {"batch_points": 200}),
        (Gaussian(2.5), {"batch_points": 200, "batch_channels": 1}),
    ],
    ids=["poisson", "negative binomial, batches", "gaussian, batches"],
)
def test_a_field_with_a_footprint_averages_to_what_was_measured_and_is_sharper_than_that(likelihood, batches, seen):
    size = None if isinstance(likelihood, Gaussian) else normal(N, 1, seed=4)
    measured = averages(waves, COORDS, AREA) * (1.0 if size is None else size.exp())
    values = measured if seen is None else torch.where(seen > 0, measured, torch.nan)
    parts = {"offset": size, "weight": seen, "head": Loadings(30 * torch.eye(2), torch.full((2,), 50.0))}
    if size is not None:
        parts["head"] = Loadings(torch.eye(2), torch.full((2,), 4.0))
    options = {"steps": 400, "lam": 0.3, "n_latent": 2, "likelihood": likelihood} | parts | batches
    area, point = (fit(values, footprint=footprint, **options) for footprint in (AREA, None))
    inner = COORDS[((COORDS > 5) & (COORDS < 35)).all(1)]
    assert rms_log(area.averaged(inner, AREA), averages(waves, inner, AREA)) < 0.1
    assert rms_log(area(inner), waves(inner)) < 0.6 * rms_log(point(inner), waves(inner))


def rms_log(found, truth):
    return (found.clamp_min(1e-3) / truth).log().square().mean().sqrt()


def test_units_do_not_matter_to_a_footprint_either():
    scale = lambda coords: (coords.amax(0) - coords.amin(0)).max() / (COORDS.amax(0) - COORDS.amin(0)).max()
    units_do_not_matter(lambda coords: fit(coords=coords, footprint=scale(coords) * AREA, double=True), COORDS)


class Stop(Exception):
    pass


def test_an_exception_in_on_step_stops_the_fit():
    seen = []

    def stop(step, value):
        seen.append((step, value))
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        fit(on_step=stop, record_every=1)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert len({value for _, value in seen}) == 5


def test_a_fit_goes_on_from_another():
    first = fit(steps=100)
    before, fresh = state_of(first.net), fit(steps=1).history["objective"][0]
    second = fit(steps=20, learning_rate=1e-3, start=first)
    assert second.history["objective"][0] < 0.5 * fresh
    assert second.history["objective"][0] == pytest.approx(first.history["objective"][-1], rel=0.1)
    assert not same(first, second)
    torch.testing.assert_close(state_of(first.net), before, rtol=0, atol=0)


def test_a_fit_that_goes_on_keeps_the_box_and_the_channels_of_its_start():
    part = COORDS[:, 0] < 20
    first = fit()
    second = fit(NOISY[part], coords=COORDS[part], start=first, steps=1, learning_rate=1e-9)
    torch.testing.assert_close(second(COORDS), first(COORDS))
    assert second.box == first.box
    few = fit(head=Loadings(normal(3, 2), torch.zeros(3)), n_latent=2, penalty=TGV())
    assert fit(start=few, penalty=TGV()).n_latent == 2


@dataclass(frozen=True)
class Adaptive(Penalty):
    """Counts its refreshes and the points they look at."""

    seen: list = field(default_factory=list)

    def __call__(self, f: Jet):
        return IsotropicTV()(f)

    def refreshed(self, field, x):
        self.seen.append(tuple(x.shape))
        return self


def test_an_adaptive_penalty_is_refreshed_but_not_from_an_untrained_network():
    fresh, again = Adaptive(), Adaptive()
    first = fit(penalty=fresh, steps=31, refresh_every=10, refresh_points=77)
    fit(penalty=again, steps=31, refresh_every=10, refresh_points=77, start=first)
    assert fresh.seen == [(77, 2)] * 3
    assert again.seen == [(77, 2)] * 4


def test_a_space_variant_fit_leaves_anisotropic_tv_at_its_first_refresh():
    plain, varying = (fit(penalty=p, refresh_every=100) for p in (AnisotropicTV(), SpaceVariantTV()))
    assert same(plain, varying)
    varying = fit(penalty=SpaceVariantTV(), refresh_every=10, refresh_points=100)
    assert not same(plain, varying)
    assert varying(COORDS).isfinite().all()


def test_tgv_keeps_the_slope_of_a_ramp_that_tv_flattens():
    ramp = COORDS[:, :1] / 20 - 1
    strong = {"steps": 300, "lam": 150.0, "likelihood": Gaussian(1.0), "double": True}
    slopes = {}
    for penalty in (IsotropicTV(), TGV(a0=0.5)):
        found = fit(ramp, penalty=penalty, **strong)
        assert found(COORDS).shape == (N, 1)
        assert found.latent_jacobian(COORDS).shape == (N, 1, 2)
        slopes[type(penalty)] = float(found.latent_jacobian(COORDS)[:, 0, 0].mean() * 20)
    assert slopes[IsotropicTV] < 0.5
    assert slopes[TGV] > 0.8


def test_without_a_prior_the_penalty_is_not_even_computed():
    class Refuses(IsotropicTV):
        def __call__(self, f):
            raise AssertionError

    found = fit(penalty=Refuses(), lam=0)
    assert set(found.history["penalty"]) == {0.0}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_fits_with_every_likelihood(network, likelihood):
    original = LIKELIHOODS[likelihood]
    before = state_of(original)
    found = fit(COUNTS, network=SMALL[network], likelihood=original, steps=5, record_every=1)
    assert found(COORDS).isfinite().all()
    assert found.history["objective"][-1] < found.history["objective"][0]
    torch.testing.assert_close(state_of(original), before, rtol=0, atol=0)  # a copy is fitted
    if before:
        assert any(not torch.equal(value, before[key]) for key, value in state_of(found.likelihood).items())


@pytest.mark.parametrize("batches", [{}, {"batch_points": 100, "batch_channels": 2}], ids=str)
@pytest.mark.parametrize("gain", [None, torch.tensor([0.5, 1.0, 2.0])], ids=["no gain", "gain"])
def test_loadings_spread_few_latent_channels_over_many(gain, batches):
    found = fit(head=Loadings(normal(3, 2), torch.zeros(3), gain), n_latent=2, steps=200, lam=5.0, **batches)
    assert found.latent(COORDS).shape == (N, 2)
    assert found(COORDS).shape == (N, 3)
    torch.testing.assert_close(found.head.loadings(), found.head.weight * (1.0 if gain is None else gain[:, None]))
    torch.testing.assert_close(found(COORDS), found.latent(COORDS) @ found.head.loadings().T + found.head.intercept())
    # the best rank-2 fit without any prior
    u, s, v = torch.linalg.svd(truth(COORDS) - truth(COORDS).mean(0), full_matrices=False)
    floor = s[2] / (3 * N) ** 0.5
    assert (found(COORDS) - truth(COORDS)).square().mean().sqrt() < floor + NOISE / 2


def test_the_best_scale_of_a_component_makes_its_cost_concave():
    v, lam, tv = normal(5), 3.0, 1.7
    best = minimize_scalar(
        lambda c: Loadings(c * v[:, None], v).prior().item() + lam * tv / c,
        bounds=(1e-2, 1e2),
        options={"xatol": 1e-10},
    )
    assert best.fun == pytest.approx(1.5 * (lam * float(v.norm()) * tv) ** (2 / 3), rel=1e-8)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_derivatives_of_a_field_are_per_unit_of_the_user(d):
    coords = uniform(40, d, low=100.0, high=160.0)
    found = fit(coords[:, :1] / 50, coords=coords, penalty=TGV(), double=True)
    x, h = coords[:7] + 0.3, 1e-3
    steps = h * torch.eye(d).double()
    central = torch.stack([(found.latent(x + e) - found.latent(x - e)) / (2 * h) for e in steps], -1)
    torch.testing.assert_close(found.latent_jacobian(x), central, rtol=1e-5, atol=1e-8)
    second = torch.stack([(found.latent_jacobian(x + e) - found.latent_jacobian(x - e)) / (2 * h) for e in steps], -1)
    torch.testing.assert_close(found.latent_hessian(x), second, rtol=1e-5, atol=1e-8)


def test_a_field_is_read_in_the_units_of_a_given_box():
    box = Box(torch.tensor([20.0, 20.0]).double(), 40.0)
    assert fit(box=box).box == box


def test_coordinates_far_from_the_origin_keep_their_precision():
    # float32 coordinates of this size would be multiples of 4
    far = COORDS + 5e7
    torch.testing.assert_close(fit(coords=far)(far), fit()(COORDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_a_prior_strength_is_finite_and_not_negative(lam):
    with pytest.raises(ValueError, match=rf"`lam={lam}`: expected a finite number >= 0"):
        fit(lam=lam)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"steps": 0}, "`steps=0`: expected a whole number >= 1"),
        ({"refresh_every": 0}, "`refresh_every=0`"),
        ({"record_every": -1}, "`record_every=-1`"),
        ({"n_regularisation": 0}, "`n_regularisation=0`"),
        ({"batch_points": -1}, r"`batch_points=-1`: expected 0 \(all\)"),
        ({"batch_channels": -2}, "`batch_channels=-2`"),
        ({"learning_rate": 0.0}, r"`learning_rate=0.0`.*expected a positive rate"),
        ({"near": 1.5}, r"`near=1.5`.*share between 0 and 1"),
        ({"jitter": -0.1}, r"`jitter=-0.1`.*jitter >= 0"),
    ],
)
def test_a_config_names_the_number_it_refuses(numbers, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**numbers)


def test_an_objective_that_is_not_finite_stops_the_fit():
    with pytest.raises(
        ValueError, match=r"the objective is nan at step 0: lower `learning_rate` \(0.01\), or look for extreme"
    ):
        fit(torch.full((N, 1), torch.nan))


def test_a_device_is_taken_as_named():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [0, 16])
def test_a_fit_on_cuda_agrees_with_one_on_the_cpu(batch):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(61, 2, generator=generator)
    y = torch.poisson(2 * torch.exp(torch.sin(5 * x[:, :1])).expand(-1, 3), generator=generator).to_sparse_csr()
    fields = [
        fit_field(
            Samples(x, y),
            network=Siren(width=16),
            likelihood=Poisson(),
            penalty=SpaceVariantTV(),
            lam=1.0,
            config=FitConfig(steps=120, batch_points=batch, n_regularisation=64, device=device, double=True),
        )
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(fields[1](x), fields[0](x), rtol=1e-3, atol=1e-3)


def test_regularisation_reaches_the_region_where_a_field_will_be_read():
    # half the plane has no values: named as a region, it is as flat there as the penalty asks
    left = COORDS[COORDS[:, 0] < 20]
    steep = lambda found: found.latent_jacobian(COORDS[COORDS[:, 0] > 30]).norm(dim=-1).mean()
    options = {"coords": left, "box": Box.of(COORDS), "near": 1.0, "jitter": 0.5, "lam": 300.0, "steps": 100}
    values = truth(left)
    assert steep(fit(values, region=COORDS, **options)) < 0.5 * steep(fit(values, **options))
