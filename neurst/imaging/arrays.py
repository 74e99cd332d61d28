"""Checks of pictures and masks that are passed as arrays, and estimates of their noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurst.core.arguments import NONE, number, plain_array

SIGMA = (NONE | number(0)).advised("the standard deviation of the noise in the units of the data")
MIN_SIDE = 4  # pixels
MIN_OBSERVED = 16  # observed pixels in each channel
MIN_COEFFICIENTS = 64  # fewest wavelet coefficients from which a noise level is estimated
NEIGHBOURS = 4  # observed pixels through which a local plane is laid
MOST_PLANES = 4000  # most local planes from which a noise level is estimated
MAD_OF_NORMAL = 0.6744897501960817  # median absolute value of a standard normal
ROUNDING = 1e-12  # where the largest number is about 1, smaller ones than this are rounding errors


def as_image(image: Any) -> np.ndarray:  # (H, W) or (H, W, C)
    """A picture as floats; unsigned integers and booleans are scaled to [0, 1].

    Raises
    ------
    TypeError, ValueError
        If it is not an array of real numbers (H, W) or (H, W, C), a side is shorter than 4 pixels, or it holds signed integers, whose range
        is unknown.
    """
    if np.ma.is_masked(image):
        msg = f"`image` is a masked array with {np.ma.count_masked(image)} masked entries: use `inpaint(image.data, mask=~image.mask)`"
        raise ValueError(msg)
    image = unscaled_image("image", image)
    return image if image.dtype.kind == "f" else image / largest_value(image)


def unscaled_image(name: str, image: Any) -> np.ndarray:  # (H, W) or (H, W, C)
    """A picture in its own type, not copied. Raises as :func:`as_image`."""
    image = plain_array(name, image, advice="pass (H, W), or (H, W, C) with the channels last")
    if image.ndim not in (2, 3) or 0 in image.shape:
        msg = f"`{name}` has shape {image.shape}: expected (H, W), or (H, W, C) with the channels last"
        raise ValueError(msg)
    if min(image.shape[:2]) < MIN_SIDE:
        msg = f"`{name}` has shape {image.shape}: a field needs at least {MIN_SIDE} pixels along each side; channels stand last"
        raise ValueError(msg)
    if image.dtype.kind not in "buf":
        msg = f"`{name}` holds {image.dtype}: expected floats, or unsigned integers, which are scaled to [0, 1]; convert it with `.astype(float)`"
        raise TypeError(msg)
    return image


def largest_value(image: np.ndarray) -> float:
    """The number that is scaled to 1: the largest one of unsigned integers, and 1 for other types."""
    return float(np.iinfo(image.dtype).max) if image.dtype.kind == "u" else 1.0


def as_mask(mask: Any, image: np.ndarray) -> np.ndarray | None:
    """True where observed, in the shape of the picture; None if all of it is observed.

    Raises
    ------
    TypeError, ValueError
        If the mask is not boolean, has the shape of neither the pixels nor the entries of the picture, or leaves fewer than 16 observed pixels
        in a channel; or if the picture is not finite where it is observed.
    """
    if mask is not None:
        mask = plain_array("mask", mask)
        if mask.dtype != bool:
            msg = f"`mask` holds {mask.dtype}: expected booleans, True where the picture is observed"
            raise TypeError(msg)
        if mask.shape not in (image.shape, image.shape[:2]):
            entries = "" if image.ndim == 2 else f", or {image.shape}, one for each entry"
            msg = f"`mask` has shape {mask.shape}: expected {image.shape[:2]}, one for each pixel{entries}"
            raise ValueError(msg)
        if mask.ndim < image.ndim:
            mask = np.broadcast_to(mask[..., None], image.shape)
        seen = mask.reshape(-1, mask.shape[2] if mask.ndim == 3 else 1).sum(0)
        if seen.min() < MIN_OBSERVED:
            msg = f"`mask` is True at {seen.min()} pixels of channel {seen.argmin()}: a field needs at least {MIN_OBSERVED} observed ones"
            raise ValueError(msg)
    bad = ~np.isfinite(image) if mask is None else ~np.isfinite(image) & mask
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        msg = f"the picture is not finite at {bad.sum()} observed entries (first: {first}): give `inpaint` or `fit_image` a mask that leaves them out"
        raise ValueError(msg)
    return None if mask is None or mask.all() else mask


def noise_level(image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Standard deviation of Gaussian noise, in the units of the picture, averaged over channels.

    It is estimated from the median of the finest diagonal wavelet coefficients (:func:`skimage.restoration.estimate_sigma`), which edges hardly
    change. With a mask, only coefficients that depend on observed pixels alone are used. If there are fewer than 64 of these, the estimate is
    the typical distance of a pixel from the plane through its four nearest observed neighbours, which is somewhat too large in texture.

    Parameters
    ----------
    image
        (H, W) or (H, W, C) floats.
    mask
        True where observed, in the shape of the picture. None means that all of it is observed.
    """
    planes = image.reshape(*image.shape[:2], -1).astype(np.float64)
    scale = np.abs(planes if mask is None else planes[mask.reshape(planes.shape)]).max() or 1.0
    seen = np.ones(planes.shape, bool) if mask is None else mask.reshape(planes.shape)
    levels = [_channel_noise(planes[..., c] / scale, seen[..., c]) for c in range(planes.shape[2])]
    return float(np.mean(levels) * scale)


def _channel_noise(image: np.ndarray, seen: np.ndarray) -> float:  # (H, W)
    import pywt

    # the gaps are filled in two ways: coefficients that come out equal depend on observed pixels only
    fill = image[seen].mean() + np.random.default_rng(0).standard_normal((2, *image.shape))
    one, other = (pywt.dwt2(np.where(seen, image, part), "db2")[1][2] for part in fill)
    # flat areas, where coefficients are rounding errors, have no noise
    clear = np.abs(one[(one == other) & (np.abs(one) > ROUNDING)])
    if len(clear) >= MIN_COEFFICIENTS or seen.all():
        return float(np.median(clear)) / MAD_OF_NORMAL if len(clear) else 0.0
    return _noise_from_planes(image, seen)


def _noise_from_planes(image: np.ndarray, seen: np.ndarray) -> float:
    """Noise level from the median distance of observed pixels to planes through their nearest observed neighbours."""
    from scipy.spatial import cKDTree  # slow to import

    at, values = np.argwhere(seen).astype(float), image[seen]
    pick = np.random.default_rng(0).permutation(len(at))[:MOST_PLANES]
    near = cKDTree(at).query(at[pick], NEIGHBOURS + 1)[1][:, 1:]
    design = np.concatenate([np.ones((*near.shape, 1)), at[near] - at[pick][:, None]], axis=2)
    weights = np.linalg.pinv(design)[:, 0]  # of each neighbour in the value of the plane at the pixel
    distance = values[pick] - (weights * values[near]).sum(1)
    return float(np.median(np.abs(distance) / np.sqrt(1 + (weights**2).sum(1)))) / MAD_OF_NORMAL
