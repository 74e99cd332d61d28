from dataclasses import dataclass, field

import pytest
import torch
from draws import NETWORKS, normal, uniform
from torch import nn

from neurst.core.check import state_of, units_do_not_matter
from neurst.core.fit import DEVICE, FitConfig, fit_field, resolve_device
from neurst.core.heads import Loadings
from neurst.core.jet import Jet
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian, NegativeBinomial, Poisson, RootGaussian, Truncated
from neurst.core.nets import Network, Siren
from neurst.core.penalty import TGV, IsotropicTV, Penalty, SpaceVariantTV, evaluate
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
LIKELIHOODS = {
    "gaussian": Gaussian(NOISE, learned=True),
    "root": RootGaussian(),
    "truncated": Truncated(2.0),
    "poisson": Poisson(),
    "negative binomial": NegativeBinomial(torch.tensor([5.0, 10.0, 20.0])),
}
BATCHES = {"batch_points": 60, "batch_channels": 2}


def config(**numbers):
    return FitConfig(**({"steps": 30, "learning_rate": 1e-2, "n_regularisation": 64, "device": "cpu"} | numbers))


def fit(
    values=NOISY,
    *,
    coords=COORDS,
    network=NETWORKS["siren"],
    likelihood=Gaussian(NOISE),
    penalty=IsotropicTV(),
    lam=30.0,
    **rest,
):
    parts = {name: rest.pop(name) for name in ("weight", "offset", "footprint") if name in rest}
    options = {name: rest.pop(name) for name in ("head", "n_latent", "box", "region", "on_step") if name in rest}
    samples = Samples(coords, values, **parts)
    return fit_field(
        samples, network=network, likelihood=likelihood, penalty=penalty, lam=lam, config=config(**rest), **options
    )


def same(a, b):
    """Whether two fields hold the same weights, bit by bit."""
    a, b = state_of(a.net) | state_of(a.head), state_of(b.net) | state_of(b.head)
    return all(torch.equal(a[key], b[key]) for key in a)


def rms(difference):
    return difference.square().mean().sqrt()


# ---- what is found


ANY = [name for name in NETWORKS if name != "bumps"]  # networks that can be any function


@pytest.mark.parametrize(("network", "likelihood"), [("siren", "root"), *((name, "gaussian") for name in ANY)])
def test_a_smooth_field_is_recovered_better_than_its_noisy_data(network, likelihood):
    found = fit(network=NETWORKS[network], likelihood=LIKELIHOODS[likelihood], steps=150, lam=20.0, learning_rate=2e-2)
    assert rms(found(COORDS) - truth(COORDS)) < NOISE / 2


@pytest.mark.parametrize(("network", "likelihood"), list(zip(NETWORKS, [*LIKELIHOODS, "gaussian"], strict=True)))
def test_a_copy_of_the_likelihood_is_fitted_with_the_field(network, likelihood):
    original = LIKELIHOODS[likelihood]
    before = state_of(original)
    found = fit(COUNTS, network=NETWORKS[network], likelihood=original, steps=5, record_every=1)
    assert found(COORDS).isfinite().all()
    assert found.history["objective"][-1] < found.history["objective"][0]
    torch.testing.assert_close(state_of(original), before, rtol=0, atol=0)
    if before:
        assert any(not torch.equal(value, before[key]) for key, value in state_of(found.likelihood).items())


def test_an_offset_is_added_to_the_predictor():
    size = normal(N, 1, seed=4)
    counts = torch.poisson((truth(COORDS)[:, :1] + 1 + size).exp(), generator=torch.Generator().manual_seed(0))
    found = fit(counts, likelihood=Poisson(), offset=size, steps=150, lam=10.0)
    assert rms(found(COORDS).log() - truth(COORDS)[:, :1] - 1) < 0.25


@pytest.mark.parametrize("batches", [{}, BATCHES], ids=["all", "batches"])
def test_loadings_spread_few_latent_channels_over_many(batches):
    head = Loadings(normal(3, 2), torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]) if batches else None)
    found = fit(head=head, n_latent=2, steps=150, lam=5.0, learning_rate=2e-2, **batches)
    assert found.latent(COORDS).shape == (N, 2)
    torch.testing.assert_close(found(COORDS), found.latent(COORDS) @ found.head.loadings().T + found.head.intercept())
    assert torch.equal(head.weight, normal(3, 2))  # a copy is fitted
    # the best rank-2 fit without any prior
    floor = torch.linalg.svdvals(truth(COORDS) - truth(COORDS).mean(0))[2] / (3 * N) ** 0.5
    assert rms(found(COORDS) - truth(COORDS)) < floor + NOISE / 2


def test_tgv_keeps_the_slope_of_a_ramp_that_tv_flattens():
    ramp, slopes = COORDS[:, :1] / 20 - 1, {}
    for penalty in (IsotropicTV(), TGV(a0=0.5)):
        found = fit(ramp, penalty=penalty, steps=150, lam=150.0, likelihood=Gaussian(1.0), learning_rate=2e-2)
        assert found(COORDS).shape == (N, 1)  # without the second field
        slopes[type(penalty)] = float(found.jacobian(COORDS)[:, 0, 0].mean() * 20)
    assert slopes[IsotropicTV] < 0.5
    assert slopes[TGV] > 0.8


def test_regularisation_reaches_the_region_where_a_field_will_be_read():
    # half the plane has no values: named as a region, it is as flat there as the penalty asks
    left = COORDS[COORDS[:, 0] < 20]
    steep = lambda found: found.jacobian(COORDS[COORDS[:, 0] > 30]).norm(dim=-1).mean()
    options = {"coords": left, "box": Box.of(COORDS), "near": 1.0, "jitter": 0.5, "lam": 300.0, "steps": 100}
    values = truth(left)
    assert steep(fit(values, region=COORDS, **options)) < 0.5 * steep(fit(values, **options))


# ---- the objective and its record


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


def test_an_exception_in_on_step_stops_the_fit():
    seen = []

    def stop(step, value):
        seen.append((step, value))
        if step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(on_step=stop, record_every=1)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert len({value for _, value in seen}) == 5


# ---- batches, seeds and types


def test_a_seed_settles_a_fit_and_the_global_generator_is_not_touched():
    state = torch.get_rng_state()
    first, again, other = (fit(random_state=seed, **BATCHES) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, again)
    assert first.history == again.history
    assert not same(first, other)


def objective(found, lam=30.0):
    """The full objective of a fitted field on NOISY, by its definition."""
    return (
        Gaussian(NOISE)(found(COORDS), NOISY) + lam * evaluate(IsotropicTV(), found.net.double(), uniform(2000, 2))
    ).item()


def test_minibatches_reach_about_the_objective_of_the_full_batch():
    full, start = objective(fit(steps=150)), objective(fit(steps=1, learning_rate=1e-9))
    for batches in (BATCHES, {"batch_channels": 1}):
        assert abs(objective(fit(steps=150, **batches)) - full) < 0.05 * (start - full)


@pytest.mark.parametrize("batches", [{"batch_points": 60}, {"batch_channels": 2}], ids=str)
def test_the_likelihood_of_a_minibatch_is_scaled_to_the_whole(batches):
    nll = lambda **rest: fit(COUNTS, steps=1, likelihood=Poisson(), **rest).history["likelihood"][0]
    drawn = torch.tensor([nll(random_state=seed, **batches) / nll(random_state=seed) for seed in range(12)])
    assert drawn.mean() == pytest.approx(1.0, abs=0.1)
    assert drawn.std() > 0
    assert nll() == nll(batch_points=N, batch_channels=3)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("batches", [{}, BATCHES], ids=["all", "batches"])
def test_sparse_values_give_the_fit_of_dense_ones(batches):
    dense, sparse = (fit(values, likelihood=Poisson(), **batches) for values in (COUNTS, COUNTS.to_sparse_csr()))
    assert same(dense, sparse)


@pytest.mark.parametrize(
    ("likelihood", "batches"), [("gaussian", {}), ("truncated", BATCHES), ("negative binomial", BATCHES)]
)
def test_what_a_missing_entry_holds_does_not_matter(likelihood, batches):
    seen = uniform(N, 3, seed=3) < 0.4
    options = {"likelihood": LIKELIHOODS[likelihood], **batches}
    fits = [fit(torch.where(seen, COUNTS, hidden), weight=seen.double(), **options) for hidden in (torch.nan, 3.0)]
    assert same(*fits)
    assert not same(fits[0], fit(COUNTS, **options))


def test_the_default_type_of_torch_and_switched_off_gradients_do_not_matter():
    options = {"penalty": SpaceVariantTV(), "steps": 12, "refresh_every": 5, **BATCHES}
    plain, before, others = fit(**options), torch.get_default_dtype(), []
    torch.set_default_dtype(torch.float64)
    try:
        others.append(fit(**options))
    finally:
        torch.set_default_dtype(before)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            others.append(fit(**options))
    for found in others:
        assert same(found, plain)
        assert found.history == plain.history
        assert found(COORDS[:3]).dtype == torch.float32


# ---- units and areas

AREA = 4.0 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()


@pytest.mark.parametrize("case", ["isotropic", "space_variant", "footprint"])
def test_units_of_the_coordinates_do_not_matter(case):
    penalty = SpaceVariantTV() if case == "space_variant" else IsotropicTV()
    scale = lambda coords: (coords.amax(0) - coords.amin(0)).max() / (COORDS.amax(0) - COORDS.amin(0)).max()
    area = lambda coords: {"footprint": scale(coords) * AREA} if case == "footprint" else {}
    options = {"penalty": penalty, "double": True, "refresh_every": 10, "n_refresh": 100}
    units_do_not_matter(lambda coords: fit(coords=coords, **area(coords), **options), COORDS)


def test_a_tiny_footprint_is_a_point():
    options = {"likelihood": LIKELIHOODS["negative binomial"], "double": True} | BATCHES
    point, tiny = (fit(COUNTS, footprint=footprint, **options) for footprint in (None, 1e-9 * AREA))
    torch.testing.assert_close(tiny(COORDS), point(COORDS), rtol=1e-5, atol=1e-5)


def waves(coords):
    """Rates that a footprint levels to a good part."""
    return 50 * torch.sin(coords @ torch.tensor([[0.25, 0.05], [0.05, 0.25]]).double()).exp()


@pytest.mark.parametrize(
    "likelihood", [NegativeBinomial(torch.full((2,), 1e3)), Gaussian(2.5)], ids=["counts", "values"]
)
def test_a_field_with_a_footprint_averages_to_what_was_measured_and_is_sharper_than_that(likelihood):
    averages = lambda field, coords: torch.stack([field(coords + offset) for offset in AREA]).mean(0)
    rms_log = lambda found, expected: rms((found.clamp_min(1e-3) / expected).log())
    measured, seen = averages(waves, COORDS), (uniform(N, 2, seed=3) < 0.8).double()
    if likelihood.log_link:  # with exposures and missing entries
        size = normal(N, 1, seed=4)
        parts = {"offset": size, "weight": seen, "head": Loadings(torch.eye(2), torch.full((2,), 4.0))}
        values = torch.where(seen > 0, measured * size.exp(), torch.nan)
    else:
        parts = {"head": Loadings(30 * torch.eye(2), torch.full((2,), 50.0)), "batch_channels": 1}
        values = measured
    options = {"likelihood": likelihood, "steps": 300, "lam": 0.3, "n_latent": 2, "batch_points": 200} | parts
    area, point = (fit(values, footprint=footprint, **options) for footprint in (AREA, None))
    inner = COORDS[((COORDS > 5) & (COORDS < 35)).all(1)]
    assert rms_log(averages(area, inner), averages(waves, inner)) < 0.1
    assert rms_log(area(inner), waves(inner)) < 0.6 * rms_log(point(inner), waves(inner))


# ---- adaptive penalties


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
    penalty = Adaptive()
    fit(penalty=penalty, steps=31, refresh_every=10, n_refresh=77)
    assert penalty.seen == [(77, 2)] * 3


# ---- what is refused


@pytest.mark.parametrize(("numbers", "error", "message"), [
    ({"steps": 10.0}, TypeError, "`FitConfig.steps=10.0`: expected a whole number >= 1"),
    ({"batch_points": -1}, ValueError, "`FitConfig.batch_points=-1`: expected a whole number >= 0; 0 takes all"),
    ({"near": 1.5}, ValueError, "`FitConfig.near=1.5`: expected a finite number >= 0 and <= 1"),
    ({"double": 1}, TypeError, "`FitConfig.double=1`"),
    ({"device": "gpu"}, ValueError, r"`FitConfig.device='gpu'`: expected 'auto'.* a torch device.*\(here: cpu"),
])  # fmt: skip
def test_a_config_names_the_number_it_refuses(numbers, error, message):
    with pytest.raises(error, match=message):
        FitConfig(**numbers)


def test_an_objective_that_is_not_finite_stops_the_fit():
    with pytest.raises(ValueError, match=r"is nan at step 0: lower `learning_rate` \(0.01\), or look for extreme"):
        fit(torch.full((N, 1), torch.nan))
    with pytest.raises(ValueError, match="`lam=-1.0`: expected a finite number >= 0"):
        fit(lam=-1.0)


@dataclass(frozen=True)
class Own(Network):
    """A network of the user's own, made by a function of the numbers of its inputs and outputs."""

    make: object

    def n_weights(self, n_in, n_out):
        return 0

    def build(self, n_in, n_out, generator):
        return self.make(n_in, n_out)


class MeanOfPoints(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize("coords", [COORDS, Lattice.of_shape(25, 10)], ids=["points", "lattice"])
@pytest.mark.parametrize(("make", "message"), [
    (lambda d, c: nn.Linear(d, c + 1), r"`network=Own.*` gives .*4\) .*: expected .*3\), see `Network.build`"),
    (lambda d, c: nn.Sequential(nn.Linear(d, c), nn.Flatten(0)), r"gives \(\d+,\) .*: expected .*3\)"),
    (lambda d, c: nn.LSTM(d, c), r"gives tuple .*: expected .*3\)"),
    (lambda d, c: nn.Linear(d, c).requires_grad_(False), "has no weights that can be trained: expected an nn.Mod"),
    (lambda d, c: nn.ConstantPad1d((0, c - d), 0.0), "has no weights that can be trained"),
    (MeanOfPoints, r"expected .*3\)"),
])  # fmt: skip
def test_a_network_that_cannot_be_fitted_is_refused_before_the_loop(make, message, coords):
    with pytest.raises(ValueError, match=message):
        fit(coords=coords, network=Own(make), on_step=lambda *_: pytest.fail("the loop was entered"))


# ---- devices


def test_a_device_is_taken_as_named():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    assert DEVICE("device", torch.device("cpu")) == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [0, 16])
def test_a_fit_on_cuda_agrees_with_one_on_the_cpu(batch):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(61, 2, generator=generator)
    y = torch.poisson(2 * torch.exp(torch.sin(5 * x[:, :1])).expand(-1, 3), generator=generator).to_sparse_csr()
    fields = [
        fit_field(
            Samples(coords, y),
            network=Siren(width=16),
            likelihood=Poisson(),
            penalty=SpaceVariantTV(),
            lam=1.0,
            config=config(steps=120, batch_points=batch, device=coords.device.type, double=True),
        )
        for coords in (x, x.cuda())
    ]
    torch.testing.assert_close(fields[1](x), fields[0](x), rtol=1e-3, atol=1e-3)
    assert fields[1].to_dict().keys() == fields[0].to_dict().keys()
