"""How a picture is to be fitted: the numbers behind the names, and the prior strength by held-out pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from neurst.core.fit import Affine, Field, FitConfig, fit_field
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Fourier, LowRank, Network, Siren, Spline, as_network
from neurst.core.penalty import Penalty
from neurst.core.samples import Samples
from neurst.core.search import climb
from neurst.imaging.pixels import on_part, pixel_spline, prior_strength

NOISE_FREE = 0.02  # of the picture's standard deviation: what the data term takes as noise where there is none
LEARNING_RATE = {Spline: 0.1, Fourier: 3e-3}  # 1e-3 of others


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
class Plan:
    """One picture and how it is to be fitted."""

    samples: Samples
    sigma: float
    penalty: Penalty
    network: Network | str
    config: FitConfig

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels along each axis."""
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
        """lam in nats, of a picture in units of its standard deviation."""
        return prior_strength(strength, self.shape, self.penalty.order) * float(self.scale()[1]) / self.noise()

    def noise(self) -> float:
        """Standard deviation that the data term takes."""
        return max(self.sigma, NOISE_FREE * float(self.scale()[1]))

    def window(self, max_pixels: int) -> Plan:
        """The plan of the centre of the picture."""
        share = min(1.0, math.sqrt(max_pixels / len(self.samples)))
        inner = tuple(max(1, round(share * m)) for m in self.shape)
        index = tuple(torch.arange((m - k) // 2, (m - k) // 2 + k) for m, k in zip(self.shape, inner, strict=True))
        rows, weight = self.samples.coords.flat_index(index), self.samples.weight
        samples = Samples(Lattice.of_shape(*inner), self.samples.values[rows], None if weight is None else weight[rows])
        return dataclasses.replace(self, samples=samples, penalty=on_part(self.penalty, self.shape, inner))

    def without(self, held: torch.Tensor) -> Plan:  # (N, C) of 0 and 1
        """The plan that does not see the entries where `held` is 1."""
        weight = 1 - held if self.samples.weight is None else self.samples.weight * (1 - held)
        return dataclasses.replace(self, samples=dataclasses.replace(self.samples, weight=weight))

    def fit(self, lam: float, on_step: Callable[[int, float], None] | None = None) -> Field:
        """The field at a prior strength in nats."""
        mean, scale = self.scale()
        return fit_field(
            self.samples,
            network=sized(self.network, self.shape),
            likelihood=Gaussian(self.noise()),
            penalty=self.penalty,
            lam=lam,
            head=Affine(mean, scale),
            config=self.config,
            on_step=on_step,
        )


def sized(network: Network | str, shape: tuple[int, ...]) -> Network:
    """The network behind a name, as fine as the pixels ask for."""
    n = max(shape)
    if isinstance(network, Network):
        return network
    if network in ("auto", "spline"):
        return pixel_spline(shape)
    named = {
        "siren": Siren(width=256, depth=3, omega=30.0),
        "fourier": Fourier(width=256, n_features=256, scale=n / 4),
        "lowrank": LowRank(rank=min(n, 128), width=256, omega=n / 4),
    }
    return named.get(network) or as_network(network)


def fit_settings(
    network: Network | str, shape: tuple[int, ...], slow: bool, steps: int | str, random_state: int, device: str
) -> FitConfig:
    """Numbers of a fit, from the kind of network and whether it is slow: gaps take longer to close than noise to go, exact values to be met and slopes to settle."""
    kind, n = type(sized(network, shape)), math.prod(shape)
    at_once = kind in (Spline, LowRank)  # a lattice costs them less than its points one by one
    if steps == "auto":
        steps = (240 if slow else 80) if kind is Spline else 1000
    batch = min(n, 2**18 if at_once else 2**12)
    return FitConfig(
        steps=steps,
        learning_rate=LEARNING_RATE.get(kind, 1e-3),
        batch_points=batch,
        n_regularisation=batch if at_once else 2**10,
        refresh_every=max(1, min(16, steps // 5) if kind is Spline else steps // 5),
        random_state=random_state,
        device=device,
    )


def search_strength(plan: Plan, search: LamSearch, on_step: Callable[[int, float], None]) -> float:
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
