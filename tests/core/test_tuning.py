import dataclasses
import math

import numpy as np
import pytest

from neurst.core.progress import StepCounter, progress_bar
from neurst.core.tuning import LineSearch, choose, parabola_peak

SEARCH = LineSearch(start=100.0, ratio=2.0, max_steps=4, fraction=0.2, steps=10)


def parabola(best):
    """A trial whose score is a parabola in the logarithm of the strength, and that keeps its strength."""
    return lambda lam: (0.3 - math.log(lam / best) ** 2, f"kept at {lam:g}")


def test_the_peak_of_a_parabola_in_log_strength_is_found_exactly():
    lam = [100 * 2.0**k for k in range(6)]
    for best in (310.0, 400.0, 700.0):
        score = [0.3 - 0.01 * math.log(x / best) ** 2 for x in lam]
        assert parabola_peak(lam, score) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("score", [[0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.2, 0.2, 0.2], [0.3]])
def test_without_two_neighbours_the_best_strength_is_taken_as_it_is(score):
    lam = [100.0, 200.0, 400.0][: len(score)]
    assert parabola_peak(lam, score) == lam[int(np.argmax(score))]


@pytest.mark.parametrize("score", [[0.29, 0.3, 0.29], [0.1, 0.3, 0.3], [0.3 - 1e-9, 0.3, 0.0]])
def test_the_peak_stays_within_half_a_stage_of_the_best(score):
    assert 200 / math.sqrt(2) <= parabola_peak([100.0, 200.0, 400.0], score) <= 200 * math.sqrt(2) * (1 + 1e-12)


# the best strength, and the strengths that are tried before the score falls, as powers of 2 times 100
PEAKS = {
    "at the start": (100.0, [-1, 0, 1], 0),
    "stronger": (100 * 2.0**2.3, [0, 1, 2, 3], 2),
    "weaker": (100 * 2.0**-1.4, [-2, -1, 0, 1], -1),
    "as far as the search goes": (100 * 2.0**3.1, [0, 1, 2, 3, 4], 3),
}


@pytest.mark.parametrize(("best", "powers", "nearest"), PEAKS.values(), ids=PEAKS)
def test_a_search_follows_a_parabola_in_either_direction_and_finds_its_peak(best, powers, nearest):
    tried = []
    found = choose(lambda lam: tried.append(lam) or parabola(best)(lam), SEARCH)  # warnings are errors
    assert found.strength == pytest.approx(best, rel=1e-9)
    np.testing.assert_allclose(list(found.scores), 100 * 2.0 ** np.array(powers), rtol=1e-12)
    assert sorted(tried) == list(found.scores)  # each once
    assert all(score == parabola(best)(lam)[0] for lam, score in found.scores.items())
    assert found.best == f"kept at {100 * 2.0**nearest:g}"


@pytest.mark.parametrize(("sign", "max_steps", "powers", "edge"), [
    (1, 3, [0, 1, 2, 3], r"strongest value, 1.08e\+04"),
    (-1, 3, [-3, -2, -1, 0, 1], "weakest value, 14.8"),
    (1, 1, [0, 1], r"strongest value, 1.2e\+03"),
])  # fmt: skip
def test_a_search_that_ends_while_the_score_still_rises_warns(sign, max_steps, powers, edge):
    search = LineSearch(400.0, 3.0, max_steps, 0.2, 10)
    message = rf"the search for `bending_length` ended at its {edge}, .*max_steps={max_steps + 4}\)`"
    with pytest.warns(UserWarning, match=message):
        found = choose(lambda lam: (sign * lam, lam), search, name="bending_length")
    np.testing.assert_allclose(list(found.scores), 400 * 3.0 ** np.array(powers), rtol=1e-12)
    assert found.strength == found.best == (list(found.scores)[-1] if sign > 0 else list(found.scores)[0])


def test_a_score_that_stops_rising_at_the_last_strength_does_not_warn():
    flat = choose(lambda lam: (min(lam, 200.0), lam), dataclasses.replace(SEARCH, max_steps=2))
    assert flat.scores == {100.0: 100.0, 200.0: 200.0, 400.0: 200.0}
    assert flat.best == 200.0
    assert flat.strength == pytest.approx(200 * 2**0.5)  # in the middle of the two


def test_a_given_strength_is_tried_alone():
    found = choose(parabola(1.0), LineSearch(), given=7.0)
    assert (found.strength, found.best) == (7.0, "kept at 7")
    assert found.scores == {7.0: parabola(1.0)(7.0)[0]}


@pytest.mark.parametrize(("numbers", "message"), [
    ({"start": 0.0}, r"`LineSearch.start=0.0`: expected None or a positive, finite number"),
    ({"ratio": 1.0}, r"`LineSearch.ratio=1.0`: expected None or a finite number > 1"),
    ({"fraction": 0.95}, r"`LineSearch.fraction=0.95`: expected None or a positive, .* <= 0.9"),
])  # fmt: skip
def test_a_search_names_the_number_it_refuses(numbers, message):
    with pytest.raises(ValueError, match=message):
        LineSearch(**numbers)


# ---- progress


def test_a_counter_counts_the_steps_of_all_fits_and_what_is_still_planned():
    seen = []
    counter = StepCounter(lambda *what: seen.append(what), planned=3)
    for stage, planned, steps in [("trial", 2, 2), ("fit", 0, 3)]:
        on_step = counter.stage(stage, planned)
        for step in range(steps):
            on_step(step, 1.0)
    assert seen == [(1, 5, "trial"), (2, 5, "trial"), (3, 5, "fit"), (4, 5, "fit"), (5, 5, "fit")]
    StepCounter(None).stage("silent", 1)(0, 1.0)


def test_a_progress_bar_follows_and_writes_nothing_if_not_shown(capsys):
    for show in (True, False):
        with progress_bar(show) as on_progress:
            for done in range(1, 4):
                on_progress(done, 3, "fit")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert bool(captured.err) == show


def test_a_score_that_is_not_a_number_never_wins():
    trial = lambda lam: (math.nan if lam == 400 else -abs(math.log(lam / 1200)), lam)
    found = choose(trial, LineSearch(400.0, 3.0, 4, 0.2, 10))
    assert found.best == pytest.approx(1200)
    assert found.strength == pytest.approx(1200)
