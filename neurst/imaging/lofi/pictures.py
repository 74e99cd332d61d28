"""Pictures of users as the local neural field takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neurst.imaging.arrays import largest_value, unscaled_image
from neurst.imaging.lofi.reading import window

ROWS = 256  # that are looked at together, so that a memory-mapped picture is never copied as a whole


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that is read in parts, so that it may be a memory-mapped file.

    Parameters
    ----------
    values
        (H, W, C) of any type.
    scale
        The number that is read as 1.
    """

    values: NDArray
    scale: float

    @classmethod
    def of(cls, name: str, image: ArrayLike) -> Picture:
        """A picture of a user (H, W) or (H, W, C).

        Raises
        ------
        TypeError, ValueError
            For a wrong type or shape, and values that are not finite.
        """
        array = unscaled_image(name, image)
        if array.dtype.kind == "f":
            for start in range(0, len(array), ROWS):
                bad = np.argwhere(~np.isfinite(array[start : start + ROWS]))
                if len(bad):
                    first = (int(bad[0][0]) + start, *map(int, bad[0][1:]))
                    msg = f"`{name}` is not finite (first at {first}): fill its gaps, for example with `inpaint`"
                    raise ValueError(msg)
        return cls(array if array.ndim == 3 else array[..., None], largest_value(array))

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.values.shape[:2]

    @property
    def channels(self) -> int:
        """C."""
        return self.values.shape[2]

    def part(self, top: int, left: int, height: int, width: int) -> NDArray:
        """A part (height, width, C) as floats, mirrored beyond the border."""
        part = window(self.values, top, left, height, width)
        return part if part.dtype.kind == "f" and self.scale == 1 else part / self.scale

    def whole(self) -> NDArray:
        """The picture (H, W, C) as floats."""
        return self.part(0, 0, *self.shape)

    def moments(self) -> tuple[NDArray, NDArray]:
        """Mean and variance of each channel (C,)."""
        n, total, square, shift = 0, 0.0, 0.0, self.part(0, 0, 1, 1)[0, 0].astype(np.float64)
        for start in range(0, self.shape[0], ROWS):
            rows = self.part(start, 0, min(ROWS, self.shape[0] - start), self.shape[1]) - shift
            n, total, square = (
                n + rows.shape[0] * rows.shape[1],
                total + rows.sum((0, 1)),
                square + (rows**2).sum((0, 1)),
            )
        return shift + total / n, np.maximum(square / n - (total / n) ** 2, 0)


def as_pictures(name: str, pictures: Sequence[ArrayLike]) -> list[Picture]:
    """A list of pictures of a user, with equally many channels.

    Raises
    ------
    TypeError, ValueError
        For an empty list, one array instead of a list, other numbers of channels, and as :meth:`Picture.of`.
    """
    if hasattr(pictures, "ndim") and pictures.ndim <= 3:
        msg = f"`{name}` is one array of shape {tuple(pictures.shape)}: expected a list of pictures, such as [picture], or list(stack) for a stack of them"
        raise ValueError(msg)
    if isinstance(pictures, (str, bytes, dict)) or not hasattr(pictures, "__iter__"):
        msg = f"`{name}` is a {type(pictures).__name__}: expected a list of pictures (H, W) or (H, W, C)"
        raise TypeError(msg)
    out = [Picture.of(f"{name}[{k}]", each) for k, each in enumerate(pictures)]
    if not out:
        msg = f"`{name}` is empty: expected one or more pictures"
        raise ValueError(msg)
    other = next((k for k, each in enumerate(out) if each.channels != out[0].channels), None)
    if other is not None:
        msg = f"`{name}[{other}]` has {out[other].channels} channels and `{name}[0]` has {out[0].channels}: expected equally many"
        raise ValueError(msg)
    return out


def as_pairs(first: str, a: Sequence[ArrayLike], second: str, b: Sequence[ArrayLike]) -> list[tuple[Picture, Picture]]:
    """Two lists of pictures, the k-th of one belonging to the k-th of the other.

    Raises
    ------
    TypeError, ValueError
        For lists of other lengths, other numbers of channels, and as :func:`as_pictures`.
    """
    left, right = as_pictures(first, a), as_pictures(second, b)
    if len(left) != len(right):
        msg = f"`{first}` has {len(left)} pictures and `{second}` has {len(right)}: expected pairs"
        raise ValueError(msg)
    if left[0].channels != right[0].channels:
        msg = (
            f"`{first}` have {left[0].channels} channels and `{second}` have {right[0].channels}: expected equally many"
        )
        raise ValueError(msg)
    return list(zip(left, right, strict=True))


def tensor(part: NDArray) -> Tensor:  # (h, w, C) -> (C, h, w)
    """A part of a picture as a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(part, -1, 0), dtype=np.float32))


def standard_deviation(pictures: Sequence[Picture]) -> float:
    """The root of the mean variance of pictures over all channels; 1 if they are constant."""
    variance: Any = np.mean([each.moments()[1].mean() for each in pictures])
    return float(np.sqrt(variance)) or 1.0
