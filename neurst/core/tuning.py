"""Choice of a strength from held-out data: short fits at several strengths, scored on data that they were not fitted to.

A *trial* is a function of the strength. It fits to part of the data, and returns the score on the rest and a result to keep.
:func:`choose` tries strengths that are evenly spaced in the logarithm and takes the best one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from neurst.core.arguments import NONE, POSITIVE, SHARE, SIZE, Rule, check_fields, instance, number, warn

T = TypeVar("T")


@dataclass(frozen=True)
class LineSearch:
    """How a strength is chosen.

    The search starts at `start`, tries strengths a factor `ratio` apart in the direction in which the held-out score rises, and stops when
    it falls. The choice is the peak of the parabola through the best strength and its neighbours, in the logarithm of the strength. A
    warning is issued if the score still rises at the last strength. Each trial starts from scratch: a warm start would bias the
    comparison, as a field that was fitted at another strength keeps its components.

    Parameters
    ----------
    start
        First strength: nats for `lam`, a length in the units of the points for `bending_length`. None is the default of each method.
    ratio
        Factor between neighbouring strengths, above 1; None is the default of each method.
    max_steps
        Largest number of strengths tried in one direction beyond the first; None is the default of each method.
    fraction
        Share of the data that is held out; None is the default of each method.
    steps
        Optimisation steps of a trial; None is the default of each method.

    Examples
    --------
    >>> LineSearch(start=100.0, max_steps=6).with_defaults(LineSearch(400.0, 3.0, 4, 0.2, 200))
    LineSearch(start=100.0, ratio=3.0, max_steps=6, fraction=0.2, steps=200)
    """

    start: float | None = None
    ratio: float | None = None
    max_steps: int | None = None
    fraction: float | None = None
    steps: int | None = None

    def __post_init__(self):
        ratio, rest = number(1, above=True), {"max_steps": SIZE, "fraction": SHARE, "steps": SIZE}
        check_fields(self, **{name: NONE | rule for name, rule in ({"start": POSITIVE, "ratio": ratio} | rest).items()})

    def hold_out(self, n: int, random_state: int) -> tuple[NDArray, NDArray]:
        """Indices of held-out data, at least one, and of the rest."""
        order = np.random.default_rng(random_state).permutation(n)
        held, rest = np.split(order, [max(1, round(self.fraction * n))])
        return held, rest

    def with_defaults(self, default: LineSearch) -> LineSearch:
        """The same search, with values that are None taken from `default`."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(default, **given)


SEARCH = instance(LineSearch, "a `neurst.core.tuning.LineSearch`")


def _full(value: Any) -> LineSearch:
    if None in dataclasses.astuple(SEARCH.read(value)):
        raise ValueError
    return value


FULL_SEARCH = Rule(("a `neurst.core.tuning.LineSearch` with all its numbers",), _full)


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The result of a search.

    Parameters
    ----------
    strength
        The strength that was chosen.
    scores
        The held-out score of each strength that was tried, from weak to strong; a higher score is better.
    best
        The result that was kept from the best trial.
    advice
        What to tell the user if the search ended while the score still rose; else empty.
    """

    strength: float
    scores: dict[float, float]
    best: T
    advice: str = ""


def parabola_peak(strengths: list[float], scores: list[float]) -> float:
    """The best of strengths that are evenly spaced in the logarithm, refined by the parabola through it and its neighbours.

    Examples
    --------
    >>> parabola_peak([100.0, 200.0, 400.0], [0.3, 0.4, 0.3])
    200.0
    """
    k = max(range(len(scores)), key=scores.__getitem__)
    if k in (0, len(strengths) - 1):
        return strengths[k]
    left, middle, right = scores[k - 1 : k + 2]
    if not all(map(math.isfinite, (left, middle, right))):
        return strengths[k]
    curvature = left - 2 * middle + right
    if not curvature < 0:
        return strengths[k]
    return float(strengths[k] * (strengths[k + 1] / strengths[k]) ** (0.5 * (left - right) / curvature))


def choose(
    trial: Callable[[float], tuple[float, T]],
    search: LineSearch,
    *,
    given: float | None = None,
    name: str = "lam",
    quiet: bool = False,
) -> Choice[T]:
    """Choose a strength by trials; if one is `given`, try it alone.

    Parameters
    ----------
    trial
        Called with a strength. Returns its held-out score (higher is better) and the result to keep.
    search
        How to search, with no value left at None.
    given
        A strength that the user has set.
    name
        Name of the strength, for the warning.
    quiet
        Issue no warning, but leave it in the `advice` of the result.

    Examples
    --------
    >>> import math
    >>> found = choose(lambda lam: (-(math.log(lam / 700) ** 2), None), LineSearch(400.0, 3.0, 4, 0.2, 10))
    >>> round(found.strength), [round(x) for x in found.scores]
    (700, [400, 1200, 3600])
    """
    if given is not None:
        score, kept = trial(given)
        return Choice(given, {given: score}, kept)

    def scored(strength: float) -> tuple[float, T]:
        score, kept = trial(strength)
        return (-math.inf if math.isnan(score) else score), kept

    tried = {0: scored(search.start)}
    at_edge = None
    for direction in (1, -1):
        k = direction
        while abs(k) <= search.max_steps:
            tried[k] = scored(search.start * search.ratio**k)
            if tried[k][0] <= tried[k - direction][0]:
                break
            k += direction
        else:
            at_edge = k - direction
        if direction == 1 and k > 1:  # the score rose towards stronger values, so weaker ones are not tried
            break
    tried = dict(sorted(tried.items()))
    strengths, scores = [search.start * search.ratio**k for k in tried], [score for score, _ in tried.values()]
    advice = ""
    if at_edge is not None:
        advice = (
            f"the search for `{name}` ended at its {'strongest' if at_edge > 0 else 'weakest'} value, {search.start * search.ratio**at_edge:.3g}, "
            f"while the held-out score still rose: to look further, pass a `LineSearch(max_steps={search.max_steps + 4})` as `search` (of "
            f"`FitOptions` in `neurst.imaging`), or pass a fixed `{name}`"
        )
    if advice and not quiet:
        warn(advice)
    best = max(tried.values(), key=lambda pair: pair[0])[1]
    return Choice(parabola_peak(strengths, scores), dict(zip(strengths, scores, strict=True)), best, advice)
