r"""Attributes of scattered points, such as the colours of a point cloud, denoised and filled by a field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from neurst.core.arguments import (
    ANYTHING,
    MEMBERS,
    NONE,
    POSITIVE,
    check_fields,
    checked,
    coordinates,
    instance,
    real_array,
    several,
)
from neurst.core.field import Field, FittedField, finite_array, stored_as
from neurst.core.fit import FIT, FitConfig, OnStep, fit_field
from neurst.core.heads import Affine
from neurst.core.jet import Jet
from neurst.core.likelihood import Gaussian
from neurst.core.nets import NETWORKS, Network, Siren
from neurst.core.penalty import PENALTIES, Penalty, SpaceVariantTV
from neurst.core.progress import StepCounter, progress_bar
from neurst.core.samples import Box, Samples
from neurst.core.spec import named
from neurst.core.tuning import FULL_SEARCH, LineSearch, choose
from neurst.imaging.options import OPTIONS, FitOptions

MIN_POINTS = 4  # fewest observed points in each channel


@dataclass(frozen=True)
class AttributeConfig:
    """Numbers of the fit of attributes.

    Parameters
    ----------
    network
        Network where the options say ``network="auto"``.
    penalties
        Penalties where the options say ``penalty="auto"``. The members take them in turn, and the search for `lam` takes the first.
    fit
        Numbers of the fit of a member. Most regularisation points are near data points, because points on a surface leave most of the
        bounding box empty.
    search
        How `lam` is chosen, where the options do not say it.
    least_noise
        Smallest noise of a channel, as a share of the standard deviation of its values. Even exact values are not fitted more closely.
    """

    network: Network = Siren(width=128, depth=3, omega=16.0)
    penalties: tuple[str | Penalty, ...] = (*[SpaceVariantTV(neighbours=32, shared=True)] * 3, "space_variant")
    fit: FitConfig = FitConfig(steps=800, batch_points=1024, n_regularisation=512, near=0.9)
    search: LineSearch = LineSearch(start=45.0, ratio=3.0, max_steps=4, fraction=0.2, steps=200)
    least_noise: float = 1e-3

    def __post_init__(self):
        names = {"network": named(NETWORKS), "penalties": several(named(PENALTIES))}
        check_fields(self, fit=FIT, search=FULL_SEARCH, **names)


RULES = {
    "points": ANYTHING,
    "values": ANYTHING,
    "sigma": (NONE | several(POSITIVE)).advised("in the units of `values`"),
    "n_members": MEMBERS,
    "options": OPTIONS,
    "config": instance(AttributeConfig, "a `neurst.imaging.AttributeConfig`"),
}


@stored_as("attributes")
@dataclass(frozen=True, eq=False)
class AttributeField(Field):
    """Attributes as a function of position: the mean of several fits (members).

    A call gives values in the units that were fitted.

    Parameters
    ----------
    fields
        The members, in the units of the values.
    sigma
        (C,) standard deviation of the noise of each channel.
    lam
        Prior strength in nats.
    scores
        The score of each strength that was tried: minus the mean squared error at held-out values, in units of the noise variance.
    """

    fields: tuple[FittedField, ...]
    sigma: NDArray[np.float64]
    lam: float
    scores: dict[float, float] = field(default_factory=dict)

    @property
    def box(self) -> Box:
        """The box that all members share."""
        return self.fields[0].box

    @property
    def n_channels(self) -> int:
        """C, the number of channels."""
        return self.fields[0].n_channels

    def in_box(self, x: torch.Tensor | Jet) -> torch.Tensor | Jet:
        return sum(member.in_box(x) for member in self.fields) * (1 / len(self.fields))

    def to_dict(self) -> dict[str, Any]:
        return {
            "members": {str(k): member.to_dict() for k, member in enumerate(self.fields)},
            "sigma": self.sigma,
            "lam": self.lam,
            "tried": np.array(list(self.scores), dtype=float),
            "scores": np.array(list(self.scores.values()), dtype=float),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> AttributeField:
        members = [FittedField.from_dict(stored["members"][str(k)]) for k in range(len(stored["members"]))]
        if len({(member.box.scale, *member.box.center.tolist()) for member in members}) != 1:
            msg = "the members have different boxes"
            raise ValueError(msg)
        tried, scores = (finite_array(stored, name).tolist() for name in ("tried", "scores"))
        sigma = finite_array(stored, "sigma", np.size(stored["sigma"]), dtype=np.float64)
        return cls(tuple(members), sigma, float(stored["lam"]), dict(zip(tried, scores, strict=True)))


def _values(values: ArrayLike, n: int) -> NDArray[np.float64]:  # -> (N, C)
    """Checked values (N, C): every channel is observed at enough points, none is infinite. Masked entries become NaN."""
    if isinstance(values, np.ma.MaskedArray):
        values = np.where(np.ma.getmaskarray(values), np.nan, real_array("values", values.data))
    values = real_array("values", values, advice="pass (N, C) or (N,), with NaN where an entry is unobserved")
    if values.ndim not in (1, 2) or len(values) != n or values.size == 0:
        msg = f"`values` has shape {values.shape}: expected ({n}, C) or ({n},), one row for each of the points"
        raise ValueError(msg)
    values = values.reshape(n, -1)
    if np.isinf(values).any():
        msg = f"`values` is infinite at {np.isinf(values).sum()} entries: set those that are unobserved to NaN"
        raise ValueError(msg)
    counts = np.isfinite(values).sum(0)
    if counts.min() < MIN_POINTS:
        c = int(counts.argmin())
        msg = f"channel {c} of `values` is observed at {counts[c]} points: a field needs at least {MIN_POINTS}; drop the channel"
        raise ValueError(msg)
    return values


def noise_level(points: NDArray, values: NDArray) -> float:
    r"""Standard deviation of the noise of values (N,) at points (N, d): :math:`\mathrm{median}_i |y_i - y_{j(i)}| / (0.6745 \sqrt 2)`, where j(i) is nearest to i.

    The few pairs of points across an edge hardly change the median. All variation between neighbours counts as noise, so the estimate is
    somewhat too large: by 2 to 8 % on a coloured scan, by 8 to 12 % under fine stripes.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> points = rng.random((2000, 2))
    >>> round(noise_level(points, (points[:, 0] > 0.5) + 0.1 * rng.standard_normal(2000)), 1)
    0.1
    """
    from scipy.spatial import cKDTree  # slow to import

    nearest = cKDTree(points).query(points, k=2)[1]
    # if several points are at one place, the first one found need not be the point itself
    other = np.where(nearest[:, 1] == np.arange(len(points)), nearest[:, 0], nearest[:, 1])
    return float(np.median(np.abs(values - values[other])) / (0.6745 * math.sqrt(2)))


def _noise(
    sigma: tuple[float, ...] | None, points: NDArray, values: NDArray, seen: NDArray, least: float
) -> NDArray[np.float64]:
    """Noise of each channel (C,), given or estimated, and at least `least` times the standard deviation of its values."""
    channels = list(zip(values.T, seen.T, strict=True))
    spread = np.array([column[mask].std() for column, mask in channels])
    if sigma is None:
        found = np.array([noise_level(points[mask], column[mask]) for column, mask in channels])
    elif len(sigma) not in (1, len(spread)):
        msg = f"`sigma` has {len(sigma)} entries: expected one number, or one for each of the {len(spread)} channels"
        raise ValueError(msg)
    else:
        found = np.array(sigma)
    found = np.maximum(found, least * spread)
    return np.where(found > 0, found, 1.0)  # a constant channel


@checked(**RULES)
def fit_attributes(
    points: ArrayLike,
    values: ArrayLike,
    *,
    sigma: float | tuple[float, ...] | None = None,
    n_members: int = 4,
    options: FitOptions = FitOptions(),
    config: AttributeConfig = AttributeConfig(),
) -> AttributeField:
    r"""Fit a field to attributes of scattered points. It can be evaluated and differentiated anywhere.

    The field is the mean of `n_members` fits, each the minimum of
    :math:`\sum_{observed} \tfrac12 ((y_{ic} - f_c(x_i)) / \sigma_c)^2 + \lambda\,\mathrm{mean}_x P(f / \sigma)(x)`, in units of the box (half the
    longest side of the bounding box of the points is 1). P is NeurTV :cite:p:`Luo2025`, by default space-variant. Three members of four use one
    norm over all channels, so that these share edges; the fourth treats each channel on its own.

    Parameters
    ----------
    points
        (N, d), d = 2 or 3, with one unit of length for all axes.
    values
        (N, C) or (N,), in any unit, which may differ between channels. **An entry that is NaN or masked is unobserved**, and is filled. Integers
        are not rescaled: colours 0 .. 255 come back between 0 and 255.
    sigma
        Standard deviation of the noise, in the units of the data; None estimates it. It is one number or one for each channel, and is
        estimated from nearest neighbours (:func:`noise_level`).
    n_members
        Fits that are averaged.
    options
        Choices that every fit offers, such as `lam` and ``progress``. ``lam="auto"`` tries strengths a factor of 3 apart in short
        fits. They are scored by the squared error at a fifth of the observed points, which is held out.
    config
        Numbers of the method.

    Returns
    -------
    AttributeField
        ``field(query)`` gives the values (Q, C), ``field.jacobian(query)`` their derivatives (Q, C, d). ``field.save(path)`` stores it.

    Raises
    ------
    TypeError, ValueError
        If an array has another shape, all points are at one place, a channel has no observed value, or an option does not suit points.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, fit_attributes
    >>> points = np.random.default_rng(0).random((200, 2))
    >>> found = fit_attributes(points, points[:, 0], options=FitOptions(lam=1.0, steps=20, progress=False))
    >>> found([[0.5, 0.5]]).shape, found.jacobian([[0.5, 0.5]]).shape
    ((1, 1), (1, 1, 2))
    """
    points = coordinates("points", points, least=MIN_POINTS)
    if not np.ptp(points, axis=0).any():
        msg = f"all {len(points)} `points` are at one place: a field needs points apart from each other"
        raise ValueError(msg)
    values = _values(values, len(points))
    seen = np.isfinite(values)
    center = np.array([column[mask].mean() for column, mask in zip(values.T, seen.T, strict=True)])
    sigma = _noise(sigma, points, values, seen, config.least_noise)
    penalties = [PENALTIES.get_spec(p) for p in (config.penalties if options.penalty == "auto" else (options.penalty,))]
    if any(penalty.needs_spectrum for penalty in penalties):
        msg = f"`penalty={options.penalty!r}` needs a spectral axis, which points lack: choose another one"
        raise ValueError(msg)
    network = options.network_or(config.network)
    fit_config = options.fit_config(config.fit)
    standard = np.where(seen, (values - center) / sigma, 0.0)
    box, region = Box.of(torch.from_numpy(points)), torch.from_numpy(points)
    head = Affine(torch.from_numpy(center), torch.from_numpy(sigma))

    def fit(rows: NDArray, lam: float, penalty: Penalty, numbers: FitConfig, on_step: OnStep) -> FittedField:
        x, y, w = (torch.from_numpy(part[rows]) for part in (points, standard, seen.astype(float)))
        found = fit_field(
            Samples(x, y, None if seen[rows].all() else w),
            network=network,
            likelihood=Gaussian(1.0),
            penalty=penalty,
            lam=lam,
            box=box,
            region=region,
            config=numbers,
            on_step=on_step,
        )
        return found.with_head(head)

    observed, lam, scores = np.flatnonzero(seen.any(1)), options.given_lam, {}
    with progress_bar(options.progress) as on_progress:
        counter = StepCounter(on_progress)
        if lam is None:
            default = dataclasses.replace(config.search, steps=min(fit_config.steps, config.search.steps))
            search = options.search.with_defaults(default)
            hidden, shown = (observed[part] for part in search.hold_out(len(observed), options.random_state))
            short = dataclasses.replace(fit_config, steps=search.steps)

            def trial(lam: float) -> tuple[float, None]:
                found = fit(shown, lam, penalties[0], short, counter.stage(f"choosing lam: {lam:.3g}", short.steps))
                error = ((found(points[hidden]) - values[hidden]) / sigma)[seen[hidden]]
                return -float(np.mean(error**2)), None

            choice = choose(trial, search)
            lam, scores = choice.strength, choice.scores
        members = []
        for k in range(n_members):
            numbers = dataclasses.replace(fit_config, random_state=options.random_state + k)
            on_step = counter.stage(f"fitting, {k + 1} of {n_members}", numbers.steps)
            members.append(fit(observed, lam, penalties[k % len(penalties)], numbers, on_step))
    return AttributeField(tuple(members), sigma, lam, scores)


@checked(query=ANYTHING, **RULES)
def recover_attributes(
    points: ArrayLike,
    values: ArrayLike,
    query: ArrayLike | None = None,
    *,
    sigma: float | tuple[float, ...] | None = None,
    n_members: int = 4,
    options: FitOptions = FitOptions(),
    config: AttributeConfig = AttributeConfig(),
) -> NDArray[np.float64]:
    r"""Denoised and filled attributes of scattered points: the field of :func:`fit_attributes`, evaluated at points.

    Parameters
    ----------
    points, values, sigma, n_members, options, config
        As in :func:`fit_attributes`.
    query
        (Q, d) where the field is evaluated; at `points` if None.

    Returns
    -------
    (N, C) or (Q, C) float64 in the units of `values`; (N,) or (Q,) if `values` is (N,).

    Raises
    ------
    TypeError, ValueError
        If `query` has another number of columns than `points`; and as :func:`fit_attributes`.

    Examples
    --------
    >>> import numpy as np
    >>> from neurst.imaging import FitOptions, recover_attributes
    >>> rng = np.random.default_rng(0)
    >>> points = rng.random((200, 2))
    >>> colours = (points[:, :1] > 0.5) * np.array([1.0, 0.5, 0.2]) + 0.1 * rng.standard_normal((200, 3))
    >>> colours[:40] = np.nan
    >>> recover_attributes(points, colours, options=FitOptions(lam=10.0, steps=20, progress=False)).shape
    (200, 3)
    """
    points = coordinates("points", points, least=MIN_POINTS)
    query = points if query is None else coordinates("query", query, (points.shape[1],))
    found = fit_attributes(points, values, sigma=sigma, n_members=n_members, options=options, config=config)
    out = found(query)
    return out[:, 0] if np.ndim(values) == 1 else out
