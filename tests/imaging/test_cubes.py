import inspect
import os
from pathlib import Path

import numpy as np
import pytest

from neurst.imaging import demix
from neurst.imaging.cubes import SparseRule, Subspace, _regressed, _start

H, W, B = 26, 22, 20
SIGMA = 0.03


def truth():
    """Two materials on four fields with smooth spectra, in [0, 1]."""
    t = np.linspace(0, 1, B)
    spectra = np.stack([0.3 + 0.5 * np.exp(-((t - 0.4) ** 2) / 0.1), 0.6 - 0.4 * t])
    share = np.zeros((H, W))
    share[:12, :9], share[12:, 9:], share[12:, :9] = 1.0, 0.7, 0.3
    return share[..., None] * spectra[0] + (1 - share[..., None]) * spectra[1]


def mixed_noise(seed=0, impulses=0.08):
    """Clean cube, noisy cube, and where impulses and lines are."""
    rng, clean = np.random.default_rng(seed), truth()
    cube = clean + SIGMA * rng.standard_normal(clean.shape)
    wrong = rng.random(cube.shape) < impulses
    cube[wrong] = rng.integers(0, 2, wrong.sum())
    lines = np.zeros(cube.shape, bool)
    lines[:, [4, 17], 3] = lines[:, 11, 8] = True
    cube[:, [4, 17], 3] += 0.2
    cube[:, 11, 8] = 0.0
    return clean, cube, wrong, lines


def rmse(a, b):
    return float(np.sqrt(np.mean((a - b) ** 2)))


def quiet(cube, **settings):
    return demix(cube, **{"progress": False, "device": "cpu", "steps": 60, **settings})


@pytest.fixture(scope="module")
def case():
    clean, cube, wrong, lines = mixed_noise()
    return clean, cube, wrong, lines, quiet(cube)


def test_mixed_noise_goes(case):
    clean, cube, _, _, found = case
    assert rmse(found.clean, clean) < 0.25 * SIGMA < 0.05 * rmse(cube, clean)


def test_the_sparse_part_holds_the_impulses_and_the_lines(case):
    clean, cube, wrong, lines, found = case
    far = (wrong | lines) & (np.abs(cube - clean) > 5 * SIGMA)
    assert (found.sparse[far] != 0).all()
    assert rmse(found.sparse[far], (cube - clean)[far]) < 1.3 * SIGMA
    assert (found.sparse[~(wrong | lines)] != 0).mean() < 0.05


def test_an_offset_of_a_line_below_the_threshold_is_found():
    clean = truth()
    cube = clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)
    cube[:, 5, 2] += 1.5 * SIGMA
    found = quiet(cube, tau=4 * SIGMA)
    np.testing.assert_allclose(np.median(found.sparse[:, 5, 2]), 1.5 * SIGMA, atol=SIGMA)


@pytest.mark.parametrize("tau", [None, 0.2])
def test_clean_and_sparse_leave_at_most_tau(tau):
    _, cube, _, _ = mixed_noise()
    found = quiet(cube, tau=tau)
    assert np.abs(cube - found.clean - found.sparse).max() <= (0.2 if tau else 2.5 * 1.5 * SIGMA) + 1e-6


def test_the_unit_of_the_cube_is_free(case):
    *_, cube, _, _, found = case
    other = quiet(1000 * cube + 70)
    np.testing.assert_allclose(other.clean, 1000 * found.clean + 70, atol=1.0)
    np.testing.assert_allclose(other.sparse, 1000 * found.sparse, atol=1.0)


def test_bands_may_come_in_any_order(case):
    *_, cube, _, _, found = case
    order = np.random.default_rng(1).permutation(B)
    other = quiet(np.ascontiguousarray(cube[..., order]))
    # single entries at the threshold may fall on its other side
    assert rmse(other.clean, found.clean[..., order]) < 0.1 * SIGMA


def test_rows_and_columns_may_be_swapped(case):
    *_, cube, _, _, found = case
    other = quiet(np.ascontiguousarray(cube.swapaxes(0, 1)))
    assert rmse(other.clean.swapaxes(0, 1), found.clean) < 0.2 * SIGMA


def test_the_same_seed_gives_the_same_cubes(case):
    *_, cube, _, _, found = case
    np.testing.assert_array_equal(quiet(cube).clean, found.clean)


def test_the_global_random_state_is_untouched(case):
    import torch

    before = torch.get_rng_state()
    quiet(case[1], steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_type_of_the_cube_is_kept(case, dtype):
    cube = case[1].astype(dtype)
    copy = cube.copy()
    found = quiet(cube, steps=5)
    assert found.clean.dtype == found.sparse.dtype == dtype
    np.testing.assert_array_equal(cube, copy)


def test_a_cube_without_noise_comes_back():
    clean = truth()
    found = quiet(clean, steps=200)
    assert rmse(found.clean, clean) < 0.03 * clean.std()


def test_a_constant_cube_comes_back():
    cube = np.full((6, 5, 4), 3.0)
    found = quiet(cube)
    np.testing.assert_array_equal(found.clean, cube)
    assert not found.sparse.any()


def test_a_dead_band_does_no_harm(case):
    clean, cube, *_ = case
    dead = cube.copy()
    dead[..., 7] = 0.0
    found = quiet(dead)
    others = np.arange(B) != 7
    assert rmse(found.clean[..., others], clean[..., others]) < 0.3 * SIGMA


def test_a_known_noise_level_may_differ_from_band_to_band():
    clean = truth()
    sigma = np.where(np.arange(B) % 2, 0.1, 0.01)
    cube = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)
    given, estimated = quiet(cube, sigma=sigma), quiet(cube)
    one = quiet(cube, sigma=0.07)
    assert rmse(given.clean, clean) < 0.8 * rmse(one.clean, clean)
    assert rmse(estimated.clean, clean) < 0.8 * rmse(one.clean, clean)


def test_the_noise_is_estimated_beside_impulses():
    _, cube, *_ = mixed_noise()
    noise = _start(cube.astype(np.float32), None, None, 2.5)[0]
    np.testing.assert_allclose(np.median(noise), SIGMA, rtol=0.2)


def test_a_pixel_that_the_start_lost_whole_comes_back():
    clean = truth()
    clean[5, 6] += 2 * (clean[5, 6] - clean[20, 15])  # on the line of the two materials, unlike its neighbours
    cube = (clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)).astype(np.float32)
    noise, rule, sparse, rank = _start(cube, None, None, 2.5)
    white = cube / noise
    space = Subspace.of(white - sparse, rank)
    sparse[5, 6] = white[5, 6] - white[5, 7]
    assert (rule(white - space.outward(space.inward(white - sparse)))[5, 6] != 0).mean() > 0.5
    assert (_regressed(white, sparse, space, rule)[5, 6] != 0).mean() < 0.2


def test_the_rule_takes_what_lies_beyond_the_threshold_and_no_less():
    residual = np.zeros((9, 7, 2), np.float32)
    residual[1, 2, 0], residual[3, 3, 1] = 5.0, 1.0
    residual[:, 4, 1] = 2.0
    found = SparseRule(tau=np.array([3.0, 3.0], np.float32))(residual)
    expected = residual.copy()
    expected[3, 3, 1] = 0.0
    np.testing.assert_array_equal(found, expected)


def test_neurtv_on_the_maps_beats_none(case):
    clean, cube, *_, found = case
    assert rmse(found.clean, clean) < 0.7 * rmse(quiet(cube, lam=0.0).clean, clean)


@pytest.mark.parametrize("penalty", ["hessian", "tgv"])
def test_lam_follows_the_order_of_the_penalty_and_its_lengths(case, penalty):
    clean, cube, *_ = case
    assert rmse(quiet(cube, penalty=penalty).clean, clean) < 0.8 * rmse(quiet(cube, lam=0.0).clean, clean)


def test_neursstv_serves_as_well():
    clean, cube, *_ = mixed_noise()
    found = quiet(cube, penalty="mixed", steps=150)
    assert rmse(found.clean, clean) < 0.7 * SIGMA


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"cube": np.zeros((5, 5))}, ValueError, r"shape \(5, 5\): expected an array \(height, width, bands\)"),
        ({"cube": [[[1.0]]]}, ValueError, "expected an array"),
        ({"cube": np.zeros((5, 5, 4), int)}, TypeError, "int64: expected floats; pass `cube.astype"),
        ({"cube": np.zeros((5, 5, 4), bool)}, TypeError, "bool: expected floats"),
        ({"cube": np.zeros((5, 5, 1))}, ValueError, "2 bands"),
        ({"cube": np.zeros((1, 5, 4))}, ValueError, "4 x 4 pixels"),
        ({"cube": np.zeros((5, 1, 4))}, ValueError, "4 x 4 pixels"),
        ({"cube": np.full((5, 5, 4), np.nan)}, ValueError, "not finite at 100 of 100 entries"),
        ({"tau": 0.0}, ValueError, "`tau=0.0`: expected a positive"),
        ({"tau": -1.0}, ValueError, "`tau=-1.0`"),
        ({"sigma": 0.0}, ValueError, "`sigma=0.0`"),
        ({"sigma": np.ones(3)}, ValueError, "one for each of the 4 bands"),
        ({"lam": -1.0}, ValueError, "`lam=-1.0`"),
        ({"lam": "much"}, ValueError, "`lam='much'`"),
        ({"rank": 0}, ValueError, "`rank=0`"),
        ({"steps": 0}, ValueError, "`steps=0`"),
        ({"penalty": "none"}, ValueError, "`penalty='none'` is unknown"),
        ({"network": "none"}, ValueError, "`network='none'` is unknown"),
    ],
)
def test_wrong_input_is_refused(change, error, match):
    settings = {"cube": np.random.default_rng(0).random((5, 5, 4)), **change}
    with pytest.raises(error, match=match):
        quiet(**settings)


def test_numbers_are_named():
    kinds = {p.kind for name, p in inspect.signature(demix).parameters.items() if name != "cube"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.skipif("NEURST_DATA" not in os.environ, reason="NEURST_DATA names no folder of real data")
def test_a_crop_of_a_real_cube_is_restored():
    with np.load(Path(os.environ["NEURST_DATA"]) / "hsi" / "muufl_gulfport_crop.npz") as file:
        clean = file["cube"][:40, :40].astype(float)
    rng = np.random.default_rng(0)
    cube = clean + 0.05 * rng.standard_normal(clean.shape)
    wrong = rng.random(cube.shape) < 0.1
    cube[wrong] = rng.integers(0, 2, wrong.sum())
    found = quiet(cube)
    assert rmse(found.clean, clean) < 0.02
