import numpy as np
import pytest

from neurst.core.nets import Siren
from neurst.core.penalty import IsotropicTV
from neurst.imaging import points as module
from neurst.imaging.points import fit_attributes, noise_level, recover_attributes

RNG = np.random.default_rng(0)
N, SIGMA = 600, 0.1
POINTS = RNG.random((N, 2)) * [2.0, 1.0]
CLEAN = np.where(POINTS[:, :1] > 1.0, [[0.9, 0.2, 0.5]], [[0.1, 0.6, 0.3]])
NOISY = CLEAN + SIGMA * RNG.standard_normal(CLEAN.shape)
HALF = np.where(np.arange(N)[:, None] < N // 2, NOISY, np.nan)
SMALL = {
    "network": Siren(width=32, depth=2, omega=8.0),
    "steps": 60,
    "lam": 20.0,
    "n_members": 1,
    "device": "cpu",
    "progress": False,
}


def recover(points=POINTS, values=HALF, query=None, **options):
    return recover_attributes(points, values, query, **(SMALL | options))


def rmse(a, b=CLEAN):
    return float(np.sqrt(np.mean((a - b) ** 2)))


def test_noise_is_removed_and_unobserved_points_are_filled_better_than_by_the_best_mean_of_neighbours():
    near = np.argsort(((POINTS[:, None] - POINTS[None, : N // 2]) ** 2).sum(-1), axis=1)
    best = min(rmse(NOISY[near[:, :k]].mean(1)) for k in (1, 3, 5, 8, 12, 20, 40))
    assert rmse(recover(steps=250, penalty="nuclear")) < 0.9 * best


def test_units_of_points_and_of_each_channel_do_not_matter():
    scale, shift = np.array([10.0, 1.0, 255.0]), np.array([3.0, 0.0, -7.0])
    there = recover(1e3 * POINTS + 500, HALF * scale + shift)
    np.testing.assert_allclose((there - shift) / scale, recover(), atol=2e-3)


def test_an_unobserved_value_is_one_that_is_nan_entry_by_entry():
    values = NOISY.copy()
    values[::2, 0] = values[1::3, 1] = np.nan
    found = recover(values=values, steps=200)
    assert np.isfinite(found).all()
    assert rmse(found) < SIGMA


def test_the_field_is_the_same_whatever_is_asked_of_it_and_in_whatever_batches(monkeypatch):
    whole = recover()
    monkeypatch.setattr(module, "READ_AT_ONCE", 77)
    np.testing.assert_allclose(recover(query=POINTS[:201]), whole[:201], atol=1e-5)


def test_one_channel_may_come_without_an_axis():
    one = recover(values=HALF[:, 0])
    assert one.shape == (N,)
    np.testing.assert_array_equal(one, recover(values=HALF[:, :1])[:, 0])


def test_integers_are_numbers_in_their_own_unit():
    colours = np.clip(255 * NOISY, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(recover(values=colours), recover(values=colours.astype(float)))


def test_order_of_the_points_does_not_matter_but_for_the_draws():
    order = np.random.default_rng(1).permutation(N)
    moved, here = recover(POINTS[order], HALF[order], steps=120), recover(steps=120)
    other = recover(steps=120, random_state=5)
    assert rmse(moved, here[order]) < 2 * rmse(other, here)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_state_alone():
    np.testing.assert_array_equal(recover(), recover())
    assert rmse(recover(), recover(random_state=1)) > 0


def test_the_gradient_is_that_of_the_values_in_units_of_the_points():
    found = fit_attributes(POINTS * 100, NOISY, **SMALL)
    query, h = 100 * POINTS[:5], 0.05
    for axis in range(2):
        step = h * np.eye(2)[axis]
        difference = (found(query + step) - found(query - step)) / (2 * h)
        np.testing.assert_allclose(found.gradient(query)[..., axis], difference, atol=2e-4)


def test_members_are_averaged():
    members = fit_attributes(POINTS, NOISY, **(SMALL | {"n_members": 2, "penalty": IsotropicTV()}))
    mean = sum(f(module.torch.from_numpy(POINTS)).double().numpy() for f in members.fields) / 2
    np.testing.assert_allclose(members(POINTS), members.center + members.sigma * mean, atol=1e-6)


def test_members_take_the_penalties_in_turn():
    penalties = module.Recovery().penalties
    members = fit_attributes(POINTS, NOISY, **(SMALL | {"n_members": len(penalties), "steps": 20})).fields
    for k in (0, len(penalties) - 1):
        options = SMALL | {"steps": 20, "penalty": penalties[k], "random_state": k}
        alone = fit_attributes(POINTS, NOISY, **options).fields[0].latent(module.torch.from_numpy(POINTS))
        np.testing.assert_array_equal(members[k].latent(module.torch.from_numpy(POINTS)), alone)
    assert penalties[0] != penalties[-1]


def test_lam_is_the_vertex_of_the_scores_at_points_held_out(monkeypatch):
    found = fit_attributes(POINTS, HALF, **(SMALL | {"lam": "auto", "steps": 40}))
    from neurst.core.search import vertex

    assert len(found.tried) >= 2
    assert found.lam == vertex(list(found.tried), [-error for error in found.tried.values()])


@pytest.mark.parametrize("unit", [1.0, 50.0])
def test_the_noise_is_estimated_across_edges(unit):
    assert noise_level(POINTS, unit * NOISY[:, 0]) == pytest.approx(unit * SIGMA, rel=0.1)
    np.testing.assert_allclose(fit_attributes(POINTS, NOISY, sigma=0.3, **SMALL).sigma, 0.3)


def test_the_noise_at_points_that_stand_twice_is_that_of_their_pairs():
    twice = np.repeat(POINTS[:200], 2, axis=0)
    values = np.repeat(np.arange(200.0), 2) + np.tile([0.0, 1.0], 200)
    assert noise_level(twice, values) == pytest.approx(1 / (0.6745 * 2**0.5))


def test_a_constant_channel_stays_constant():
    found = recover(values=np.column_stack([NOISY[:, 0], np.full(N, 7.0)]), steps=200)
    np.testing.assert_allclose(found[:, 1], 7.0, atol=0.3)


WRONG = {
    "one dimension": ({"points": POINTS[:, :1]}, r"`points` has shape \(600, 1\): expected \(N, 2\) or \(N, 3\)"),
    "flat": ({"points": POINTS[:, 0]}, r"`points` has shape \(600,\)"),
    "words": ({"points": [["a", "b"]]}, "`points` is not an array of numbers"),
    "infinite": (
        {"points": np.where(np.arange(N)[:, None] == 3, np.inf, POINTS)},
        r"not finite at 1 of 600 points \(first: row 3",
    ),
    "identical": ({"points": np.ones((N, 2))}, "all 600 coordinates are the same point"),
    "rows": ({"values": NOISY[:5]}, r"`values` has shape \(5, 3\): expected \(600, C\)"),
    "infinite values": ({"values": np.where(NOISY > 0.5, np.inf, NOISY)}, "`values` is infinite at"),
    "unseen channel": (
        {"values": np.where([True, False, True], NOISY, np.nan)},
        "channel 1 of `values` is observed at 0 points",
    ),
    "query": ({"query": np.ones((4, 3))}, r"`query` has shape \(4, 3\): expected \(N, 2\)"),
    "lam": ({"lam": -1.0}, r"`lam=-1.0`: expected a finite number >= 0"),
    "lam word": ({"lam": "best"}, "`lam='best'`"),
    "penalty": ({"penalty": "ridge"}, "`penalty='ridge'` is unknown"),
    "network": ({"network": "mlp"}, "`network='mlp'` is unknown"),
    "sigma": ({"sigma": 0.0}, "`sigma=0.0`: expected a positive number, or 3 of them"),
    "sigmas": ({"sigma": [0.1, 0.1]}, "or 3 of them"),
    "steps": ({"steps": 0}, "`steps=0`: expected a whole number >= 1"),
    "members": ({"n_members": 1.5}, "`n_members=1.5`"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_with_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        recover(**arguments)
