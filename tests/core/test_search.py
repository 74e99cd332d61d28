import math

import numpy as np
import pytest

from neurst.core.search import climb, vertex


def test_the_vertex_of_a_parabola_in_log_lam_is_found_exactly():
    lam = [100 * 2.0**k for k in range(6)]
    for best in (310.0, 400.0, 700.0):
        score = [0.3 - 0.01 * math.log(x / best) ** 2 for x in lam]
        assert vertex(lam, score) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("score", [[0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.2, 0.2, 0.2], [0.3]])
def test_without_two_neighbours_the_best_strength_is_taken_as_it_is(score):
    lam = [100.0, 200.0, 400.0][: len(score)]
    assert vertex(lam, score) == lam[int(np.argmax(score))]


@pytest.mark.parametrize("score", [[0.29, 0.3, 0.29], [0.1, 0.3, 0.3], [0.3 - 1e-9, 0.3, 0.0]])
def test_the_vertex_stays_within_half_a_stage_of_the_best(score):
    assert 200 / math.sqrt(2) <= vertex([100.0, 200.0, 400.0], score) <= 200 * math.sqrt(2) * (1 + 1e-12)


# the best strength, and the neighbours that are looked at before the score falls, as powers of 2 times 100
VERTICES = {
    "at the start": (100.0, [-1, 0, 1]),
    "stronger": (100 * 2.0**2.3, [0, 1, 2, 3]),
    "weaker": (100 * 2.0**-1.4, [-2, -1, 0, 1]),
    "between the start and its neighbour": (100 * 2.0**0.6, [0, 1, 2]),
    "as far as the reach goes": (100 * 2.0**3.1, [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize(("best", "powers"), VERTICES.values(), ids=VERTICES)
def test_the_search_climbs_a_parabola_in_either_direction_and_finds_its_vertex(best, powers):
    lam, tried = climb(lambda lam: 0.3 - math.log(lam / best) ** 2, start=100.0, ratio=2.0, reach=4)
    assert lam == pytest.approx(best, rel=1e-9)
    np.testing.assert_allclose(list(tried), 100 * 2.0 ** np.array(powers), rtol=1e-12)
    for strength, score in tried.items():
        assert score == 0.3 - math.log(strength / best) ** 2


@pytest.mark.parametrize(
    ("sign", "reach", "powers"), [(1, 3, [0, 1, 2, 3]), (-1, 3, [-3, -2, -1, 0, 1]), (1, 0, [0]), (-1, 0, [0])]
)
def test_a_score_that_rises_on_and_on_ends_at_the_edge_of_the_search(sign, reach, powers):
    lam, tried = climb(lambda lam: sign * lam, start=400.0, ratio=3.0, reach=reach)
    np.testing.assert_allclose(list(tried), 400 * 3.0 ** np.array(powers), rtol=1e-12)
    assert lam == (list(tried)[-1] if sign > 0 else list(tried)[0])
