"""Hyperspectral cubes with mixed noise."""

import os
from pathlib import Path

import numpy as np
import pytest

from neurst.imaging import CubeConfig, FitOptions, denoise_cube
from neurst.imaging.metrics import rmse

H, W, B = 26, 22, 20
SIGMA = 0.03
CONFIG = CubeConfig()
REST = np.arange(B) != 7


def truth():
    """Two materials on four fields with smooth spectra, in [0, 1]."""
    t = np.linspace(0, 1, B)
    spectra = np.stack([0.3 + 0.5 * np.exp(-((t - 0.4) ** 2) / 0.1), 0.6 - 0.4 * t])
    share = np.zeros((H, W))
    share[:12, :9], share[12:, 9:], share[12:, :9] = 1.0, 0.7, 0.3
    return share[..., None] * spectra[0] + (1 - share[..., None]) * spectra[1]


def gaussian(sigma=SIGMA):
    return sigma * np.random.default_rng(0).standard_normal((H, W, B))


def mixed_noise():
    """A noisy cube, and where impulses and lines are."""
    rng = np.random.default_rng(0)
    cube = truth() + SIGMA * rng.standard_normal((H, W, B))
    wrong = rng.random(cube.shape) < 0.08
    cube[wrong] = rng.integers(0, 2, wrong.sum())
    lines = np.zeros(cube.shape, bool)
    lines[:, [4, 17], 3] = lines[:, 11, 8] = True
    cube[:, [4, 17], 3] += 0.2
    cube[:, 11, 8] = 0.0
    return cube, wrong | lines


CLEAN = truth()
NOISY, WRONG = mixed_noise()


def quiet(cube, *, sigma=None, tau=None, rank="auto", config=CONFIG, **chosen):
    options = FitOptions(**({"progress": False, "device": "cpu", "steps": 60} | chosen))
    return denoise_cube(cube, sigma=sigma, tau=tau, rank=rank, options=options, config=config)


@pytest.fixture(scope="module")
def found():
    return quiet(NOISY)


def test_mixed_noise_is_removed(found):
    assert rmse(found.clean, CLEAN) < 0.25 * SIGMA < 0.05 * rmse(NOISY, CLEAN)


def test_the_sparse_part_holds_the_impulses_and_the_lines(found):
    far = WRONG & (np.abs(NOISY - CLEAN) > 5 * SIGMA)
    assert (found.sparse[far] != 0).all()
    assert rmse(found.sparse[far], (NOISY - CLEAN)[far]) < 1.3 * SIGMA
    assert (found.sparse[~WRONG] != 0).mean() < 0.05


@pytest.mark.parametrize("tau", [None, 0.2])
def test_clean_and_sparse_leave_at_most_tau(found, tau):
    clean, sparse = found if tau is None else quiet(NOISY, tau=tau, steps=20)
    assert np.abs(NOISY - clean - sparse).max() <= (tau or 2.5 * 1.5 * SIGMA) + 1e-6


def test_an_offset_of_a_line_below_the_threshold_is_found():
    cube = CLEAN + gaussian()
    cube[:, 5, 2] += 1.5 * SIGMA
    sparse = quiet(cube, tau=4 * SIGMA).sparse
    assert np.median(sparse[:, 5, 2]) == pytest.approx(1.5 * SIGMA, abs=SIGMA)


@pytest.mark.parametrize(("unit", "shift"), [(1000, 70), (1e90, 0)])
def test_the_unit_of_the_cube_does_not_matter(found, unit, shift):
    other = quiet(unit * NOISY + shift)
    np.testing.assert_allclose((other.clean - shift) / unit, found.clean, atol=0.1 * SIGMA)
    np.testing.assert_allclose(other.sparse / unit, found.sparse, atol=0.1 * SIGMA)


BANDS = np.random.default_rng(1).permutation(B)
ORDERS = {
    "bands": lambda cube: np.ascontiguousarray(cube[..., BANDS]),
    "rows and columns": lambda cube: np.ascontiguousarray(cube.swapaxes(0, 1)),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_bands_may_come_in_any_order_and_rows_and_columns_may_be_swapped(found, order):
    # single entries at the threshold may fall on its other side
    assert rmse(quiet(order(NOISY)).clean, order(found.clean)) < 0.2 * SIGMA


def test_a_reversed_view_equals_its_copy_and_the_type_of_the_cube_is_kept():
    for dtype in (np.float32, np.float64):
        view = NOISY.astype(dtype)[::-1, ::-1, ::-1]
        for here, there in zip(quiet(view, steps=2), quiet(view.copy(), steps=2), strict=True):
            assert here.dtype == dtype
            np.testing.assert_array_equal(here, there)


def test_a_constant_cube_comes_back_exactly():
    clean, sparse = quiet(np.full((6, 5, 4), 3.3))
    np.testing.assert_array_equal(clean, np.full((6, 5, 4), 3.3))
    assert not sparse.any()


def test_a_dead_band_does_no_harm_to_the_others():
    dead = np.where(REST, NOISY, 0.0)
    assert rmse(quiet(dead).clean[..., REST], CLEAN[..., REST]) < 0.3 * SIGMA


def test_the_noise_may_differ_from_band_to_band_given_or_estimated():
    sigma = np.where(np.arange(B) % 2, 0.1, 0.01)
    cube = CLEAN + gaussian(sigma)
    given, estimated, one = (rmse(quiet(cube, sigma=s).clean, CLEAN) for s in (sigma, None, 0.07))
    assert max(given, estimated) < 0.8 * one


PRIORS = {"auto": {}, "hessian": {"penalty": "hessian"}, "tgv": {"penalty": "tgv"}}
PRIORS |= {"mixed": {"penalty": "mixed", "steps": 120}}


@pytest.mark.parametrize("chosen", PRIORS.values(), ids=PRIORS)
def test_the_strength_of_the_default_suits_every_penalty(chosen):
    assert rmse(quiet(NOISY, **chosen).clean, CLEAN) < 0.8 * rmse(quiet(NOISY, lam=0.0).clean, CLEAN)


SMALL = np.random.default_rng(0).random((5, 5, 4))
REFUSED = {
    "a picture": ({"cube": SMALL[..., 0]}, ValueError, r"`cube` has shape \(5, 5\): expected \(H, W, B\)"),
    "integers": ({"cube": np.zeros((5, 5, 4), int)}, TypeError, "`cube` holds int64: .*`cube.astype"),
    "NaN": ({"cube": SMALL * np.nan}, ValueError, "not finite at 100 of 100 entries: fill them"),
    "masked": ({"cube": np.ma.MaskedArray(SMALL, SMALL > 0.5)}, ValueError, "masked entries: fill or drop them"),
    "sigmas": ({"sigma": np.ones(3)}, ValueError, "`sigma` has 3 entries: .* each of the 4 bands"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_named(change, error, message):
    with pytest.raises(error, match=message):
        quiet(**({"cube": SMALL} | change))


@pytest.mark.skipif("NEURST_DATA" not in os.environ, reason="NEURST_DATA names no folder of real data")
def test_a_crop_of_a_real_cube_is_restored():
    with np.load(Path(os.environ["NEURST_DATA"]) / "hsi" / "muufl_gulfport_crop.npz") as file:
        clean = file["cube"][:40, :40].astype(float)
    rng = np.random.default_rng(0)
    cube = clean + 0.05 * rng.standard_normal(clean.shape)
    wrong = rng.random(cube.shape) < 0.1
    cube[wrong] = rng.integers(0, 2, wrong.sum())
    assert rmse(quiet(cube).clean, clean) < 0.02
