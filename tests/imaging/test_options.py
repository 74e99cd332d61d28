"""What all functions share: options, numbers of the method, seeds, and the search for a strength."""

import warnings

import numpy as np
import pytest
import torch

from neurst import imaging
from neurst.core.nets import Siren, Spline
from neurst.imaging import FitOptions, LineSearch
from neurst.imaging.surface import fit as surface

RNG = np.random.default_rng(0)
IMAGE = (np.hypot(*(np.mgrid[:20, :18] - 9.0)) < 6) + 0.1 * RNG.standard_normal((20, 18))
CUBE = RNG.random((6, 5, 4))
POINTS = RNG.random((200, 2))
VALUES = np.sin(6 * POINTS) + 0.1 * RNG.standard_normal((200, 2))
ANGLE = np.linspace(0, 2 * np.pi, 120, endpoint=False)
CIRCLE = 5 * np.stack([np.cos(ANGLE), np.sin(ANGLE)], 1) + 0.05 * RNG.standard_normal((120, 2))
QUICK = {"steps": 3, "lam": 5.0, "device": "cpu", "progress": False}
SIREN, SPLINE = {"network": Siren(width=16, depth=1)}, {"network": Spline((8,))}


def image(options, **more):
    return imaging.fit_image(IMAGE, options=options, **more)


def attribute(options, **more):
    return imaging.fit_attributes(POINTS, VALUES, n_members=1, options=options, **more)


def curve(options, **more):
    return imaging.fit_surface(CIRCLE, options=options, **more)


# name: the call, options of its own, and the numbers that it gives
FITS = {
    "fit_image": (image, {}, lambda field: field(POINTS)),
    "denoise_cube": (lambda options, **more: imaging.denoise_cube(CUBE, options=options, **more), {}, lambda cube: cube.clean),
    "fit_attributes": (attribute, SIREN, lambda field: field(POINTS)),
    "fit_surface": (lambda options, **more: curve(options, bending_length=0.5, **more), SPLINE, lambda field: field.distance(POINTS)),
}  # fmt: skip


def every_fit(function):
    return pytest.mark.parametrize(("call", "own", "numbers"), FITS.values(), ids=FITS)(function)


@every_fit
def test_a_seed_settles_the_numbers_and_neither_the_global_state_nor_the_data_are_touched(call, own, numbers):
    state, data = torch.get_rng_state(), [part.copy() for part in (IMAGE, CUBE, POINTS, VALUES, CIRCLE)]
    one, again, other = (numbers(call(FitOptions(**QUICK, **own, random_state=seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0
    assert torch.equal(torch.get_rng_state(), state)
    for part, before in zip((IMAGE, CUBE, POINTS, VALUES, CIRCLE), data, strict=True):
        np.testing.assert_array_equal(part, before)


@every_fit
def test_numbers_of_numpy_serve_as_those_of_python(call, own, numbers):
    plain = FitOptions(lam=5.0, steps=3, random_state=1, progress=False, device="cpu", **own)
    scalars = {"lam": np.float32(5.0), "steps": np.int64(3), "random_state": np.uint8(1), "progress": np.bool_(False)}
    there = numbers(call(FitOptions(device="cpu", **scalars, **own), sigma=np.float32(0.125)))
    np.testing.assert_array_equal(there, numbers(call(plain, sigma=0.125)))


CONFIGS = {
    "fit_image": (imaging.ImageConfig(exact=0.5), lambda f: float(f.likelihood.arguments()["scale"]), 0.5),
    "denoise_cube": (imaging.CubeConfig(tau_in_noise=1e6, line=1e6), lambda cube: np.abs(cube.sparse).max(), 0.0),
    "fit_attributes": (imaging.AttributeConfig(least_noise=0.5), lambda field: field.sigma / VALUES.std(0), [0.5, 0.5]),
    "fit_surface": (imaging.SurfaceConfig(margin=0.5), lambda s: np.ptp([s.low, s.high]) / np.ptp(CIRCLE), 2.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_changes_what_it_says(name):
    (call, own, _), (config, read, expected) = FITS[name], CONFIGS[name]
    options = FitOptions(**QUICK, **own)
    assert read(call(options, config=config)) == pytest.approx(expected, rel=0.05)
    assert read(call(options)) != pytest.approx(expected, rel=0.05)


# ---- the search

SEARCHES = {
    "lam of a picture": (lambda options: image(options, sigma=0.1), {}, imaging.images, lambda fit: fit["lam"],
        lambda samples: samples.values.numel() if samples.weight is None else float(samples.weight.sum())),
    "lam of attributes": (attribute, SIREN, imaging.attributes, lambda fit: fit["lam"], lambda samples: len(samples.coords)),
    "bending_length": (curve, SPLINE, surface, lambda fit: fit["penalty"].bending_length * fit["box"].scale,
        lambda samples: int((samples.weight == 1).sum())),
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
def test_the_search_does_what_its_options_say_and_warns_at_its_edge(name, monkeypatch):
    """It starts far too strong: one strength above, one below, and there the score still rises."""
    call, own, module, strength, n_seen = SEARCHES[name]
    real, fits = module.fit_field, []

    def fit_field(samples, **arguments):
        fits.append((strength(arguments), arguments["config"].steps, n_seen(samples)))
        return real(samples, **arguments)

    monkeypatch.setattr(module, "fit_field", fit_field)
    search = LineSearch(start=1e4, ratio=5.0, max_steps=1, fraction=0.4, steps=7)
    options = FitOptions(steps=2, device="cpu", progress=False, search=search, **own)
    words = rf"the search for `{name.split()[0]}` ended at its weakest value, 2e\+03, .*LineSearch\(max_steps=5\)"
    with pytest.warns(UserWarning, match=words) as record:
        call(options)
    assert [warning.filename for warning in record] == [__file__]  # it points at the line of the caller
    strengths, steps, seen = zip(*fits, strict=True)
    # what is left of a picture has another mean and variance, so that its strength in nats is slightly different
    assert strengths == pytest.approx([1e4, 5e4, 2e3, 2e3], rel=0.1)
    assert steps == (7, 7, 7, 2)
    assert seen[0] / seen[3] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_holds_something_out_and_leaves_something_whatever_the_share(name):
    for fraction in (1e-6, 0.9):
        search = LineSearch(max_steps=1, fraction=fraction, steps=2)
        options = FitOptions(steps=2, device="cpu", progress=False, search=search, **SEARCHES[name][1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a search of so few steps may end at its edge
            SEARCHES[name][0](options)
