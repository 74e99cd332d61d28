"""Pictures restored as fields."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from neurst.core.lattice import Lattice
from neurst.core.nets import Fourier, LowRank, Siren
from neurst.core.penalty import TGV, HessianTV, evaluate
from neurst.core.progress import StepCounter
from neurst.imaging import FitOptions, ImageConfig, LineSearch, denoise, fit_image, images, inpaint, upsample
from neurst.imaging.metrics import psnr, rmse

SIGMA = 0.1
CONFIG = ImageConfig()


def options(**chosen):
    return FitOptions(**({"progress": False, "device": "cpu"} | chosen))


QUICK = options(lam=80.0, steps=5)  # where only equal answers count
GIVEN = options(lam=80.0, steps=40)  # about the best strength for a drawing


def drawing(height=28, width=24, channels=0):
    """A disc and a bar on a ramp, in [0, 1]; colours have the same edges."""
    i, j = np.mgrid[:height, :width].astype(float)
    disc, bar = (np.hypot(i - 12, j - 11) < 8).astype(float), ((i > 21) & (i < 25)).astype(float)
    grey = 0.2 + 0.2 * j / width + 0.4 * disc + 0.3 * bar
    return grey if not channels else np.stack([grey * s for s in np.linspace(1, 0.4, channels)], -1)


def noisy(image, seed=0):
    return image + SIGMA * np.random.default_rng(seed).standard_normal(image.shape)


def some(image, share, seed=0):
    return np.random.default_rng(seed).random(image.shape) < share


def at_pixels(field, image):
    return field.on_lattice(Lattice.of_shape(*image.shape[:2])).numpy().reshape(image.shape)


def problem(image, mask=None, sigma=SIGMA, *, config=CONFIG, **chosen):
    return images._problem(image, mask, sigma, options(**chosen), config)


# ---- noise


def test_edges_are_kept_better_than_by_isotropic_tv_of_any_strength():
    image = drawing()
    fit = lambda penalty, lam: denoise(noisy(image), sigma=SIGMA, options=options(penalty=penalty, lam=lam, steps=40))
    isotropic = max(psnr(fit("isotropic", lam), image) for lam in (40.0, 60.0, 80.0))
    assert psnr(fit("space_variant", 80.0), image) > isotropic + 1


SPECS = Siren(width=32, depth=2, omega=20.0), Fourier(width=32, n_features=32, scale=5.0), LowRank(rank=12, omega=6.0)


@pytest.mark.parametrize("network", SPECS, ids=lambda spec: type(spec).__name__)
def test_every_kind_of_network_takes_off_noise(network):
    image = drawing()
    out = denoise(noisy(image), sigma=SIGMA, options=options(network=network, penalty="isotropic", lam=60.0, steps=100))
    assert psnr(out, image) > psnr(noisy(image), image) + 1


@pytest.mark.parametrize("penalty", ["nuclear", "tgv", HessianTV()], ids=str)
def test_the_first_strength_that_is_tried_suits_every_penalty(penalty):
    image = drawing(channels=2)
    part = problem(noisy(image), penalty=penalty, steps=40)
    assert psnr(at_pixels(part.fit(part.lam(CONFIG.strength)), image), image) > psnr(noisy(image), image) + 2


def test_the_strength_that_is_chosen_is_near_the_best_one():
    image = drawing(channels=2)
    y = noisy(image)
    score = lambda **chosen: psnr(denoise(y, options=options(steps=40, **chosen)), image)
    part = problem(y, steps=40)
    auto = score()
    assert auto > psnr(y, image) + 8
    assert auto > max(score(lam=part.lam(s)) for s in (0.3, 0.85, 2.0)) - 0.5


def test_one_gap_hardly_changes_the_answer_as_the_noise_is_estimated_from_the_other_pixels():
    image = drawing()
    y, seen = noisy(image), np.ones(image.shape, bool)
    seen[20, 3] = False
    there = at_pixels(fit_image(np.where(seen, y, np.nan), seen, options=GIVEN), image)
    assert psnr(there, image) == pytest.approx(psnr(denoise(y, options=GIVEN), image), abs=0.3)


# ---- ranges and types


@pytest.fixture(scope="module")
def plain():
    return denoise(noisy(drawing(20, 18)), options=GIVEN)


RANGES = {"1024": (1024.0, 0.0, 0.0), "1e-24": (1e-24, 0.0, 0.2), "1e20": (1e20, 0.0, 0.2), "1e90": (1e90, 0.0, 0.2)}
RANGES |= {"1e7 is added": (1.0, 1e7, 0.2)}


@pytest.mark.parametrize(("scale", "shift", "tolerance"), RANGES.values(), ids=RANGES)
def test_the_range_of_a_picture_does_not_matter(plain, scale, shift, tolerance):
    """Other factors than powers of two round, and steps on a cost with corners amplify that to a fraction of the noise."""
    there = (denoise(scale * noisy(drawing(20, 18)) + shift, options=GIVEN) - shift) / scale
    assert rmse(there, plain) <= tolerance * SIGMA


def test_the_choice_of_lam_does_not_see_the_range():
    y = noisy(drawing())
    parts = [problem(k * y + shift, sigma=None, steps=20) for k, shift in ((1, 0), (1e4, -3e3))]
    assert parts[1].sigma == pytest.approx(1e4 * parts[0].sigma)
    here, there = (images._chosen_lam(part, options(), StepCounter(None)) for part in parts)
    assert abs(np.log(there / here)) < np.log(CONFIG.search_ratio) / 2


FLAT = {
    "black": np.zeros((16, 18)),
    "white bytes": np.full((16, 18), 255, np.uint8),
    "a colour": np.ones((16, 18, 3)) * [0.2, 0.5, 0.9],
}


@pytest.mark.parametrize("image", FLAT.values(), ids=FLAT)
def test_a_picture_of_one_colour_is_that_colour(image):
    seen = np.arange(16 * 18).reshape(16, 18) % 2 == 0
    truth = image / 255 if image.dtype == np.uint8 else image
    searched = denoise(image, options=options(steps=10, search=LineSearch(max_steps=1, steps=10)))
    for out in (searched, denoise(image, options=GIVEN), inpaint(image, seen, options=GIVEN)):
        np.testing.assert_allclose(out, truth, atol=4e-3)


def test_unsigned_integers_are_the_range_from_0_to_1_and_floats_keep_their_type():
    y = np.clip(noisy(drawing()), 0, 1)
    small = (255 * y).astype(np.uint8)
    np.testing.assert_array_equal(denoise(small, options=QUICK), denoise(small / 255, options=QUICK))
    assert denoise(y, options=QUICK).dtype == np.float64
    assert denoise(y.astype(np.float32), options=QUICK).dtype == np.float32


def test_pictures_may_be_small_or_long():
    for shape in ((4, 4), (4, 60), (31, 5, 3)):
        out = denoise(noisy(np.full(shape, 0.5)), sigma=SIGMA, options=options(lam=100.0, steps=60))
        assert out.shape == shape
        assert rmse(out, np.full(shape, 0.5)) < 0.06


def test_a_transposed_picture_gives_the_transposed_answer_within_the_difference_between_seeds():
    y = noisy(drawing())
    out, other = (denoise(y, sigma=SIGMA, options=options(lam=80.0, steps=40, random_state=seed)) for seed in (0, 1))
    turned = denoise(y.T.copy(), sigma=SIGMA, options=GIVEN).T
    assert rmse(turned, out) < 2 * rmse(other, out)
    assert rmse(other, out) < 0.15 * SIGMA


def test_a_reversed_view_equals_its_copy():
    view = noisy(drawing(channels=3))[::-1, ::-1, ::-1]
    np.testing.assert_array_equal(denoise(view, options=QUICK), denoise(view.copy(), options=QUICK))


# ---- the choice of lam


def test_a_large_picture_is_searched_on_its_centre():
    part = problem(noisy(drawing(50, 30)))
    np.testing.assert_array_equal(part.centre(400).values, part.values[12:38, 7:22])
    whole = problem(part.values, penalty=TGV(a1=2.0, a0=0.3))  # its length is the same in pixels
    pixels = [each.penalty.a0 / each.penalty.a1 / images.pixel(each.shape) for each in (whole, whole.centre(400))]
    assert pixels[1] == pytest.approx(pixels[0])


def test_a_picture_whose_centre_is_not_observed_is_searched_as_a_whole():
    image = drawing(40, 36)
    seen = np.ones(image.shape, bool)
    seen[8:32, 6:30] = False
    part, counter = problem(image, seen, 0.0, config=ImageConfig(max_search_pixels=300), steps=4), StepCounter(None)
    assert part.centre(300).n_observed() == 0
    images._chosen_lam(part, options(), counter)
    assert counter.done >= 3 * 4


def test_fewer_than_256_observed_pixels_warn_and_take_the_first_strength():
    image = drawing(17, 16)
    part = problem(image, np.arange(image.size).reshape(image.shape) < 255)
    with pytest.warns(UserWarning, match="only 255 pixels are observed, fewer than the 256 .*`options=FitOptions"):
        found = images._chosen_lam(part, options(), StepCounter(None))
    assert found == part.lam(CONFIG.strength)


@pytest.mark.parametrize("name", ["isotropic", "hessian", "tgv"])
def test_a_pattern_costs_each_pixel_the_same_in_a_picture_of_any_size(name):
    def cost(side):
        shape, h = (side, side), images.pixel((side, side))
        penalty = images.pixel_penalty(name, shape, CONFIG)
        # the second field of TGV is half the slope, so that both its terms count
        slope = lambda u: torch.cat([torch.cos(u) * (0.5 / h), 0 * u], -1)
        wave = lambda u: torch.cat([torch.sin(u), slope(u)], -1)[..., : penalty.n_outputs(1, 2)]
        axis = h * (torch.arange(0, side - 1, 0.25, dtype=torch.float64) - (side - 1) / 2)
        mean = float(evaluate(penalty, lambda x: wave(x[..., :1] * (1 / h)), Lattice((axis, axis))))
        return images.nats(1.0, shape, penalty.order) * mean / side**2

    assert cost(101) == pytest.approx(cost(161), rel=0.02)


# ---- gaps


@pytest.mark.parametrize("per", ["pixel", "entry"])
def test_gaps_are_filled_from_what_is_observed(per):
    image = drawing(channels=3)
    seen = some(image if per == "entry" else image[..., 0], 0.3)
    full = seen if per == "entry" else np.broadcast_to(seen[..., None], image.shape)
    out = inpaint(np.where(full, image, np.nan), seen, options=options(lam=1000.0, steps=100))
    np.testing.assert_array_equal(out[full], image[full])
    assert psnr(out, image) > psnr(np.where(full, image, image[full].mean()), image) + 8


def test_what_stands_in_a_gap_does_not_matter():
    image = drawing()
    seen = some(image, 0.5)
    outs = [inpaint(np.where(seen, image, gap), seen, sigma=None, options=QUICK) for gap in (0.0, 1e6, np.nan)]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def test_noisy_observations_are_not_taken_as_they_are():
    image = drawing()
    y, seen = noisy(image), some(image, 0.5)
    out = inpaint(y, seen, sigma=SIGMA, options=GIVEN)
    assert rmse(out[seen], image[seen]) < 0.6 * rmse(y[seen], image[seen])


def test_masked_entries_of_a_masked_array_are_not_observed():
    y = noisy(drawing())
    hidden, part = some(y, 0.3), some(y, 0.8, seed=1)
    masked = np.ma.MaskedArray(y, hidden)
    for mask, seen in ((None, ~hidden), (part, part & ~hidden), (np.ones(y.shape, bool), ~hidden)):
        np.testing.assert_array_equal(inpaint(masked, mask, options=QUICK), inpaint(y, seen, options=QUICK))
        here, there = (fit_image(*arguments, options=QUICK) for arguments in ((masked, mask), (y, seen)))
        np.testing.assert_array_equal(at_pixels(here, y), at_pixels(there, y))


# ---- between the pixels


def test_a_picture_is_enlarged_about_the_same_centre():
    i, j = np.mgrid[:24, :20].astype(float)
    blob = lambda i, j: np.exp(-((i - 11.5) ** 2 + (j - 9.5) ** 2) / 40)
    fine = np.mgrid[:72, :60]
    brief = options(lam=1.0, steps=80)
    out = upsample(blob(i, j), scale=np.float32(3), options=brief)
    assert out.shape == (72, 60)
    assert rmse(out, blob((fine[0] + 0.5) / 3 - 0.5, (fine[1] + 0.5) / 3 - 0.5)) < 0.02
    np.testing.assert_array_equal(upsample(blob(i, j), shape=np.array([72, 60]), options=brief), out)


def test_the_answer_does_not_depend_on_how_many_rows_are_read_at_a_time():
    image = drawing(channels=3)
    field = fit_image(image, options=QUICK)
    lattice = Lattice.of_shape(*image.shape[:2])
    whole = images._read(field, lattice, image)
    np.testing.assert_allclose(whole, at_pixels(field, image), rtol=0, atol=1e-12)
    np.testing.assert_allclose(images._read(field, lattice, image, rows=50), whole, rtol=0, atol=1e-6)


def test_a_field_is_read_in_rows_and_columns_and_its_slopes_settle_in_the_steps_of_the_default():
    i, j = np.mgrid[:30, :24].astype(float)
    field = fit_image(0.03 * i - 0.01 * j, sigma=0.0, options=options(lam=1.0))
    x = np.array([[10.25, 7.5], [20.0, 15.75]])
    np.testing.assert_allclose(field(x)[:, 0], 0.03 * x[:, 0] - 0.01 * x[:, 1], atol=2e-3)
    np.testing.assert_allclose(field.jacobian(x)[:, 0], [[0.03, -0.01]] * 2, atol=2e-3)


# ---- what is refused

GREY = drawing(16, 12)
BRIGHT = np.where(GREY > 0.5, np.nan, GREY)
SPECTRAL = options(penalty="mixed")
REFUSED = {
    "NaN": (lambda: denoise(BRIGHT), ValueError, "not finite at .* observed entries .*mask"),
    "masked": (lambda: denoise(np.ma.masked_invalid(BRIGHT)), ValueError, "masked entries: use `inpaint"),
    "no mask": (lambda: inpaint(GREY), ValueError, "`mask=None`: expected booleans, True where .* observed"),
    "spectral": (lambda: denoise(GREY, options=SPECTRAL), ValueError, "`penalty='mixed'` .*`denoise_cube`"),
    "no new size": (lambda: upsample(GREY), ValueError, "`scale=None` and `shape=None`: give one of them"),
    "one side": (lambda: upsample(GREY, shape=8), ValueError, "shape=.*expected two whole numbers >= 1"),
    "gigabytes": (lambda: upsample(GREY, scale=1e5), ValueError, r"1.92e\+12 pixels and 1.54e\+04 GB.*max_pixels"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif("NEURST_DATA" not in os.environ, reason="NEURST_DATA names no folder of real data")
def test_a_real_picture_is_restored_better_than_by_the_best_weight_of_total_variation():
    from skimage.restoration import denoise_tv_chambolle

    with np.load(Path(os.environ["NEURST_DATA"]) / "images" / "neurtv_plane.npz") as file:
        truth, y = file["gt"][88:136, 88:136] / 255, file["noisy_case1"][88:136, 88:136]
    weights = np.geomspace(0.05, 0.2, 7)
    best = max(psnr(denoise_tv_chambolle(y, w, channel_axis=-1), truth) for w in weights)
    assert psnr(denoise(y, options=options()), truth) > best + 1
