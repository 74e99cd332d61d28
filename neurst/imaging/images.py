r"""Pictures as fields: denoise, fill and enlarge arrays. :func:`fit_image` gives the field itself.

All functions minimise

.. math:: \sum_{observed} \frac{(y - f)^2}{2 \sigma^2} + \lambda\,\mathrm{mean}_x P(f / s)(x),

with P a derivative penalty in box units (the longest side of the picture is [-1, 1]) and s the standard deviation of the picture without its noise.
:math:`\lambda` is a prior strength in nats (natural-log units of likelihood) that does not depend on the range of the picture.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from neurst.core.arguments import (
    ANYTHING,
    NONE,
    POSITIVE,
    SIZE,
    checked,
    one_of,
    several,
    shown,
    warn,
)
from neurst.core.field import FittedField
from neurst.core.fit import FitConfig, OnStep, fit_field
from neurst.core.heads import Affine
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Fourier, LowRank, Network, Spline
from neurst.core.penalty import TGV, Penalty
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.samples import Samples
from neurst.core.tuning import LineSearch, choose
from neurst.imaging.arrays import MIN_SIDE, ROUNDING, SIGMA, as_image, as_mask, noise_level
from neurst.imaging.options import OPTIONS, FitOptions
from neurst.imaging.pixels import CONFIG, ImageConfig, nats, pixel, pixel_network, pixel_penalty


@dataclass(frozen=True, eq=False)
class ImageProblem:
    """A picture, or a part of it, and the choices for its fit."""

    values: np.ndarray  # (H, W, C) float64
    seen: np.ndarray | None  # (H, W, C) bool, None if all entries are observed
    sigma: float
    penalty: Penalty
    network: str | Network
    fit_config: FitConfig
    config: ImageConfig

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.values.shape[:2]

    def n_observed(self) -> int:
        """Number of observed pixels in the channel with the fewest."""
        return math.prod(self.shape) if self.seen is None else int(self.seen.sum((0, 1)).min())

    @functools.cached_property
    def scale(self) -> tuple[np.ndarray, float]:
        """Mean of each channel (C,), and the standard deviation over all channels without the noise."""
        seen = np.ones(self.values.shape, bool) if self.seen is None else self.seen
        largest = np.abs(np.where(seen, self.values, 0.0)).max() or 1.0  # scaled by this, no square over- or underflows
        y = np.where(seen, self.values, 0.0) / largest
        mean = y.sum((0, 1)) / seen.sum((0, 1))
        variance = (np.square(y - mean) * seen).sum() / seen.sum()
        clean = math.sqrt(max(variance - (self.sigma / largest) ** 2, self.config.least_signal * variance))
        flat = not clean > ROUNDING * np.abs(mean).max()  # the picture has one colour, up to rounding
        return mean * largest, largest if flat else clean * largest

    def noise(self) -> float:
        """The noise level of the data term, a standard deviation in the units of the picture."""
        return max(self.sigma, self.config.exact * self.scale[1])

    def lam(self, strength: float) -> float:
        """The prior strength in nats of a fit in which values are in units of the standard deviation of the picture."""
        return nats(strength, self.shape, self.penalty.order) * self.scale[1] / self.noise()

    def centre(self, max_pixels: int) -> ImageProblem:
        """The problem for the centre of the picture. Lengths of the penalty stay the same in pixels."""
        share = min(1.0, math.sqrt(max_pixels / math.prod(self.shape)))
        inner = tuple(max(min(m, MIN_SIDE), round(share * m)) for m in self.shape)
        rows, columns = (slice((m - k) // 2, (m - k) // 2 + k) for m, k in zip(self.shape, inner, strict=True))
        penalty = self.penalty
        if isinstance(penalty, TGV):
            penalty = dataclasses.replace(penalty, a0=penalty.a0 * pixel(inner) / pixel(self.shape))
        seen = None if self.seen is None else self.seen[rows, columns]
        return dataclasses.replace(self, values=self.values[rows, columns], seen=seen, penalty=penalty)

    def without(self, held: np.ndarray) -> ImageProblem:
        """The problem without the entries where `held` is True."""
        return dataclasses.replace(self, seen=~held if self.seen is None else self.seen & ~held)

    def fit(self, lam: float, on_step: OnStep | None = None) -> FittedField:
        """The field at a prior strength in nats, in the units of the picture."""
        mean, scale = self.scale
        lattice, n = Lattice.of_shape(*self.shape), math.prod(self.shape)
        centred = (self.values - mean) / scale
        centred[np.abs(centred) < ROUNDING] = 0.0  # total variation would take rounding errors for edges
        standard = torch.from_numpy(centred.astype(np.float32)).reshape(n, -1)
        weight = None if self.seen is None else torch.from_numpy(self.seen.astype(np.float32)).reshape(standard.shape)
        field = fit_field(
            Samples(lattice, standard, weight),
            network=pixel_network(self.network, self.shape, self.config),
            likelihood=Gaussian(self.noise() / scale),
            penalty=self.penalty,
            lam=lam,
            config=self.fit_config,
            on_step=on_step,
        )
        return field.with_head(Affine(torch.from_numpy(mean), torch.full((1,), scale, dtype=torch.float64)))


def _fit_config(network: Network, n: int, slow: bool, options: FitOptions, config: ImageConfig) -> FitConfig:
    """Numbers of a fit of n pixels, for a kind of network. `slow` fits converge slowly and take more steps."""
    spline, on_lattice = isinstance(network, Spline), isinstance(network, (Spline, LowRank))
    steps = options.steps_or((config.slow_steps if slow else config.steps) if spline else config.other_steps)
    rate = config.spline_rate if spline else config.fourier_rate if isinstance(network, Fourier) else config.other_rate
    batch = min(n, config.lattice_batch if on_lattice else config.point_batch)
    apart = steps // config.refreshes
    refresh = max(1, min(config.spline_refresh, apart) if spline else apart)
    n_regularisation = batch if on_lattice else config.point_regularisation
    return options.fit_config(FitConfig(steps, rate, batch, n_regularisation=n_regularisation, refresh_every=refresh))


def _problem(
    image: np.ndarray, mask: np.ndarray | None, sigma: float | None, options: FitOptions, config: ImageConfig
) -> ImageProblem:
    """The fit of a picture with the choices of the caller."""
    penalty = pixel_penalty(options.penalty, image.shape[:2], config)
    if penalty.needs_spectrum:
        msg = f"`penalty={options.penalty!r}` needs a spectral axis, which a picture lacks: use `denoise_cube`, or another penalty"
        raise ValueError(msg)
    sigma = noise_level(image, mask) if sigma is None else sigma
    network = pixel_network(options.network, image.shape[:2], config)
    slow = mask is not None or sigma == 0 or penalty.order > 1 or penalty.n_outputs(1, 2) > 1
    fit_config = _fit_config(network, math.prod(image.shape[:2]), slow, options, config)
    values = image.reshape(*image.shape[:2], -1).astype(np.float64)
    seen = None if mask is None else mask.reshape(values.shape)
    if seen is not None:  # values in gaps are ignored, and may be NaN
        values = np.where(seen, values, 0.0)
    return ImageProblem(values, seen, sigma, penalty, options.network, fit_config, config)


def _chosen_lam(problem: ImageProblem, options: FitOptions, counter: StepCounter) -> float:
    """The prior strength in nats whose field is nearest to entries that were held out."""
    config = problem.config
    centre = problem.centre(config.max_search_pixels)
    part = centre if centre.n_observed() >= config.min_search_pixels else problem
    default = problem.lam(config.strength)
    if part.n_observed() < config.min_search_pixels:
        warn(
            f"only {part.n_observed()} pixels are observed, fewer than the {config.min_search_pixels} that the choice of `lam` needs: "
            f"{default:.3g} nats is used; pass `options=FitOptions(lam=...)` to choose it yourself"
        )
        return default
    search = options.search.with_defaults(
        LineSearch(default, config.search_ratio, config.search_steps, config.held_out, problem.fit_config.steps)
    )
    generator = torch.Generator().manual_seed(problem.fit_config.random_state)
    drawn = torch.rand(part.values.reshape(-1, part.values.shape[2]).shape, generator=generator, dtype=torch.float32)
    drawn = drawn.numpy().reshape(part.values.shape)
    drawn = drawn if part.seen is None else np.where(part.seen, drawn, 1.0)
    held = drawn < max(search.fraction, np.nextafter(drawn.min(), 1.0))  # at least one entry
    rest = part.without(held)
    rest = dataclasses.replace(rest, fit_config=dataclasses.replace(rest.fit_config, steps=search.steps))
    share = rest.lam(1.0) / problem.lam(1.0)  # the centre has fewer pixels and another box

    def trial(lam: float) -> tuple[float, None]:
        field = rest.fit(share * lam, counter.stage(f"choosing lam: {lam:.3g}", search.steps))
        found = field.on_lattice(Lattice.of_shape(*part.shape)).numpy().reshape(part.values.shape)
        error = np.square((part.values - found)[held] / part.scale[1]).mean()
        return -math.log(max(error, 1e-30)), None

    return choose(trial, search).strength


@checked(image=ANYTHING, mask=ANYTHING, sigma=SIGMA, options=OPTIONS, config=CONFIG)
def fit_image(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    sigma: float | None = None,
    options: FitOptions = FitOptions(),
    config: ImageConfig = ImageConfig(),
) -> FittedField:
    r"""The continuous field of a picture.

    Coordinates are (row, column) in pixels, with the centre of the first pixel at (0, 0). At points (N, 2), also between pixels,
    ``field(coords)`` gives the colours, ``field.jacobian(coords)`` their slopes per pixel, and ``field.hessian(coords)`` their second derivatives.

    Parameters
    ----------
    image
        (H, W) or (H, W, C), floats of any range; unsigned integers are scaled to [0, 1]. Masked entries of a masked array are taken as
        unobserved.
    mask
        True where observed: (H, W), or one entry for each channel. None means that all of it is observed.
    sigma
        Standard deviation of the noise, in the units of the data; None estimates it. 0 means that there is no noise. It is estimated from the
        observed pixels (:func:`neurst.imaging.arrays.noise_level`).
    options
        Choices that every fit offers, such as `lam` and ``progress``.
    config
        Numbers of the method.

    Returns
    -------
    FittedField
        The field, with coordinates in pixels. ``field.save(path)`` stores it.

    Raises
    ------
    TypeError, ValueError
        For wrong types, shapes, masks or numbers, and for values that are not finite where they are observed.

    Notes
    -----
    NeurTV is :cite:p:`Luo2025`.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, fit_image
    >>> ramp = np.linspace(0, 1, 24)[:, None] * np.ones((1, 20))
    >>> field = fit_image(ramp, sigma=0.0, options=FitOptions(lam=1.0, progress=False))
    >>> abs(field.jacobian([[11.5, 9.0]])).round(2)
    array([[[0.04, 0.  ]]])
    """
    image, mask = _observed(image, mask)
    problem = _problem(image, mask, sigma, options, config)
    with progress_bar(options.progress) as on_progress:
        counter = StepCounter(on_progress)
        lam = options.lam if options.lam != "auto" else _chosen_lam(problem, options, counter)
        return problem.fit(lam, counter.stage("fitting", problem.fit_config.steps))


def _observed(image: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture as a plain array, and where it is observed, also by the mask of a masked array: None if all of it is."""
    if not isinstance(image, np.ma.MaskedArray):
        image = as_image(image)
        return image, as_mask(mask, image)
    seen, image = ~np.ma.getmaskarray(image), as_image(image.data)
    mask = as_mask(mask, np.zeros(image.shape))
    return image, as_mask(seen if mask is None else mask & seen, image)


def _read(field: FittedField, lattice: Lattice, like: np.ndarray, rows: int = 2**18) -> np.ndarray:
    """The values of a field on a lattice as a picture, computed a band of rows at a time."""
    first, *rest = lattice.axes
    bands = first.split(max(1, rows // math.prod(map(len, rest))))
    values = torch.cat([field.on_lattice(Lattice((band, *rest))) for band in bands])
    shape = lattice.shape + like.shape[2:]
    return values.reshape(shape).numpy().astype(np.result_type(like.dtype, np.float32), copy=False)


@checked(image=ANYTHING, method=one_of("neurtv", "learned_tgv", "lofi"), sigma=SIGMA, options=OPTIONS, config=CONFIG)
def denoise(
    image: np.ndarray,
    *,
    method: str = "neurtv",
    sigma: float | None = None,
    options: FitOptions = FitOptions(),
    config: ImageConfig = ImageConfig(),
) -> np.ndarray:
    """A picture without its Gaussian noise.

    Parameters
    ----------
    image
        As in :func:`fit_image`.
    method
        ``"neurtv"`` fits a field to the picture, which takes seconds. The others use a network that was trained on photographs: ``"learned_tgv"`` minimises total generalised
        variation with weights that a network predicts for each pixel (:class:`neurst.imaging.tgv.LearnedTGV`), and ``"lofi"`` takes each value as a mean of observed values around it whose weights a network predicts
        (:class:`neurst.imaging.lofi.LoFi`).
    sigma, options, config
        As in :func:`fit_image`. The other methods have no use for `config`, nor for `options` other than ``progress``.

    Returns
    -------
    numpy.ndarray
        The restored picture in the shape and units of `image`; unsigned integers come back as floats from 0 to 1.

    Raises
    ------
    TypeError, ValueError
        As :func:`fit_image`.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, denoise, metrics
    >>> rng = np.random.default_rng(0)
    >>> disc = (np.hypot(*(np.mgrid[:32, :32] - 16)) < 9).astype(float)
    >>> noisy = disc + 0.2 * rng.standard_normal(disc.shape)
    >>> restored = denoise(noisy, options=FitOptions(progress=False))
    >>> bool(metrics.psnr(restored, disc) > metrics.psnr(noisy, disc) + 6)
    True
    """
    image = as_image(image)
    if method != "neurtv":
        return _denoise_trained(image, method, sigma, options, config)
    field = fit_image(image, sigma=sigma, options=options, config=config)
    return _read(field, Lattice.of_shape(*image.shape[:2]), image)


def _denoise_trained(
    image: np.ndarray, method: str, sigma: float | None, options: FitOptions, config: ImageConfig
) -> np.ndarray:
    """The picture that a model in the package gives."""
    from neurst.imaging.lofi.model import shipped_lofi
    from neurst.imaging.tgv.learned import pretrained_denoiser

    for name, given in (("options", dataclasses.replace(options, progress=True)), ("config", config)):
        default = type(given)()
        other = [f.name for f in dataclasses.fields(given) if getattr(given, f.name) != getattr(default, f.name)]
        if other:
            msg = f"`{name}` sets `{other[0]}={shown(getattr(given, other[0]))}` with `method={method!r}`: expected the default, as it is a choice of a fit; drop it, or use `method='neurtv'`"
            raise ValueError(msg)
    as_mask(None, image)  # checks that it is finite
    sigma = noise_level(image) if sigma is None else sigma
    dtype = np.result_type(image.dtype, np.float32)
    if sigma == 0:
        return image.astype(dtype)
    if method == "lofi":
        return shipped_lofi()(image, sigma=sigma)
    found = pretrained_denoiser().reconstruct(image, sigma=sigma, progress=options.progress)
    return found.astype(dtype, copy=False)


@checked(image=ANYTHING, mask=ANYTHING, sigma=SIGMA, options=OPTIONS, config=CONFIG)
def inpaint(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    sigma: float | None = 0.0,
    options: FitOptions = FitOptions(),
    config: ImageConfig = ImageConfig(),
) -> np.ndarray:
    """A picture with its unobserved pixels filled.

    Parameters
    ----------
    image
        As in :func:`fit_image`; values that are not observed are ignored.
    mask
        True where observed: (H, W), or one entry for each channel. It may be omitted for a masked array.
    sigma
        Standard deviation of the noise, in the units of the data; None estimates it. With 0, observed entries are returned unchanged.
    options, config
        As in :func:`fit_image`.

    Returns
    -------
    numpy.ndarray
        The filled picture in the shape and units of `image`; unsigned integers come back as floats from 0 to 1.

    Raises
    ------
    TypeError, ValueError
        If nothing says which pixels are observed; and as :func:`fit_image`.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, inpaint
    >>> ramp = np.linspace(0, 1, 24)[:, None] * np.ones((1, 20))
    >>> seen = np.random.default_rng(0).random(ramp.shape) < 0.6
    >>> filled = inpaint(np.where(seen, ramp, np.nan), seen, options=FitOptions(lam=1000.0, progress=False))
    >>> bool(np.abs(filled - ramp).max() < 0.05)
    True
    """
    if mask is None and not isinstance(image, np.ma.MaskedArray):
        msg = "`mask=None`: expected booleans, True where the picture is observed, or a masked array as `image`"
        raise ValueError(msg)
    image, mask = _observed(image, mask)
    field = fit_image(image, mask, sigma=sigma, options=options, config=config)
    out = _read(field, Lattice.of_shape(*image.shape[:2]), image)
    return out if sigma != 0 else np.where(True if mask is None else mask, image, out)


@checked(
    image=ANYTHING,
    scale=NONE | POSITIVE,
    shape=(NONE | several(SIZE, least=2)).advised("the new height and width"),
    sigma=SIGMA,
    options=OPTIONS,
    config=CONFIG,
)
def upsample(
    image: np.ndarray,
    *,
    scale: float | None = None,
    shape: tuple[int, int] | None = None,
    sigma: float | None = 0.0,
    options: FitOptions = FitOptions(),
    config: ImageConfig = ImageConfig(),
) -> np.ndarray:
    """A picture with more pixels over the same area: pixel i of n is at ``(i + 1/2) H / n - 1/2``.

    Parameters
    ----------
    scale
        Number of new pixels per old pixel along each side. Give either `scale` or `shape`.
    shape
        The new (H, W).
    image, sigma, options, config
        As in :func:`fit_image`.

    Returns
    -------
    numpy.ndarray
        The picture in the new shape, (H, W) or (H, W, C).

    Raises
    ------
    TypeError, ValueError
        If not exactly one of `scale` and `shape` is given, if the result would have more than ``config.max_pixels`` pixels, or as in
        :func:`fit_image`.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, upsample
    >>> ramp = np.linspace(0, 1, 16)[:, None] * np.ones((1, 12))
    >>> upsample(ramp, scale=2, options=FitOptions(lam=1.0, progress=False)).shape
    (32, 24)
    """
    image = as_image(image)
    if (scale is None) == (shape is None):
        msg = f"`scale={scale!r}` and `shape={shape!r}`: give one of them"
        raise ValueError(msg)
    new = tuple(scale * m for m in image.shape[:2]) if shape is None else shape
    if len(new) != 2 or min(new) < 0.5:
        msg = f"`shape={shape!r}` (`scale={scale!r}`): expected two whole numbers >= 1, the new height and width"
        raise ValueError(msg)
    if math.prod(new) > config.max_pixels:
        size = math.prod(new) * math.prod(image.shape[2:]) * np.result_type(image.dtype, np.float32).itemsize
        msg = (
            f"`shape={shape!r}` (`scale={scale!r}`) gives {math.prod(new):.3g} pixels and {size / 1e9:.3g} GB: expected at most {config.max_pixels:,} "
            "pixels; raise the limit with `config=ImageConfig(max_pixels=...)`"
        )
        raise ValueError(msg)
    field = fit_image(image, sigma=sigma, options=options, config=config)
    # the outermost new centres lie outside the old ones: there the value at the border is repeated
    sides = zip(image.shape[:2], map(round, new), strict=True)
    axes = [((torch.arange(n, dtype=torch.float64) + 0.5) * m / n - 0.5).clamp(0, m - 1) for m, n in sides]
    return _read(field, Lattice(tuple(axes)), image)
