r"""Reading a picture at any coordinates, pointwise or on all its pixels.

Coordinates are (row, column) in pixels with the first pixel centre at (0, 0). Between pixels the picture is the bicubic interpolation with a = -0.75 :cite:p:`Keys1981`, and beyond its border it is mirrored at
the centres of the border pixels. Rings further out are read in copies of the picture blurred by repeated filtering with (1, 4, 6, 4, 1) / 16, whose holes double from level to level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CUBIC = -0.75  # of `torch.nn.functional.grid_sample`
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def reach_of_level(level: int) -> int:
    """How far in pixels a blurred copy looks."""
    return 2 * (2**level - 1)


def mirrored(start: int, length: int, size: int) -> NDArray[np.intp]:
    """Indices start, ..., start + length - 1 reflected into 0, ..., size - 1 at the centres of the border pixels."""
    index = np.abs(np.arange(start, start + length)) % (2 * (size - 1))
    return np.minimum(index, 2 * (size - 1) - index)


def window(picture: NDArray, top: int, left: int, height: int, width: int) -> NDArray:
    """A part of a picture (H, W, ...), mirrored beyond the border. Only this part of a memory-mapped picture is read."""
    parts = []
    for start, length, size in zip((top, left), (height, width), picture.shape, strict=False):
        inside = 0 <= start and start + length <= size
        parts.append(slice(start, start + length) if inside else mirrored(start, length, size))
    rows, columns = parts
    if isinstance(rows, slice) or isinstance(columns, slice):
        return np.asarray(picture[rows, columns])
    return np.asarray(picture[rows][:, columns])


def blurred(pictures: Tensor, level: int) -> Tensor:  # (B, C, H, W) -> the same shape
    """One more level: filtered with holes of ``2 ** (level - 1)`` pixels."""
    hole = 2 ** (level - 1)
    for axis in (-2, -1):
        size = pictures.shape[axis]
        at = torch.from_numpy(mirrored(-2 * hole, size + 4 * hole, size)).to(pictures.device)
        padded = pictures.index_select(axis, at)
        pictures = sum(tap * padded.narrow(axis, k * hole, size) for k, tap in enumerate(TAPS))
    return pictures


def pyramid(pictures: Tensor, levels: Sequence[int]) -> dict[int, Tensor]:
    """The copies of pictures (B, C, H, W) at the levels that are read."""
    out = {0: pictures}
    for level in range(1, max(levels) + 1):
        out[level] = blurred(out[level - 1], level)
    return {level: out[level] for level in sorted(set(levels))}


def read(pictures: Tensor, points: Tensor) -> Tensor:  # (B, C, H, W), (B, P, K, 2) -> (B, C, P, K)
    """Values of pictures at coordinates."""
    height, width = pictures.shape[-2:]
    scale = points.new_tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])
    return F.grid_sample(
        pictures, points.flip(-1) * scale - 1, mode="bicubic", padding_mode="reflection", align_corners=True
    )


def read_patches(copies: dict[int, Tensor], points: Tensor, offsets: Tensor, levels: Sequence[int]) -> Tensor:
    """Patches (C, M, R, B P) of pictures at points (B, P, 2), for offsets (R, M, 2) or (B, P, R, M, 2), each ring from its level."""
    (n, p, _), (rings, rays) = points.shape, offsets.shape[-3:-1]
    at = (points[:, :, None, None] + offsets).expand(n, p, rings, rays, 2)
    parts: list[Tensor | None] = [None] * rings
    for level, pictures in copies.items():
        own = [k for k, each in enumerate(levels) if each == level]
        values = read(pictures, at[:, :, own].reshape(n, p, -1, 2)).permute(1, 3, 0, 2).flatten(2)  # (C, K, B P)
        for k, ring in enumerate(own):
            parts[ring] = values.unflatten(1, (len(own), rays))[:, k]
    return torch.stack(parts, 2)


def cubic_weights(fraction: Tensor) -> Tensor:  # (...) -> (..., 4)
    """Weights of the pixels at -1, 0, 1 and 2 for a position between the pixels 0 and 1."""
    near = lambda x: ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = lambda x: ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return torch.stack([far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)], -1)


def grid_patches(copies: dict[int, Tensor], offsets: Tensor, levels: Sequence[int], margin: int) -> Tensor:
    """Patches (C, M, R, h w) at all pixels of one picture (1, C, h + 2 margin, w + 2 margin) but the margin: one convolution for each level, as the offsets (R, M, 2) are the same at all pixels."""
    parts: list[Tensor | None] = [None] * len(offsets)
    for level, pictures in copies.items():
        own = [k for k, each in enumerate(levels) if each == level]
        kernels = _kernels(offsets[own].reshape(-1, 2))  # (K, side, side)
        spare = margin - kernels.shape[-1] // 2
        inner = pictures[..., spare : pictures.shape[-2] - spare, spare : pictures.shape[-1] - spare]
        values = F.conv2d(inner.transpose(0, 1), kernels[:, None]).flatten(2).unflatten(1, (len(own), -1))
        for k, ring in enumerate(own):
            parts[ring] = values[:, k]
    return torch.stack(parts, 2)


def _kernels(offsets: Tensor) -> Tensor:  # (K, 2) -> (K, side, side)
    """Kernels whose correlation with a picture reads it at an offset from each pixel."""
    reach = math.ceil(float(offsets.abs().max())) + 2
    base = offsets.floor()
    weights = cubic_weights(offsets - base)  # (K, 2, 4)
    out = offsets.new_zeros(len(offsets), 2, 2 * reach + 1)
    index = (base.long() + reach - 1)[..., None] + torch.arange(4, device=offsets.device)
    out.scatter_(2, index, weights)
    return out[:, 0, :, None] * out[:, 1, None, :]
