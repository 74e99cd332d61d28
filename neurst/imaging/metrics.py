r"""Scores of how close a picture, a cube or a point set is to the truth.

All scores use one convention for the data range: it is 1 for floating-point pictures, whose values are expected in [0, 1], unless another is
given, and the range of the dtype for integers (255 for uint8). Values are not clipped before scoring.
Pictures are (H, W) or (H, W, C), cubes (H, W, bands); scores are computed in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neurst.core.arguments import POSITIVE, plain_array, real_array

WINDOW = 11  # pixels of the window: a Gaussian of standard deviation 1.5, cut off at 3.5 standard deviations


def psnr(image: ArrayLike, truth: ArrayLike, *, data_range: float | None = None) -> float:
    r"""Peak signal-to-noise ratio :math:`10 \log_{10} (R^2 / \mathrm{MSE})` in dB, where the mean is over all entries.

    Parameters
    ----------
    image, truth
        Arrays of one shape, both of floating point or both of one integer dtype.
    data_range
        R. None means 1 for floating point and the range of the dtype for integers.

    Returns
    -------
    The ratio in decibels; infinite if both are equal.

    Raises
    ------
    ValueError
        If shapes or dtypes differ, or an entry is not finite.

    Examples
    --------
    >>> truth = np.zeros((4, 5))
    >>> round(psnr(truth + 0.1, truth), 9)
    20.0
    """
    image, truth, data_range = _pair(image, truth, data_range)
    return _decibels(np.mean((image - truth) ** 2), data_range)


def mpsnr(cube: ArrayLike, truth: ArrayLike, *, data_range: float | None = None) -> float:
    """Mean over bands of the PSNR of each band, in dB, which is the usual score of hyperspectral cubes.

    Parameters
    ----------
    cube, truth
        (H, W, bands), as for `psnr`.
    data_range
        As for `psnr`; the same for all bands.

    Returns
    -------
    The mean in decibels. By Jensen's inequality it is never below `psnr` of the whole cube.

    Examples
    --------
    >>> truth = np.zeros((4, 5, 2))
    >>> round(mpsnr(truth + np.array([0.1, 0.01]), truth), 9)
    30.0
    """
    cube, truth, data_range = _pair(cube, truth, data_range)
    if truth.ndim != 3:
        raise ValueError(f"`cube` has shape {truth.shape}: give (H, W, bands)")
    errors = np.mean((cube - truth) ** 2, axis=(0, 1))
    return float(np.mean([_decibels(e, data_range) for e in errors]))


def ssim(image: ArrayLike, truth: ArrayLike, *, data_range: float | None = None) -> float:
    """Structural similarity :cite:p:`Wang2004`, averaged over pixels and then over channels or bands.

    As in the paper, the window is Gaussian with a standard deviation of 1.5 pixels, and covariances are divided by the sum of its weights.

    Parameters
    ----------
    image, truth
        (H, W) or (H, W, C), at least 11 pixels a side; dtypes as for `psnr`.
    data_range
        As for `psnr`.

    Returns
    -------
    The similarity, at most 1, which is its value for equal pictures.

    Examples
    --------
    >>> truth = np.tile(np.linspace(0, 1, 16), (16, 1))
    >>> ssim(truth, truth)
    1.0
    """
    from skimage.metrics import structural_similarity  # slow to import

    image, truth, data_range = _pair(image, truth, data_range)
    if truth.ndim not in (2, 3) or min(truth.shape[:2]) < WINDOW:
        msg = f"`truth` has shape {truth.shape}: give (H, W) or (H, W, C) of at least {WINDOW} pixels a side"
        raise ValueError(msg)
    axis = None if truth.ndim == 2 else -1
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(image, truth, data_range=data_range, channel_axis=axis, **window))


def rmse(image: ArrayLike, truth: ArrayLike) -> float:
    """Root mean squared error over all entries, in the unit of the entries.

    Parameters
    ----------
    image, truth
        Arrays of one shape; dtypes as for `psnr`.

    Examples
    --------
    >>> rmse([0.0, 2.0], [1.0, 1.0])
    1.0
    """
    image, truth, _ = _pair(image, truth, None)
    return math.sqrt(np.mean((image - truth) ** 2))


def sam(cube: ArrayLike, truth: ArrayLike) -> float:
    r"""Mean spectral angle :math:`\arccos \frac{\langle u, v \rangle}{\|u\| \|v\|}` between the spectra of each pixel, in degrees.

    It is computed as :math:`2 \arctan (\|\hat u - \hat v\| / \|\hat u + \hat v\|)` from the unit spectra, which is accurate for small angles too.
    Pixels whose true spectrum is zero have no angle and are left out. A zero spectrum in `cube` counts as 90 degrees.

    Parameters
    ----------
    cube, truth
        (..., bands); dtypes as for `psnr`.

    Raises
    ------
    ValueError
        As `psnr`, and if every true spectrum is zero.

    Examples
    --------
    >>> round(sam([[1.0, 1.0]], [[2.0, 0.0]]), 9)
    45.0
    """
    cube, truth, _ = _pair(cube, truth, None)
    known = np.linalg.norm(truth, axis=-1) > 0
    if not known.any():
        raise ValueError("every spectrum of `truth` is zero: a zero spectrum has no angle")
    u, v = _unit(cube[known]), _unit(truth[known])
    angle = 2 * np.arctan2(np.linalg.norm(u - v, axis=-1), np.linalg.norm(u + v, axis=-1))
    return float(np.degrees(angle).mean())


def chamfer(a: ArrayLike, b: ArrayLike) -> float:
    r"""Symmetric Chamfer distance, the average of the two one-sided mean distances, which are not squared:

    .. math:: \tfrac12 \Big( \frac1{|A|} \sum_{a \in A} \min_{b \in B} \|a - b\| + \frac1{|B|} \sum_{b \in B} \min_{a \in A} \|a - b\| \Big)

    The distance between two random samples of the same surface is not zero: with n points on an area S, each one-sided mean is about
    :math:`\tfrac12 \sqrt{S / n}`.

    Parameters
    ----------
    a, b
        (N, d) and (M, d) points.

    Returns
    -------
    The distance in the unit of the points.

    Examples
    --------
    >>> chamfer([[0.0, 0.0]], [[3.0, 4.0]])
    5.0
    """
    from scipy.spatial import cKDTree  # slow to import

    a, b = _points("a", a), _points("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` has {a.shape[1]} coordinates and `b` has {b.shape[1]}: give points of one space")
    return float(cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2


def _decibels(mse: float, data_range: float) -> float:
    return 20 * math.log10(data_range) - 10 * math.log10(mse) if mse > 0 else math.inf


def _unit(spectra: NDArray) -> NDArray:
    """Spectra scaled to norm 1; a zero spectrum stays zero."""
    norm = np.linalg.norm(spectra, axis=-1, keepdims=True)
    return spectra / np.where(norm > 0, norm, 1)


def _pair(image: ArrayLike, truth: ArrayLike, data_range: float | None) -> tuple[NDArray, NDArray, float]:
    """Both arrays, checked and in float64, and the data range."""
    image, truth = plain_array("image", image), plain_array("truth", truth)
    if image.shape != truth.shape or truth.size == 0:
        msg = f"`image` has shape {image.shape} and `truth` {truth.shape}: pass two of one shape that is not empty"
        raise ValueError(msg)
    kinds = {image.dtype.kind, truth.dtype.kind}
    if kinds != {"f"} and not (kinds <= {"i", "u"} and image.dtype == truth.dtype):
        msg = (
            f"`image` is {image.dtype} and `truth` {truth.dtype}: pass both in floating point, in [0, 1], or both in "
            "one integer dtype"
        )
        raise ValueError(msg)
    if data_range is None:
        limits = np.iinfo(truth.dtype) if kinds != {"f"} else None
        data_range = 1.0 if limits is None else float(limits.max) - float(limits.min)
    data_range = POSITIVE("data_range", data_range)
    image, truth = real_array("image", image), real_array("truth", truth)
    for name, values in (("image", image), ("truth", truth)):
        bad = np.count_nonzero(~np.isfinite(values))
        if bad:
            raise ValueError(f"`{name}` is not finite at {bad} of {values.size} entries: fill or leave out those")
    return image, truth, data_range


def _points(name: str, points: ArrayLike) -> NDArray:
    points = real_array(name, points, advice="pass points (N, d)")
    if points.ndim != 2 or points.size == 0:
        raise ValueError(f"`{name}` has shape {points.shape}: expected points (N, d), at least one")
    bad = np.count_nonzero(~np.isfinite(points).all(1))
    if bad:
        raise ValueError(f"`{name}` is not finite at {bad} of {len(points)} points: drop them first")
    return points
