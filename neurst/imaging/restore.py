r"""Pictures as fields: denoise, fill, enlarge, read between the pixels. Array in, array out; :func:`fit_image` gives the field.

All of them minimise

.. math:: \sum_{observed} \frac{(y - f)^2}{2 \sigma^2} + \lambda\,\mathrm{mean}_x P(f / s)(x),

P a derivative penalty in box units (the longest side of the picture is [-1, 1]) and s the standard deviation of the picture without its noise,
so that the range of the picture does not move :math:`\lambda`, a prior strength in nats.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np
import torch
from tqdm.auto import tqdm

from neurst.core.fit import Field
from neurst.core.lattice import Lattice
from neurst.core.nets import Network
from neurst.core.penalty import TGV, Penalty
from neurst.imaging.convert import as_image, as_mask, to_samples
from neurst.imaging.pixels import pixel_penalty
from neurst.imaging.plan import LamSearch, Plan, fit_settings, search_strength


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
    >>> import torch
    >>> import neurst
    >>> ramp = np.linspace(0, 1, 24)[:, None] * np.ones((1, 20))
    >>> field = neurst.imaging.fit_image(ramp, sigma=0.0, lam=1.0, progress=False)
    >>> slope = field.jacobian(torch.tensor([[11.5, 9.0]]))[0, 0]
    >>> [round(abs(float(s)), 2) for s in slope]
    [0.04, 0.0]
    """
    plan = _plan(image, mask, sigma, penalty, network, steps, random_state, device)
    if lam != "auto":
        _number("lam", lam)
    with tqdm(desc="fit", unit="step", disable=not progress) as bar:

        def on_step(step: int, objective: float) -> None:
            bar.update()

        if lam == "auto":
            lam = plan.lam(search_strength(plan, LamSearch(), on_step))
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
) -> Plan:
    """What the caller asked for, checked."""
    image = as_image(image)
    mask = as_mask(mask, image)
    _number("sigma", sigma)
    if steps != "auto" and not (isinstance(steps, Integral) and steps >= 1):
        msg = f"`steps={steps!r}`: expected a whole number >= 1, or 'auto'"
        raise ValueError(msg)
    if sigma is None:
        sigma = _noise_level(image) if mask is None else 0.0
    penalty = pixel_penalty(penalty, image.shape[:2])
    slow = mask is not None or sigma == 0 or penalty.order > 1 or isinstance(penalty, TGV)
    config = fit_settings(network, image.shape[:2], slow, steps, random_state, device)
    return Plan(to_samples(image, mask), sigma, penalty, network, config)


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
