"""The search for a prior strength by held-out data: a climb in log lam, and the vertex of a parabola."""

from __future__ import annotations

from collections.abc import Callable


def vertex(lam: list[float], score: list[float]) -> float:
    """The best of evenly spaced (in log) strengths, refined by the parabola through it and its neighbours.

    Examples
    --------
    >>> vertex([100.0, 200.0, 400.0], [0.3, 0.4, 0.3])
    200.0
    """
    k = max(range(len(score)), key=score.__getitem__)
    if k in (0, len(lam) - 1):
        return lam[k]
    left, middle, right = score[k - 1 : k + 2]
    bend = left - 2 * middle + right
    return float(lam[k] * (lam[k + 1] / lam[k]) ** (0.5 * (left - right) / bend)) if bend < 0 else lam[k]


def climb(
    score: Callable[[float], float], *, start: float, ratio: float = 3.0, reach: int = 4
) -> tuple[float, dict[float, float]]:
    """The strength chosen, and the score of each one tried, from weak to strong.

    From `start` to the stronger neighbour, and on in the direction in which the score rises until it falls; the choice is the
    :func:`vertex`.

    Parameters
    ----------
    score
        What held-out data say of a strength: more is better.
    start, ratio
        First strength, and the factor between neighbours.
    reach
        Most neighbours looked at in one direction.

    Examples
    --------
    >>> import math
    >>> lam, tried = climb(lambda lam: -(math.log(lam / 700) ** 2), start=400.0)
    >>> round(lam), [round(x) for x in tried]
    (700, [400, 1200, 3600])
    """
    tried = {0: score(start)}
    for sign in (1, -1):
        k = sign
        while abs(k) <= reach:
            tried[k] = score(start * ratio**k)
            if tried[k] <= tried[k - sign]:
                break
            k += sign
        if sign == 1 and k > 1:  # it rose: the weaker side is lower
            break
    tried = dict(sorted(tried.items()))
    lams = [start * ratio**k for k in tried]
    return vertex(lams, list(tried.values())), dict(zip(lams, tried.values(), strict=True))
