r"""Pictures from measured data with a denoiser as the prior :cite:p:`Venkatakrishnan2013`.

With A an operator of norm 1 and D a denoiser, each step of the alternating direction method of multipliers is

.. math::
    x = \arg\min_x \tfrac12 \|A x - y\|^2 + \tfrac{\rho}{2} \|x - (v - u)\|^2, \quad v = D_\sigma(x + u), \quad u \leftarrow u + x - v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from neurst.core.arguments import (
    ANYTHING,
    FLAG,
    NONE,
    POSITIVE,
    Rule,
    check_fields,
    checked,
    instance,
    number,
    plain_array,
    warn,
)
from neurst.core.grid import grad, grad_adjoint
from neurst.core.progress import StepCounter, progress_bar
from neurst.imaging.operators import Operator
from neurst.imaging.operators.checks import check_operator

Denoiser = Callable[..., ArrayLike]
OPERATOR = instance(Operator, "a `neurst.imaging.operators.Operator`").advised(
    "make one with a function of `neurst.imaging.operators`"
)


@dataclass(frozen=True)
class PlugAndPlayConfig:
    r"""Numbers of :func:`plug_and_play`.

    Parameters
    ----------
    steps
        Largest number of steps.
    tol
        Steps end when x and v differ, and v changes, by no more than this share of the range of the picture (root mean square).
    coarse, strength, falling
        :math:`\sigma`, if it is not given, falls from `coarse` to `strength` in the first `falling` steps, both as multiples of the range of the smooth first picture after one pass of the denoiser.
        Strong first steps move what the data do not see, such as the total brightness in interferometry, which weak ones would take hundreds of steps for.
    least_rho
        Least :math:`\rho`, if it is not given, where the data have little noise.
    smoothness
        Weight of the squared differences of pixels in the first picture, beside the data.
    solve_tol, solve_steps
        A linear system is solved until its residual is this share of its right-hand side, or for so many steps of conjugate gradients.
    """

    steps: int = 60
    tol: float = 1e-3
    coarse: float = 2.0
    strength: float = 0.1
    falling: int = 15
    least_rho: float = 1e-3
    smoothness: float = 1e-3
    solve_tol: float = 1e-4
    solve_steps: int = 200

    def __post_init__(self):
        check_fields(self, tol=number(0), solve_tol=number(0, 0.1, above=True))


CONFIG = instance(PlugAndPlayConfig, "a `neurst.imaging.PlugAndPlayConfig`, such as PlugAndPlayConfig(steps=100)")
GIVEN = NONE | POSITIVE


def _function(value: Any) -> Any:
    if isinstance(value, type) or not (callable(value) or hasattr(value, "reconstruct")):
        raise TypeError
    return value


DENOISER = Rule(
    ("a function `denoiser(image, sigma=sigma)` of an array that gives an array", "a `LearnedTGV`"), _function
)


@checked(
    y=ANYTHING, operator=OPERATOR, denoiser=DENOISER, sigma=GIVEN, rho=GIVEN, noise=number(0), lower=NONE | number(), start=ANYTHING,
    config=CONFIG, progress=FLAG,
)  # fmt: skip
def plug_and_play(
    y: ArrayLike,
    operator: Operator,
    denoiser: Any,
    *,
    sigma: float | None = None,
    rho: float | None = None,
    noise: float = 0.0,
    lower: float | None = None,
    start: ArrayLike | None = None,
    config: PlugAndPlayConfig = PlugAndPlayConfig(),
    progress: bool = True,
) -> NDArray:
    r"""The picture that agrees with measured data and with a denoiser.

    The operator and the data are divided by the norm of the operator, then the steps above are taken until x and v agree. With a denoiser that is a proximal map, this is the minimum of
    :math:`\tfrac12 \|A x - y\|^2 + \rho R(x)`. If :math:`\rho` is not given, it is :math:`(\mathrm{noise} / (\|A\| \sigma))^2`, which weighs data and prior by their variances, and at least
    ``config.least_rho``. If data are scaled together with `noise` and `lower`, the picture scales with them, provided that the denoiser does so too.

    Parameters
    ----------
    y
        Data of one picture in the shape ``operator.data_shape``, or with channels last. Entries that the operator does not observe are not read.
    operator
        A, one of :mod:`neurst.imaging.operators` or one of your own. Of complex pictures the real and the imaginary part are denoised one by one.
    denoiser
        ``denoiser(image, sigma=sigma)`` takes an array (H, W) or (H, W, C) and the standard deviation of its noise, and gives an array of the same shape. A :class:`neurst.imaging.tgv.LearnedTGV`
        is taken as it is.
    sigma
        Strength of the denoiser, in the units of the picture. None lets it fall to a share of the range of the picture, see :class:`PlugAndPlayConfig`.
    rho
        Weight of the denoiser beside the data.
    noise
        Standard deviation of the noise of each real number of the data, in their units; 0 if the data are exact.
    lower
        Least value of a pixel: 0 for brightness or mass, which gains much where few frequencies are measured. None if there is none.
    start
        First picture (H, W) or (H, W, C); None is the smoothest picture with these data.
    config
        Numbers of the method.
    progress
        Show a progress bar.

    Returns
    -------
    (H, W) or (H, W, C), in the precision of the data.

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type, shape or range, the data are not finite where they are observed, the operator does not do what it states, or the denoiser gives something else than
        a finite picture of the same shape.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import operators
    >>> from skimage.filters import gaussian
    >>> truth = np.add.outer(np.sin(np.arange(20) / 3), np.cos(np.arange(24) / 4))
    >>> seen = np.random.default_rng(0).random(truth.shape) < 0.5
    >>> smooth = lambda image, sigma: gaussian(image, 1.0, mode="nearest")
    >>> found = plug_and_play(truth, operators.pixel_mask(seen), smooth, progress=False)
    >>> bool(abs(found - truth)[~seen].mean() < 0.05)
    True
    """
    denoise = denoiser.reconstruct if hasattr(denoiser, "reconstruct") else denoiser
    data, channels = _data(y, operator)
    if lower is not None and operator.complex:
        msg = f"`lower={lower:g}`: expected None, as pictures of this operator are complex"
        raise ValueError(msg)
    check_operator(operator, data.dtype)
    solver = _Solver(operator.normalised(), data / operator.norm, config)
    smooth = solver.smoothest()
    first = smooth if start is None else _picture("start", start, operator, data, channels)
    bounded = lambda v: v if lower is None else v.clamp_min(lower)
    prior = lambda w, sigma: bounded(_denoised(denoise, w, sigma, channels))
    span = _range(smooth)  # not that of `start`, which may have any scale
    if not span > 0:
        return _array(bounded(smooth), channels)  # a constant fits the data, and there is nothing to denoise
    if sigma is None:
        sigmas = _falling(_range(prior(smooth, config.strength * span)) or span, config)
    else:
        sigmas = [sigma] * config.steps
    noise = noise / operator.norm
    rhos = [max(config.least_rho, (noise / each) ** 2) if rho is None else rho for each in sigmas]
    with progress_bar(progress) as on_progress:
        on_step = StepCounter(on_progress).stage("plug and play", config.steps)
        found = _alternate(solver, prior, first, list(zip(sigmas, rhos, strict=True)), span, on_step)
    return _array(found, channels)


def _alternate(
    solver: _Solver,
    prior: Callable[[Tensor, float], Tensor],
    first: Tensor,
    schedule: list[tuple[float, float]],
    span: float,
    on_step: Callable[[int, float], None],
) -> Tensor:
    """The steps, each with its sigma and rho, until x and v agree. Of the two, v is given, which has no noise and obeys the bound."""
    config = solver.config
    x, v, u = first, first, torch.zeros_like(first)
    for k, (sigma, rho) in enumerate(schedule, 1):
        x = solver.nearest(v - u, rho, x)
        old, v = v, prior(x + u, sigma)
        u = u + x - v
        apart = float(torch.maximum((x - v).abs().square().mean(), (v - old).abs().square().mean()).sqrt()) / span
        on_step(k, apart)
        if apart <= config.tol and sigma == schedule[-1][0]:
            return v
    warn(
        f"plug and play stopped after {config.steps} steps, when pictures still differed by {apart:.1e} of their range: "
        "raise `steps` or `tol` of `config`, or choose another `sigma`"
    )
    return v


@dataclass(frozen=True, eq=False)
class _Solver:
    """Least squares with an operator of norm 1 and its data (C, ...)."""

    operator: Operator
    data: Tensor
    config: PlugAndPlayConfig

    def nearest(self, centre: Tensor, rho: float, x: Tensor) -> Tensor:
        """The picture of least squares near another one, from a first guess x."""
        if self.operator.prox is not None:
            return self.operator.prox(centre, self.data, 1 / rho)
        return self._solved(lambda p: rho * p, rho * centre, x)

    def smoothest(self) -> Tensor:
        """The picture of least squares with small differences of pixels."""
        weight = self.config.smoothness
        first = self.operator.adjoint(self.data)
        return self._solved(lambda p: weight * grad_adjoint(grad(p)), torch.zeros_like(first), first)

    def _solved(self, extra: Callable[[Tensor], Tensor], right: Tensor, x: Tensor) -> Tensor:
        """The solution of A'A x + extra(x) = A'y + right, by conjugate gradients from x."""
        apply = lambda p: self.operator.apply_normal(p) + extra(p)
        right = self.operator.adjoint(self.data) + right
        r = right - apply(x)
        p, size, small = r, _square(r), self.config.solve_tol**2 * _square(right)
        for _ in range(self.config.solve_steps):
            if size <= small:
                break
            q = apply(p)
            step = size / float((p.conj() * q).real.sum())
            x, r = x + step * p, r - step * q
            size, old = _square(r), size
            p = r + (size / old) * p
        return x


def _square(x: Tensor) -> float:
    return float(x.abs().square().sum())


def _denoised(denoise: Denoiser, w: Tensor, sigma: float, channels: bool) -> Tensor:
    """What the denoiser gives for pictures (C, H, W)."""
    if w.is_complex():
        return torch.complex(*(_denoised(denoise, part, sigma, channels) for part in (w.real, w.imag)))
    image = _array(w, channels)
    found = plain_array("denoiser(image)", denoise(image, sigma=sigma))
    if found.shape != image.shape or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        msg = f"`denoiser` gives an array of {found.dtype} of shape {found.shape}: expected finite real numbers of shape {image.shape}"
        raise ValueError(msg)
    return _tensor(found, channels).to(w)


def _data(y: ArrayLike, operator: Operator) -> tuple[Tensor, bool]:
    """Data (C, ...) of a user, and whether they have channels."""
    values, shape = plain_array("y", y), tuple(operator.data_shape)
    if values.dtype.kind == "c" and not operator.complex:
        msg = f"`y` holds {values.dtype}: expected real numbers; where an operator gives real and imaginary parts, as `interferometer` and `lensing` do, pass np.stack([y.real, y.imag])"
        raise TypeError(msg)
    if values.dtype.kind not in ("fc" if operator.complex else "f"):
        msg = f"`y` holds {values.dtype}: expected {'floats or complex numbers' if operator.complex else 'floats'}; convert it first"
        raise TypeError(msg)
    channels = values.ndim == len(shape) + 1
    if values.shape[: len(shape)] != shape or values.ndim > len(shape) + 1 or 0 in values.shape:
        one = ", ".join(map(str, shape))
        msg = f"`y` has shape {values.shape}: expected ({one}) or ({one}, C), which is what the operator gives"
        raise ValueError(msg)
    values = values if channels else values[..., None]
    if operator.observed is not None:
        values = np.where(np.broadcast_to(operator.observed.numpy(), shape)[..., None], values, 0)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        msg = f"`y` is not finite at {bad} entries: leave them out with `operators.pixel_mask`, or fill them"
        raise ValueError(msg)
    precise = values.dtype in (np.float64, np.complex128)
    kind = (np.complex128 if precise else np.complex64) if operator.complex else np.float64 if precise else np.float32
    return torch.from_numpy(np.moveaxis(values, -1, 0).astype(kind)), channels


def _picture(name: str, image: ArrayLike, operator: Operator, data: Tensor, channels: bool) -> Tensor:
    """A picture (C, H, W) of a user, in the type of the data."""
    values = plain_array(name, image)
    shape = (*operator.shape, len(data)) if channels else operator.shape
    if values.shape != shape or values.dtype.kind not in "fiuc" or not np.isfinite(values).all():
        msg = (
            f"`{name}` is an array of {values.dtype} of shape {values.shape}: expected finite numbers of shape {shape}"
        )
        raise ValueError(msg)
    if values.dtype.kind == "c" and not data.is_complex():
        msg = f"`{name}` holds {values.dtype}: expected real numbers, as pictures of this operator are real"
        raise TypeError(msg)
    return _tensor(values, channels).to(data.dtype)


def _tensor(image: NDArray, channels: bool) -> Tensor:  # -> (C, H, W)
    return torch.from_numpy(np.moveaxis(image, -1, 0).copy() if channels else image[None].copy())


def _array(x: Tensor, channels: bool) -> NDArray:  # -> (H, W) or (H, W, C)
    return x.movedim(0, -1).numpy().copy() if channels else x[0].numpy().copy()


def _range(x: Tensor) -> float:
    parts = torch.view_as_real(x) if x.is_complex() else x
    return float(parts.max() - parts.min())


def _falling(span: float, config: PlugAndPlayConfig) -> list[float]:
    """The strength of the denoiser in each step, for a picture with a range of `span`."""
    left = [max(0.0, 1 - k / config.falling) for k in range(config.steps)]  # of the way from coarse to fine
    return [span * config.strength * (config.coarse / config.strength) ** share for share in left]
