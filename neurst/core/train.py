"""The one loop that trains a model on a data set."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurst.core.arguments import SEED, check_fields, whole
from neurst.core.fit import DEVICE, OnStep, resolve_device


@dataclass(frozen=True)
class TrainConfig:
    """Numbers of a training.

    Parameters
    ----------
    steps
        Adam steps :cite:p:`Kingma2015`.
    learning_rate, warm_up
        The learning rate falls from `learning_rate` to zero along half a cosine, times a factor that grows linearly to 1 over the first `warm_up` steps.
    max_gradient_norm
        The gradient is scaled down to this norm if it is larger.
    record_every
        Steps between entries of the history, each the mean loss over the steps since the entry before.
    random_state
        Seed of the batches.
    device
        ``"auto"``, or a torch device name.
    """

    steps: int = 1000
    learning_rate: float = 2e-3
    warm_up: int = 20
    max_gradient_norm: float = 1.0
    record_every: int = 10
    random_state: int = 0
    device: str = "auto"

    def __post_init__(self):
        check_fields(self, warm_up=whole(0), random_state=SEED, device=DEVICE)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / max(self.warm_up, 1))
        return self.learning_rate * warm * (1 + math.cos(math.pi * step / self.steps)) / 2


@contextlib.contextmanager
def seeded(random_state: int) -> Iterator[None]:
    """Draw from torch's global generator of the CPU with a seed, as layers do for their first weights; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_state)  # `torch.manual_seed` would also seed accelerators
        yield


@torch.inference_mode(False)
def train(
    model: nn.Module,
    draw: Callable[[torch.Generator], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    config: TrainConfig = TrainConfig(),
    *,
    on_step: OnStep | None = None,
) -> dict[str, list[float]]:
    """Train the weights of a model in place; an interrupted training leaves them as they were.

    Parameters
    ----------
    model
        What is trained; it ends on the CPU.
    draw
        Gives a batch from a random generator.
    loss
        The loss of a batch, one number; it moves the batch to the device of the model.
    config
        Numbers of the training.
    on_step
        Called after each step with the step number and the last recorded loss.

    Returns
    -------
    dict
        ``step`` and ``loss``.

    Raises
    ------
    ValueError
        If the loss or its gradient stops being finite.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> history = train(
    ...     model,
    ...     lambda generator: torch.rand(32, 1, generator=generator),
    ...     lambda model, x: (model(x) - 3 * x).square().mean(),
    ...     TrainConfig(steps=200, learning_rate=0.1, device="cpu"),
    ... )
    >>> bool(history["loss"][-1] < 0.01)
    True
    """
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(config.random_state)
    history: dict[str, list[float]] = {"step": [], "loss": []}
    model.to(resolve_device(config.device)).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=config.learning_rate)
    recent, finished = [], False
    try:
        with torch.enable_grad():
            for step in range(config.steps):
                optimiser.param_groups[0]["lr"] = config.rate(step)
                value = loss(model, draw(generator))
                optimiser.zero_grad()
                value.backward()
                size = torch.nn.utils.clip_grad_norm_(weights, config.max_gradient_norm)
                if not bool(torch.isfinite(value.detach() + size)):
                    msg = (
                        f"the loss is {float(value.detach()):.3g} and its gradient {float(size):.3g} at step {step}: lower `learning_rate` "
                        f"({config.learning_rate}), or look for extreme values in the data"
                    )
                    raise ValueError(msg)
                optimiser.step()
                recent.append(value.detach())
                if step % config.record_every == 0 or step == config.steps - 1:
                    history["step"].append(step)
                    history["loss"].append(float(torch.stack(recent).mean()))
                    recent = []
                if on_step is not None:
                    on_step(step, history["loss"][-1])
        finished = True
    finally:
        model.to("cpu").eval()
        if not finished:
            model.load_state_dict(before)
    return history
