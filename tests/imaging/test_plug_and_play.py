"""Plug and play: the minimum it reaches with a proximal denoiser, units, operators of all kinds, and wrong arguments."""

import dataclasses

import numpy as np
import pytest
import torch
from draws import normal

from neurst.imaging import PlugAndPlayConfig, plug_and_play
from neurst.imaging import operators as op
from neurst.imaging.tgv import pretrained_denoiser

SHAPE = (14, 11)
MASK = np.random.default_rng(0).random(SHAPE) < 0.5
TRUTH = np.add.outer(np.sin(np.arange(14) / 3), np.cos(np.arange(11) / 3))
UV = np.random.default_rng(3).uniform(-2, 2, (60, 2))
OPERATORS = {
    "identity": op.identity(SHAPE),
    "pixel_mask": op.pixel_mask(MASK),
    "blur": op.blur(np.full((3, 3), 1 / 9), SHAPE),
    "radon": op.radon(SHAPE, np.arange(0, 180, 20)),
    "masked_fourier": op.masked_fourier(MASK),
    "lensing": op.lensing(SHAPE),
    "interferometer": op.interferometer(SHAPE, UV),
}
EXACT = PlugAndPlayConfig(steps=4000, tol=1e-9, solve_tol=1e-12)


def shrink(image, *, sigma):
    """The proximal map of sigma**2 |x|**2 / 2."""
    return image / (1 + sigma**2)


def data_of(a, seed=0):
    truth = torch.from_numpy(TRUTH).to(torch.complex128 if a.complex else torch.float64)
    y = a.forward(truth)
    return (y + 0.1 * normal(*y.shape, seed=seed)).numpy()


@pytest.mark.parametrize("name", OPERATORS)
def test_with_a_proximal_denoiser_it_reaches_the_minimum(name):
    a, sigma, rho = OPERATORS[name], 0.8, 0.3
    y = torch.from_numpy(data_of(a))
    seen = y if a.observed is None else y * a.observed
    x = torch.from_numpy(plug_and_play(y, a, shrink, sigma=sigma, rho=rho, config=EXACT, progress=False))
    # the gradient of |A x - y|^2 / (2 |A|^2) + rho sigma^2 |x|^2 / 2
    slope = a.adjoint(a.forward(x) - seen) / a.norm**2 + rho * sigma**2 * x
    assert slope.norm() <= 1e-6 * x.norm()


@pytest.mark.parametrize("name", OPERATORS)
def test_the_defaults_follow_the_units_of_the_data(name):
    a, y = OPERATORS[name], data_of(OPERATORS[name])
    soft = lambda image, sigma: np.sign(image) * np.maximum(np.abs(image) - sigma, 0)
    run = lambda unit: plug_and_play(
        unit * y, a, soft, noise=0.1 * unit, lower=None if a.complex else -0.5 * unit, config=SHORT, progress=False
    )
    with pytest.warns(UserWarning, match="plug and play stopped after 8 steps"):
        here = run(1.0)
    with pytest.warns(UserWarning, match="plug and play stopped after 8 steps"):
        there = run(1024.0)
    np.testing.assert_allclose(there, 1024 * here, rtol=1e-9)  # a power of 2 does not change the rounding


SHORT = PlugAndPlayConfig(steps=8, tol=0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "channels"])
def test_shape_and_precision_are_those_of_the_data(dtype, channels):
    seen = []

    def denoiser(image, sigma):
        seen.append((image.shape, image.dtype))
        return shrink(image, sigma=sigma)

    y = np.broadcast_to(TRUTH.T if not channels else TRUTH.T[..., None], (11, 14, *channels)).astype(dtype)
    found = plug_and_play(y, op.pixel_mask(MASK.T), denoiser, progress=False)
    assert found.shape == y.shape
    assert found.dtype == dtype
    assert set(seen) == {(y.shape, np.dtype(dtype))}


def test_channels_of_equal_data_are_equal_to_the_grey_picture():
    y = data_of(OPERATORS["pixel_mask"])
    one = plug_and_play(y, OPERATORS["pixel_mask"], shrink, sigma=0.5, progress=False)
    two = plug_and_play(np.stack([y, y], -1), OPERATORS["pixel_mask"], shrink, sigma=0.5, progress=False)
    np.testing.assert_allclose(two, np.stack([one, one], -1), rtol=1e-9)


def test_values_that_are_not_observed_are_not_read():
    y = data_of(OPERATORS["pixel_mask"])
    gaps = np.where(MASK, y, np.nan)
    found = [plug_and_play(each, OPERATORS["pixel_mask"], shrink, progress=False) for each in (y, gaps)]
    np.testing.assert_array_equal(*found)


def test_no_pixel_is_below_the_bound():
    found = plug_and_play(TRUTH, OPERATORS["identity"], shrink, rho=0.5, lower=0.1, progress=False)
    assert found.min() == 0.1


def test_data_without_contrast_come_back():
    found = plug_and_play(np.full(SHAPE, 2.0), op.identity(SHAPE), shrink, progress=False)
    np.testing.assert_allclose(found, 2.0)


@pytest.mark.parametrize("start", [0.0, 1.0, 1e3])
def test_strengths_come_from_the_data_and_not_from_the_start(start):
    """A constant start has no range, and that of a large one says nothing of the picture."""
    a, strengths = op.pixel_mask(np.random.default_rng(0).random(SHAPE) < 0.6), []

    def note(image, sigma):
        strengths.append(sigma)
        return shrink(image, sigma=sigma)

    plug_and_play(TRUTH, a, note, progress=False)
    expected, strengths[:] = list(strengths), []
    found = plug_and_play(TRUTH, a, note, start=start * np.ones(SHAPE) + start * TRUTH, progress=False)
    assert strengths[-1] == pytest.approx(expected[-1])
    assert np.abs(found - start * (1 + TRUTH)).max() > 0.1  # the start is not given back


def test_constant_data_obey_the_bound():
    found = plug_and_play(np.full(SHAPE, -2.0), op.identity(SHAPE), shrink, lower=0.0, progress=False)
    np.testing.assert_array_equal(found, 0.0)


def test_the_start_does_not_matter_where_the_minimum_is_unique():
    a, y = OPERATORS["blur"], data_of(OPERATORS["blur"])
    run = lambda start: plug_and_play(y, a, shrink, sigma=0.5, rho=0.2, start=start, config=EXACT, progress=False)
    np.testing.assert_allclose(run(None), run(normal(*SHAPE).numpy()), atol=1e-6)


def test_linear_systems_give_what_closed_forms_give():
    a = OPERATORS["pixel_mask"]
    y = data_of(a)
    run = lambda each: plug_and_play(y, each, shrink, sigma=0.5, rho=0.2, config=EXACT, progress=False)
    np.testing.assert_allclose(run(a), run(dataclasses.replace(a, prox=None)), atol=1e-7)


def test_learned_tgv_fills_gaps_better_than_the_smoothest_picture():
    rows, columns = np.mgrid[:48, :40]
    truth = 0.2 + 0.6 * (np.hypot(rows - 22, columns - 18) < 12)
    seen = np.random.default_rng(1).random(truth.shape) < 0.3
    a = op.pixel_mask(seen)
    mean_error = lambda found: np.sqrt(np.mean((found - truth) ** 2))
    smooth = plug_and_play(truth, a, lambda image, sigma: image, progress=False)  # stays at its start
    found = plug_and_play(truth, a, pretrained_denoiser(), progress=False)
    assert mean_error(found) < 0.8 * mean_error(smooth)


GOOD = {"y": TRUTH, "operator": op.identity(SHAPE), "denoiser": shrink, "progress": False}
WRONG = {
    "integers": ({"y": np.ones(SHAPE, int)}, TypeError, "`y` holds int64: expected floats"),
    "complex data": ({"y": TRUTH + 0j}, TypeError, "`y` holds complex128: expected real numbers.*np.stack"),
    "another shape": ({"y": TRUTH[1:]}, ValueError, r"`y` has shape \(13, 11\): expected \(14, 11\) or \(14, 11, C\)"),
    "a batch": ({"y": np.ones((2, *SHAPE, 1))}, ValueError, r"`y` has shape \(2, 14, 11, 1\)"),
    "NaN": ({"y": np.full(SHAPE, np.nan)}, ValueError, "`y` is not finite at 154 entries: leave them out"),
    "no operator": ({"operator": None}, TypeError, "`operator=None`: expected a `neurst.imaging.operators.Operator`"),
    "a wrong adjoint": (
        {"operator": op.Operator(SHAPE, SHAPE, lambda u: 2 * u, lambda y: y, 2.0)},
        ValueError,
        "the adjoint fails the dot test",
    ),
    "a wrong normal": (
        {"operator": dataclasses.replace(op.identity(SHAPE), normal=lambda u: 2 * u)},
        ValueError,
        r"`operator.normal\(x\)` is not the adjoint of `forward\(x\)`",
    ),
    "a denoiser that is no function": ({"denoiser": "bm3d"}, TypeError, "`denoiser='bm3d'`: expected a function"),
    "a denoiser that crops": (
        {"denoiser": lambda image, sigma: image[1:]},
        ValueError,
        r"`denoiser` gives an array of float64 of shape \(13, 11\): expected finite real numbers of shape \(14, 11\)",
    ),
    "a denoiser that gives NaN": ({"denoiser": lambda image, sigma: image * np.nan}, ValueError, "expected finite"),
    "no strength": ({"sigma": 0.0}, ValueError, "`sigma=0.0`: expected None or a positive"),
    "a negative rho": ({"rho": -1.0}, ValueError, "`rho=-1.0`: expected None or a positive"),
    "negative noise": ({"noise": -0.1}, ValueError, "`noise=-0.1`: expected a finite number >= 0"),
    "a bound of NaN": ({"lower": np.nan}, ValueError, "`lower=nan`: expected None or a finite number"),
    "a bound of complex pictures": (
        {"operator": op.masked_fourier(MASK), "y": TRUTH + 0j, "lower": 0.0},
        ValueError,
        "`lower=0`: expected None, as pictures of this operator are complex",
    ),
    "a start of another shape": ({"start": TRUTH.T}, ValueError, r"`start` is an array of float64 of shape \(11, 14\)"),
    "a complex start": ({"start": TRUTH + 0j}, TypeError, "`start` holds complex128: expected real numbers"),
    "a number as configuration": ({"config": 20}, TypeError, "`config=20`: expected a `neurst.imaging.PlugAndPlay"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    change, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        plug_and_play(**(GOOD | change))


@pytest.mark.parametrize("field", ["steps", "strength", "least_rho", "smoothness", "solve_tol", "solve_steps"])
def test_numbers_of_the_configuration_are_positive(field):
    with pytest.raises(ValueError, match=rf"`PlugAndPlayConfig.{field}=0`: expected"):
        PlugAndPlayConfig(**{field: 0})
