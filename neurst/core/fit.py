r"""The one loop that fits a field to one signal, and the field it gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurst.core.jet import Jet, hessian, jacobian
from neurst.core.lattice import Lattice, value_at
from neurst.core.likelihood import Likelihood
from neurst.core.nets import Network
from neurst.core.penalty import Penalty, score
from neurst.core.samples import Box, Cells, Region, Samples, rows, typical_spacing


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA, else MPS, else the CPU; any torch device name is taken as it is."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass(frozen=True)
class FitConfig:
    """Numbers of one fit.

    Parameters
    ----------
    steps
        Adam steps :cite:p:`Kingma2015`; the learning rate follows half a cosine from `learning_rate` to zero, so the number of
        steps is the stopping rule.
    learning_rate
        At the first step.
    batch_points, batch_channels
        Points and channels drawn for one step; 0 takes all. The likelihood is rescaled to the whole.
    n_regularisation
        Regularisation points drawn for one step.
    near
        Their share near data; the rest covers the bounding box.
    jitter
        Standard deviation of the near ones around data points, as a multiple of the typical spacing of points.
    refresh_every
        Steps between refreshes of an adaptive penalty.
    refresh_points
        Regularisation points a refresh looks at.
    record_every
        Steps between entries of the history, each the mean over them.
    random_state
        Seed of every draw.
    device
        ``"auto"``, or a torch device name.
    double
        Compute in float64.
    """

    steps: int = 500
    learning_rate: float = 3e-3
    batch_points: int = 0
    batch_channels: int = 0
    n_regularisation: int = 1024
    near: float = 0.5
    jitter: float = 1.0
    refresh_every: int = 100
    refresh_points: int = 2048
    record_every: int = 10
    random_state: int = 0
    device: str = "auto"
    double: bool = False

    def __post_init__(self):
        for name in ("steps", "n_regularisation", "refresh_every", "refresh_points", "record_every"):
            if getattr(self, name) < 1:
                msg = f"`{name}={getattr(self, name)!r}`: expected a whole number >= 1"
                raise ValueError(msg)
        for name in ("batch_points", "batch_channels"):
            if getattr(self, name) < 0:
                msg = f"`{name}={getattr(self, name)!r}`: expected 0 (all) or a positive number"
                raise ValueError(msg)
        if not (self.learning_rate > 0 and self.jitter >= 0 and 0 <= self.near <= 1):
            msg = (
                f"`learning_rate={self.learning_rate!r}`, `jitter={self.jitter!r}`, `near={self.near!r}`: expected a positive "
                "rate, a jitter >= 0 and a share between 0 and 1"
            )
            raise ValueError(msg)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the fit."""
        return torch.float64 if self.double else torch.float32


class Identity(nn.Module):
    """The head of a field that is observed as it is."""

    def forward(self, z: Tensor, channels: Tensor | None = None) -> Tensor:
        return z if channels is None else z[:, channels]

    def prior(self) -> Tensor | float:
        """Negative log-prior of the head's weights in nats."""
        return 0.0


class Affine(nn.Module):
    """A fixed change of unit, ``eta = shift + scale z``: what is learned has a scale of one whatever the unit of the values.

    Parameters
    ----------
    shift
        (C,).
    scale
        (C,) or ().
    """

    def __init__(self, shift: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.clone())

    def forward(self, z: Tensor, channels: Tensor | None = None) -> Tensor:
        shift = self.shift if channels is None else self.shift[channels]
        scale = self.scale if channels is None or self.scale.ndim == 0 else self.scale[channels]
        return (z if channels is None else z[:, channels]) * scale + shift

    def prior(self) -> Tensor | float:
        """Nothing is learned."""
        return 0.0


class Loadings(nn.Module):
    r"""A linear head ``eta = b + gain V z`` from r latent to C observed channels, with prior ``V ~ N(0, 1)``.

    The prior holds the scale that z and V share: ``|V_c|^2 / 2`` against ``lam TV(z_c)`` leaves, at the best scale of each component,
    ``(3/2) (lam |V_c| TV(z_c))^(2/3)``: concave, so weak components vanish and strong ones keep their edges.

    Parameters
    ----------
    weight, bias
        Start of V (C, r) and b (C,).
    gain
        (C,) fixed unit of each channel, such as its standard deviation; 1 if None. What is learned is in this unit, so that the
        steps of an optimiser are as well.
    """

    def __init__(self, weight: Tensor, bias: Tensor, gain: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone() if gain is None else bias / gain)
        self.register_buffer("gain", None if gain is None else gain.clone()[:, None])

    def loadings(self) -> Tensor:  # -> (C, r)
        """``gain V``."""
        return self.weight if self.gain is None else self.gain * self.weight

    def intercept(self) -> Tensor:  # -> (C,)
        """``b``."""
        return self.bias if self.gain is None else self.gain[:, 0] * self.bias

    def forward(self, z: Tensor, channels: Tensor | None = None) -> Tensor:
        weight, bias = self.loadings(), self.intercept()
        if channels is not None:
            weight, bias = weight[channels], bias[channels]
        return nn.functional.linear(z, weight, bias)

    def prior(self) -> Tensor:
        """``sum V^2 / 2``."""
        return self.weight.square().sum() / 2


@dataclass(frozen=True, eq=False)
class Field:
    """A fitted field, read in users' units.

    Parameters
    ----------
    box
        Users' units <-> box.
    net
        (N, d) box coordinates -> (N, C) latent channels (and those of a second field, if the penalty asked for one).
    head
        Latent channels -> predictor.
    likelihood
        The data term it was fitted with, for its inverse link.
    n_latent
        C: the network's leading outputs that are the field.
    history
        ``step``, ``objective``, ``likelihood``, ``penalty`` as lists, means over the steps since the entry before; objective in nats
        (for likelihoods that are).
    """

    box: Box
    net: nn.Module
    head: nn.Module
    likelihood: Likelihood
    n_latent: int
    history: dict[str, list[float]]

    def _inward(self, coords: Tensor | Lattice) -> Tensor | Lattice:
        return _placed(self.box, coords, next(self.net.parameters()))

    def latent(self, coords: Tensor | Lattice) -> Tensor:  # (N, d) -> (N, C)
        """The network's value."""
        with torch.no_grad():
            return value_at(self.net, self._inward(coords))[:, : self.n_latent]

    def __call__(self, coords: Tensor | Lattice) -> Tensor:  # (N, d) -> (N, C)
        """Expected value at coordinates or on a lattice, without offset."""
        with torch.no_grad():
            return self.likelihood.mean(self.head(self.latent(coords)))

    def averaged(self, coords: Tensor, footprint: Tensor) -> Tensor:  # (N, d), (Q, d) -> (N, C)
        """Mean over a footprint, offsets in users' units, of the expected value around coordinates, without offset."""
        with torch.no_grad():
            eta = self.head(self.latent(_spread(coords.double(), footprint)))
            return self.likelihood.mean(self.likelihood.average(eta.unflatten(0, (len(footprint), -1))))

    def latent_jacobian(self, coords: Tensor) -> Tensor:  # -> (N, C, d)
        """First derivatives of the network per user unit."""
        with torch.no_grad():
            return jacobian(self.net, self._inward(coords))[:, : self.n_latent] / self.box.scale

    def latent_hessian(self, coords: Tensor) -> Tensor:  # -> (N, C, d, d)
        """Second derivatives of the network per square user unit."""
        with torch.no_grad():
            return hessian(self.net, self._inward(coords))[:, : self.n_latent] / self.box.scale**2

    def _predictor(self, x: Tensor | Jet) -> Tensor | Jet:
        return self.head(self.net(x)[..., : self.n_latent])

    def jacobian(self, coords: Tensor) -> Tensor:  # -> (N, C, d)
        """First derivatives of the predictor, ``head(net(x))``, per user unit."""
        with torch.no_grad():
            return jacobian(self._predictor, self._inward(coords)) / self.box.scale

    def hessian(self, coords: Tensor) -> Tensor:  # -> (N, C, d, d)
        """Second derivatives of the predictor per square user unit."""
        with torch.no_grad():
            return hessian(self._predictor, self._inward(coords)) / self.box.scale**2


def _placed(box: Box, coords: Tensor | Lattice, like: Tensor) -> Tensor | Lattice:
    """Coordinates in the box, in the type and on the device of a tensor; moved in float64."""
    if isinstance(coords, Lattice):
        return box.inward(coords.map(lambda i, axis: axis.double())).map(lambda i, axis: axis.to(like))
    return box.inward(coords.double()).to(like)


def _spread(x: Tensor, footprint: Tensor) -> Tensor:  # (N, d), (Q, d) -> (Q N, d)
    """The quadrature points around every point, those of the first offset first."""
    return (footprint.to(x)[:, None] + x).flatten(0, 1)


def _draw(total: int, n: int, generator: torch.Generator) -> Tensor | None:
    """Indices of a batch, on the CPU, where they index tensors of any device; None for all."""
    return None if n == 0 or n >= total else torch.randperm(total, generator=generator)[:n]


def _batch(x: Tensor | Lattice, n: int, generator: torch.Generator) -> tuple[Tensor | Lattice, Tensor | None]:
    """Points of a batch and their rows, None for all."""
    if isinstance(x, Lattice) and 0 < n < len(x):
        index = x.subset(n, generator)
        return x.map(lambda i, axis: axis[index[i].to(axis.device)]), x.flat_index(index)
    points = _draw(len(x), n, generator)
    return x if points is None else x[points], points


def fit_field(
    samples: Samples,
    *,
    network: Network,
    likelihood: Likelihood,
    penalty: Penalty,
    lam: float,
    head: nn.Module | None = None,
    n_latent: int | None = None,
    box: Box | None = None,
    region: Tensor | None = None,
    config: FitConfig = FitConfig(),
    start: Field | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Field:
    r"""Fit a continuous field to samples.

    Minimises :math:`\sum_{observed} -\log p(y \mid \eta) + \lambda\, \mathrm{mean}_x P(z)(x) - \log p(\mathrm{head})` with
    :math:`\eta = \mathrm{head}(z(x)) + \mathrm{offset}`: `lam` is a prior strength in nats, whose meaning does not move with the
    number of points. Where samples have a footprint, offsets :math:`\delta_q`, the mean over q of the expected value at
    :math:`x + \delta_q` takes the place of that at x: with a log link
    :math:`\eta = \log \tfrac1Q \sum_q \exp \mathrm{head}(z(x + \delta_q)) + \mathrm{offset}`.

    Parameters
    ----------
    samples
        Coordinates in any unit, values, weights, offsets, footprint.
    network
        Specification of z.
    likelihood
        Data term; a copy of it is fitted.
    penalty
        Regulariser of z, in box units.
    lam
        Its strength, >= 0.
    head
        Module ``(z, channels) -> eta`` with a ``prior()``; the identity if None. A copy of it is fitted.
    n_latent
        Channels of z: those of `start`, else of the samples, if None.
    box
        The unit box: that of `start`, else of the samples, if None.
    region
        (M, d) coordinates where the field may be read, such as those without a value: regularisation points are drawn near these
        and in their bounding box. Those of the samples if None.
    config
        Numbers of the fit.
    start
        A field to go on from, with the same network; a fresh one if None.
    on_step
        Called after each step with its number and the objective: progress bars, or an exception to stop.

    Returns
    -------
    Field
        On the CPU, in evaluation mode.

    Raises
    ------
    ValueError
        If `lam` is negative or the objective stops being finite.

    Examples
    --------
    >>> import torch
    >>> from neurst.core.likelihood import Gaussian
    >>> from neurst.core.nets import Siren
    >>> from neurst.core.penalty import IsotropicTV
    >>> x = torch.rand(50, 2)
    >>> field = fit_field(
    ...     Samples(x, x[:, :1] > 0.5),
    ...     network=Siren(width=16),
    ...     likelihood=Gaussian(0.1),
    ...     penalty=IsotropicTV(),
    ...     lam=1.0,
    ...     config=FitConfig(steps=20, device="cpu"),
    ... )
    >>> field(x).shape
    torch.Size([50, 1])
    """
    if not (lam >= 0 and math.isfinite(lam)):
        msg = f"`lam={lam!r}`: expected a finite number >= 0"
        raise ValueError(msg)
    device, dtype = resolve_device(config.device), config.dtype
    generator = torch.Generator().manual_seed(config.random_state)
    box = box or (Box.of(samples.coords) if start is None else start.box)
    x = _placed(box, samples.coords, torch.zeros((), dtype=dtype, device=device))
    n, d = len(x), samples.n_dims
    n_latent = n_latent or (samples.n_channels if start is None else start.n_latent)
    if start is None:
        net = network.build(d, penalty.channels(n_latent, d), generator)
        head, likelihood = copy.deepcopy(head or Identity()), copy.deepcopy(likelihood)
    else:
        net, head, likelihood = (copy.deepcopy(part) for part in (start.net, start.head, start.likelihood))
    model = nn.ModuleList([net, head, likelihood]).to(dtype).to(device).train()

    weight, offset = (None if part is None else part.to(dtype).to(device) for part in (samples.weight, samples.offset))
    values = samples.values.to(dtype)
    if config.batch_points == 0 or config.batch_points >= n:
        values = rows(values, None)  # every step needs all rows: make them dense once
    if values.layout == torch.strided:  # not every device holds sparse matrices: their batches are made dense here
        values = values.to(device)
    if isinstance(x, Lattice):
        region, footprint = Cells(x), None
    else:
        footprint = None if samples.footprint is None else (samples.footprint.double() / box.scale).to(x)
        readable = x if region is None else box.inward(region.double()).to(x)
        region = Region(readable, config.jitter * typical_spacing(readable, generator), config.near)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    history: dict[str, list[float]] = {"step": [], "objective": [], "likelihood": [], "penalty": []}
    since: list[Tensor] = []

    for step in range(config.steps):
        if step % config.refresh_every == 0 and (step > 0 or start is not None):
            penalty = penalty.refreshed(net, region.survey(config.refresh_points, generator))
        here, points = _batch(x, config.batch_points, generator)
        channels = _draw(samples.n_channels, config.batch_channels, generator)
        eta = head(value_at(net, here if footprint is None else _spread(here, footprint))[:, :n_latent], channels)
        if footprint is not None:
            eta = likelihood.average(eta.unflatten(0, (len(footprint), -1)))
        y = rows(values, points).to(device)
        if offset is not None:
            eta = eta + rows(offset, points)
        w = None if weight is None else rows(weight, points)
        if channels is not None:
            y, w = y[:, channels], w if w is None or w.shape[1] == 1 else w[:, channels]
        nll = likelihood(eta, y, w, channels) * (n / len(eta)) * (samples.n_channels / eta.shape[1])
        variation = (
            score(penalty, net, region.draw(config.n_regularisation, generator)) if lam > 0 else nll.new_zeros(())
        )
        objective = nll + lam * variation + head.prior()
        optimiser.zero_grad(set_to_none=True)
        (objective / n).backward()
        optimiser.step()
        schedule.step()
        since.append(torch.stack([objective, nll, variation]).detach())
        if step % config.record_every == 0 or step == config.steps - 1:
            # a batch alone says more of its spots than of the fit
            means = torch.stack(since).mean(0).tolist()
            now, since = {"step": step} | dict(zip(("objective", "likelihood", "penalty"), means, strict=True)), []
            if not math.isfinite(now["objective"]):
                msg = (
                    f"the objective is {now['objective']} at step {step}: lower `learning_rate` ({config.learning_rate}), or look "
                    "for extreme values in the data"
                )
                raise ValueError(msg)
            for key, value in now.items():
                history[key].append(value)
        if on_step is not None:
            on_step(step, history["objective"][-1])
    model.eval().to("cpu")
    return Field(Box(box.center, box.scale), net, head, likelihood, n_latent, history)
