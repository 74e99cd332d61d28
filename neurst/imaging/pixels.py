"""Quantities in pixels: the numbers of a fit of a picture, and networks and penalties whose lengths are in pixels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from neurst.core.arguments import SHARE, check_fields, instance, number, whole
from neurst.core.nets import NETWORKS, Fourier, LowRank, Network, Siren, Spline
from neurst.core.penalty import PENALTIES, TGV, Penalty, SpaceVariantTV


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
