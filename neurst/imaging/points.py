r"""Attributes at scattered points: colours, or any channels measured on a point cloud, denoised and filled by a field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from neurst.core.fit import Field, FitConfig, fit_field
from neurst.core.likelihood import Gaussian
from neurst.core.nets import Network, Siren, as_network
from neurst.core.penalty import Penalty, SpaceVariantTV, as_penalty
from neurst.core.samples import Box, Samples
from neurst.core.search import climb

READ_AT_ONCE = 65_536  # points of one forward pass
LEAST_NOISE = 1e-3  # of the spread of a channel: exact values are not fitted closer
MIN_POINTS = 4  # observed, in each channel


@dataclass(frozen=True)
class Recovery:
    """Numbers of a recovery.

    Parameters
    ----------
    network
        Where ``network="auto"``.
    penalties
        Where ``penalty="auto"``: the members take them in turn; the search for `lam` takes the first.
    steps, short_steps
        Adam steps of a member, and of a fit in the search for `lam`.
    learning_rate
        At the first step.
    batch_points, n_regularisation
        Observed points and regularisation points drawn for one step.
    near
        Share of the regularisation points that lie near points; the rest covers their bounding box. Points on a surface leave most of
        the box empty.
    start, ratio, reach
        First strength that is tried, the factor between strengths, most neighbours looked at in one direction.
    fraction
        Share of the observed points held out in the search.
    """

    network: Network = Siren(width=128, depth=3, omega=16.0)
    penalties: tuple[str | Penalty, ...] = (*[SpaceVariantTV(neighbours=32, shared=True)] * 3, "space_variant")
    steps: int = 800
    short_steps: int = 200
    learning_rate: float = 3e-3
    batch_points: int = 1024
    n_regularisation: int = 512
    near: float = 0.9
    start: float = 45.0
    ratio: float = 3.0
    reach: int = 4
    fraction: float = 0.2


@dataclass(frozen=True, eq=False)
class Attributes:
    """Fitted attributes: the mean of a few fields, read anywhere in the points' units.

    Parameters
    ----------
    fields
        The members, of values in units of `sigma` about `center`.
    center, sigma
        (C,) mean of the observed values, and the noise's standard deviation.
    lam
        Prior strength, in nats.
    tried
        Mean squared error at held-out values, in units of the noise's variance, for each strength tried.
    """

    fields: tuple[Field, ...]
    center: NDArray[np.float64]
    sigma: NDArray[np.float64]
    lam: float
    tried: dict[float, float] = field(default_factory=dict)

    def _read(self, read: Callable[[Field, torch.Tensor], torch.Tensor], query: ArrayLike) -> NDArray[np.float64]:
        query = torch.from_numpy(checked_points("query", query, len(self.fields[0].box.center)))
        parts = (sum(read(f, part).double() for f in self.fields) for part in query.split(READ_AT_ONCE))
        return torch.cat(list(parts)).numpy() / len(self.fields)

    def __call__(self, query: ArrayLike) -> NDArray[np.float64]:
        """Values (Q, C) at points (Q, d)."""
        return self.center + self.sigma * self._read(lambda f, x: f(x), query)

    def gradient(self, query: ArrayLike) -> NDArray[np.float64]:
        """First derivatives (Q, C, d) at points (Q, d), per unit of the points."""
        return self.sigma[:, None] * self._read(lambda f, x: f.latent_jacobian(x), query)


def recover_attributes(
    points: ArrayLike,
    values: ArrayLike,
    query: ArrayLike | None = None,
    *,
    sigma: float | Sequence[float] | None = None,
    penalty: str | Penalty = "auto",
    network: str | Network = "auto",
    lam: float | str = "auto",
    steps: int | str = "auto",
    n_members: int = 4,
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> NDArray[np.float64]:
    r"""Denoised and filled attributes of scattered points.

    A field f, the mean of `n_members` fits, each the minimum of
    :math:`\sum_{observed} \tfrac12 ((y_{ic} - f_c(x_i)) / \sigma_c)^2 + \lambda\,\mathrm{mean}_x P(f / \sigma)(x)`, is read at `query`.
    P is NeurTV :cite:p:`Luo2025` in units of the box (half the longest side of the points' bounding box is 1); by default it is space-variant, with
    one norm over all channels, which shares edges between them, in three members of four, and channel by channel in the fourth.

    Parameters
    ----------
    points
        (N, d), d = 2 or 3, one length unit for all axes.
    values
        (N, C) or (N,), in any unit, one for each channel; **an entry that is NaN is unobserved** and is filled. Integers are taken as
        numbers in their own unit: colours 0 .. 255 come back between 0 and 255.
    query
        (Q, d) where the field is read; at `points` if None.
    sigma
        Standard deviation of the noise in the units of `values`, one number or one for each channel. If None it is estimated from
        nearest neighbours, ``median |y_i - y_j| / 0.954``, which edges do not move.
    penalty
        A name of :data:`neurst.core.penalty.PENALTIES`, a penalty, or ``"auto"``.
    network
        A name of :data:`neurst.core.nets.NETWORKS`, a network, or ``"auto"``: a sine network.
    lam
        Prior strength in nats, or ``"auto"``: short fits at strengths a factor of 3 apart, scored by the squared error at a fifth of the
        observed points that they have not seen; the vertex of the parabola through the best and its neighbours.
    steps
        Adam steps of each fit, or ``"auto"``.
    n_members
        Fits that are averaged.
    random_state
        Seed of every draw.
    device
        ``"auto"``, or a torch device name.
    progress
        Show a bar.

    Returns
    -------
    (N, C) or (Q, C) float64 in the units of `values`; (N,) or (Q,) if `values` is (N,).

    Raises
    ------
    ValueError
        If an argument does not fit: the message names it, what was found and what to do.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> points = rng.random((200, 2))
    >>> colours = (points[:, :1] > 0.5) * np.array([1.0, 0.5, 0.2]) + 0.1 * rng.standard_normal((200, 3))
    >>> colours[:40] = np.nan
    >>> recover_attributes(points, colours, lam=10.0, steps=20, progress=False).shape
    (200, 3)
    """
    points = checked_points("points", points)
    query = points if query is None else checked_points("query", query, points.shape[1])
    found = fit_attributes(
        points,
        values,
        sigma=sigma,
        penalty=penalty,
        network=network,
        lam=lam,
        steps=steps,
        n_members=n_members,
        random_state=random_state,
        device=device,
        progress=progress,
    )
    out = found(query)
    return out[:, 0] if np.ndim(values) == 1 else out


def fit_attributes(
    points: ArrayLike,
    values: ArrayLike,
    *,
    sigma: float | Sequence[float] | None = None,
    penalty: str | Penalty = "auto",
    network: str | Network = "auto",
    lam: float | str = "auto",
    steps: int | str = "auto",
    n_members: int = 4,
    random_state: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Attributes:
    """The field of :func:`recover_attributes`, to be read and differentiated anywhere.

    Parameters
    ----------
    points, values, sigma, penalty, network, lam, steps, n_members, random_state, device, progress
        As there.

    Examples
    --------
    >>> import numpy as np
    >>> points = np.random.default_rng(0).random((200, 2))
    >>> found = fit_attributes(points, points[:, 0], lam=1.0, steps=20, progress=False)
    >>> found([[0.5, 0.5]]).shape, found.gradient([[0.5, 0.5]]).shape
    ((1, 1), (1, 1, 2))
    """
    points = checked_points("points", points)
    values = _values(values, len(points))
    seen = np.isfinite(values)
    _check_choices(lam, steps, n_members)
    numbers = Recovery()
    if steps != "auto":
        numbers = dataclasses.replace(numbers, steps=steps, short_steps=min(steps, numbers.short_steps))
    center = np.array([column[mask].mean() for column, mask in zip(values.T, seen.T, strict=True)])
    sigma = _sigma(sigma, points, values, seen)
    network = numbers.network if network == "auto" else as_network(network)
    names = numbers.penalties if isinstance(penalty, str) and penalty == "auto" else (penalty,)
    penalties = [as_penalty(name) for name in names]
    config = FitConfig(
        steps=numbers.steps,
        learning_rate=numbers.learning_rate,
        batch_points=numbers.batch_points,
        n_regularisation=numbers.n_regularisation,
        near=numbers.near,
        random_state=random_state,
        device=device,
    )
    scaled = np.where(seen, (values - center) / sigma, 0.0)
    box, region = Box.of(torch.from_numpy(points)), torch.from_numpy(points)

    def fit(
        rows: NDArray, lam: float, config: FitConfig, penalty: Penalty, on_step: Callable[[int, float], None]
    ) -> Field:
        x, y, w = (torch.from_numpy(part[rows]) for part in (points, scaled, seen.astype(float)))
        return fit_field(
            Samples(x, y, None if seen[rows].all() else w),
            network=network,
            likelihood=Gaussian(1.0),
            penalty=penalty,
            lam=lam,
            box=box,
            region=region,
            config=config,
            on_step=on_step,
        )

    observed, tried = np.flatnonzero(seen.any(1)), {}
    with progress_stages(progress) as stage:
        if lam == "auto":
            order = np.random.default_rng(random_state).permutation(observed)
            hidden, shown = np.split(order, [max(1, round(numbers.fraction * len(order)))])
            short = dataclasses.replace(config, steps=numbers.short_steps)

            def score(lam: float) -> float:
                on_step = stage(f"lam {lam:.3g}", short.steps)
                trial = Attributes((fit(shown, lam, short, penalties[0], on_step),), center, sigma, lam)
                error = ((trial(points[hidden]) - values[hidden]) / sigma)[seen[hidden]]
                return -float(np.mean(error**2))

            lam, scores = climb(score, start=numbers.start, ratio=numbers.ratio, reach=numbers.reach)
            tried = {strength: -found for strength, found in scores.items()}
        fields = []
        for k in range(n_members):
            member = dataclasses.replace(config, random_state=random_state + k)
            on_step = stage(f"fit {k + 1} of {n_members}", config.steps)
            fields.append(fit(observed, lam, member, penalties[k % len(penalties)], on_step))
    return Attributes(tuple(fields), center, sigma, float(lam), tried)


@contextmanager
def progress_stages(show: bool) -> Iterator[Callable[[str, int], Callable[[int, float], None]]]:
    """A bar that grows by the steps of each stage: ``stage(name, steps)`` gives the `on_step` of a fit."""
    with tqdm(total=0, disable=not show, unit="step", leave=False, mininterval=0.5) as bar:

        def stage(name: str, steps: int) -> Callable[[int, float], None]:
            bar.set_description(name, refresh=False)
            bar.total = (bar.total or 0) + steps
            return lambda step, objective: bar.update(1)

        yield stage


def checked_points(name: str, points: ArrayLike, d: int | None = None) -> NDArray[np.float64]:
    """Checked coordinates: (N, d), finite; of `d` dimensions if that is given."""
    try:
        points = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"`{name}` is not an array of numbers ({error}): pass coordinates (N, 2) or (N, 3)"
        raise ValueError(msg) from error
    expected = (2, 3) if d is None else (d,)
    if points.ndim != 2 or points.shape[1] not in expected:
        shapes = " or ".join(f"(N, {n})" for n in expected)
        msg = f"`{name}` has shape {points.shape}: expected {shapes}, one row of coordinates for each point"
        raise ValueError(msg)
    bad = np.flatnonzero(~np.isfinite(points).all(1))
    if len(bad):
        msg = f"`{name}` is not finite at {len(bad)} of {len(points)} points (first: row {bad[0]}): drop them"
        raise ValueError(msg)
    return points


def _values(values: ArrayLike, n: int) -> NDArray[np.float64]:  # -> (N, C)
    """Checked values: every channel observed at two points or more, none infinite."""
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"`values` is not an array of numbers ({error}): pass (N, C) or (N,), NaN where an entry is unobserved"
        raise ValueError(msg) from error
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


def _sigma(
    sigma: float | Sequence[float] | None, points: NDArray, values: NDArray, seen: NDArray
) -> NDArray[np.float64]:
    """Noise of each channel (C,), given or estimated; never under a thousandth of the spread of its values."""
    spread = np.array([column[mask].std() for column, mask in zip(values.T, seen.T, strict=True)])
    if sigma is None:
        found = np.array([noise_level(points[m], v[m]) for v, m in zip(values.T, seen.T, strict=True)])
    else:
        found = np.asarray(sigma, dtype=np.float64)
        if found.shape not in ((), (values.shape[1],)) or not (np.isfinite(found).all() and (found > 0).all()):
            msg = (
                f"`sigma={sigma!r}`: expected a positive number, or {values.shape[1]} of them, in the units of `values`"
            )
            raise ValueError(msg)
        found = np.broadcast_to(found, spread.shape)
    found = np.maximum(found, LEAST_NOISE * spread)
    return np.where(found > 0, found, 1.0)  # a constant channel


def noise_level(points: NDArray, values: NDArray) -> float:
    r"""Standard deviation of the noise of values (N,) at points (N, d): :math:`\mathrm{median}_i |y_i - y_{j(i)}| / (0.6745 \sqrt 2)`, j(i) nearest to i.

    The median does not feel the few pairs across an edge. What varies from neighbour to neighbour counts as noise, so that it is
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
    other = np.where(
        nearest[:, 1] == np.arange(len(points)), nearest[:, 0], nearest[:, 1]
    )  # of equal points any may come first
    return float(np.median(np.abs(values - values[other])) / (0.6745 * math.sqrt(2)))


def _check_choices(lam: float | str, steps: int | str, n_members: int) -> None:
    if not (lam == "auto" or (isinstance(lam, Real) and 0 <= lam < math.inf)):
        msg = f"`lam={lam!r}`: expected a finite number >= 0 in nats, or 'auto'"
        raise ValueError(msg)
    for name, value in {"steps": 1 if steps == "auto" else steps, "n_members": n_members}.items():
        if not (isinstance(value, Integral) and value >= 1):
            msg = f"`{name}={value!r}`: expected a whole number >= 1"
            raise ValueError(msg)
