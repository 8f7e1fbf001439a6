from __future__ import annotations

import pytest

from blaze.engines.progress import StepCounter
from blaze.reports import EngineStatus
from blaze.types import EngineKind
from tests.fakes import FakeClock


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
