"""Pictures and masks as arrays, and the estimate of the noise of a picture."""

import numpy as np
import pytest
import torch
from skimage.restoration import estimate_sigma

from neurst.imaging.arrays import as_image, as_mask, noise_level

GREY = np.random.default_rng(0).random((9, 7))
COLOUR = np.random.default_rng(0).random((9, 7, 3))
BYTES = (255 * GREY).astype(np.uint8)
SEEN = np.ones((9, 7), bool)


def test_a_picture_is_read_as_floats_and_unsigned_integers_as_the_range_from_0_to_1():
    for image, expected in [
        (-1e3 * GREY, -1e3 * GREY),
        (GREY.astype(np.float32), GREY.astype(np.float32)),
        (BYTES, BYTES / 255),
        (257 * BYTES.astype(np.uint16), BYTES / 255),
        (GREY > 0.5, (GREY > 0.5).astype(float)),
        (torch.from_numpy(COLOUR), COLOUR),
        (np.ma.MaskedArray(GREY), GREY),  # nothing is masked
    ]:
        found = as_image(image)
        assert type(found) is np.ndarray and found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-15)


@pytest.mark.parametrize(("image", "error", "message"), [
    (GREY[0], ValueError, r"`image` has shape \(7,\): expected \(H, W\), or \(H, W, C\)"),
    (GREY[:1], ValueError, r"`image` has shape \(1, 7\): a field needs at least 4 pixels"),
    (np.moveaxis(COLOUR, -1, 0), ValueError, r"\(3, 9, 7\).*channels stand last"),
    (np.ones((9, 9), int), TypeError, r"`image` holds int64.*unsigned.*astype\(float\)"),
    (np.ma.MaskedArray(GREY, GREY > 0.5), ValueError, "masked array with .* masked entries: use `inpaint"),
])  # fmt: skip
def test_what_is_no_picture_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        as_image(image)


def test_a_mask_of_pixels_holds_for_every_channel_and_a_full_one_is_none():
    seen = GREY < 0.7
    np.testing.assert_array_equal(as_mask(seen, COLOUR), np.stack([seen] * 3, -1))
    np.testing.assert_array_equal(as_mask(seen, np.where(seen, GREY, np.nan)), seen)  # a gap may hold anything
    assert as_mask(SEEN, COLOUR) is None
    assert as_mask(None, GREY) is None


@pytest.mark.parametrize(("mask", "image", "error", "message"), [
    (SEEN.astype(int), GREY, TypeError, "`mask` holds int64: expected booleans"),
    (SEEN.T, GREY, ValueError, r"`mask` has shape \(7, 9\): expected \(9, 7\)"),
    (np.arange(3) != np.ones((9, 7, 1)), COLOUR, ValueError, "`mask` is True at 0 pixels of channel 1: .* 16"),
    (SEEN, np.where(GREY > 0.5, np.nan, GREY), ValueError, "not finite at .* observed entries .*mask"),
])  # fmt: skip
def test_a_mask_that_does_not_fit_is_refused(mask, image, error, message):
    with pytest.raises(error, match=message):
        as_mask(mask, image)


# ---- the noise of a picture


def smooth(sigma=0.1, seed=0):
    """A smooth picture with noise."""
    i, j = np.mgrid[:64, :56] / 64
    return np.sin(3 * i) + np.cos(2 * i * j) + sigma * np.random.default_rng(seed).standard_normal(i.shape)


def test_without_a_mask_the_noise_is_that_of_scikit_image_and_the_mean_over_channels():
    colour = np.stack([smooth(sigma, seed) for seed, sigma in enumerate((0.1, 0.2, 0.4))], -1)
    assert noise_level(colour[..., 0]) == pytest.approx(estimate_sigma(colour[..., 0]), rel=1e-6)
    expected = estimate_sigma(colour, channel_axis=-1, average_sigmas=True)
    assert noise_level(colour) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("share", [0.99, 0.8, 0.5, 0.2])
def test_the_noise_is_estimated_from_the_pixels_that_are_observed(share):
    seen = np.random.default_rng(1).random((64, 56)) < share
    for sigma in (0.05, 0.5):
        assert noise_level(np.where(seen, smooth(sigma), np.nan), seen) == pytest.approx(sigma, rel=0.15)


def test_the_noise_has_the_unit_of_the_picture_and_each_channel_its_own_gaps():
    seen = np.random.default_rng(1).random((64, 56, 2)) < [0.9, 0.4]
    image = np.stack([smooth(0.1), smooth(0.3, seed=1)], -1)
    found = noise_level(image, seen)
    assert found == pytest.approx(np.mean([noise_level(image[..., c], seen[..., c]) for c in range(2)]), rel=0.02)
    for unit in (1e-90, 1e90):
        assert noise_level(unit * image, seen) == pytest.approx(unit * found)


@pytest.mark.parametrize("flat", [0.0, 1.0], ids=["black", "white"])
def test_a_flat_area_does_not_lower_the_noise_and_a_flat_picture_has_none(flat):
    assert noise_level(np.where(np.arange(56) < 28, smooth(), flat)) == pytest.approx(0.1, rel=0.15)
    assert noise_level(np.full((16, 18), 3.3 * flat)) == 0
