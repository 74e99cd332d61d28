"""Attributes of scattered points, denoised and filled."""

import numpy as np
import pytest
import torch

from neurst.core.nets import Siren
from neurst.core.tuning import parabola_peak
from neurst.imaging import AttributeConfig, FitOptions, LineSearch, fit_attributes, recover_attributes
from neurst.imaging.attributes import noise_level
from neurst.imaging.metrics import rmse

RNG = np.random.default_rng(0)
N, SIGMA = 600, 0.1
POINTS = RNG.random((N, 2)) * [2.0, 1.0]
CLEAN = np.where(POINTS[:, :1] > 1.0, [[0.9, 0.2, 0.5]], [[0.1, 0.6, 0.3]])
NOISY = CLEAN + SIGMA * RNG.standard_normal(CLEAN.shape)
HALF = np.where(np.arange(N)[:, None] < N // 2, NOISY, np.nan)
SMALL = {"network": Siren(width=32, depth=2, omega=8.0), "steps": 40, "lam": 20.0, "device": "cpu", "progress": False}


def fit(points=POINTS, values=HALF, *, n_members=1, sigma=None, **chosen):
    return fit_attributes(points, values, sigma=sigma, n_members=n_members, options=FitOptions(**(SMALL | chosen)))


def recover(points=POINTS, values=HALF, query=None, *, n_members=1, sigma=None, **chosen):
    more = {"sigma": sigma, "n_members": n_members, "options": FitOptions(**(SMALL | chosen))}
    return recover_attributes(points, values, query, **more)


def test_noise_is_removed_and_gaps_are_filled_better_than_by_the_best_mean_of_neighbours():
    near = np.argsort(((POINTS[:, None] - POINTS[None, : N // 2]) ** 2).sum(-1), axis=1)
    best = min(rmse(NOISY[near[:, :k]].mean(1), CLEAN) for k in (1, 3, 5, 8, 12, 20, 40))
    assert rmse(recover(steps=250), CLEAN) < 0.9 * best


def test_units_of_points_and_of_each_channel_do_not_matter():
    scale, shift = np.array([10.0, 1.0, 255.0]), np.array([3.0, 0.0, -7.0])
    there = recover(1e3 * POINTS + 500, HALF * scale + shift)
    np.testing.assert_allclose((there - shift) / scale, recover(), atol=2e-3)


def test_an_entry_that_is_nan_is_unobserved_and_filled():
    values = NOISY.copy()
    values[::2, 0] = values[1::3, 1] = np.nan
    found = recover(values=values, steps=200)
    assert np.isfinite(found).all()
    assert rmse(found, CLEAN) < SIGMA


def test_equal_values_in_another_form_give_the_same_answer():
    byte = np.clip(255 * NOISY, 0, 255).astype(np.uint8)
    for values, others in [
        (np.ma.MaskedArray(np.nan_to_num(HALF), np.isnan(HALF)), HALF),
        (byte, byte.astype(float)),  # integers are numbers in their own unit
        (torch.from_numpy(NOISY), NOISY),
        (NOISY[::-1][::-1], NOISY),
    ]:
        np.testing.assert_array_equal(recover(values=values, steps=3), recover(values=others, steps=3))


def test_one_channel_may_come_without_an_axis():
    one, column = (recover(values=values, steps=3) for values in (HALF[:, 0], HALF[:, :1]))
    np.testing.assert_array_equal(one, column[:, 0], strict=True)


def test_members_take_the_penalties_and_the_seeds_in_turn_and_are_averaged():
    penalties = AttributeConfig().penalties
    assert penalties[0] != penalties[-1]
    found = fit(n_members=np.int64(len(penalties)), steps=20)
    for k in (0, len(penalties) - 1):
        alone = fit(steps=20, penalty=penalties[k], random_state=k).fields[0]
        np.testing.assert_array_equal(found.fields[k](POINTS), alone(POINTS))
    np.testing.assert_allclose(found(POINTS), np.mean([f(POINTS) for f in found.fields], axis=0), atol=1e-12)


def test_lam_is_the_peak_of_the_parabola_through_the_scores_at_held_out_points():
    found = fit(lam="auto", steps=5, search=LineSearch(start=3.0, ratio=10.0, steps=150))
    assert list(found.scores) == pytest.approx([0.3, 3.0, 30.0])
    assert found.lam not in found.scores
    assert found.lam == parabola_peak(list(found.scores), list(found.scores.values()))
    assert all(-20 < score < -1 for score in found.scores.values())  # in units of the noise, which no field can beat


def test_the_noise_is_estimated_across_edges_or_given():
    for unit in (1.0, 50.0):
        assert noise_level(POINTS, unit * NOISY[:, 0]) == pytest.approx(unit * SIGMA, rel=0.1)
    np.testing.assert_allclose(fit(values=NOISY, steps=1).sigma, SIGMA, rtol=0.25)
    np.testing.assert_array_equal(fit(sigma=0.3, steps=1).sigma, [0.3] * 3)
    np.testing.assert_array_equal(fit(sigma=[0.1, 0.2, 0.3], steps=1).sigma, [0.1, 0.2, 0.3])


def test_the_noise_at_points_that_occur_twice_is_that_of_their_pairs():
    twice = np.repeat(POINTS[:200], 2, axis=0)
    values = np.repeat(np.arange(200.0), 2) + np.tile([0.0, 1.0], 200)
    assert noise_level(twice, values) == pytest.approx(1 / (0.6745 * 2**0.5))


def test_a_constant_channel_stays_constant():
    found = recover(values=np.column_stack([NOISY[:, 0], np.full(N, 7.0)]), steps=100)
    np.testing.assert_allclose(found[:, 1], 7.0, atol=0.3)


ROWS = np.arange(N)[:, None]
REFUSED = {
    "identical": ({"points": np.ones((N, 2))}, ValueError, "all 600 .* at one place"),
    "rows": ({"values": NOISY[:5]}, ValueError, r"`values` has shape \(5, 3\): expected \(600, C\) or \(600,\)"),
    "infinite values": ({"values": np.where(ROWS < 9, np.inf, NOISY)}, ValueError, "`values` is infinite at 27 .*NaN"),
    "unseen channel": ({"values": NOISY * [1, np.nan, 1]}, ValueError, "channel 1 of `values` .* 0 points: .* least 4"),
    "query": ({"query": np.ones((4, 3))}, ValueError, r"`query` has shape \(4, 3\): expected \(N, 2\)"),
    "spectral": ({"penalty": "mixed"}, ValueError, "`penalty='mixed'` needs a spectral axis, which points lack"),
    "sigmas": ({"sigma": [0.1, 0.1]}, ValueError, "`sigma` has 2 entries: .* each of the 3 channels"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        recover(**arguments)
