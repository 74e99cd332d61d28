import threading
import time

import pytest
import torch

from neurst.core.parallel import run_all
from neurst.core.progress import StepCounter


def counted_fit(result, counter, steps=3):
    """A fit of some steps."""
    on_step = counter.stage("fit", steps)

    def task():
        for step in range(steps):
            on_step(step, 0.0)
        return result

    return task


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_results_are_in_the_order_of_the_tasks(n, together):
    seen = []
    counter = StepCounter(lambda *now: seen.append(now[0]))
    assert run_all([counted_fit(k, counter) for k in range(n)], counter, together=together) == list(range(n))
    assert seen == list(range(1, 3 * n + 1))  # no step is lost


def test_the_slowest_task_may_be_the_first():
    wait = [0.05, 0.0, 0.02]
    tasks = [lambda k=k: time.sleep(wait[k]) or k for k in range(3)]
    assert run_all(tasks, StepCounter(None)) == [0, 1, 2]


def fit(seed):
    """Numbers that depend on the order of floating-point operations."""

    def task():
        x = torch.randn(60, 60, generator=torch.Generator().manual_seed(seed))
        for _ in range(5):
            x = torch.tanh(x @ x / 8)
        return x

    return task


def test_tasks_at_the_same_time_give_bit_by_bit_what_they_give_one_after_the_other():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tasks = [fit(seed) for seed in range(5)]
        for a, b in zip(
            run_all(tasks, StepCounter(None)), run_all(tasks, StepCounter(None), together=False), strict=True
        ):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_each_task_has_one_thread_and_the_number_of_threads_is_restored(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert run_all([torch.get_num_threads] * 3, StepCounter(None)) == [1, 1, 1]
        assert torch.get_num_threads() == threads
        found = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found == [threads]  # also in threads of others
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_exception_of_one_task_is_raised_and_stops_the_others(error):
    counter, ended, begun = StepCounter(None), [], threading.Event()

    def endless():
        on_step = counter.stage("fit")
        try:
            for step in range(10**9):
                on_step(step, 0.0)
                begun.set()
                time.sleep(1e-3)
        finally:
            ended.append("fit")

    def fails():
        begun.wait(5)
        raise error("`a` is wrong")

    with pytest.raises(error, match="`a` is wrong"):
        run_all([endless, fails], counter)
    assert ended == ["fit"]


def test_no_step_is_counted_after_a_stop():
    counter = StepCounter(None)
    on_step = counter.stage("fit", 2)
    on_step(0, 0.0)
    counter.stop()
    with pytest.raises(InterruptedError, match="another fit of the same call was stopped"):
        on_step(1, 0.0)
    assert counter.done == 1


def test_an_exception_of_who_is_told_the_progress_ends_all_fits():
    def refuse(*now):
        raise KeyboardInterrupt

    counter = StepCounter(refuse)
    with pytest.raises(KeyboardInterrupt):
        run_all([counted_fit(k, counter, steps=10**9) for k in range(3)], counter)
