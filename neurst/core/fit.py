"""The one loop that fits a field to one signal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurst.core.arguments import FLAG, SEED, Rule, check_fields, instance, number, shown, whole
from neurst.core.collocation import LatticeCollocation, PointCollocation, typical_spacing
from neurst.core.field import FittedField
from neurst.core.heads import Head, Identity
from neurst.core.lattice import Lattice
from neurst.core.likelihood import Likelihood
from neurst.core.nets import Network
from neurst.core.penalty import Penalty, evaluate
from neurst.core.samples import Box, Samples, around, rows
from neurst.core.tensor_product import value_at

OnStep = Callable[[int, float], None]  # (step, objective)


def _device(value: str) -> str:
    if not isinstance(value, (str, torch.device)):
        raise TypeError
    if value != "auto":
        try:  # try to put a tensor on the device and read it back
            torch.zeros(1, device=torch.device(value)).item()
        except (AssertionError, NotImplementedError, RuntimeError):
            usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            msg = f"here: {', '.join(usable + ['mps'] * torch.backends.mps.is_available())}"
            raise ValueError(msg) from None
    return str(value)


DEVICE = Rule(("'auto'", "the name of a torch device that can be used on this machine"), _device)


def resolve_device(device: str) -> torch.device:
    """The torch device of this name. ``"auto"`` is CUDA if available, else MPS, else the CPU."""
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
        Adam steps :cite:p:`Kingma2015`. The learning rate falls from `learning_rate` to zero along half a cosine, so the number of
        steps is the stopping rule.
    learning_rate
        Learning rate at the first step.
    batch_points, batch_channels
        Points and channels drawn for one step; 0 takes all. The likelihood of a batch is scaled up to that of all data.
    n_regularisation
        Regularisation points drawn for one step.
    near
        Share of the regularisation points near data points; the others cover the bounding box.
    jitter
        Standard deviation of the near regularisation points around data points, as a multiple of the typical spacing of the points.
    refresh_every
        Steps between refreshes of an adaptive penalty.
    n_refresh
        Regularisation points used in a refresh.
    record_every
        Steps between entries of the history. One batch is noisy, so each entry is the mean over the steps since the entry before.
    random_state
        Seed of all random numbers.
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
    n_refresh: int = 2048
    record_every: int = 10
    random_state: int = 0
    device: str = "auto"
    double: bool = False

    def __post_init__(self):
        all_or_some = whole(0).advised("0 takes all")
        check_fields(
            self,
            batch_points=all_or_some,
            batch_channels=all_or_some,
            near=number(0, 1),
            jitter=number(0),
            random_state=SEED,
            device=DEVICE,
            double=FLAG,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the fit."""
        return torch.float64 if self.double else torch.float32


FIT = instance(FitConfig, "a `neurst.core.fit.FitConfig`")


def _draw(total: int, n: int, generator: torch.Generator) -> Tensor | None:
    """Indices of a random batch; None means all. They stay on the CPU, because CPU indices work with tensors on any device."""
    return None if n == 0 or n >= total else torch.randperm(total, generator=generator)[:n]


def _batch(x: Tensor | Lattice, n: int, generator: torch.Generator) -> tuple[Tensor | Lattice, Tensor | None]:
    """The points of a random batch and their row numbers; None means all rows."""
    if isinstance(x, Lattice) and 0 < n < len(x):
        index = x.subset(n, generator)
        return x.map(lambda i, axis: axis[index[i].to(axis.device)]), x.flat_index(index)
    points = _draw(len(x), n, generator)
    return x if points is None else x[points], points


@torch.inference_mode(False)  # tensors made in inference mode would have no gradients
def fit_field(
    samples: Samples,
    *,
    network: Network,
    likelihood: Likelihood,
    penalty: Penalty,
    lam: float,
    head: Head | None = None,
    n_latent: int | None = None,
    box: Box | None = None,
    region: Tensor | None = None,
    config: FitConfig = FitConfig(),
    on_step: OnStep | None = None,
) -> FittedField:
    r"""Fit a continuous field to samples.

    Minimises :math:`\sum_{observed} -\log p(y \mid \eta) + \lambda\, \mathrm{mean}_x P(z)(x) - \log p(\mathrm{head})` with
    :math:`\eta = \mathrm{head}(z(x)) + \mathrm{offset}`. The likelihood is a sum and the penalty a mean, so `lam` is a prior strength in nats
    (natural-log units of likelihood) whose meaning does not change with the number of points. Where samples have a footprint with
    offsets :math:`\delta_q`, the expected value at x is replaced by its mean over the points :math:`x + \delta_q`. With a log link that is
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
        Strength of the penalty in nats, >= 0.
    head
        Maps z to the predictor; the identity if None. A copy of it is fitted.
    n_latent
        Number of channels of z; that of the samples if None.
    box
        The unit box; the box of the samples if None.
    region
        (M, d) coordinates where the field will be evaluated, including places without a value. Regularisation points are drawn near
        these and in their bounding box. None means the coordinates of the samples.
    config
        Numbers of the fit.
    on_step
        Called after each step with the step number and the objective, for example to show progress. An exception in it ends the fit.

    Returns
    -------
    FittedField
        The fitted field, on the CPU and in evaluation mode.

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
    ...     Samples(x, (x[:, :1] > 0.5).float()),
    ...     network=Siren(width=16),
    ...     likelihood=Gaussian(0.1),
    ...     penalty=IsotropicTV(),
    ...     lam=1.0,
    ...     config=FitConfig(steps=20, device="cpu"),
    ... )
    >>> field(x).shape
    torch.Size([50, 1])
    """
    lam = number(0)("lam", lam)
    device, dtype = resolve_device(config.device), config.dtype
    generator = torch.Generator().manual_seed(config.random_state)
    box = box or Box.of(samples.coords)
    x = box.to_unit_like(samples.coords, torch.zeros((), dtype=dtype, device=device))
    n, d, n_latent = len(x), samples.n_dims, n_latent or samples.n_channels
    n_outputs = penalty.n_outputs(n_latent, d)
    net = network.build(d, n_outputs, generator)
    head, likelihood = copy.deepcopy(head or Identity()), copy.deepcopy(likelihood)
    model = nn.ModuleList([net, head, likelihood]).to(dtype).to(device).train()
    _check_outputs(net, network, x, n_outputs)

    weight, offset = (
        None if part is None else _usable(part, dtype).to(device) for part in (samples.weight, samples.offset)
    )
    values = _usable(samples.values, dtype)
    if config.batch_points == 0 or config.batch_points >= n:
        values = rows(values, None)  # every step needs all rows, so they are made dense once
    if values.layout == torch.strided:  # some devices cannot hold sparse matrices, so these stay on the CPU
        values = values.to(device)
    if isinstance(x, Lattice):
        collocation, footprint = LatticeCollocation(x), None
    else:
        footprint = None if samples.footprint is None else (samples.footprint.double() / box.scale).to(x)
        readable = x if region is None else box.to_unit(region.double()).to(x)
        spacing = typical_spacing(readable, generator)
        collocation = PointCollocation(readable, config.jitter * spacing, config.near)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=config.learning_rate, fused=device.type in ("cpu", "cuda"))
    history: dict[str, list[float]] = {"step": [], "objective": [], "likelihood": [], "penalty": []}
    recent: list[Tensor] = []

    with torch.enable_grad():  # in case the caller has switched gradients off
        for step in range(config.steps):
            if step % config.refresh_every == 0 and step > 0:  # an untrained network has nothing to adapt to
                penalty = penalty.refreshed(net, collocation.refresh_points(config.n_refresh, generator))
            here, points = _batch(x, config.batch_points, generator)
            channels = _draw(samples.n_channels, config.batch_channels, generator)
            eta = head(value_at(net, here if footprint is None else around(here, footprint))[:, :n_latent], channels)
            if footprint is not None:
                eta = likelihood.average(eta.unflatten(0, (len(footprint), -1)))
            y = rows(values, points).to(device)
            if offset is not None:
                eta = eta + rows(offset, points)
            w = None if weight is None else rows(weight, points)
            if channels is not None:
                y, w = y[:, channels], w if w is None or w.shape[1] == 1 else w[:, channels]
            nll = likelihood(eta, y, w, channels) * (n / len(eta)) * (samples.n_channels / eta.shape[1])
            variation = nll.new_zeros(())
            if lam > 0:
                variation = evaluate(penalty, net, collocation.draw(config.n_regularisation, generator))
                if variation.ndim:
                    msg = f"`penalty={shown(penalty)}` gives a tensor of shape {tuple(variation.shape)}: expected one number, such as a mean over points"
                    raise ValueError(msg)
            objective = nll + lam * variation + head.prior()
            for part in weights:
                part.grad = None
            (objective / n).backward()
            optimiser.param_groups[0]["lr"] = config.learning_rate * (1 + math.cos(math.pi * step / config.steps)) / 2
            optimiser.step()
            recent.append(torch.stack([objective, nll, variation]).detach())
            if step % config.record_every == 0 or step == config.steps - 1:
                _record(history, step, recent, config)
                recent = []
            if on_step is not None:
                on_step(step, history["objective"][-1])
    model.requires_grad_(False).eval().to("cpu")
    return FittedField(box, network, net, head, likelihood, n_latent, lam, history)


def _usable(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type. A tensor made in inference mode is copied, so that gradients can be computed with it."""
    part = part.to(dtype)
    return part.clone() if part.is_inference() else part


def _check_outputs(net: nn.Module, network: Network, x: Tensor | Lattice, n_outputs: int) -> None:
    """Check that a network gives one row for each point and has weights that can be trained."""
    ends = torch.tensor([0, -1])  # a single point would not reveal a network that averages over points
    probe = x[ends] if isinstance(x, Tensor) else torch.stack([axis[ends] for axis in x.axes], 1)
    with torch.no_grad():
        out = net(probe)
    if not isinstance(out, Tensor) or tuple(out.shape) != (len(probe), n_outputs):
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        msg = f"`network={shown(network)}` gives {found} for {len(probe)} points: expected ({len(probe)}, {n_outputs}), see `Network.build`"
        raise ValueError(msg)
    if not any(p.requires_grad for p in net.parameters()):
        msg = f"`network={shown(network)}` has no weights that can be trained: expected an nn.Module with parameters"
        raise ValueError(msg)


def _record(history: dict[str, list[float]], step: int, recent: list[Tensor], config: FitConfig) -> None:
    """Add the means over the recent steps to the history."""
    means = torch.stack(recent).mean(0).tolist()
    entry = {"step": step} | dict(zip(("objective", "likelihood", "penalty"), means, strict=True))
    if not math.isfinite(entry["objective"]):
        msg = (
            f"the objective is {entry['objective']} at step {step}: lower `learning_rate` ({config.learning_rate}), or look "
            "for extreme values in the data"
        )
        raise ValueError(msg)
    for name, value in entry.items():
        history[name].append(value)
