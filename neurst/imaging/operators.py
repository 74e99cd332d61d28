r"""Linear operators from pictures to measured data: with adjoint, norm, and a closed-form proximal map where there is one.

Operators act on the last two axes of tensors (..., H, W), real or complex, and give (..., \*data_shape).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neurst.core.arguments import SEED, number, plain_array, real_array, shown, whole

Prox = Callable[[Tensor, Tensor, Tensor | float], Tensor]


@dataclass(frozen=True, eq=False)
class Operator:
    r"""A linear operator A.

    Parameters
    ----------
    shape
        (H, W) of a picture.
    data_shape
        Shape of the data of one picture.
    forward, adjoint
        A from (..., H, W) to (..., \*data_shape), and its adjoint, for tensors in single and double precision.
    norm
        The spectral norm, or an upper bound on it.
    prox
        ``prox(x, data, t)``: the u that minimises :math:`\tfrac{t}{2} \|A u - \mathrm{data}\|^2 + \tfrac12 \|u - x\|^2`. None if it has no closed form.
    observed
        True at the entries of the data that are measured, in a shape that broadcasts to `data_shape`; None if all are.
    complex
        Whether pictures are complex.
    is_identity
        Whether A is the identity, for which the duality gap is known.

    Examples
    --------
    >>> import torch
    >>> crop = Operator((3, 4), (3, 2), lambda u: u[..., :2], lambda y: torch.nn.functional.pad(y, (0, 2)), norm=1.0)
    >>> crop.forward(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    shape: tuple[int, int]
    data_shape: tuple[int, ...]
    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    norm: float
    prox: Prox | None = None
    observed: Tensor | None = None
    complex: bool = False
    is_identity: bool = False

    def __post_init__(self):
        object.__setattr__(self, "shape", _shape("Operator.shape", self.shape))
        sizes = tuple(self.data_shape) if isinstance(self.data_shape, (tuple, list)) else (self.data_shape,)
        data_shape = tuple(whole(1)(f"Operator.data_shape[{k}]", n) for k, n in enumerate(sizes))
        object.__setattr__(self, "data_shape", data_shape)
        number(0, above=True)("Operator.norm", self.norm)
        for name in ("forward", "adjoint", "prox"):
            if not (callable(getattr(self, name)) or (name == "prox" and self.prox is None)):
                msg = f"`Operator.{name}={shown(getattr(self, name))}`: expected a function of tensors"
                raise TypeError(msg)
        if self.observed is not None:
            object.__setattr__(self, "observed", torch.as_tensor(self.observed, dtype=torch.bool).clone())

    def normalised(self) -> Operator:
        """The operator divided by its norm, for data that are divided by it too."""
        n = self.norm
        if n == 1:
            return self
        prox = None if self.prox is None else lambda x, data, t: self.prox(x, n * data, t / n**2)
        forward, adjoint = (lambda u: self.forward(u) / n), (lambda y: self.adjoint(y) / n)
        return dataclasses.replace(self, forward=forward, adjoint=adjoint, norm=1.0, prox=prox)

    @property
    def n_observed(self) -> int:
        """Number of measured entries of the data of one picture."""
        total = math.prod(self.data_shape)
        return total if self.observed is None else int(self.observed.expand(self.data_shape).sum())


def _shape(name: str, value: object) -> tuple[int, int]:
    try:
        rows, columns = value
    except (TypeError, ValueError):
        msg = f"`{name}={shown(value)}`: expected (H, W), the sides of the picture in pixels"
        raise TypeError(msg) from None
    return whole(1)(f"{name}[0]", rows), whole(1)(f"{name}[1]", columns)


def _mask(mask: ArrayLike) -> Tensor:
    mask = plain_array("mask", mask)
    if mask.dtype != bool or mask.ndim != 2:
        msg = f"`mask` is an array of {mask.dtype} of shape {mask.shape}: expected booleans (H, W), True where there are data"
        raise (TypeError if mask.dtype != bool else ValueError)(msg)
    if not mask.any():
        msg = f"`mask` of shape {mask.shape} is False everywhere: expected some data"
        raise ValueError(msg)
    return torch.from_numpy(mask.copy())


def identity(shape: tuple[int, int]) -> Operator:
    """The picture itself, as in denoising.

    Examples
    --------
    >>> identity((3, 5)).norm
    1.0
    """
    shape = _shape("shape", shape)
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
    seen = _mask(mask)
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
    shape, values = _shape("shape", shape), real_array("kernel", kernel)
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
    shape, k = _shape("shape", shape), whole(1)("factor", factor)
    if shape[0] % k or shape[1] % k:
        msg = f"`shape={shape}`: expected multiples of `factor={k}`; crop or pad the picture"
        raise ValueError(msg)
    data_shape = (shape[0] // k, shape[1] // k)
    forward = lambda u: u.unflatten(-1, (-1, k)).mean(-1).unflatten(-2, (-1, k)).mean(-2)
    adjoint = lambda y: y.repeat_interleave(k, -1).repeat_interleave(k, -2) / k**2
    # A A' = I / k^2, so (I + t A'A)^-1 = I - t / (1 + t / k^2) A'A
    prox = lambda x, data, t: x + t / (1 + t / k**2) * adjoint(data - forward(x))
    return Operator(shape, data_shape, forward, adjoint, 1 / k, prox)


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
    seen = _mask(mask)
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
    seen, maps = _mask(mask), plain_array("maps", maps)
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


def radon(shape: tuple[int, int], angles: ArrayLike) -> Operator:
    """Integrals along parallel lines through a picture (H, W): data (n_angles, n_detectors), in units of pixels.

    The picture is rotated by each angle about its centre, with bilinear interpolation, and summed along the rows. Detectors are one pixel
    apart and cover the diagonal.

    Parameters
    ----------
    shape
        (H, W) of the picture.
    angles
        In degrees, such as ``np.arange(0, 180, 3)``.

    Examples
    --------
    >>> import numpy as np
    >>> radon((32, 32), np.arange(0, 180, 10)).data_shape
    (18, 46)
    """
    (rows, columns), angles = _shape("shape", shape), real_array("angles", angles)
    if angles.ndim != 1 or not len(angles) or not np.isfinite(angles).all():
        msg = f"`angles` has shape {angles.shape}: expected a list of finite angles in degrees"
        raise ValueError(msg)
    n = math.ceil(math.hypot(rows, columns))
    at = torch.arange(n, dtype=torch.float64) - (n - 1) / 2  # of detectors, and of points along a line
    along, across = torch.meshgrid(at, at, indexing="ij")

    def grid(angle: float) -> Tensor:  # (n, n, 2) positions in [-1, 1], as `grid_sample` takes them
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        return torch.stack([(cos * across - sin * along) * 2 / columns, (sin * across + cos * along) * 2 / rows], -1)

    def forward(u: Tensor) -> Tensor:
        pictures = u.reshape(1, -1, rows, columns)
        lines = [F.grid_sample(pictures, grid(a).to(u)[None], align_corners=False).sum(-2) for a in angles]
        return torch.stack(lines, -2).reshape(*u.shape[:-2], len(angles), n)

    adjoint = adjoint_of(forward, (rows, columns))
    ones = lambda *size: torch.ones(size, dtype=torch.float64)
    # Schur's test: for entries >= 0, the squared norm is at most the largest row sum times the largest column sum
    norm = math.sqrt(float(forward(ones(rows, columns)).max() * adjoint(ones(len(angles), n)).max()))
    return Operator((rows, columns), (len(angles), n), forward, adjoint, norm)


def adjoint_of(forward: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The adjoint of a linear function of real pictures (..., H, W), by automatic differentiation.

    Examples
    --------
    >>> import torch
    >>> adjoint_of(lambda u: u[..., :2], (3, 4))(torch.ones(3, 2)).sum(1)
    tensor([2., 2., 2.])
    """
    n_axes = forward(torch.zeros(shape, dtype=torch.float64)).ndim

    def adjoint(y: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            lead = y.shape[: y.ndim - n_axes]
            u = y.new_zeros((*lead, *shape)).requires_grad_()
            return torch.autograd.grad((forward(u) * y).sum(), u, create_graph=y.requires_grad)[0]

    return adjoint


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
    shape, speed = _shape("shape", shape), number(1)("acceleration", acceleration)
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
