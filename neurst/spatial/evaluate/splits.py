"""Splits into training and test spots. Test spots are hidden from a fit, so that predictions of them can be scored."""

from __future__ import annotations

from math import gamma, pi
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neurst.spatial.geometry import kd_tree

Holdout = Literal["random", "block", "mixed"]
DISC_SHARE = 0.02  # share of the bounding box that one disc covers
MOST_HIDDEN = 0.6  # share of the spots that discs may hide; twice the share that was asked for, if that is more


def split(
    coords: ArrayLike, holdout: Holdout = "random", *, random_state: int = 0, fraction: float = 0.2
) -> tuple[NDArray, NDArray]:
    """Training and test spots.

    Parameters
    ----------
    coords
        (N, d) positions.
    holdout
        ``"random"`` hides single spots, to test predictions between neighbouring spots. ``"block"`` hides discs (balls in 3-d) around
        random spots, each of 2 % of the bounding box, until `fraction` of the spots is hidden, to test predictions across gaps. ``"mixed"`` hides
        half of them in discs and half as single spots; if a disc holds most of the spots, all of them as single spots.
    random_state
        Seed.
    fraction
        Share of the spots to hide.

    Returns
    -------
    Indices of the training spots, ascending, and of the test spots.

    Examples
    --------
    >>> train, test = split(np.random.default_rng(0).normal(size=(50, 2)), "block")
    >>> len(train) + len(test), len(test) >= 10
    (50, True)
    """
    if holdout not in SPLITS:
        msg = f"`holdout={holdout!r}`: expected one of {', '.join(map(repr, SPLITS))}"
        raise ValueError(msg)
    if not 0 < fraction < 1:
        msg = f"`fraction={fraction!r}`: expected a number between 0 and 1"
        raise ValueError(msg)
    test = SPLITS[holdout](np.asarray(coords, float), np.random.default_rng(random_state), fraction)
    return np.setdiff1d(np.arange(len(coords)), test), test


def _random_spots(coords: NDArray, rng: np.random.Generator, fraction: float) -> NDArray:
    return rng.permutation(len(coords))[: int(len(coords) * fraction)]


def _blocks(coords: NDArray, rng: np.random.Generator, fraction: float) -> NDArray:
    hidden = _discs(coords, rng, fraction)
    if hidden.mean() > max(MOST_HIDDEN, 2 * fraction):
        msg = (
            f"`holdout='block'` hides {hidden.sum()} of {len(coords)} spots, as a disc of 2 % of the bounding box holds most of them: look for "
            "outlying spots that make the box too large, or use holdout='random'"
        )
        raise ValueError(msg)
    return np.flatnonzero(hidden)


def _mixed(coords: NDArray, rng: np.random.Generator, fraction: float) -> NDArray:
    hidden = _discs(coords, rng, fraction / 2)
    if hidden.mean() > max(MOST_HIDDEN / 2, 2 * fraction):
        return _random_spots(coords, rng, fraction)
    rest = np.flatnonzero(~hidden)
    hidden[rng.permutation(rest)[: int(len(coords) * fraction / 2)]] = True
    return np.flatnonzero(hidden)


def _discs(coords: NDArray, rng: np.random.Generator, fraction: float) -> NDArray:  # -> (N,) bool
    extent = np.ptp(coords, axis=0)
    extent = extent[extent > 0]
    d = len(extent)
    radius = (np.prod(extent) * DISC_SHARE / (pi ** (d / 2) / gamma(d / 2 + 1))) ** (1 / d)  # a d-ball of that volume
    hidden, tree = np.zeros(len(coords), bool), kd_tree(coords)
    while hidden.mean() < fraction:
        hidden[tree.query_ball_point(coords[rng.integers(len(coords))], radius)] = True
    return hidden


SPLITS = {"random": _random_spots, "block": _blocks, "mixed": _mixed}
