"""What the verbs share: checks of their arguments, and the progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real

import numpy as np
import torch
from tqdm.auto import tqdm

from neurst.core.fit import resolve_device
from neurst.core.penalty import PENALTIES, Penalty
from neurst.spatial.model import LIKELIHOODS

DEFAULT_PENALTIES = ("nuclear", "space_variant")


def named_penalties(penalty: str | Penalty | Iterable[str | Penalty]) -> tuple[str | Penalty, ...]:
    """The penalties that are averaged, each once; refused if they are none."""
    if isinstance(penalty, str) and penalty == "auto":
        return DEFAULT_PENALTIES
    names = sorted(set(PENALTIES) - {"mixed"})
    single = isinstance(penalty, (str, Penalty)) or not isinstance(penalty, Iterable)
    several = (penalty,) if single else tuple(penalty)
    if not several:
        msg = f"`penalty={penalty!r}` is empty: choose one or more of {names}, or 'auto'"
        raise ValueError(msg)
    reasons = {"mixed": "is for cubes with a spectral axis, which positions lack", "auto": "stands alone"}
    for name in several:
        if not isinstance(name, Penalty) and name not in names:
            why = reasons.get(name, "is unknown") if isinstance(name, str) else "is unknown"
            msg = f"`penalty={name!r}` {why}: choose 'auto', or one or more of {names}"
            raise ValueError(msg)
    return tuple(dict.fromkeys(several))


def check_options(likelihood: str, lam: float | str, for_gaps: bool) -> None:
    """Refuse names that are not known, and a strength that is none."""
    if likelihood not in ("auto", *LIKELIHOODS):
        msg = f"`likelihood={likelihood!r}` is unknown: choose one of {['auto', *LIKELIHOODS]}"
        raise ValueError(msg)
    automatic = isinstance(lam, str) and lam == "auto"
    if not automatic and not (isinstance(lam, Real) and 0 <= lam < np.inf):
        msg = f"`lam={lam!r}`: expected 'auto' or a finite number >= 0, a prior strength in nats (20 to 3000 suits most tissue)"
        raise ValueError(msg)
    if not isinstance(for_gaps, (bool, np.bool_)):
        msg = f"`for_gaps={for_gaps!r}`: expected True or False"
        raise ValueError(msg)


def check_whole(least: int, **arguments: int) -> None:
    """Refuse all but whole numbers from `least` on."""
    for name, value in arguments.items():
        if not (isinstance(value, Integral) and value >= least):
            msg = f"`{name}={value!r}`: expected a whole number >= {least}"
            raise ValueError(msg)


def check_positive(**arguments: float) -> None:
    """Refuse all but positive, finite numbers."""
    for name, value in arguments.items():
        if not (isinstance(value, Real) and 0 < value < np.inf):
            msg = f"`{name}={value!r}`: expected a positive, finite number"
            raise ValueError(msg)


def check_device(device: str) -> None:
    """Refuse a device that a tensor cannot be put on and read back from."""
    try:
        torch.zeros(1, device=resolve_device(device)).item()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        usable = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        usable += ["mps"] if torch.backends.mps.is_available() else []
        msg = f"`device={device!r}` cannot be used on this machine: choose one of {usable}"
        raise ValueError(msg) from error


@contextlib.contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of `total` steps, moved by ``on_step(done, planned, stage)``."""
    with tqdm(total=total, disable=not show, unit="step", leave=False, mininterval=0.5) as bar:

        def on_step(done: int, planned: int, stage: str) -> None:
            bar.set_description(stage, refresh=False)
            bar.update(done - bar.n)

        yield on_step
