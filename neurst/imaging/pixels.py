"""What pixels ask of a fit: a knot at each, and lengths and prior strengths that do not move with the size of the picture."""

from __future__ import annotations

import dataclasses
import itertools
import math

from neurst.core.nets import Spline
from neurst.core.penalty import TGV, Penalty, SpaceVariantTV, as_penalty

COARSER = 4  # ratio of neighbouring grids of a pyramid; 2 is as good, and slower
COARSEST = 4  # cells along its longest side, at least
WINDOW = 1.5  # pixels, of the structure tensors of space-variant NeurTV
SLOPES_BEND_OVER = 4.0  # pixels, ``a0 / a1`` of TGV


def pixel(shape: tuple[int, ...]) -> float:
    """From one pixel to the next in box units, where the longest side is [-1, 1].

    Examples
    --------
    >>> pixel((101, 41))
    0.02
    """
    return 2 / (max(shape) - 1)


def pixel_spline(shape: tuple[int, ...]) -> Spline:
    """A knot at every pixel and coarser grids beneath, which let a smooth part settle in few steps.

    Examples
    --------
    >>> pixel_spline((65, 33)).cells
    (4, 16, 64)
    """
    n = max(shape) - 1
    grids = itertools.takewhile(lambda m: m >= COARSEST, (round(n / COARSER**k) for k in itertools.count()))
    return Spline(tuple(grids)[::-1] or (n,), sides=tuple((m - 1) / n for m in shape))


def prior_strength(per_pixel: float, shape: tuple[int, ...], order: int) -> float:
    r"""lam in nats: a slope (a derivative of that order) of one unit per pixel costs `per_pixel` nats at each pixel.

    The penalty is a mean over the box, so :math:`\lambda = c N h^k` with N pixels, h :func:`pixel` and k the order.
    """
    return per_pixel * math.prod(shape) * pixel(shape) ** order


def pixel_penalty(penalty: str | Penalty, shape: tuple[int, ...]) -> Penalty:
    """The penalty behind a name, its lengths in pixels; or the penalty itself."""
    if penalty == "space_variant":
        return SpaceVariantTV(shared=True, window=WINDOW)
    if penalty == "tgv":
        return TGV(a0=SLOPES_BEND_OVER * pixel(shape))
    return as_penalty(penalty)


def on_part(penalty: Penalty, whole: tuple[int, ...], part: tuple[int, ...]) -> Penalty:
    """The penalty for a part of a picture, whose box is another: its lengths are the same in pixels."""
    if isinstance(penalty, TGV):
        return dataclasses.replace(penalty, a0=penalty.a0 * pixel(part) / pixel(whole))
    return penalty
