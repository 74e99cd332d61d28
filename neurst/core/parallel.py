"""Independent fits, run at the same time on the cores of a CPU.

A step of a small network is too short to be split over several cores. Several fits at once, each on one core, use them better.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from neurst.core.progress import StepCounter

T = TypeVar("T")


def run_all(tasks: Sequence[Callable[[], T]], counter: StepCounter, *, together: bool = True) -> list[T]:
    """The results of all tasks, in their order.

    If one of them raises an exception, or the user interrupts them, the others end at their next step.

    Parameters
    ----------
    tasks
        Functions without arguments. Their fits must call the steps of `counter`.
    counter
        Counts the steps of all tasks, and stops them.
    together
        Run them at the same time, each on one thread, so that results do not depend on the number of cores; else one after the other.
    """
    if len(tasks) < 2 or not together:
        return [task() for task in tasks]
    with _threads_restored(), ThreadPoolExecutor(len(tasks), initializer=_one_thread) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            counter.stop()
            for future in futures:
                future.cancel()
            raise


def _one_thread() -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def _threads_restored() -> Iterator[None]:
    """Restore the number of threads that torch uses afterwards: a new thread takes the number that was set last."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
