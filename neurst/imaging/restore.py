r"""Pictures as fields: denoise, fill, enlarge, read between the pixels. Array in, array out; :func:`fit_image` gives the field.

All of them minimise

.. math:: \sum_{observed} \frac{(y - f)^2}{2 \sigma^2} + \lambda\,\mathrm{mean}_x P(f / s)(x),

P a derivative penalty in box units (the longest side of the picture is [-1, 1]) and s the standard deviation of the picture without its noise,
so that the range of the picture does not move :math:`\lambda`, a prior strength in nats.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from tqdm.auto import tqdm

from neurst.core.fit import Affine, Field, FitConfig, fit_field
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Fourier, LowRank, Network, Siren, Spline, as_network
from neurst.core.penalty import TGV, Penalty, SpaceVariantTV, as_penalty
from neurst.core.samples import Samples
from neurst.core.search import climb
from neurst.imaging.convert import as_image, as_mask, to_samples

SLOPES_BEND_OVER = 4.0  # pixels, ``a0 / a1`` of TGV
NOISE_FREE = 0.02  # of the picture's standard deviation: what the data term takes as noise where there is none


@dataclass(frozen=True)
class LamSearch:
    r"""How the prior strength is chosen: short fits without some pixels, scored on them.

    ``lam = strength N (2 / (n - 1))^k s / sigma`` for a penalty of order k on N pixels, n along the longest side: per pixel, a slope of one grey value
    per pixel costs ``strength / sigma`` nats. Strengths are tried on a grid until the best has a worse one on both sides; the vertex of the
    parabola through the three in log strength and log error is taken.

    Parameters
    ----------
    start
        First strength.
    ratio
        Between neighbours of the grid.
    reach
        Steps of the grid at most to either side.
    fraction
        Share of the observed entries that is held out.
    max_pixels
        A larger picture is searched on its centre, unless too little of that is observed.
    least
        Observed entries of a channel that a search needs; with fewer, `start` is taken.
    """

    start: float = 0.85
    ratio: float = 1.6
    reach: int = 3
    fraction: float = 0.1
    max_pixels: int = 2**17
    least: int = 256


@dataclass(frozen=True)
class _Plan:
    """One picture and how it is to be fitted."""

    samples: Samples
    sigma: float
    penalty: Penalty
    network: Network | str
    config: FitConfig

    @property
    def shape(self) -> tuple[int, ...]:
        return self.samples.coords.shape

    def n_observed(self) -> int:
        """Observed entries of the channel that has fewest."""
        weight = self.samples.weight
        return len(self.samples) if weight is None else int((weight > 0).sum(0).min())

    def scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of each channel, and one standard deviation for all, noise taken off."""
        y, w = self.samples.values, self.samples.weight
        w = torch.ones_like(y) if w is None else w
        y = torch.where(w > 0, y, 0.0)
        mean = (y * w).sum(0) / w.sum(0)
        variance = ((y - mean).square() * w).sum() / w.sum()
        clean = (variance - self.sigma**2).clamp_min(0.05 * variance).sqrt()
        return mean, torch.where(clean > 1e-6 * mean.abs().max(), clean, 1.0)  # a picture of one colour has no scale

    def lam(self, strength: float) -> float:
        noise = self.noise()
        cell = 2 / (max(self.shape) - 1)
        return float(strength * len(self.samples) * cell**self.penalty.order * float(self.scale()[1]) / noise)

    def noise(self) -> float:
        return max(self.sigma, NOISE_FREE * float(self.scale()[1]))

    def window(self, max_pixels: int) -> _Plan:
        """The plan of the centre of the picture."""
        share = min(1.0, math.sqrt(max_pixels / len(self.samples)))
        inner = [max(1, round(share * m)) for m in self.shape]
        index = tuple(torch.arange((m - k) // 2, (m - k) // 2 + k) for m, k in zip(self.shape, inner, strict=True))
        rows, weight = self.samples.coords.flat_index(index), self.samples.weight
        samples = Samples(Lattice.of_shape(*inner), self.samples.values[rows], None if weight is None else weight[rows])
        return dataclasses.replace(self, samples=samples)

    def without(self, held: torch.Tensor) -> _Plan:  # (N, C) of 0 and 1
        """The plan that does not see the entries where `held` is 1."""
        weight = 1 - held if self.samples.weight is None else self.samples.weight * (1 - held)
        return dataclasses.replace(self, samples=dataclasses.replace(self.samples, weight=weight))

    def fit(self, lam: float, on_step: Callable[[int, float], None] | None = None) -> Field:
        mean, scale = self.scale()
        return fit_field(
            self.samples,
            network=_sized(self.network, self.shape),
            likelihood=Gaussian(self.noise()),
            penalty=self.penalty,
            lam=lam,
            head=Affine(mean, scale),
            config=self.config,
            on_step=on_step,
        )


def _pyramid(cells: int, ratio: int = 4, least: int = 4) -> tuple[int, ...]:
    grids = itertools.takewhile(lambda m: m >= least, (round(cells / ratio**k) for k in itertools.count()))
    return tuple(grids)[::-1] or (cells,)


def _sized(network: Network | str, shape: tuple[int, ...]) -> Network:
    """The network behind a name, as fine as the pixels ask for."""
    n = max(shape)
    if isinstance(network, Network):
        return network
    if network in ("auto", "spline"):
        return Spline(_pyramid(n - 1), sides=tuple((m - 1) / (n - 1) for m in shape))
    named = {
        "siren": Siren(width=256, depth=3, omega=30.0),
        "fourier": Fourier(width=256, n_features=256, scale=n / 8),
        "lowrank": LowRank(rank=min(n, 128), width=256, omega=n / 4),
    }
    return named.get(network) or as_network(network)


def _penalty(penalty: str | Penalty, shape: tuple[int, ...]) -> Penalty:
    """The penalty behind a name: where it has lengths of its own, they are pixels."""
    if penalty == "space_variant":
        return SpaceVariantTV(shared=True, window=1.5)
    if penalty == "tgv":
        return TGV(a0=SLOPES_BEND_OVER * 2 / (max(shape) - 1))
    return as_penalty(penalty)


def _config(network: Network | str, n: int, slow: bool, steps: int | str, random_state: int, device: str) -> FitConfig:
    """Numbers of a fit, from the kind of network and whether it is slow: gaps take longer to close than noise to go, and slopes to settle."""
    spline = network in ("auto", "spline") or isinstance(network, Spline)
    tucker = spline or network == "lowrank" or isinstance(network, LowRank)
    if steps == "auto":
        steps = (240 if slow else 80) if spline else 1000
    batch = min(n, 2**18 if tucker else 2**13)
    return FitConfig(
        steps=steps,
        learning_rate=0.1 if spline else 1e-3,
        batch_points=batch,
        n_regularisation=batch if tucker else 2**11,
        refresh_every=max(1, min(16, steps // 5) if spline else steps // 5),
        random_state=random_state,
        device=device,
    )


def _search_strength(plan: _Plan, search: LamSearch, on_step: Callable[[int, float], None]) -> float:
    """The strength whose field is nearest to pixels it has not seen."""
    centre = plan.window(search.max_pixels)
    plan = centre if centre.n_observed() >= search.least else plan
    if plan.n_observed() < search.least:
        return search.start
    y, weight = plan.samples.values, plan.samples.weight
    generator = torch.Generator().manual_seed(plan.config.random_state)
    held = (torch.rand(y.shape, generator=generator) < search.fraction).to(y)
    held = held if weight is None else held * weight
    rest, y = plan.without(held), torch.where(held > 0, y, 0.0)

    def score(strength: float) -> float:
        found = rest.fit(rest.lam(strength), on_step)(plan.samples.coords)
        return -math.log(max(float(((y - found).square() * held).sum() / held.sum()), 1e-30))

    return climb(score, start=search.start, ratio=search.ratio, reach=search.reach)[0]


def _number(name: str, value: float | None, least: float = 0.0) -> None:
    if value is not None and not (isinstance(value, Real) and math.isfinite(value) and value >= least):
        msg = f"`{name}={value!r}`: expected a finite number >= {least:g}"
        raise ValueError(msg)


def fit_image(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    sigma: float | None = None,
    penalty: str | Penalty = "space_variant",
    network: str | Network = "auto",
    lam: float | str = "auto",
    steps: int | str = "auto",
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Field:
    r"""The continuous field of a picture.

    Coordinates are (row, column) in pixels, the centre of the first pixel at (0, 0): ``field(coords)`` reads colours between the pixels, ``field.jacobian(coords)``
    their slopes per pixel, ``field.hessian(coords)`` second derivatives; all at points (N, 2), the values also on a :class:`~neurst.core.lattice.Lattice`.

    Parameters
    ----------
    image
        (H, W) or (H, W, C), floats of any range; unsigned integers are taken as [0, 1].
    mask
        True where observed: (H, W), or one entry for each channel. All of it if None.
    sigma
        Standard deviation of the noise, in the units of the picture; 0 for none. None estimates it from the finest wavelets
        (:func:`skimage.restoration.estimate_sigma`); with a mask, where they cannot be had, None stands for 0.
    penalty
        A name of :data:`~neurst.core.penalty.PENALTIES` or a penalty. ``"space_variant"`` is NeurTV across and along the edges that all channels share.
    network
        ``"auto"`` is a cubic B-spline with a knot at every pixel and coarser ones beneath; or a name or specification of :mod:`~neurst.core.nets`.
    lam
        Prior strength in nats, see the head of this page; ``"auto"`` chooses it on held-out pixels, in 3 to 5 more fits.
    steps
        Of the fit.
    random_state, device, progress
        Seed; torch device; progress bar.

    Returns
    -------
    Field
        In pixels.

    Raises
    ------
    ValueError
        For wrong shapes, masks or numbers, and for values that are not finite where they are observed.

    Notes
    -----
    NeurTV is :cite:p:`Luo2025`.

    Examples
    --------
    >>> import numpy as np
    >>> import neurst
    >>> ramp = np.linspace(0, 1, 24)[:, None] * np.ones((1, 20))
    >>> field = neurst.imaging.fit_image(ramp, sigma=0.0, lam=1.0, progress=False)
    >>> slope = field.jacobian(torch.tensor([[11.5, 9.0]]))[0, 0]
    >>> [round(float(s), 2) for s in slope]
    [0.04, 0.0]
    """
    plan = _plan(image, mask, sigma, penalty, network, steps, random_state, device)
    if lam != "auto":
        _number("lam", lam)
    with tqdm(desc="fit", unit="step", disable=not progress) as bar:

        def on_step(step: int, objective: float) -> None:
            bar.update()

        if lam == "auto":
            lam = plan.lam(_search_strength(plan, LamSearch(), on_step))
        return plan.fit(lam, on_step)


def _noise_level(image: np.ndarray) -> float:
    """Standard deviation of the noise, from the finest wavelets; the mean over channels."""
    from skimage.restoration import estimate_sigma  # slow to import

    return float(estimate_sigma(image, channel_axis=-1 if image.ndim == 3 else None, average_sigmas=True))


def _plan(
    image: np.ndarray,
    mask: np.ndarray | None,
    sigma: float | None,
    penalty: str | Penalty,
    network: str | Network,
    steps: int | str,
    random_state: int,
    device: str,
) -> _Plan:
    """What the caller asked for, checked."""
    image = as_image(image)
    mask = as_mask(mask, image)
    _number("sigma", sigma)
    if steps != "auto" and not (isinstance(steps, Integral) and steps >= 1):
        msg = f"`steps={steps!r}`: expected a whole number >= 1, or 'auto'"
        raise ValueError(msg)
    if sigma is None:
        sigma = _noise_level(image) if mask is None else 0.0
    penalty = _penalty(penalty, image.shape[:2])
    slow = mask is not None or penalty.order > 1 or isinstance(penalty, TGV)
    config = _config(network, math.prod(image.shape[:2]), slow, steps, random_state, device)
    if isinstance(network, str) and network != "auto":
        as_network(network)
    return _Plan(to_samples(image, mask), sigma, penalty, network, config)


def _read(field: Field, lattice: Lattice, like: np.ndarray, rows: int = 2**18) -> np.ndarray:
    """A field on a lattice as a picture, a band of rows at a time."""
    first, *rest = lattice.axes
    bands = first.split(max(1, rows // math.prod(map(len, rest))))
    values = torch.cat([field(Lattice((band, *rest))) for band in bands])
    shape = lattice.shape + like.shape[2:]
    return values.reshape(shape).numpy().astype(np.result_type(like.dtype, np.float32), copy=False)


def denoise(
    image: np.ndarray,
    *,
    sigma: float | None = None,
    penalty: str | Penalty = "space_variant",
    network: str | Network = "auto",
    lam: float | str = "auto",
    steps: int | str = "auto",
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> np.ndarray:
    """A picture without its Gaussian noise.

    Parameters
    ----------
    image, sigma, penalty, network, lam, steps, random_state, device, progress
        As in :func:`fit_image`.

    Returns
    -------
    numpy.ndarray
        In the shape and units of `image`.

    Examples
    --------
    >>> import numpy as np
    >>> import neurst
    >>> rng = np.random.default_rng(0)
    >>> disc = (np.hypot(*(np.mgrid[:32, :32] - 16)) < 9).astype(float)
    >>> noisy = disc + 0.2 * rng.standard_normal(disc.shape)
    >>> restored = neurst.imaging.denoise(noisy, progress=False)
    >>> bool(neurst.imaging.metrics.psnr(restored, disc) > neurst.imaging.metrics.psnr(noisy, disc) + 6)
    True
    """
    image = as_image(image)
    field = fit_image(
        image,
        sigma=sigma,
        penalty=penalty,
        network=network,
        lam=lam,
        steps=steps,
        random_state=random_state,
        device=device,
        progress=progress,
    )
    return _read(field, Lattice.of_shape(*image.shape[:2]), image)


def inpaint(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    sigma: float | None = 0.0,
    penalty: str | Penalty = "space_variant",
    network: str | Network = "auto",
    lam: float | str = "auto",
    steps: int | str = "auto",
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> np.ndarray:
    """A picture filled where it was not observed.

    Parameters
    ----------
    image
        As in :func:`fit_image`; what it holds where `mask` is False is not looked at.
    mask
        True where observed: (H, W), or one entry for each channel.
    sigma
        Standard deviation of the noise of what is observed. With 0 or None observed entries come back as they are.
    penalty, network, lam, steps, random_state, device, progress
        As in :func:`fit_image`.

    Returns
    -------
    numpy.ndarray
        In the shape and units of `image`.

    Examples
    --------
    >>> import numpy as np
    >>> import neurst
    >>> ramp = np.linspace(0, 1, 24)[:, None] * np.ones((1, 20))
    >>> seen = np.random.default_rng(0).random(ramp.shape) < 0.3
    >>> filled = neurst.imaging.inpaint(np.where(seen, ramp, np.nan), seen, progress=False)
    >>> bool(np.abs(filled - ramp).max() < 0.05)
    True
    """
    image = as_image(image)
    seen = as_mask(mask, image)
    field = fit_image(
        image,
        seen,
        sigma=sigma,
        penalty=penalty,
        network=network,
        lam=lam,
        steps=steps,
        random_state=random_state,
        device=device,
        progress=progress,
    )
    out = _read(field, Lattice.of_shape(*image.shape[:2]), image)
    return out if sigma else np.where(seen, image, out)


def upsample(
    image: np.ndarray,
    *,
    scale: float | None = None,
    shape: tuple[int, int] | None = None,
    sigma: float = 0.0,
    penalty: str | Penalty = "space_variant",
    network: str | Network = "auto",
    lam: float | str = "auto",
    steps: int | str = "auto",
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> np.ndarray:
    """A picture on finer pixels, which cover the same area: pixel i of n stands at ``(i + 1/2) H / n - 1/2``.

    Parameters
    ----------
    scale
        New pixels per old one along each side; or
    shape
        the new (H, W).
    image, sigma, penalty, network, lam, steps, random_state, device, progress
        As in :func:`fit_image`.

    Returns
    -------
    numpy.ndarray
        (H, W) or (H, W, C) of the new shape.

    Raises
    ------
    ValueError
        Unless one of `scale` and `shape` is given; and as :func:`fit_image`.

    Examples
    --------
    >>> import numpy as np
    >>> import neurst
    >>> ramp = np.linspace(0, 1, 16)[:, None] * np.ones((1, 12))
    >>> neurst.imaging.upsample(ramp, scale=2, lam=1.0, progress=False).shape
    (32, 24)
    """
    image = as_image(image)
    if (scale is None) == (shape is None):
        msg = f"`scale={scale!r}` and `shape={shape!r}`: give one of them"
        raise ValueError(msg)
    if shape is None:
        _number("scale", scale)
        shape = tuple(round(scale * m) for m in image.shape[:2])
    if len(shape) != 2 or min(shape) < 1:
        msg = f"`shape={shape!r}` (`scale={scale!r}`): expected two whole numbers >= 1, the new height and width"
        raise ValueError(msg)
    field = fit_image(
        image,
        sigma=sigma,
        penalty=penalty,
        network=network,
        lam=lam,
        steps=steps,
        random_state=random_state,
        device=device,
        progress=progress,
    )
    # the outermost new centres lie outside the old ones: there the border is held
    sides = zip(image.shape[:2], shape, strict=True)
    axes = [((torch.arange(n, dtype=torch.float64) + 0.5) * m / n - 0.5).clamp(0, m - 1) for m, n in sides]
    return _read(field, Lattice(tuple(axes)), image)
