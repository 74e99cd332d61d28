"""Pictures and cubes <-> values on a lattice, checked at the door."""

from __future__ import annotations

import numpy as np
import torch

from neurst.core.lattice import Lattice
from neurst.core.samples import Samples

MIN_SIDE = 4


def as_image(image: np.ndarray, name: str = "image") -> np.ndarray:  # (H, W) or (H, W, C)
    """A picture as floats; unsigned integers become [0, 1].

    Raises
    ------
    ValueError
        If it is neither (H, W) nor (H, W, C), a side is shorter than 4 pixels, or it holds signed integers, whose range is not known.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or 0 in image.shape:
        msg = f"`{name}` has shape {image.shape}: expected (H, W), or (H, W, C) with the channels last"
        raise ValueError(msg)
    if min(image.shape[:2]) < MIN_SIDE:
        msg = f"`{name}` has shape {image.shape}: a field needs at least {MIN_SIDE} pixels along each side; channels stand last"
        raise ValueError(msg)
    if image.dtype.kind in "bu":
        return image / (1.0 if image.dtype == bool else np.iinfo(image.dtype).max)
    if image.dtype.kind != "f":
        msg = f"`{name}` holds {image.dtype}: expected floats, or unsigned integers, which are scaled to [0, 1]; convert it with `.astype(float)`"
        raise ValueError(msg)
    return image


def as_mask(mask: np.ndarray | None, image: np.ndarray, name: str = "mask") -> np.ndarray | None:
    """True where observed, in the shape of the picture; None if all of it is.

    Raises
    ------
    ValueError
        If it is not boolean, fits neither the pixels nor the entries of the picture, or leaves fewer than 16 pixels; or if the picture is not finite
        where it is observed.
    """
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool:
            msg = f"`{name}` holds {mask.dtype}: expected booleans, True where the picture is observed"
            raise ValueError(msg)
        if mask.shape not in (image.shape, image.shape[:2]):
            msg = f"`{name}` has shape {mask.shape}: expected {image.shape[:2]}, one for each pixel, or {image.shape}, one for each entry"
            raise ValueError(msg)
        if mask.ndim < image.ndim:
            mask = np.broadcast_to(mask[..., None], image.shape)
        seen = mask.reshape(-1, mask.shape[2] if mask.ndim == 3 else 1).sum(0)
        if seen.min() < 16:
            msg = f"`{name}` is True at {seen.min()} pixels of channel {seen.argmin()}: a field needs at least 16 observed ones"
            raise ValueError(msg)
    bad = ~np.isfinite(image) if mask is None else ~np.isfinite(image) & mask
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        msg = f"the picture is not finite at {bad.sum()} observed entries (first: {first}): give `inpaint` or `fit_image` a mask that leaves them out"
        raise ValueError(msg)
    return mask


def to_samples(image: np.ndarray, mask: np.ndarray | None = None) -> Samples:
    """Pixels as samples on the lattice of whole numbers: coordinates are (row, column)."""
    height, width = image.shape[:2]
    values = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height * width, -1)
    weight = None if mask is None else torch.from_numpy(np.array(mask, dtype=np.float32)).reshape(values.shape)
    return Samples(Lattice.of_shape(height, width), values, weight)
