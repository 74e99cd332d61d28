"""Scores of pictures, cubes and point sets against slow and obviously right formulas."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from neurst.imaging import metrics

# name: the score of equal arrays, and whether more is better
SCORES = {"psnr": (math.inf, 1), "mpsnr": (math.inf, 1), "ssim": (1, 1), "rmse": (0, -1), "sam": (0, -1)}
RANGED = ["psnr", "mpsnr", "ssim"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def cube(rng):
    return rng.uniform(0.1, 0.9, (17, 13, 5))


@pytest.fixture
def other(cube, rng):
    return cube + 0.1 * rng.normal(size=cube.shape)


def score(name, *arrays, **options):
    return getattr(metrics, name)(*arrays, **options)


def spectrum_angle(u, v):
    return math.degrees(math.acos(u @ v / math.sqrt(u @ u * (v @ v))))


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_best_for_equal_arrays_worse_for_more_noise_and_symmetric(name, cube, other, rng):
    best, sign = SCORES[name]
    assert score(name, cube, cube) == pytest.approx(best, abs=1e-12)
    noise = rng.normal(size=cube.shape)
    scores = [sign * score(name, cube + sigma * noise, cube) for sigma in (0.02, 0.1, 0.5)]
    assert scores[0] > scores[1] > scores[2]
    assert score(name, other, cube) == pytest.approx(score(name, cube, other))


@pytest.mark.parametrize("name", RANGED)
def test_scores_do_not_depend_on_the_unit_of_picture_and_range(name, cube, other, rng):
    for factor in (0.5, 255.0):
        there = score(name, factor * other, factor * cube, data_range=factor)
        assert there == pytest.approx(score(name, other, cube))
    a, b = rng.integers(0, 256, (2, 16, 15, 3), dtype=np.uint8)
    assert score(name, a, b) == pytest.approx(score(name, a / 255, b / 255))


def test_the_mean_over_bands_is_never_below_the_psnr_of_the_cube(cube, rng):
    other = cube + np.linspace(0.01, 0.3, 5) * rng.normal(size=cube.shape)
    bands = [metrics.psnr(other[..., b], cube[..., b]) for b in range(5)]
    assert bands[0] == pytest.approx(-10 * math.log10(((other - cube)[..., 0] ** 2).mean()))
    assert metrics.mpsnr(other, cube) == pytest.approx(np.mean(bands))
    assert metrics.mpsnr(other, cube) > metrics.psnr(other, cube) + 1


def test_ssim_has_the_gaussian_window_of_its_paper_and_is_the_mean_over_channels(cube, other, rng):
    x, y = rng.uniform(size=(2, 11, 11))  # one whole window: only the pixel in the middle counts
    weight = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / weight.sum() ** 2
    mean = lambda a: (weight * a).sum()
    covariance = lambda a, b: mean(a * b) - mean(a) * mean(b)
    luminance = (2 * mean(x) * mean(y) + 0.01**2) / (mean(x) ** 2 + mean(y) ** 2 + 0.01**2)
    structure = (2 * covariance(x, y) + 0.03**2) / (covariance(x, x) + covariance(y, y) + 0.03**2)
    assert metrics.ssim(x, y) == pytest.approx(luminance * structure)
    channels = [metrics.ssim(other[..., b], cube[..., b]) for b in range(5)]
    assert metrics.ssim(other, cube) == pytest.approx(np.mean(channels))


def test_the_spectral_angle_is_the_arccos_of_each_pixel_and_ignores_scale(cube, other):
    slow = [spectrum_angle(u, v) for u, v in zip(other.reshape(-1, 5), cube.reshape(-1, 5), strict=True)]
    assert metrics.sam(other, cube) == pytest.approx(np.mean(slow))
    assert metrics.sam(3 * other, cube) == pytest.approx(np.mean(slow))
    assert metrics.sam(3 * cube, cube) < 1e-10


def test_chamfer_is_the_mean_of_both_nearest_distances(rng):
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(25, 3))
    d = cdist(a, b)
    assert metrics.chamfer(a, b) == pytest.approx((d.min(0).mean() + d.min(1).mean()) / 2)
    assert metrics.chamfer(b, a) == pytest.approx(metrics.chamfer(a, b))
    assert metrics.chamfer(1e3 * a, 1e3 * b) == pytest.approx(1e3 * metrics.chamfer(a, b))
    assert metrics.chamfer(a, rng.permutation(a)) == 0


def test_pictures_that_cannot_be_compared_are_refused(cube):
    wrong = {
        r"shape \(16, 13, 5\) and `truth` \(17, 13, 5\)": cube[:-1],
        "not finite at 1 of 1105 entries": np.where(cube == cube.max(), np.nan, cube),
        "uint8 and `truth` float64": (255 * cube).astype(np.uint8),
        "bool and `truth` float64": cube > 0.5,
    }
    for name, (message, picture) in itertools.product(SCORES, wrong.items()):
        with pytest.raises(ValueError, match=message):
            score(name, picture, cube)


ZERO = np.zeros((2, 3))
WRONG = {
    "`data_range=0.0`: expected a positive": lambda: metrics.psnr(ZERO, ZERO, data_range=0.0),
    r"`cube` has shape \(2, 3\)": lambda: metrics.mpsnr(ZERO, ZERO),
    "at least 11 pixels": lambda: metrics.ssim(np.zeros((10, 20)), np.zeros((10, 20))),
    "`a` has 3 coordinates and `b` has 2": lambda: metrics.chamfer(ZERO, ZERO[:, :2]),
    "`b` is not finite at 2 of 2": lambda: metrics.chamfer(ZERO, np.full((2, 3), np.inf)),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
