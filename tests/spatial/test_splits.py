import numpy as np
import pytest
from scipy.spatial import cKDTree

from neurst.spatial.evaluate.splits import split


@pytest.mark.parametrize("holdout", ["random", "block", "mixed"])
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
    else:  # at most one block more than needed; of a mixture, half of a spot may be missing
        assert 501 * fraction - 1 <= len(test) <= 501 * (fraction + 0.06)


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


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_mixture_hides_half_of_its_spots_in_discs_and_half_as_single_spots(fraction):
    coords = np.random.default_rng(0).random((2001, 2))
    hidden = np.isin(np.arange(2001), split(coords, "mixed", random_state=5, fraction=fraction)[1])
    blocks = np.isin(np.arange(2001), split(coords, "block", random_state=5, fraction=fraction / 2)[1])
    assert hidden[blocks].all()  # the discs of a split into blocks alone
    assert (hidden & ~blocks).sum() == int(2001 * fraction / 2)
    nearest = cKDTree(coords[~hidden]).query(coords)[0] * np.sqrt(2001)  # in pitches
    assert np.median(nearest[blocks]) > 2 * np.median(nearest[hidden & ~blocks])


def test_a_mixture_hides_single_spots_alone_if_a_disc_holds_most_of_them():
    coords = np.append(np.random.default_rng(0).random((200, 2)), [[50.0, 50.0]], axis=0)
    with pytest.raises(ValueError, match="look for outlying"):
        split(coords, "block", random_state=1)
    test = split(coords, "mixed", random_state=1)[1]
    assert len(test) == int(201 * 0.2)
    nearest = cKDTree(np.delete(coords, test, 0)).query(coords[test])[0]
    assert np.median(nearest) < 1 / np.sqrt(200)  # with spots all around them


@pytest.mark.parametrize(("holdout", "fraction", "words"), [
    ("blocks", 0.2, "`holdout='blocks'`: expected one of 'random', 'block', 'mixed'"),
    ("random", 0, "`fraction=0`: expected a number between 0 and 1"),
    ("block", 1.0, "`fraction=1.0`"),
    ("block", np.nan, "`fraction=nan`"),
])  # fmt: skip
def test_a_split_that_cannot_be_is_refused(holdout, fraction, words):
    with pytest.raises(ValueError, match=words):
        split(np.zeros((9, 2)), holdout, fraction=fraction)
