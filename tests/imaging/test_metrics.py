import doctest
import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from neurst.imaging import metrics

SCORES = {name: getattr(metrics, name) for name in ("psnr", "mpsnr", "ssim", "rmse", "sam")}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def cube(rng):
    return rng.uniform(0.1, 0.9, (17, 13, 5))


def spectrum_angle(u, v):
    return math.degrees(math.acos(u @ v / math.sqrt(u @ u * (v @ v))))


def test_the_examples_of_the_docstrings_hold():
    result = doctest.testmod(metrics)
    assert result.attempted >= 6 and result.failed == 0


@pytest.mark.parametrize(
    ("name", "best"), [("psnr", math.inf), ("mpsnr", math.inf), ("ssim", 1), ("rmse", 0), ("sam", 0)]
)
def test_equal_arrays_reach_the_best_score(name, best, cube):
    assert SCORES[name](cube, cube) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(("name", "sign"), [("psnr", 1), ("mpsnr", 1), ("ssim", 1), ("rmse", -1), ("sam", -1)])
def test_more_noise_scores_worse(name, sign, cube, rng):
    noise = rng.normal(size=cube.shape)
    scores = [sign * SCORES[name](cube + sigma * noise, cube) for sigma in (0.02, 0.1, 0.5)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_symmetric(name, cube, rng):
    other = cube + 0.1 * rng.normal(size=cube.shape)
    assert SCORES[name](other, cube) == pytest.approx(SCORES[name](cube, other))


@pytest.mark.parametrize("name", ["psnr", "mpsnr", "ssim"])
@pytest.mark.parametrize("factor", [0.5, 255.0])
def test_scores_do_not_move_with_the_unit_of_picture_and_range(name, factor, cube, rng):
    other = cube + 0.1 * rng.normal(size=cube.shape)
    assert SCORES[name](factor * other, factor * cube, data_range=factor) == pytest.approx(SCORES[name](other, cube))


@pytest.mark.parametrize("name", ["psnr", "mpsnr", "ssim"])
def test_bytes_score_as_their_fractions(name, rng):
    truth, other = rng.integers(0, 256, (2, 16, 15, 3), dtype=np.uint8)
    assert SCORES[name](other, truth) == pytest.approx(SCORES[name](other / 255, truth / 255))


def test_psnr_is_the_noise_level_and_is_not_clipped(rng):
    truth = np.zeros((300, 300))
    noisy = truth + 0.1 * rng.normal(size=truth.shape)
    assert metrics.psnr(noisy, truth) == pytest.approx(20, abs=0.05)
    assert metrics.psnr(truth + 10, truth) == pytest.approx(-20)


def test_mean_over_bands_is_never_below_the_psnr_of_the_cube(cube, rng):
    other = cube + np.linspace(0.01, 0.3, 5) * rng.normal(size=cube.shape)
    bands = [metrics.psnr(other[..., b], cube[..., b]) for b in range(5)]
    assert metrics.mpsnr(other, cube) == pytest.approx(np.mean(bands))
    assert metrics.mpsnr(other, cube) > metrics.psnr(other, cube) + 1


def test_ssim_of_two_constants_compares_their_means():
    a, b, c = 0.2, 0.7, 0.01**2
    expected = (2 * a * b + c) / (a * a + b * b + c)
    assert metrics.ssim(np.full((12, 14), a), np.full((12, 14), b)) == pytest.approx(expected)


def test_ssim_has_the_gaussian_window_of_its_paper(rng):
    x, y = rng.uniform(size=(2, 11, 11))  # one whole window: the only pixel that counts is the middle
    weight = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / weight.sum() ** 2
    mean = lambda a: (weight * a).sum()
    covariance = lambda a, b: mean(a * b) - mean(a) * mean(b)
    luminance = (2 * mean(x) * mean(y) + 0.01**2) / (mean(x) ** 2 + mean(y) ** 2 + 0.01**2)
    structure = (2 * covariance(x, y) + 0.03**2) / (covariance(x, x) + covariance(y, y) + 0.03**2)
    assert metrics.ssim(x, y) == pytest.approx(luminance * structure)


def test_ssim_of_channels_is_their_mean(cube, rng):
    other = cube + 0.1 * rng.normal(size=cube.shape)
    assert metrics.ssim(other, cube) == pytest.approx(
        np.mean([metrics.ssim(other[..., b], cube[..., b]) for b in range(5)])
    )


def test_spectral_angle_is_the_arccos_of_each_pixel_and_ignores_scale(cube, rng):
    other = cube + 0.1 * rng.normal(size=cube.shape)
    slow = [spectrum_angle(u, v) for u, v in zip(other.reshape(-1, 5), cube.reshape(-1, 5), strict=True)]
    assert metrics.sam(other, cube) == pytest.approx(np.mean(slow))
    assert metrics.sam(3 * other, cube) == pytest.approx(np.mean(slow))
    assert metrics.sam(3 * cube, cube) < 1e-10


def test_zero_spectra_are_left_out_or_a_right_angle():
    truth = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert metrics.sam(np.array([[5.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), truth) == pytest.approx(45)
    with pytest.raises(ValueError, match="every spectrum of `truth` is zero"):
        metrics.sam(truth, np.zeros_like(truth))


def test_chamfer_is_the_mean_of_both_nearest_distances(rng):
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(25, 3))
    d = cdist(a, b)
    assert metrics.chamfer(a, b) == pytest.approx((d.min(0).mean() + d.min(1).mean()) / 2)
    assert metrics.chamfer(a, b) == pytest.approx(metrics.chamfer(b, a))
    assert metrics.chamfer(1e3 * a, 1e3 * b) == pytest.approx(1e3 * metrics.chamfer(a, b))
    assert metrics.chamfer(a, rng.permutation(a)) == 0


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], r"shape \(16, 13, 5\) and `truth` \(17, 13, 5\)"),
        (lambda x: np.where(x == x.max(), np.nan, x), "not finite at 1 of 1105 entries"),
        (lambda x: (255 * x).astype(np.uint8), "uint8 and `truth` float64"),
        (lambda x: x > 0.5, "bool and `truth` float64"),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(name, change, message, cube):
    with pytest.raises(ValueError, match=message):
        SCORES[name](change(cube), cube)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.psnr(np.zeros(3), np.ones(3), data_range=0.0), "`data_range` is 0.0"),
        (lambda: metrics.mpsnr(np.zeros((3, 3)), np.zeros((3, 3))), r"`cube` has shape \(3, 3\)"),
        (lambda: metrics.ssim(np.zeros((10, 20)), np.zeros((10, 20))), "at least 11 pixels"),
        (lambda: metrics.chamfer(np.zeros((2, 3)), np.zeros((2, 2))), "`a` has 3 coordinates and `b` has 2"),
        (lambda: metrics.chamfer(np.zeros((0, 3)), np.zeros((2, 3))), r"`a` has shape \(0, 3\)"),
        (lambda: metrics.chamfer(np.zeros((2, 3)), np.full((2, 3), np.inf)), "`b` is not finite at 2 of 2"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
