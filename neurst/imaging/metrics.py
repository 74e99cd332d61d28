r"""How close a picture, a cube or a point set is to the truth.

One convention of range: floating-point pictures live in [0, 1], so that the data range of `psnr` and `ssim` is 1 unless another is given;
integers have the range of their dtype, 255 for uint8. Nothing is clipped before it is scored.
Pictures are (H, W) or (H, W, C), cubes (H, W, bands); scores are computed in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

WINDOW = 11  # pixels: a Gaussian of standard deviation 1.5 cut at 3.5 of them


def psnr(image: ArrayLike, truth: ArrayLike, *, data_range: float | None = None) -> float:
    r"""Peak signal-to-noise ratio :math:`10 \log_{10} (R^2 / \mathrm{MSE})` in dB, the mean taken over all entries at once.

    Parameters
    ----------
    image, truth
        Arrays of one shape, both of floating point or both of one integer dtype.
    data_range
        R. None is 1 for floating point and the range of the dtype for integers.

    Returns
    -------
    Decibels, not clipped; infinite where both are equal.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or an entry is not finite.

    Examples
    --------
    >>> truth = np.zeros((4, 5))
    >>> round(psnr(truth + 0.1, truth), 9)
    20.0
    """
    image, truth, data_range = _pair(image, truth, data_range)
    return _decibels(np.mean((image - truth) ** 2), data_range)


def mpsnr(cube: ArrayLike, truth: ArrayLike, *, data_range: float | None = None) -> float:
    """Mean over bands of the PSNR of each band, in dB: the usual score of hyperspectral cubes.

    Parameters
    ----------
    cube, truth
        (H, W, bands), as for `psnr`.
    data_range
        As for `psnr`, one for all bands.

    Returns
    -------
    Decibels. By Jensen's inequality never below `psnr` of the whole cube.

    Examples
    --------
    >>> truth = np.zeros((4, 5, 2))
    >>> round(mpsnr(truth + np.array([0.1, 0.01]), truth), 9)
    30.0
    """
    cube, truth, data_range = _pair(cube, truth, data_range)
    _need_bands("cube", truth)
    errors = np.mean((cube - truth) ** 2, axis=(0, 1))
    return float(np.mean([_decibels(e, data_range) for e in errors]))


def ssim(image: ArrayLike, truth: ArrayLike, *, data_range: float | None = None) -> float:
    """Structural similarity, the mean over pixels, then over channels or bands :cite:p:`Wang2004`.

    The window is Gaussian with a standard deviation of 1.5 pixels and covariances are divided by its whole weight, the paper's setting.

    Parameters
    ----------
    image, truth
        (H, W) or (H, W, C), at least 11 pixels a side; dtypes as for `psnr`.
    data_range
        As for `psnr`.

    Returns
    -------
    At most 1, which equal pictures reach.

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

    Computed as :math:`2 \arctan (\|\hat u - \hat v\| / \|\hat u + \hat v\|)` of the unit spectra, which is exact for small angles too.
    Pixels whose true spectrum is zero have no angle and are left out; a zero spectrum against one that is not counts as 90 degrees.

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
    r"""Symmetric Chamfer distance, half the sum of both one-sided means of distances, not squared:

    .. math:: \tfrac12 \Big( \frac1{|A|} \sum_{a \in A} \min_{b \in B} \|a - b\| + \frac1{|B|} \sum_{b \in B} \min_{a \in A} \|a - b\| \Big)

    Two samples of one surface are not at distance zero: with n points on an area S, a side has a floor of about
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
    return 10 * math.log10(data_range**2 / mse) if mse > 0 else math.inf


def _unit(spectra: NDArray) -> NDArray:
    """Spectra of norm 1; zero stays zero."""
    norm = np.linalg.norm(spectra, axis=-1, keepdims=True)
    return spectra / np.where(norm > 0, norm, 1)


def _pair(image: ArrayLike, truth: ArrayLike, data_range: float | None) -> tuple[NDArray, NDArray, float]:
    """Both in float64, and the data range; the door of all scores of pictures."""
    image, truth = np.asarray(image), np.asarray(truth)
    if image.shape != truth.shape or truth.size == 0:
        msg = f"the picture has shape {image.shape} and `truth` {truth.shape}: give two of one shape that is not empty"
        raise ValueError(msg)
    kinds = {image.dtype.kind, truth.dtype.kind}
    if kinds != {"f"} and not (kinds <= {"i", "u"} and image.dtype == truth.dtype):
        msg = (
            f"the picture is {image.dtype} and `truth` {truth.dtype}: give both in floating point, in [0, 1], or both in "
            "one integer dtype"
        )
        raise ValueError(msg)
    if data_range is None:
        limits = np.iinfo(truth.dtype) if kinds != {"f"} else None
        data_range = 1.0 if limits is None else float(limits.max) - float(limits.min)
    if not (math.isfinite(data_range) and data_range > 0):
        raise ValueError(f"`data_range` is {data_range}: give a positive number")
    image, truth = image.astype(float), truth.astype(float)
    for name, values in (("the picture", image), ("`truth`", truth)):
        bad = np.count_nonzero(~np.isfinite(values))
        if bad:
            raise ValueError(f"{name} is not finite at {bad} of {values.size} entries: fill or leave out those")
    return image, truth, data_range


def _need_bands(name: str, values: NDArray) -> None:
    if values.ndim != 3:
        raise ValueError(f"`{name}` has shape {values.shape}: give (H, W, bands)")


def _points(name: str, points: ArrayLike) -> NDArray:
    points = np.asarray(points, float)
    if points.ndim != 2 or points.size == 0:
        raise ValueError(f"`{name}` has shape {points.shape}: give points (N, d), at least one")
    bad = np.count_nonzero(~np.isfinite(points).all(1))
    if bad:
        raise ValueError(f"`{name}` is not finite at {bad} of {len(points)} points: drop them first")
    return points
