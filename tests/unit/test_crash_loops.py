"""Replicas that die by themselves: how long the next one waits, and what is said of the model."""

from __future__ import annotations

import pytest

from blaze.health.conditions import DeploymentFacts
from blaze.health.settings import HealthSettings
from blaze.reports import Heartbeat, ReplicaCounters, ReplicaState, RouterReport
from tests.health_watch import HealthWatch
from tests.samples import heartbeat, model_counters

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

    def learn(self, status: str, replicas: int) -> str:
        """What Serve says of the deployment, and what the model is then."""
        self.supervisor.learn({"m": DeploymentFacts(status, "", replicas)})
        return self.condition().state

    def fail_to_load(self) -> str:
        """As often as it takes. What the model is then."""
        for _ in range(SETTINGS.max_restarts):
            self.live(1, state="loading")
            self.supervisor.not_loaded(f"r{self.deaths}", "m", 0, "OSError: the hub is away")
            self.deaths += 1
        return self.condition().state

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


def test_a_request_that_kills_its_replica_between_two_heartbeats_is_held_against_it_all_the_same() -> None:
    """Each is refused after two deaths, so it takes many of them; the model serves all others."""
    loop = Loop()
    waits: list[float] = []
    died: tuple[str, ...] = ()
    for _ in range(3 * SETTINGS.max_restarts):
        loop.live(2)
        died = (*died, f"r{loop.deaths}")
        moved = ReplicaCounters(f"r{loop.deaths}", "m", 0, 1.0, 1, 1)
        loop.supervisor.report(RouterReport("router", (model_counters(died_at_work=died),), (moved,)))
        waits.append(loop.die())
    assert (max(waits), waits[0]) == (5, 0)
    loop.live(1, state="loading")
    assert (loop.condition().state, loop.condition().reason) == ("loading", "")


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


# --- What is held against a slot ends ----------------------------------------------------------------


@pytest.mark.parametrize("seen", [("HEALTHY",), ("UPDATING", "HEALTHY")])
def test_a_model_that_is_scaled_to_zero_is_woken_again_whatever_became_of_the_last_ones(
    seen: tuple[str, ...],
) -> None:
    """A failing model refuses requests, so none would ever wake it."""
    loop = Loop()
    assert loop.learn("DEPLOY_FAILED", 1) == loop.fail_to_load() == "failing"
    for status in seen:
        found = loop.learn(status, 0)
    assert found == "idle"
    assert loop.supervisor.load_in_s("m", 0) == 0


def test_a_model_that_fails_after_it_was_woken_fails_again_within_as_many_attempts() -> None:
    loop = Loop()
    for _ in range(3):
        assert loop.learn("HEALTHY", 0) == "idle"
        loop.learn("UPSCALING", 1)
        assert loop.fail_to_load() == "failing"


def test_a_deployment_that_does_not_become_healthy_is_believed_when_it_has_been_empty_for_long() -> None:
    """Serve calls it unhealthy until a replica runs, scaled to zero or not."""
    loop = Loop()
    loop.learn("UNHEALTHY", 1)
    loop.fail_to_load()
    for _ in range(int(SETTINGS.forgive_after_s / 2)):
        assert loop.learn("UNHEALTHY", 0) == "failing"
        loop.clock.advance(2.0)
    assert loop.learn("UNHEALTHY", 0) != "failing"


def test_that_nobody_is_there_between_a_death_and_the_next_replica_forgives_nothing() -> None:
    loop = Loop()
    for _ in range(SETTINGS.max_restarts):
        loop.learn("HEALTHY", 1)
        loop.live(70)
        loop.die()
        loop.learn("UNHEALTHY", 0)
        loop.learn("UNHEALTHY", 1)
    loop.live(1, state="loading")
    assert loop.condition().state == "failing"


def test_a_new_version_begins_anew() -> None:
    loop = Loop()
    assert loop.learn("UNHEALTHY", 1) == "loading"
    assert loop.fail_to_load() == "failing"
    assert loop.learn("UPDATING", 1) == "loading"
    assert loop.supervisor.load_in_s("m", 0) == 0
    assert loop.fail_to_load() == "failing"
    assert loop.learn("UPDATING", 1) == "failing"  # still the same one


def test_a_slot_that_is_no_more_is_not_held_against_those_that_are_left() -> None:
    watch = HealthWatch(SETTINGS)
    for number in range(SETTINGS.max_restarts):
        watch.supervisor.heartbeat(heartbeat(f"b{number}", rank=1, actor="b"))
        watch.supervisor.ended(f"b{number}")
    watch.supervisor.heartbeat(heartbeat("a", actor="a"))
    assert watch.condition().reason
    watch.supervisor.learn({"m": DeploymentFacts("HEALTHY", "", 1)})
    assert (watch.condition().state, watch.condition().reason) == ("ready", "")


def test_a_model_does_not_fail_while_another_slot_may_do_better() -> None:
    watch = HealthWatch(SETTINGS)
    watch.supervisor.learn({"m": DeploymentFacts("UNHEALTHY", "", 3, stopping=1)})
    states: list[str] = []
    for rank in (1, 0):
        for number in range(SETTINGS.max_restarts):
            watch.supervisor.heartbeat(heartbeat(f"{rank}{number}", rank=rank, actor="x"))
            watch.supervisor.ended(f"{rank}{number}")
        states.append(watch.condition().state)
    assert states == ["loading", "failing"]


# --- Two in one slot ---------------------------------------------------------------------------------


def rounds(watch: HealthWatch, seconds: int, *beats: Heartbeat) -> None:
    for _ in range(seconds):
        watch.clock.advance(1.0)
        for beat in beats:
            watch.supervisor.heartbeat(beat)
        watch.supervisor.decide()


def test_two_that_share_a_slot_and_are_well_for_long_begin_anew() -> None:
    """As in a rolling update, and until Serve has closed the gaps between ranks."""
    watch = HealthWatch(SETTINGS)
    for number in range(3 * SETTINGS.max_restarts):
        beats = heartbeat(f"a{number}", actor="a"), heartbeat(f"b{number}", actor="b")
        rounds(watch, int(SETTINGS.forgive_after_s) + 2, *beats)
        watch.supervisor.ended(f"a{number}")
        assert watch.supervisor.load_in_s("m", 0) == 0
        watch.supervisor.goodbye(f"b{number}")


def test_one_that_is_well_excuses_none_that_dies_beside_it() -> None:
    watch = HealthWatch(SETTINGS)
    well = heartbeat("a", actor="a")
    rounds(watch, 1000, well)
    for number in range(SETTINGS.max_restarts):
        rounds(watch, 70, well, heartbeat(f"b{number}", actor="b"))
        watch.supervisor.ended(f"b{number}")
        rounds(watch, 5, well)
    assert watch.supervisor.load_in_s("m", 0) > 0
    assert watch.condition().reason == "replicas die or fail to load again and again"


def test_health_in_one_place_counts_in_the_next() -> None:
    """When ranks change, it is still the same replica."""
    watch = HealthWatch(SETTINGS)
    for number in range(2):
        rounds(watch, 1, heartbeat(f"b{number}", actor="b"))
        watch.supervisor.ended(f"b{number}")
    assert watch.supervisor.load_in_s("m", 0) > 0
    half = int(SETTINGS.forgive_after_s / 2) + 1
    rounds(watch, half, heartbeat("a", rank=1, actor="a"))
    rounds(watch, half, heartbeat("a", rank=0, actor="a"))
    rounds(watch, 1, heartbeat("b2", actor="b"), heartbeat("a", rank=1, actor="a"))
    watch.supervisor.ended("b2")
    assert watch.supervisor.load_in_s("m", 0) == 0
