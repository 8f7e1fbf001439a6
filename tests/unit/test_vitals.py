"""What counts as progress, and what as a stall."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blaze.health.settings import HealthSettings
from blaze.health.vitals import Ailment, AilmentKind, Vitals
from blaze.reports import Heartbeat, ReplicaState
from tests.samples import heartbeat

SETTINGS = HealthSettings(probe_period_s=1.0, missed_probes=3, stall_after_s=30.0)


def after(seconds: int, beat: Callable[[int], Heartbeat]) -> Ailment | None:
    """What is found when a heartbeat came every second."""
    vitals = Vitals(beat(0), 0.0, SETTINGS)
    for second in range(1, seconds + 1):
        vitals.hear(beat(second), float(second))
    return vitals.ailment(float(seconds))


def kind_of(ailment: Ailment | None) -> AilmentKind | None:
    return None if ailment is None else ailment.kind


def test_work_without_a_step_is_a_stall_once_the_time_has_passed() -> None:
    def wedged(_second: int) -> Heartbeat:
        return heartbeat(state="busy", running=2, queued=1, cpu_s=4.2)

    assert after(30, wedged) is None
    found = after(31, wedged)
    assert found == Ailment(AilmentKind.STALLED, "requests pending and no progress for 31.0 s")


def test_nothing_to_do_is_no_stall() -> None:
    assert after(1000, lambda _second: heartbeat(state="idle")) is None


def test_the_time_begins_with_the_work() -> None:
    def idle_first(second: int) -> Heartbeat:
        return heartbeat(state="busy" if second >= 100 else "idle", running=int(second >= 100))

    assert after(130, idle_first) is None
    assert kind_of(after(131, idle_first)) is AilmentKind.STALLED


def test_work_that_was_taken_away_is_no_sign_of_health() -> None:
    """Routers move it elsewhere once they hear of the stall, and some clients do not wait for so long."""
    wedged = Vitals(heartbeat(state="busy", running=1), 0.0, SETTINGS)
    for second in range(1, 32):
        wedged.hear(heartbeat(state="busy", running=1), float(second))
    for second in range(32, 100):
        wedged.hear(heartbeat(), float(second))
        assert kind_of(wedged.ailment(float(second))) is AilmentKind.STALLED
    wedged.hear(heartbeat(steps=6), 100.0)
    assert wedged.ailment(100.0) is None


def test_clients_that_give_up_sooner_do_not_hide_a_stall() -> None:
    def comes_and_goes(second: int) -> Heartbeat:
        pending = second % 10 < 5
        return heartbeat(state="busy" if pending else "idle", running=int(pending))

    assert after(55, comes_and_goes) is None
    assert kind_of(after(65, comes_and_goes)) is AilmentKind.STALLED


def test_steps_are_progress() -> None:
    assert after(1000, lambda second: heartbeat(state="busy", running=1, steps=second // 20)) is None


@pytest.mark.parametrize("share", [0.06, 1.0])
def test_a_long_step_that_computes_is_progress_for_a_long_time(share: float) -> None:
    """A long prefill, a denoiser's step of 30 s, a large picture's decoding, also on a crowded machine."""

    def computing(second: int) -> Heartbeat:
        return heartbeat(state="busy", running=1, cpu_s=share * second)

    assert after(300, computing) is None
    found = after(301, computing)
    assert found == Ailment(AilmentKind.STALLED, "requests pending and 301 s of computing without a step")


def test_a_short_stall_time_leaves_a_step_that_computes_its_five_minutes() -> None:
    settings = HealthSettings(stall_after_s=5.0)
    vitals = Vitals(heartbeat(state="busy", running=1, cpu_s=0.0), 0.0, settings)
    for second in range(1, 301):
        vitals.hear(heartbeat(state="busy", running=1, cpu_s=float(second)), float(second))
        assert vitals.ailment(float(second)) is None
    vitals.hear(heartbeat(state="busy", running=1, cpu_s=301.0), 301.0)
    assert kind_of(vitals.ailment(301.0)) is AilmentKind.STALLED
    loads = Vitals(heartbeat(state="loading"), 0.0, settings)
    assert (loads.ailment(300.0), kind_of(loads.ailment(301.0))) == (None, AilmentKind.SILENT)


def test_a_thread_that_only_wakes_up_from_time_to_time_is_stalled() -> None:
    waiting = after(31, lambda second: heartbeat(state="busy", running=1, cpu_s=0.004 * second))
    assert kind_of(waiting) is AilmentKind.STALLED


def test_heartbeats_that_arrive_together_are_no_progress() -> None:
    vitals = Vitals(heartbeat(state="busy", running=1, cpu_s=1.0), 0.0, SETTINGS)
    for _ in range(5):
        vitals.hear(heartbeat(state="busy", running=1, cpu_s=1.0), 31.0)
    assert kind_of(vitals.ailment(31.0)) is AilmentKind.STALLED


def test_where_threads_have_no_clocks_steps_alone_count() -> None:
    assert kind_of(after(31, lambda _second: heartbeat(state="busy", running=1))) is AilmentKind.STALLED


def test_loading_is_no_stall_however_long_it_takes() -> None:
    assert after(10_000, lambda _second: heartbeat(state="loading")) is None


def test_silence_is_an_ailment_after_the_stall_time() -> None:
    vitals = Vitals(heartbeat(), 0.0, SETTINGS)
    assert vitals.ailment(30.0) is None
    assert vitals.ailment(30.5) == Ailment(AilmentKind.SILENT, "no heartbeat for 30.5 s")


def test_a_load_may_hold_the_interpreter_for_longer() -> None:
    vitals = Vitals(heartbeat(state="loading"), 0.0, SETTINGS)
    assert vitals.ailment(300.0) is None
    assert kind_of(vitals.ailment(301.0)) is AilmentKind.SILENT


def test_what_happens_after_the_last_heartbeat_is_not_known() -> None:
    """A stall is shown by heartbeats only: silence has a time of its own."""
    vitals = Vitals(heartbeat(state="busy", running=1), 0.0, SETTINGS)
    vitals.hear(heartbeat(state="busy", running=1), 28.0)
    assert vitals.ailment(40.0) is None


def test_a_failed_engine_is_one_at_once() -> None:
    failed = Vitals(heartbeat(state="failed", detail="the compute thread has ended"), 0.0, SETTINGS)
    assert failed.ailment(0.0) == Ailment(AilmentKind.FAILED, "the compute thread has ended")
    assert kind_of(Vitals(heartbeat(state="failed"), 0.0, SETTINGS).ailment(0.0)) is AilmentKind.FAILED


def test_whoever_could_not_listen_holds_it_against_nobody() -> None:
    vitals = Vitals(heartbeat(state="busy", running=1), 0.0, SETTINGS)
    vitals.excuse(100.0, now=101.0)
    assert vitals.ailment(101.0) is None
    assert vitals.state(101.0) is ReplicaState.READY
    assert vitals.state(104.5) is ReplicaState.SUSPECT
