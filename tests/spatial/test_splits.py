import numpy as np
import pytest

from neurst.spatial.evaluate.splits import split


@pytest.mark.parametrize("holdout", ["random", "block"])
@pytest.mark.parametrize(("d", "fraction"), [(2, 0.2), (3, 0.5)])
def test_a_split_parts_the_spots_and_repeats_itself(holdout, d, fraction):
    coords = np.random.default_rng(0).random((501, d))
    train, test = split(coords, holdout, random_state=3, fraction=fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(501))
    assert (np.diff(train) > 0).all()
    np.testing.assert_array_equal(test, split(coords, holdout, random_state=3, fraction=fraction)[1])
    assert set(test) != set(split(coords, holdout, random_state=4, fraction=fraction)[1])
    if holdout == "random":
        assert len(test) == int(501 * fraction)
    else:  # at most one block more than needed
        assert 501 * fraction <= len(test) <= 501 * (fraction + 0.06)


@pytest.mark.parametrize(
    ("box", "radius"), [([4.0, 9.0], np.sqrt(0.02 * 36 / np.pi)), ([2, 3, 4], (0.36 / np.pi) ** (1 / 3))]
)
def test_a_block_is_a_ball_of_two_percent_of_the_bounding_box(box, radius):
    coords = np.random.default_rng(0).random((400, len(box)))
    coords = np.concatenate([coords, np.zeros((1, len(box))), np.ones((1, len(box)))]) * box
    first = coords[np.random.default_rng(5).integers(len(coords))]
    inside = np.flatnonzero(np.linalg.norm(coords - first, axis=1) <= radius)
    np.testing.assert_array_equal(split(coords, "block", random_state=5, fraction=1e-3)[1], inside)


def test_blocks_of_a_flat_section_in_space_are_those_of_the_plane():
    coords = np.random.default_rng(0).random((300, 2))
    flat = np.column_stack([coords, np.full(300, 7.0)])
    np.testing.assert_array_equal(split(flat, "block")[1], split(coords, "block")[1])


@pytest.mark.parametrize(("holdout", "fraction", "words"), [
    ("blocks", 0.2, "`holdout='blocks'`: expected one of 'random', 'block'"),
    ("random", 0, "`fraction=0`: expected a number between 0 and 1"),
    ("block", 1.0, "`fraction=1.0`"),
    ("block", np.nan, "`fraction=nan`"),
])  # fmt: skip
def test_a_split_that_cannot_be_is_refused(holdout, fraction, words):
    with pytest.raises(ValueError, match=words):
        split(np.zeros((9, 2)), holdout, fraction=fraction)
