"""Operators between pixels: all of them, some of them, blurred ones, means of blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from neurst.core.arguments import real_array, whole
from neurst.imaging.operators.base import Operator, picture_mask, picture_shape


def identity(shape: tuple[int, int]) -> Operator:
    """The picture itself, as in denoising.

    Examples
    --------
    >>> identity((3, 5)).norm
    1.0
    """
    shape = picture_shape("shape", shape)
    prox = lambda x, data, t: (x + t * data) / (1 + t)
    return Operator(shape, shape, lambda u: u, lambda y: y, 1.0, prox, is_identity=True)


def pixel_mask(mask: ArrayLike) -> Operator:
    """The pixels (H, W) at which `mask` is True, and 0 elsewhere, as in inpainting.

    Examples
    --------
    >>> import numpy as np
    >>> pixel_mask(np.eye(3, dtype=bool)).n_observed
    3
    """
    seen = picture_mask(mask)
    shape, mul = tuple(seen.shape), lambda u: seen.to(u.device) * u
    # where nothing is observed the value stays; data there are not read, and may be NaN
    prox = lambda x, data, t: torch.where(seen.to(x.device), (x + t * data) / (1 + t), x)
    return Operator(shape, shape, mul, mul, 1.0, prox, seen)


def blur(kernel: ArrayLike, shape: tuple[int, int]) -> Operator:
    """Correlation of a picture (H, W) with a kernel (h, w).

    Pixels next to the border of the data are blurred with pixels beyond it. So the picture is larger than the data, which are
    (H - h + 1, W - w + 1): for data of H' rows, ask for a picture of H' + h - 1 rows.

    Examples
    --------
    >>> import numpy as np
    >>> blur(np.full((3, 3), 1 / 9), (10, 12)).data_shape
    (8, 10)
    """
    shape, values = picture_shape("shape", shape), real_array("kernel", kernel)
    if values.ndim != 2 or not np.isfinite(values).all() or not values.any():
        msg = f"`kernel` has shape {values.shape}: expected finite numbers (h, w), not all of them 0"
        raise ValueError(msg)
    data_shape = tuple(n - k + 1 for n, k in zip(shape, values.shape, strict=True))
    if min(data_shape) < 1:
        msg = f"`kernel` of shape {values.shape} is larger than the picture of shape {shape}: expected a smaller one"
        raise ValueError(msg)
    weight = torch.from_numpy(values)[None, None]

    def apply(op: Callable, u: Tensor) -> Tensor:
        out = op(u.reshape(-1, 1, *u.shape[-2:]), weight.to(u))
        return out.reshape(*u.shape[:-2], *out.shape[-2:])

    norm = float(np.abs(values).sum())  # Young's inequality
    return Operator(shape, data_shape, lambda u: apply(F.conv2d, u), lambda y: apply(F.conv_transpose2d, y), norm)


def average(factor: int, shape: tuple[int, int]) -> Operator:
    """Means over blocks of `factor` x `factor` pixels of a picture (H, W), as in super-resolution; both sides are multiples of `factor`.

    Examples
    --------
    >>> average(2, (8, 6)).data_shape
    (4, 3)
    """
    shape, k = picture_shape("shape", shape), whole(1)("factor", factor)
    if shape[0] % k or shape[1] % k:
        msg = f"`shape={shape}`: expected multiples of `factor={k}`; crop or pad the picture"
        raise ValueError(msg)
    data_shape = (shape[0] // k, shape[1] // k)
    forward = lambda u: u.unflatten(-1, (-1, k)).mean(-1).unflatten(-2, (-1, k)).mean(-2)
    adjoint = lambda y: y.repeat_interleave(k, -1).repeat_interleave(k, -2) / k**2
    # A A' = I / k^2, so (I + t A'A)^-1 = I - t / (1 + t / k^2) A'A
    prox = lambda x, data, t: x + t / (1 + t / k**2) * adjoint(data - forward(x))
    return Operator(shape, data_shape, forward, adjoint, 1 / k, prox)
