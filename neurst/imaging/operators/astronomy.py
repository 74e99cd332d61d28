"""Operators of astronomy: weak gravitational lensing, and interferometers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from neurst.core.arguments import POSITIVE, real_array
from neurst.imaging.operators.base import Operator, picture_shape

CHUNK = 2048  # visibilities that are computed at a time
NORM_TOL = 1e-3  # relative accuracy of the norm of an interferometer, by which it is enlarged
LARGEST_FREQUENCY = 1e3  # radians per pixel


def lensing(shape: tuple[int, int]) -> Operator:
    r"""The shear that a convergence map (H, W) causes: data (2, H, W), its two components.

    With F the Fourier transform on a periodic field, the shear is

    .. math:: \gamma_1 + i \gamma_2 = F^{-1} D F \kappa, \quad D = \frac{k_x^2 - k_y^2 + 2 i k_x k_y}{k_x^2 + k_y^2}, \quad D(0) = 1

    x runs along columns and y along rows. As \|D\| = 1, A'A is the identity. The adjoint is the inversion of :cite:t:`Kaiser1993`. The mean of the convergence,
    which shear does not show, is passed on with D(0); set the mean of measured shear to what the field should have.

    Raises
    ------
    TypeError, ValueError
        If `shape` is not a pair of positive whole numbers.

    Examples
    --------
    >>> import torch
    >>> kappa = torch.arange(12.0).reshape(3, 4)
    >>> a = lensing((3, 4))
    >>> torch.allclose(a.adjoint(a.forward(kappa)), kappa)
    True
    """
    shape = picture_shape("shape", shape)
    ky, kx = torch.meshgrid(*(torch.fft.fftfreq(n, dtype=torch.float64) for n in shape), indexing="ij")
    square = kx**2 + ky**2
    square[0, 0] = 1
    factor = torch.complex((kx**2 - ky**2) / square, 2 * kx * ky / square)
    factor[0, 0] = 1

    def filtered(u: Tensor, factor: Tensor) -> Tensor:
        u = u if u.is_complex() else torch.complex(u, torch.zeros_like(u))
        return torch.fft.ifft2(factor.to(u) * torch.fft.fft2(u))

    def forward(u: Tensor) -> Tensor:
        shear = filtered(u, factor)
        return torch.stack([shear.real, shear.imag], -3)

    adjoint = lambda y: filtered(torch.complex(y[..., 0, :, :], y[..., 1, :, :]), factor.conj()).real
    prox = lambda x, data, t: (x + t * adjoint(data)) / (1 + t)  # as A'A = I
    return Operator(shape, (2, *shape), forward, adjoint, 1.0, prox, normal=lambda u: u)


def shape_noise(pixel_area: float, *, dispersion: float = 0.37, density: float = 30.0) -> float:
    r"""Standard deviation of each component of the shear of a pixel, :math:`\mathrm{dispersion} / \sqrt{\mathrm{pixel\_area} \cdot \mathrm{density}}`, from the shapes of galaxies.

    Parameters
    ----------
    pixel_area
        Square arcminutes.
    dispersion
        Standard deviation of one component of the ellipticity of galaxies.
    density
        Galaxies per square arcminute; 30 is what the Euclid mission expects.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a positive number.

    Examples
    --------
    >>> shape_noise(1.0)
    0.0675
    """
    area, dispersion = POSITIVE("pixel_area", pixel_area), POSITIVE("dispersion", dispersion)
    return dispersion / math.sqrt(area * POSITIVE("density", density))


def interferometer(shape: tuple[int, int], uv: ArrayLike) -> Operator:
    r"""What pairs of antennas see of a real picture (H, W): data (2, M), real and imaginary parts of M visibilities.

    .. math:: y_m = \sum_{p, q} x_{pq} \exp(-i (u_m p + v_m q))

    with p the row and q the column, summed exactly rather than on a grid. A'A is a convolution with :math:`\sum_m \cos(u_m p + v_m q)`, computed by Fourier transforms of twice the size.

    Parameters
    ----------
    shape
        (H, W) of the picture.
    uv
        (M, 2) angular frequencies along rows and columns, in radians per pixel. A baseline of b wavelengths and pixels of c radians make :math:`2 \pi b c`.

    Raises
    ------
    TypeError, ValueError
        If `shape` is not a pair of positive whole numbers, or `uv` not finite numbers (M, 2).

    Examples
    --------
    >>> import numpy as np, torch
    >>> a = interferometer((4, 5), np.array([[0.0, 0.0], [0.3, -1.0]]))
    >>> a.forward(torch.ones(4, 5))[:, 0]  # at the zero frequency, the sum of the picture
    tensor([20., 0.])
    """
    shape, uv = picture_shape("shape", shape), real_array("uv", uv)
    if uv.ndim != 2 or uv.shape[1] != 2 or not len(uv) or not np.isfinite(uv).all():
        msg = f"`uv` has shape {uv.shape}: expected finite numbers (M, 2), angular frequencies along rows and columns in radians per pixel"
        raise ValueError(msg)
    if np.abs(uv).max() > LARGEST_FREQUENCY:
        msg = f"`uv` goes up to {np.abs(uv).max():.3g}: expected angular frequencies in radians per pixel, of which those beyond pi are sampled too coarsely; multiply wavelengths by 2 pi times the size of a pixel in radians"
        raise ValueError(msg)
    frequencies = torch.from_numpy(uv)

    def waves(like: Tensor) -> Iterator[tuple[slice, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Cosines and sines along rows and along columns, for some of the visibilities at a time."""
        for start in range(0, len(uv), CHUNK):
            part = slice(start, start + CHUNK)
            yield part, *(_waves(frequencies[part, k], 0, shape[k], like) for k in (0, 1))

    def forward(u: Tensor) -> Tensor:
        found = []
        for _, (cos_u, sin_u), (cos_v, sin_v) in waves(u):
            along, across = cos_u @ u, sin_u @ u  # (..., m, W)
            real = (along * cos_v - across * sin_v).sum(-1)
            found.append(torch.stack([real, -(along * sin_v + across * cos_v).sum(-1)], -2))
        return torch.cat(found, -1)

    def adjoint(y: Tensor) -> Tensor:
        u = y.new_zeros(*y.shape[:-2], *shape)
        for part, (cos_u, sin_u), (cos_v, sin_v) in waves(y):
            real, imaginary = (y[..., k, part, None] for k in (0, 1))
            u = u + cos_u.mT @ (real * cos_v - imaginary * sin_v) - sin_u.mT @ (real * sin_v + imaginary * cos_v)
        return u

    normal, bound = _convolution(_point_spread(frequencies, shape), shape)
    return Operator(shape, (2, len(uv)), forward, adjoint, _norm(normal, shape, bound), normal=normal)


def _waves(frequency: Tensor, start: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:  # each (m, stop - start)
    phase = frequency[:, None] * torch.arange(start, stop, dtype=torch.float64)
    return phase.cos().to(like), phase.sin().to(like)


def _point_spread(uv: Tensor, shape: tuple[int, int]) -> Tensor:  # (M, 2) -> (2 H, 2 W)
    """The sum of cos(u p + v q) for p from -H to H - 1 and q from -W to W - 1, the origin first; 0 where p = -H or q = -W, which no two pixels are apart."""
    rows, columns = shape
    spread = uv.new_zeros(rows, 2 * columns)  # p >= 0; the rest follows from symmetry
    for part in uv.split(CHUNK):
        cos_u, sin_u = _waves(part[:, 0], 0, rows, uv)
        cos_v, sin_v = _waves(part[:, 1], -columns, columns, uv)
        spread += cos_u.mT @ cos_v - sin_u.mT @ sin_v
    spread[:, 0] = 0
    whole = uv.new_zeros(2 * rows, 2 * columns)
    whole[:rows] = spread.roll(-columns, 1)
    whole[rows + 1 :, 0] = whole[1:rows, 0].flip(0)
    whole[rows + 1 :, 1:] = whole[1:rows, 1:].flip(0, 1)
    return whole


def _convolution(spread: Tensor, shape: tuple[int, int]) -> tuple[Callable[[Tensor], Tensor], float]:
    """The convolution of pictures with a symmetric point spread function (2 H, 2 W), and a bound on its norm."""
    transfer = torch.fft.rfft2(spread).real.contiguous()
    kept = {torch.float64: transfer, torch.float32: transfer.float()}

    def normal(u: Tensor) -> Tensor:
        found = torch.fft.rfft2(u, tuple(spread.shape)) * kept[u.dtype].to(u.device)
        return torch.fft.irfft2(found, tuple(spread.shape))[..., : shape[0], : shape[1]]

    return normal, float(transfer.max())


def _norm(normal: Callable[[Tensor], Tensor], shape: tuple[int, int], bound: float) -> float:
    """The norm of A from A'A: its largest eigenvalue by the Lanczos method, enlarged by its accuracy, and at most `bound`, which holds but is loose."""
    from scipy.sparse.linalg import LinearOperator, eigsh  # slow to import

    n = math.prod(shape)
    if n < 3:  # too small for the method
        return math.sqrt(bound)
    apply = lambda x: normal(torch.from_numpy(x.reshape(shape).astype(np.float64))).numpy().ravel()
    first = np.random.default_rng(0).standard_normal(n)
    largest = eigsh(
        LinearOperator((n, n), apply, dtype=np.float64), 1, v0=first, tol=NORM_TOL, return_eigenvectors=False
    )
    return math.sqrt(min((1 + NORM_TOL) * float(largest[0]), bound))
