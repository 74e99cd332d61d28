"""Progress over several fits of one call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

OnProgress = Callable[[int, int, str], None]  # (steps done, steps planned, what is being done)


@dataclass(eq=False)
class StepCounter:
    """Counts the steps of all fits of one call, which may run in several threads.

    Parameters
    ----------
    on_progress
        Called after each step; None for no call.
    planned
        Number of steps that are expected in total, including those already done.
    """

    on_progress: OnProgress | None
    planned: int = 0
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _stopped: bool = False

    def stop(self) -> None:
        """End all fits at their next step, with an exception."""
        self._stopped = True

    def stage(self, name: str, steps: int = 0) -> Callable[[int, float], None]:
        """The `on_step` of the next fit. Its `steps` are added to the planned ones."""
        self.planned += steps

        def count(step: int, objective: float) -> None:
            with self._lock:
                if self._stopped:
                    raise InterruptedError("another fit of the same call was stopped")
                self.done += 1
                if self.on_progress is not None:
                    self.on_progress(self.done, self.planned, name)

        return count


@contextlib.contextmanager
def progress_bar(show: bool) -> Iterator[OnProgress]:
    """A progress bar that follows ``on_progress(done, planned, stage)``."""
    from tqdm.auto import tqdm

    with tqdm(total=0, disable=not show, unit="step", leave=False, mininterval=0.5) as bar:

        def on_progress(done: int, planned: int, stage: str) -> None:
            bar.set_description(stage, refresh=False)
            if bar.total != planned:
                bar.total = planned
                bar.refresh()
            bar.update(done - bar.n)

        yield on_progress
