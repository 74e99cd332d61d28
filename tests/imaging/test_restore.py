"""Pictures restored as fields."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from neurst.core.lattice import Lattice
from neurst.core.nets import Spline
from neurst.core.penalty import TGV, HessianTV, score
from neurst.imaging import denoise, fit_image, inpaint, upsample
from neurst.imaging.metrics import psnr, rmse
from neurst.imaging.pixels import pixel, pixel_penalty, pixel_spline, prior_strength
from neurst.imaging.plan import LamSearch, search_strength
from neurst.imaging.restore import _plan

QUIET = {"progress": False, "device": "cpu"}
GIVEN = QUIET | {"lam": 120.0}  # where the choice of lam is not what is looked at


def drawing(height=40, width=36, channels=0):
    """A disc and a bar on a ramp, in [0, 1]; colours have the same edges."""
    i, j = np.mgrid[:height, :width].astype(float)
    disc, bar = (np.hypot(i - 18, j - 16) < 11).astype(float), ((i > 31) & (i < 36)).astype(float)
    grey = 0.2 + 0.2 * j / width + 0.4 * disc + 0.3 * bar
    return grey if not channels else np.stack([grey * s for s in np.linspace(1, 0.4, channels)], -1)


def noisy(image, sigma=0.1, seed=0):
    return image + sigma * np.random.default_rng(seed).standard_normal(image.shape)


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_noise_is_taken_off(channels):
    image = drawing(channels=channels)
    y = noisy(image)
    out = denoise(y, **QUIET)
    assert out.shape == y.shape
    assert psnr(out, image) > psnr(y, image) + 7


def test_channels_with_the_same_edges_help_each_other():
    image = drawing(channels=3)
    y = noisy(image)
    together = denoise(y, sigma=0.1, **GIVEN)
    alone = np.stack([denoise(y[..., c], sigma=0.1, **GIVEN) for c in range(3)], -1)
    assert psnr(together, image) > psnr(alone, image) + 1


def test_edges_that_vary_in_space_are_kept_better_than_by_isotropic_tv():
    image = drawing()
    out = {p: denoise(noisy(image), sigma=0.1, penalty=p, **QUIET) for p in ("space_variant", "isotropic")}
    assert psnr(out["space_variant"], image) > psnr(out["isotropic"], image) + 1


def test_the_range_of_a_picture_does_not_matter():
    y = noisy(drawing(24, 20))
    restore = lambda scale, shift, seed: (
        (denoise(scale * y + shift, sigma=0.1 * scale, lam=80.0, random_state=seed, **QUIET) - shift) / scale
    )
    plain = restore(1.0, 0.0, 0)
    np.testing.assert_array_equal(restore(1024.0, 0.0, 0), plain)
    # other factors round, and rounding moves the steps of a cost that has corners: by less than another seed
    for scale, shift in ((1e4, -3e3), (1e-5, 0.0)):
        assert rmse(restore(scale, shift, 0), plain) < rmse(restore(1.0, 0.0, 1), plain)


@pytest.mark.parametrize(("scale", "shift"), [(1024.0, 0.0), (1e4, -3e3)])
def test_the_choice_of_lam_does_not_see_the_range(scale, shift):
    y = noisy(drawing(24, 20))
    plans = [
        _plan(a * y + b, None, None, "space_variant", "auto", "auto", 0, "cpu") for a, b in ((1.0, 0.0), (scale, shift))
    ]
    assert plans[1].sigma == pytest.approx(scale * plans[0].sigma)
    strengths = [search_strength(plan, LamSearch(), lambda *_: None) for plan in plans]
    assert abs(np.log(strengths[1] / strengths[0])) < np.log(LamSearch().ratio) / 2  # half a step of the grid


def test_a_transposed_picture_gives_the_transposed_answer_within_the_noise_of_seeds():
    image = drawing()
    y = noisy(image)
    out = denoise(y, sigma=0.1, lam=400.0, **QUIET)
    turned = denoise(y.T.copy(), sigma=0.1, lam=400.0, **QUIET).T
    other = denoise(y, sigma=0.1, lam=400.0, random_state=1, **QUIET)
    assert rmse(turned, out) < 2 * rmse(other, out) + 1e-4
    assert rmse(other, out) < 0.1 * rmse(out, image) + 5e-3


def test_a_seed_settles_the_answer_and_the_global_generator_is_not_touched():
    y = noisy(drawing(24, 20))
    state = torch.get_rng_state()
    np.testing.assert_array_equal(denoise(y, **QUIET), denoise(y, **QUIET))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_come_back_in_their_type(dtype):
    assert denoise(noisy(drawing(12, 10)).astype(dtype), lam=10.0, **QUIET).dtype == dtype


def test_unsigned_integers_are_the_range_from_0_to_1():
    y = (np.clip(noisy(drawing(24, 20)), 0, 1) * 255).astype(np.uint8)
    np.testing.assert_allclose(denoise(y, lam=100.0, **QUIET), denoise(y / 255, lam=100.0, **QUIET), atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (4, 60), (61, 5, 3)])
def test_pictures_may_be_small_or_long(shape):
    out = denoise(noisy(np.full(shape, 0.5)), sigma=0.1, lam=100.0, **QUIET)
    assert out.shape == shape
    assert rmse(out, np.full(shape, 0.5)) < 0.06


def test_a_picture_of_one_colour_is_that_colour():
    np.testing.assert_allclose(denoise(np.full((16, 12), 7.0), **QUIET), 7.0, rtol=1e-3)


def test_the_strength_that_is_chosen_is_near_the_best_one():
    image = drawing()
    plan = _plan(noisy(image), None, 0.1, "space_variant", "auto", "auto", 0, "cpu")
    score = lambda s: psnr(plan.fit(plan.lam(s))(plan.samples.coords).numpy().reshape(image.shape), image)
    chosen = score(search_strength(plan, LamSearch(), lambda *_: None))
    assert chosen > max(score(s) for s in (0.2, 0.5, 1.0, 2.0, 4.0)) - 0.5


def test_a_large_picture_is_searched_on_its_centre():
    plan = _plan(noisy(drawing(50, 30)), None, 0.1, "space_variant", "auto", "auto", 0, "cpu")
    inner = plan.window(400)
    assert inner.shape == (26, 15)
    whole = plan.samples.values.reshape(50, 30)
    assert torch.equal(inner.samples.values.reshape(26, 15), whole[12:38, 7:22])


@pytest.mark.parametrize("penalty", ["tgv", TGV(a1=2.0, a0=0.3)])
def test_the_length_of_tgv_on_the_centre_is_the_same_in_pixels(penalty):
    plan = _plan(noisy(drawing(50, 30)), None, 0.1, penalty, "auto", "auto", 0, "cpu")
    inner = plan.window(400)
    pixels = [p.penalty.a0 / p.penalty.a1 / pixel(p.shape) for p in (plan, inner)]
    assert inner.shape != plan.shape
    assert pixels[1] == pytest.approx(pixels[0])


@pytest.mark.parametrize("name", ["isotropic", "hessian", "tgv"])
def test_a_pattern_costs_each_pixel_the_same_in_a_picture_of_any_size(name):
    def cost(side):
        h, penalty = pixel((side, side)), pixel_penalty(name, (side, side))
        slope = lambda u: torch.cat(
            [torch.cos(u) * (0.5 / h), 0 * u], -1
        )  # half of it, so that TGV sees both its terms
        wave = lambda u: torch.cat([torch.sin(u), slope(u)], -1)[..., : penalty.channels(1, 2)]
        axis = h * (torch.arange(0, side - 1, 0.25, dtype=torch.float64) - (side - 1) / 2)
        mean = float(score(penalty, lambda x: wave(x[..., :1] * (1 / h)), Lattice((axis, axis))))
        return prior_strength(1.0, (side, side), penalty.order) * mean / side**2

    assert cost(101) == pytest.approx(cost(161), rel=0.02)


@pytest.mark.parametrize("per", ["pixel", "entry"])
def test_gaps_are_filled_from_what_is_seen(per):
    image = drawing(channels=3)
    seen = np.random.default_rng(0).random(image.shape if per == "entry" else image.shape[:2]) < 0.3
    full = seen if per == "entry" else np.broadcast_to(seen[..., None], image.shape)
    hidden = np.where(full, image, np.nan)
    out = inpaint(hidden, seen, lam=2000.0, **QUIET)
    np.testing.assert_array_equal(out[full], image[full])
    nearest = np.where(full, image, image[full].mean())
    assert psnr(out, image) > psnr(nearest, image) + 8


def test_what_stands_in_a_gap_does_not_matter():
    image = drawing(24, 20)
    seen = np.random.default_rng(0).random(image.shape) < 0.5
    outs = [inpaint(np.where(seen, image, gap), seen, lam=100.0, **QUIET) for gap in (0.0, 1e6, np.nan)]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def test_a_large_picture_whose_centre_is_not_seen_is_searched_as_a_whole():
    image = drawing(40, 36)
    seen = np.ones(image.shape, bool)
    seen[8:32, 6:30] = False
    plan = _plan(image, seen, 0.0, "space_variant", "auto", 20, 0, "cpu")
    search = LamSearch(max_pixels=300)
    assert plan.window(300).n_observed() == 0
    steps = []
    assert np.isfinite(search_strength(plan, search, lambda step, _: steps.append(step)))
    assert len(steps) >= 3 * 20
    few = _plan(image, np.arange(image.size).reshape(image.shape) % 48 == 0, 0.0, "space_variant", "auto", 20, 0, "cpu")
    assert search_strength(few, search, lambda *_: None) == search.start


def test_a_noise_of_none_is_none():
    image = drawing(24, 20)
    seen = np.random.default_rng(0).random(image.shape) < 0.5
    outs = [inpaint(image, seen, sigma=sigma, **GIVEN) for sigma in (0.0, None)]
    np.testing.assert_array_equal(*outs)


def test_noisy_observations_are_not_taken_as_they_are():
    image = drawing()
    seen = np.random.default_rng(0).random(image.shape) < 0.5
    y = noisy(image)
    out = inpaint(y, seen, sigma=0.1, **GIVEN)
    assert rmse(out[seen], image[seen]) < 0.6 * rmse(y[seen], image[seen])


def test_a_picture_is_enlarged_about_the_same_centre():
    i, j = np.mgrid[:24, :20].astype(float)
    blob = lambda i, j: np.exp(-((i - 11.5) ** 2 + (j - 9.5) ** 2) / 40)
    fine = np.mgrid[:72, :60]
    out = upsample(blob(i, j), scale=3, lam=1.0, **QUIET)
    assert out.shape == (72, 60)
    truth = blob((fine[0] + 0.5) / 3 - 0.5, (fine[1] + 0.5) / 3 - 0.5)
    assert rmse(out, truth) < 0.02
    np.testing.assert_array_equal(upsample(blob(i, j), shape=(72, 60), lam=1.0, **QUIET), out)


def test_a_field_is_read_in_rows_and_columns_and_its_slopes_are_per_pixel():
    i, j = np.mgrid[:30, :24].astype(float)
    field = fit_image(0.03 * i - 0.01 * j, sigma=0.0, lam=0.0, steps=200, **QUIET)
    x = torch.tensor([[10.25, 7.5], [20.0, 15.75]])
    np.testing.assert_allclose(field(x)[:, 0], 0.03 * x[:, 0] - 0.01 * x[:, 1], atol=2e-3)
    np.testing.assert_allclose(field.jacobian(x)[:, 0], [[0.03, -0.01]] * 2, atol=3e-3)
    step = torch.tensor([[1e-2, 0.0]])
    numeric = (field.jacobian(x.double() + step) - field.jacobian(x.double() - step)) / 2e-2
    np.testing.assert_allclose(field.hessian(x)[:, 0, :, 0], numeric[:, 0], atol=1e-3)


def test_slopes_of_a_picture_without_noise_settle_in_the_steps_of_the_default():
    field = fit_image(np.linspace(0, 1, 24)[:, None] * np.ones((1, 20)), sigma=0.0, lam=1.0, **QUIET)
    slopes = field.jacobian(torch.tensor([[11.5, 9.0], [5.2, 7.7]]))[:, 0]
    np.testing.assert_allclose(slopes, [[1 / 23, 0.0]] * 2, atol=1e-3)


def test_answers_do_not_depend_on_how_many_rows_are_read_at_a_time():
    field = fit_image(noisy(drawing(24, 20)), lam=100.0, **QUIET)
    whole = field(Lattice.of_shape(24, 20)).reshape(24, 20)
    part = field(Lattice((torch.arange(5.0, 9.0), torch.arange(20.0))))
    torch.testing.assert_close(part.reshape(4, 20), whole[5:9], rtol=0, atol=1e-6)


@pytest.mark.parametrize("network", ["lowrank", "siren", "fourier", Spline((4, 12))])
def test_every_network_takes_off_noise(network):
    image = drawing(24, 20)
    y = noisy(image)
    out = denoise(y, sigma=0.1, network=network, lam=60.0, steps=150, penalty="isotropic", **QUIET)
    assert psnr(out, image) > psnr(y, image) + 2


@pytest.mark.parametrize("penalty", ["isotropic", "nuclear", "second_order", "tgv", HessianTV()])
def test_every_penalty_takes_off_noise(penalty):
    image = drawing(20, 18)
    y = noisy(image)
    assert psnr(denoise(y, sigma=0.1, penalty=penalty, **QUIET), image) > psnr(y, image) + 3


@pytest.mark.parametrize("n", [4, 5, 17, 256, 1000])
def test_grids_of_a_pyramid_grow_to_the_pixels(n):
    cells = pixel_spline((n, 4)).cells
    assert cells[-1] == n - 1
    assert min(cells) >= min(4, n - 1)
    assert all(b / a == pytest.approx(4, rel=0.2) for a, b in itertools.pairwise(cells))


def test_a_picture_is_not_written_to():
    y = noisy(drawing(24, 20))
    before = y.copy()
    denoise(y, lam=10.0, **QUIET)
    np.testing.assert_array_equal(y, before)


GREY, COLOUR = drawing(16, 12), drawing(16, 12, 3)
SEEN = np.ones((16, 12), bool)
WRONG = {
    "a vector": (lambda: denoise(GREY[0]), r"`image` has shape \(12,\): expected \(H, W\)"),
    "nothing": (lambda: denoise(np.zeros((0, 5))), r"`image` has shape \(0, 5\)"),
    "one row": (lambda: denoise(GREY[:1]), r"`image` has shape \(1, 12\): a field needs at least 4 pixels"),
    "channels first": (lambda: denoise(np.moveaxis(COLOUR, -1, 0)), r"\(3, 16, 12\).*channels stand last"),
    "signed integers": (lambda: denoise(np.ones((9, 9), int)), r"`image` holds int64.*astype\(float\)"),
    "complex": (lambda: denoise(GREY + 0j), "`image` holds complex128"),
    "NaN": (lambda: denoise(np.where(SEEN & (GREY > 0.5), np.nan, GREY)), "not finite at .* observed entries .*mask"),
    "NaN seen": (lambda: inpaint(np.where(GREY > 0.5, np.nan, GREY), SEEN), "not finite at .* observed entries"),
    "mask of numbers": (lambda: inpaint(GREY, SEEN.astype(int)), "`mask` holds int64: expected booleans"),
    "mask of another shape": (lambda: inpaint(GREY, SEEN.T), r"`mask` has shape \(12, 16\): expected \(16, 12\)"),
    "empty mask": (lambda: inpaint(GREY, ~SEEN), "`mask` is True at 0 pixels of channel 0"),
    "empty mask of one channel": (
        lambda: inpaint(COLOUR, np.arange(3) != 1 + 0 * COLOUR.astype(int)),
        "`mask` is True at 0 pixels of channel 1",
    ),
    "negative noise": (lambda: denoise(GREY, sigma=-0.1), r"`sigma=-0.1`: expected a finite number >= 0"),
    "noise in words": (lambda: denoise(GREY, sigma="auto"), "`sigma='auto'`: expected a finite number"),
    "negative lam": (lambda: denoise(GREY, lam=-1.0), "`lam=-1.0`: expected a finite number >= 0"),
    "lam in words": (lambda: denoise(GREY, lam="best"), "`lam='best'`: expected a finite number"),
    "unknown penalty": (lambda: denoise(GREY, penalty="tv"), "`penalty='tv'` is unknown: choose one of"),
    "unknown network": (lambda: denoise(GREY, network="unet"), "`network='unet'` is unknown: choose one of"),
    "no steps": (lambda: denoise(GREY, steps=0), "`steps=0`: expected a whole number"),
    "steps in words": (lambda: denoise(GREY, steps="many"), "`steps='many'`: expected a whole number"),
    "no new size": (lambda: upsample(GREY), "`scale=None` and `shape=None`: give one of them"),
    "two new sizes": (lambda: upsample(GREY, scale=2, shape=(4, 4)), "give one of them"),
    "a size of zero": (lambda: upsample(GREY, scale=0.01), r"`shape=\(0, 0\)`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_named(case):
    call, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.skipif("NEURST_DATA" not in os.environ, reason="NEURST_DATA names no folder of real data")
def test_a_real_picture_is_restored_better_than_by_the_best_weight_of_total_variation():
    from skimage.restoration import denoise_tv_chambolle

    with np.load(Path(os.environ["NEURST_DATA"]) / "images" / "neurtv_plane.npz") as file:
        gt, y = file["gt"][64:192, 64:192] / 255, file["noisy_case1"][64:192, 64:192]
    weights = np.geomspace(0.05, 0.2, 7)
    best = max(psnr(denoise_tv_chambolle(y, w, channel_axis=-1), gt) for w in weights)
    assert psnr(denoise(y, **QUIET), gt) > best + 1
