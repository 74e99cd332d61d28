"""Operators of computed tomography: the Radon transform and its filtered back-projection."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neurst.core.arguments import one_of, real_array
from neurst.imaging.operators.base import Operator, picture_shape

WINDOW = one_of(None, "hann")


def radon(shape: tuple[int, int], angles: ArrayLike) -> Operator:
    r"""Integrals along parallel lines through a picture (H, W): data (n_angles, n_detectors), in units of pixels.

    The centre of a pixel x to the right of and y above the middle of the picture falls, at the angle a, on :math:`s = x \cos a - y \sin a`. The value of the pixel is
    shared by the two nearest detectors, linearly in the distance. Detectors are one pixel apart and cover the diagonal.

    Parameters
    ----------
    shape
        (H, W) of the picture.
    angles
        In degrees, such as ``np.arange(0, 180, 3)``.

    Raises
    ------
    TypeError, ValueError
        If `shape` is not a pair of positive whole numbers, or `angles` not a list of finite numbers.

    Examples
    --------
    >>> import numpy as np
    >>> radon((32, 32), np.arange(0, 180, 10)).data_shape
    (18, 46)
    """
    (rows, columns), angles = picture_shape("shape", shape), _angles(angles)
    n = math.ceil(math.hypot(rows, columns))
    x = torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2
    minus_y = torch.arange(rows, dtype=torch.float64)[:, None] - (rows - 1) / 2
    turns = [(math.cos(a), math.sin(a)) for a in np.radians(angles)]

    def shares(turn: tuple[float, float], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The lower detector, the upper one and its share, of every pixel in turn."""
        at = (turn[0] * x + turn[1] * minus_y + (n - 1) / 2).flatten().clamp(0, n - 1)
        lower = at.long().clamp_max(max(n - 2, 0))
        upper = (lower + 1).clamp_max(n - 1)
        return lower.to(like.device), upper.to(like.device), (at - lower).to(like)

    def forward(u: Tensor) -> Tensor:
        mass = u.reshape(-1, rows * columns)
        views = []
        for turn in turns:
            lower, upper, share = shares(turn, mass)
            part = share * mass
            view = mass.new_zeros(len(mass), n).index_add(1, lower, mass - part)
            views.append(view.index_add(1, upper, part))
        return torch.stack(views, 1).reshape(*u.shape[:-2], len(turns), n)

    def adjoint(data: Tensor) -> Tensor:
        views = data.reshape(-1, len(turns), n)
        u = views.new_zeros(len(views), rows * columns)
        for k, turn in enumerate(turns):
            lower, upper, share = shares(turn, views)
            u = u + torch.lerp(views[:, k, lower], views[:, k, upper], share)
        return u.reshape(*data.shape[:-2], rows, columns)

    # Schur's test: for entries >= 0, the squared norm is at most the largest row sum times the largest column sum, which is the number of angles
    norm = math.sqrt(float(forward(torch.ones(rows, columns, dtype=torch.float64)).max()) * len(turns))
    return Operator((rows, columns), (len(turns), n), forward, adjoint, norm)


def filtered_back_projection(
    sinogram: ArrayLike, shape: tuple[int, int], angles: ArrayLike, *, window: str | None = None
) -> NDArray[np.floating]:
    r"""A picture from its integrals along lines: each view is filtered with a ramp, then smeared back.

    The ramp is given in space, :math:`h_0 = 1/4`, :math:`h_k = -1 / (\pi k)^2` for odd k and 0 for other even k, so that it keeps the mean. Views are padded with
    zeros, and the sum of the filtered views is multiplied by :math:`\pi / n_\mathrm{angles}`, which assumes angles evenly spread over half a turn.

    Parameters
    ----------
    sinogram
        (..., n_angles, n_detectors) as :func:`radon` gives.
    shape
        (H, W) of the picture.
    angles
        In degrees, those of the data.
    window
        ``"hann"`` fades high frequencies out, which has less noise and is less sharp; None keeps them.

    Returns
    -------
    (..., H, W), in single precision if the data are, else double.

    Raises
    ------
    TypeError, ValueError
        If the data are not finite real numbers of the shape that `shape` and `angles` imply, or `window` is unknown.

    Examples
    --------
    >>> import numpy as np, torch
    >>> radius = np.hypot(*np.mgrid[-16:17, -16:17])
    >>> disc = (radius < 10).astype(float)
    >>> angles = np.arange(0, 180, 3)
    >>> sinogram = radon(disc.shape, angles).forward(torch.from_numpy(disc))
    >>> found = filtered_back_projection(sinogram, disc.shape, angles)[radius < 8]
    >>> bool(abs(found.mean() - 1) < 0.02)
    True
    """
    operator, window = radon(shape, angles), WINDOW("window", window)
    single = getattr(sinogram, "dtype", None) in (np.float32, torch.float32)
    values = real_array("sinogram", sinogram)
    if values.shape[-2:] != operator.data_shape or not np.isfinite(values).all():
        one = ", ".join(map(str, operator.data_shape))
        msg = f"`sinogram` has shape {values.shape}: expected finite numbers (..., {one}), which is what `radon(shape, angles)` gives"
        raise ValueError(msg)
    n = values.shape[-1]
    size = 2 ** math.ceil(math.log2(2 * n))  # so that the two ends of a view do not meet
    ramp = _ramp(size) * (1 if window is None else 0.5 + 0.5 * np.cos(2 * np.pi * np.fft.rfftfreq(size)))
    filtered = np.fft.irfft(np.fft.rfft(values, size) * ramp, size)[..., :n]
    found = operator.adjoint(torch.from_numpy(filtered)).numpy() * (np.pi / operator.data_shape[0])
    return found.astype(np.float32) if single else found


def _angles(angles: ArrayLike) -> NDArray[np.float64]:
    angles = real_array("angles", angles)
    if angles.ndim != 1 or not len(angles) or not np.isfinite(angles).all():
        msg = f"`angles` has shape {angles.shape}: expected a list of finite angles in degrees"
        raise ValueError(msg)
    return angles


def _ramp(size: int) -> NDArray[np.float64]:
    """The transfer function of the ramp filter."""
    k = np.fft.fftfreq(size, 1 / size)
    h = np.where(k % 2 == 1, -1 / (np.pi * np.where(k == 0, 1, k)) ** 2, 0)
    h[0] = 1 / 4
    return np.fft.rfft(h).real
