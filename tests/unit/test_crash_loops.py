"""Replicas that die by themselves: how long the next one waits, and what is said of the model."""

from __future__ import annotations

import pytest

from blaze.health.settings import HealthSettings
from blaze.reports import ReplicaCounters, ReplicaState, RouterReport
from tests.health_watch import HealthWatch
from tests.samples import heartbeat

SETTINGS = HealthSettings(max_restarts=6, forgive_after_s=120.0)


class Loop(HealthWatch):
    """One replica of one model, which dies by itself whenever a test says so."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.deaths = 0

    def live(self, seconds: int, *, state: str = "idle", in_flight: int = 0) -> None:
        for _ in range(seconds):
            self.clock.advance(1.0)
            beat = heartbeat(f"r{self.deaths}", state=state, actor="actor")  # type: ignore[arg-type]
            self.supervisor.heartbeat(beat)
            counters = ReplicaCounters(f"r{self.deaths}", "m", in_flight, 1.0, 0, 0)
            self.supervisor.report(RouterReport("router", (), (counters,)))
            assert self.supervisor.decide() == ()

    def die(self) -> float:
        """How long the next one waits."""
        self.supervisor.ended(f"r{self.deaths}")
        self.deaths += 1
        return self.supervisor.load_in_s("m", 0)


def test_the_first_death_costs_nothing_and_each_further_one_more_up_to_a_minute() -> None:
    loop, waits = Loop(), []
    for _ in range(10):
        loop.live(70)
        waits.append(loop.die())
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_model_whose_replicas_die_again_and_again_fails_and_is_ready_as_soon_as_one_is() -> None:
    loop = Loop()
    for _ in range(SETTINGS.max_restarts):
        loop.live(3)
        assert loop.condition().state == "ready"
        loop.die()
    loop.live(1, state="loading")
    found = loop.condition()
    assert (found.state, found.reason) == ("failing", "replicas die or fail to load again and again")
    assert found.detail == "6 replicas in a row have died or could not load: the process has ended by itself"
    waiting = loop.replica("r6")
    assert waiting is not None
    assert waiting.state is ReplicaState.STARTING
    assert waiting.reason == "waits for 15 s before it loads, for the ones before it have died"
    loop.live(1)
    assert loop.condition().state == "ready"
    assert loop.condition().reason == found.reason


def test_whoever_cannot_load_is_counted_too() -> None:
    loop = Loop()
    for number in range(SETTINGS.max_restarts):
        loop.live(1, state="loading")
        loop.supervisor.not_loaded(f"r{number}", "m", 0, "OSError: the disk is gone")
        loop.deaths += 1
    assert loop.supervisor.load_in_s("m", 0) == 16
    loop.live(1, state="loading")
    assert loop.condition().detail.endswith("OSError: the disk is gone")
    assert loop.condition().state == "failing"


def test_health_for_long_is_a_new_beginning() -> None:
    loop = Loop()
    for _ in range(3 * SETTINGS.max_restarts):
        loop.live(int(SETTINGS.forgive_after_s) + 2)
        assert loop.die() == 0


@pytest.mark.parametrize("in_flight", [1, 20])
def test_deaths_with_requests_on_them_are_short_of_consequences(in_flight: int) -> None:
    """They may be the requests' fault, which are refused after two of them."""
    loop = Loop()
    waits: list[float] = []
    for _ in range(3 * SETTINGS.max_restarts):
        loop.live(2, state="busy", in_flight=in_flight)
        waits.append(loop.die())
    assert (max(waits), waits[0]) == (5, 0)
    loop.live(1)
    assert (loop.condition().state, loop.condition().reason) == ("ready", "")


def test_other_slots_and_models_do_not_wait() -> None:
    loop = Loop()
    for _ in range(4):
        loop.live(2)
        loop.die()
    assert loop.supervisor.load_in_s("m", 0) > 0
    assert loop.supervisor.load_in_s("m", 1) == loop.supervisor.load_in_s("n", 0) == 0


def test_whoever_stops_in_good_order_or_is_ended_by_decision_is_not_held_against_the_slot() -> None:
    loop = Loop()
    for _ in range(5):
        loop.live(2)
        loop.supervisor.goodbye(f"r{loop.deaths}")
        loop.deaths += 1
    assert loop.supervisor.load_in_s("m", 0) == 0
