from __future__ import annotations

import sys
import threading
import time

import pytest

from blaze.engines.progress import StepCounter
from blaze.reports import EngineStatus
from blaze.types import EngineKind
from tests.fakes import FakeClock
from tests.waiting import eventually


def status(counter: StepCounter, *, loaded: bool = True, failed: str | None = None) -> EngineStatus:
    return counter.status(EngineKind.LLM, loaded=loaded, failed=failed)


def test_a_new_counter_is_idle_and_has_no_last_step() -> None:
    found = status(StepCounter(FakeClock()))
    assert found == EngineStatus(EngineKind.LLM, "idle", 0, 0, 0, None, None)
    assert found.work_pending == 0


def test_accepted_requests_are_queued_until_the_compute_thread_takes_them() -> None:
    counter = StepCounter(FakeClock())
    with counter.queued(), counter.queued():
        assert (status(counter).running, status(counter).queued) == (0, 2)
        with counter.running(1):
            found = status(counter)
            assert (found.state, found.running, found.queued, found.work_pending) == ("busy", 1, 1, 2)
    assert status(counter).work_pending == 0


def test_a_request_whose_reader_left_is_not_counted_as_running() -> None:
    counter = StepCounter(FakeClock())
    with counter.running(2):
        found = status(counter)
        assert (found.running, found.queued) == (0, 0)


def test_requests_that_come_and_go_between_steps_are_set_not_counted() -> None:
    counter = StepCounter(FakeClock())
    with counter.queued(), counter.queued(), counter.queued():
        counter.set_running(2)
        counter.set_running(2)
        found = status(counter)
        assert (found.state, found.running, found.queued) == ("busy", 2, 1)
        counter.set_running(0)
        assert (status(counter).state, status(counter).queued) == ("idle", 3)


def test_spans_end_when_they_raise() -> None:
    counter = StepCounter(FakeClock())
    with pytest.raises(ValueError), counter.queued(), counter.running(1):
        raise ValueError
    assert status(counter).work_pending == 0


def test_the_age_of_the_last_step_is_told_by_the_clock() -> None:
    clock = FakeClock()
    counter = StepCounter(clock)
    counter.step()
    counter.step()
    clock.advance(2.5)
    found = status(counter)
    assert (found.steps_done, found.last_step_age_s) == (2, 2.5)


def test_loading_and_failed_are_told_apart() -> None:
    counter = StepCounter(FakeClock())
    assert status(counter, loaded=False).state == "loading"
    broken = status(counter, failed="the compute thread has ended")
    assert (broken.state, broken.detail) == ("failed", "the compute thread has ended")


def test_answers_that_only_wait_for_their_readers_are_no_pending_work() -> None:
    """Or a client that does not read would make its replica look stalled."""
    counter = StepCounter(FakeClock())
    with counter.queued(), counter.queued(), counter.running(1):
        found = counter.status(EngineKind.LLM, loaded=True, failed=None, unread=1)
        assert (found.running, found.queued) == (1, 0)
        found = counter.status(EngineKind.LLM, loaded=True, failed=None, unread=2)
        assert (found.state, found.work_pending) == ("idle", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no clocks of their own there")
def test_the_processor_time_of_the_compute_thread_is_told_until_it_ends() -> None:
    counter, goes_on = StepCounter(FakeClock()), threading.Event()
    computed, over = threading.Event(), threading.Event()

    def compute() -> None:
        counter.time_this_thread()
        while not computed.is_set():
            sum(range(1000))
        over.set()
        goes_on.wait(10)

    assert status(counter).compute_cpu_s is None
    thread = threading.Thread(target=compute)
    thread.start()
    eventually(lambda: (status(counter).compute_cpu_s or 0.0) > 0.02)
    computed.set()
    over.wait(10)
    goes_on.set()
    thread.join()
    eventually(lambda: status(counter).compute_cpu_s is None)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no clocks of their own there")
def test_the_processor_times_of_all_threads_that_work_are_added_up() -> None:
    counter, over = StepCounter(FakeClock()), threading.Event()

    def compute() -> None:
        counter.time_this_thread()
        before = time.thread_time()
        while time.thread_time() - before < 0.05:
            sum(range(1000))
        over.wait(10)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: (status(counter).compute_cpu_s or 0.0) > 0.1)
    over.set()
    for thread in threads:
        thread.join()
