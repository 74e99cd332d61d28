"""Operators of magnetic resonance: Fourier transforms seen by one or several coils, masks of k-space, and sensitivities of coils."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neurst.core.arguments import SEED, number, plain_array, whole
from neurst.imaging.operators.base import Operator, picture_mask, picture_shape


def _transform(u: Tensor) -> Tensor:
    return torch.fft.fft2(u, norm="ortho")


def _back(k: Tensor) -> Tensor:
    return torch.fft.ifft2(k, norm="ortho")


def masked_fourier(mask: ArrayLike) -> Operator:
    """The orthonormal Fourier transform of a complex picture at the frequencies (H, W) at which `mask` is True, and 0 elsewhere.

    The zero frequency is the first entry, as in :func:`numpy.fft.fft2`: shift data whose zero frequency is in the middle with
    :func:`numpy.fft.ifftshift`.

    Examples
    --------
    >>> masked_fourier(cartesian_mask((64, 64), 4)).n_observed
    1024
    """
    seen = picture_mask(mask)
    forward = lambda u: seen.to(u.device) * _transform(u)
    adjoint = lambda y: _back(seen.to(y.device) * y)

    def prox(x: Tensor, data: Tensor, t: Tensor | float) -> Tensor:
        k = _transform(x)
        return _back(torch.where(seen.to(x.device), (k + t * data) / (1 + t), k))

    shape = tuple(seen.shape)
    return Operator(shape, shape, forward, adjoint, 1.0, prox, seen, complex=True)


def multicoil(mask: ArrayLike, maps: ArrayLike) -> Operator:
    """The Fourier transforms of a complex picture seen by several coils: data (n_coils, H, W), zero frequency first.

    Parameters
    ----------
    mask
        (H, W) True at the frequencies that are measured.
    maps
        (n_coils, H, W) complex sensitivities, such as those of :func:`coil_maps`.

    Examples
    --------
    >>> import numpy as np
    >>> multicoil(cartesian_mask((16, 16), 2), np.ones((3, 16, 16))).data_shape
    (3, 16, 16)
    """
    seen, maps = picture_mask(mask), plain_array("maps", maps)
    if maps.ndim != 3 or maps.shape[1:] != tuple(seen.shape) or maps.dtype.kind not in "fc":
        msg = f"`maps` is an array of {maps.dtype} of shape {maps.shape}: expected numbers (n_coils, {seen.shape[0]}, {seen.shape[1]})"
        raise ValueError(msg)
    if not np.isfinite(maps).all() or not maps.any():
        msg = "`maps` has entries that are not finite, or is 0 everywhere: expected the sensitivities of the coils"
        raise ValueError(msg)
    coils = torch.from_numpy(maps.astype(np.complex128))
    here = lambda u: coils.to(u.device, torch.complex64 if u.dtype == torch.complex64 else torch.complex128)
    return Operator(
        tuple(seen.shape),
        maps.shape,
        lambda u: seen.to(u.device) * _transform(here(u) * u[..., None, :, :]),
        lambda y: (here(y).conj() * _back(seen.to(y.device) * y)).sum(-3),
        float(np.sqrt((np.abs(maps) ** 2).sum(0).max())),
        observed=seen,
        complex=True,
    )


def cartesian_mask(
    shape: tuple[int, int], acceleration: float, *, centre: int | None = None, random_state: int = 0
) -> NDArray[np.bool_]:
    r"""A random mask of the columns of k-space, denser in the middle, for :func:`masked_fourier`.

    ``W / acceleration`` columns are kept: `centre` of the lowest frequencies, and others at random with a density of
    :math:`\exp(-x^2 / (2 (W / 10)^2)) + 1 / (2 R)`, where x is the distance from the zero frequency and R the acceleration.

    Parameters
    ----------
    shape
        (H, W) of the picture.
    acceleration
        R >= 1.
    centre
        Number of columns at the lowest frequencies that are always kept; None keeps W / 32.
    random_state
        Seed.

    Returns
    -------
    (H, W) booleans, zero frequency first.

    Examples
    --------
    >>> cartesian_mask((4, 64), 4)[0].sum()
    np.int64(16)
    """
    shape, speed = picture_shape("shape", shape), number(1)("acceleration", acceleration)
    width = shape[1]
    kept = max(1, round(width / speed))
    given = centre
    centre = min(kept, max(1, width // 32)) if given is None else whole(0, width)("centre", given)
    if given is not None and centre > kept:
        msg = f"`centre={centre}`: expected at most the {kept} columns that `acceleration={acceleration}` keeps of {width}"
        raise ValueError(msg)
    distance = np.abs(np.fft.fftfreq(width, 1 / width))
    order = np.argsort(distance, kind="stable")
    columns = np.zeros(width, bool)
    columns[order[:centre]] = True
    density = np.exp(-(distance**2) / (2 * (width / 10) ** 2)) + 1 / (2 * speed)
    if kept == centre:
        return np.broadcast_to(columns, shape).copy()
    rest = order[centre:]
    drawn = np.random.default_rng(SEED("random_state", random_state)).choice(
        rest, kept - centre, replace=False, p=density[rest] / density[rest].sum()
    )
    columns[drawn] = True
    return np.broadcast_to(columns, shape).copy()


def coil_maps(kspace: ArrayLike, *, width: int = 24) -> NDArray[np.complexfloating]:
    r"""Sensitivities of coils from the middle of their k-space, zero frequency first.

    The low frequencies of each coil, faded out with a Hann window, give a smooth picture :math:`l_c`; the map is
    :math:`l_c / \sqrt{\sum_c |l_c|^2}`, so that squared maps sum to 1 where there is a signal.

    Parameters
    ----------
    kspace
        (n_coils, H, W) complex data, fully sampled within the window.
    width
        Full width of the window in frequencies.

    Returns
    -------
    (n_coils, H, W) complex maps.

    Examples
    --------
    >>> import numpy as np
    >>> coils = np.array([1.0, 2.0])[:, None, None] * np.ones((2, 8, 8))
    >>> abs(coil_maps(np.fft.fft2(coils))[:, 0, 0]).round(3)
    array([0.447, 0.894])
    """
    kspace, width = plain_array("kspace", kspace), whole(1)("width", width)
    if kspace.ndim != 3 or kspace.dtype.kind != "c" or 0 in kspace.shape:
        msg = (
            f"`kspace` is an array of {kspace.dtype} of shape {kspace.shape}: expected complex numbers (n_coils, H, W)"
        )
        raise ValueError(msg)
    if not np.isfinite(kspace).all():
        msg = "`kspace` has entries that are not finite: set those that were not measured to 0"
        raise ValueError(msg)

    def fade(n: int) -> NDArray:
        return np.cos(np.pi * np.clip(np.fft.fftfreq(n, 1 / n) / width, -0.5, 0.5)) ** 2

    low = np.fft.ifft2(kspace * np.outer(fade(kspace.shape[1]), fade(kspace.shape[2])))
    size = np.sqrt((np.abs(low) ** 2).sum(0))
    if not size.any():
        msg = f"`kspace` is 0 at all of its {width} lowest frequencies: expected them to be measured"
        raise ValueError(msg)
    return (low / np.maximum(size, 1e-12 * size.max())).astype(kspace.dtype)
