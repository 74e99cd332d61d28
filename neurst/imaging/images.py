r"""Pictures as fields: denoise, fill and enlarge arrays. :func:`fit_image` gives the field itself.

All functions minimise

.. math:: \sum_{observed} \frac{(y - f)^2}{2 \sigma^2} + \lambda\,\mathrm{mean}_x P(f / s)(x),

with P a derivative penalty in box units (the longest side of the picture is [-1, 1]) and s the standard deviation of the picture without its noise.
:math:`\lambda` is a prior strength in nats (natural-log units of likelihood) that does not depend on the range of the picture.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from neurst.core.arguments import (
    ANYTHING,
    NONE,
    POSITIVE,
    SHARE,
    SIZE,
    check_fields,
    checked,
    instance,
    number,
    several,
    warn,
    whole,
)
from neurst.core.field import FittedField
from neurst.core.fit import FitConfig, OnStep, fit_field
from neurst.core.heads import Affine
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian
from neurst.core.nets import NETWORKS, Fourier, LowRank, Network, Siren, Spline
from neurst.core.penalty import PENALTIES, TGV, Penalty, SpaceVariantTV
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.samples import Samples
from neurst.core.tuning import LineSearch, choose
from neurst.imaging.arrays import MIN_SIDE, ROUNDING, as_image, as_mask, noise_level
from neurst.imaging.options import OPTIONS, FitOptions

SIGMA = (NONE | number(0)).advised("the standard deviation of the noise in the units of the picture")


@dataclass(frozen=True)
class ImageConfig:
    """Numbers of the fit of a picture.

    Parameters
    ----------
    strength
        First prior strength that is tried: the cost, in nats, of a pixel where the picture changes by one standard deviation of the noise from
        this pixel to the next.
    search_ratio, search_steps
        Factor between neighbouring strengths, and largest number of strengths tried in one direction.
    held_out
        Share of the observed entries that is held out in the search.
    max_search_pixels
        If a picture has more pixels than this, the search uses its centre only, unless too few pixels are observed there.
    min_search_pixels
        Observed pixels of a channel that a search needs. With fewer, `strength` is used and a warning is issued.
    exact
        Noise level of the data term for pictures without noise, as a share of the standard deviation of the picture.
    least_signal
        Smallest variance that is assumed for the picture without its noise, as a share of the variance of the picture.
    pyramid_ratio, coarsest
        Ratio of neighbouring grids of the spline, and least number of cells along the longest side of the coarsest grid. A ratio of 2 gives
        equally good results and is slower.
    window
        Standard deviation, in pixels, of the window of the structure tensors of space-variant NeurTV.
    tgv_length
        ``a0 / a1`` of TGV in pixels: the length over which slopes may change freely.
    steps, slow_steps, other_steps
        Adam steps of a spline; of a spline with gaps in the picture, no noise, or a penalty of second order, which converge more slowly; and
        of other networks.
    spline_rate, fourier_rate, other_rate
        Learning rate of each kind of network at the first step.
    lattice_batch, point_batch, point_regularisation
        Pixels in one step for networks that are evaluated on whole lattices, and for other networks; regularisation points of the latter.
    refreshes, spline_refresh
        Number of refreshes of an adaptive penalty during a fit, and largest number of steps between two refreshes for a spline.
    max_pixels
        Largest number of pixels in a result of :func:`upsample`.
    """

    strength: float = 0.85
    search_ratio: float = 1.6
    search_steps: int = 3
    held_out: float = 0.1
    max_search_pixels: int = 2**17
    min_search_pixels: int = 256
    exact: float = 0.02
    least_signal: float = 0.05
    pyramid_ratio: int = 4
    coarsest: int = 4
    window: float = 1.5
    tgv_length: float = 4.0
    steps: int = 80
    slow_steps: int = 240
    other_steps: int = 1000
    spline_rate: float = 0.1
    fourier_rate: float = 3e-3
    other_rate: float = 1e-3
    lattice_batch: int = 2**18
    point_batch: int = 2**12
    point_regularisation: int = 2**10
    refreshes: int = 5
    spline_refresh: int = 16
    max_pixels: int = 2**27

    def __post_init__(self):
        check_fields(self, search_ratio=number(1, above=True), held_out=SHARE, pyramid_ratio=whole(2))


CONFIG = instance(ImageConfig, "a `neurst.imaging.ImageConfig`")


def pixel(shape: tuple[int, ...]) -> float:
    """The distance between neighbouring pixels in box units, where the longest side is [-1, 1].

    Examples
    --------
    >>> pixel((101, 41))
    0.02
    """
    return 2 / (max(shape) - 1)


def pixel_spline(shape: tuple[int, ...], ratio: int = 4, coarsest: int = 4) -> Spline:
    """A spline with a knot at every pixel, and coarser grids with which smooth parts converge in few steps.

    Examples
    --------
    >>> pixel_spline((65, 33)).cells
    (4, 16, 64)
    """
    n = max(shape) - 1
    grids = itertools.takewhile(lambda m: m >= coarsest, (round(n / ratio**k) for k in itertools.count()))
    return Spline(tuple(grids)[::-1] or (n,), sides=tuple((m - 1) / n for m in shape))


def nats(per_pixel: float, shape: tuple[int, ...], order: int) -> float:
    r"""The prior strength at which a derivative of this order that is one unit per pixel costs `per_pixel` nats at each pixel.

    The penalty is a mean over the box, so :math:`\lambda = c N h^k` for N pixels that are h apart in box units, and order k.
    """
    return per_pixel * math.prod(shape) * pixel(shape) ** order


def pixel_penalty(penalty: str | Penalty, shape: tuple[int, ...], config: ImageConfig) -> Penalty:
    """The penalty with a name, whose lengths are set in pixels; or the penalty itself."""
    if penalty in ("auto", "space_variant"):
        return SpaceVariantTV(shared=True, window=config.window)
    if penalty == "tgv":
        return TGV(a0=config.tgv_length * pixel(shape))
    return PENALTIES.get_spec(penalty)


def pixel_network(network: str | Network, shape: tuple[int, ...], config: ImageConfig) -> Network:
    """The network with a name, with the resolution of the pixels; or the network itself."""
    if isinstance(network, Network):
        return network
    n = max(shape)
    if network in ("auto", "spline"):
        return pixel_spline(shape, config.pyramid_ratio, config.coarsest)
    fine = {
        "siren": Siren(width=256, depth=3, omega=30.0),
        "fourier": Fourier(width=256, n_features=256, scale=n / 4),
        "lowrank": LowRank(rank=min(n, 128), width=256, omega=n / 4),
    }
    return fine.get(network) or NETWORKS.get_spec(network)


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
        return max(self.sigma, self.config.exact * self.scale()[1])

    def lam(self, strength: float) -> float:
        """The prior strength in nats of a fit in which values are in units of the standard deviation of the picture."""
        return nats(strength, self.shape, self.penalty.order) * self.scale()[1] / self.noise()

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
        mean, scale = self.scale()
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
    return FitConfig(
        steps=steps,
        learning_rate=rate,
        batch_points=batch,
        n_regularisation=batch if on_lattice else config.point_regularisation,
        refresh_every=max(1, min(config.spline_refresh, apart) if spline else apart),
        random_state=options.random_state,
        device=options.device,
    )


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
    slow = mask is not None or sigma == 0 or penalty.order > 1 or isinstance(penalty, TGV)
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
        error = np.square((part.values - found)[held] / part.scale()[1]).mean()
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
    image, mask = _unmasked(image, mask)
    problem = _problem(image, as_mask(mask, image), sigma, options, config)
    with progress_bar(options.progress) as on_progress:
        counter = StepCounter(on_progress)
        lam = options.lam if options.lam != "auto" else _chosen_lam(problem, options, counter)
        return problem.fit(lam, counter.stage("fitting", problem.fit_config.steps))


def _unmasked(image: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture as a plain array, and `mask`, combined with the mask of a masked array."""
    if not isinstance(image, np.ma.MaskedArray):
        return as_image(image), mask
    seen, image = ~np.ma.getmaskarray(image), as_image(image.data)
    mask = as_mask(mask, np.zeros(image.shape))
    return image, seen if mask is None else mask & seen


def _read(field: FittedField, lattice: Lattice, like: np.ndarray, rows: int = 2**18) -> np.ndarray:
    """The values of a field on a lattice as a picture, computed a band of rows at a time."""
    first, *rest = lattice.axes
    bands = first.split(max(1, rows // math.prod(map(len, rest))))
    values = torch.cat([field.on_lattice(Lattice((band, *rest))) for band in bands])
    shape = lattice.shape + like.shape[2:]
    return values.reshape(shape).numpy().astype(np.result_type(like.dtype, np.float32), copy=False)


@checked(image=ANYTHING, sigma=SIGMA, options=OPTIONS, config=CONFIG)
def denoise(
    image: np.ndarray,
    *,
    sigma: float | None = None,
    options: FitOptions = FitOptions(),
    config: ImageConfig = ImageConfig(),
) -> np.ndarray:
    """A picture without its Gaussian noise.

    Parameters
    ----------
    image, sigma, options, config
        As in :func:`fit_image`.

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
    field = fit_image(image, sigma=sigma, options=options, config=config)
    return _read(field, Lattice.of_shape(*image.shape[:2]), image)


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
    >>> filled = inpaint(np.where(seen, ramp, np.nan), seen, options=FitOptions(progress=False))
    >>> bool(np.abs(filled - ramp).max() < 0.05)
    True
    """
    if mask is None and not isinstance(image, np.ma.MaskedArray):
        msg = "`mask=None`: expected booleans, True where the picture is observed, or a masked array as `image`"
        raise ValueError(msg)
    image, mask = _unmasked(image, mask)
    field = fit_image(image, mask, sigma=sigma, options=options, config=config)
    out = _read(field, Lattice.of_shape(*image.shape[:2]), image)
    if sigma != 0:
        return out
    seen = as_mask(mask, image)
    return np.where(True if seen is None else seen, image, out)


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
