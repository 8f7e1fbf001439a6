from __future__ import annotations

from dataclasses import replace

import pytest

from blaze.control import (
    NO_CHANGES,
    ActOnBreaker,
    Control,
    SetAllDraining,
    SetDraining,
    SetStrategy,
    SetWeight,
)
from blaze.health.controls import SETTINGS_KEPT_S
from blaze.health.settings import HealthSettings
from blaze.health.supervisor import Supervisor
from blaze.health.view import ReplicaHealth
from blaze.reports import TTFT_BUCKETS_S, ModelCounters, ReplicaCounters, ReplicaState, RouterReport
from tests.fakes import FakeClock
from tests.samples import heartbeat, model_counters

SETTINGS = HealthSettings(probe_period_s=1.0, missed_probes=3, stall_after_s=30.0)


class Watch:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.supervisor = Supervisor(SETTINGS, self.clock)

    def wait(self, seconds: float) -> None:
        """Time in which the actor itself is awake."""
        until = self.clock.now() + seconds
        while (left := until - self.clock.now()) > 0:
            self.clock.advance(min(1.0, left))
            self.supervisor.awake()

    def replica(self, replica_id: str = "a") -> ReplicaHealth | None:
        found = [r for r in self.supervisor.view().replicas if r.heartbeat.replica_id == replica_id]
        return found[0] if found else None

    def state(self) -> ReplicaState | None:
        replica = self.replica()
        return None if replica is None else replica.state


def report(
    router_id: str, *replicas: ReplicaCounters, models: tuple[ModelCounters, ...] = ()
) -> RouterReport:
    return RouterReport(router_id, models, replicas)


# --- States ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine_state", "state"),
    [
        ("loading", ReplicaState.STARTING),
        ("idle", ReplicaState.READY),
        ("busy", ReplicaState.READY),
        ("failed", ReplicaState.DEAD),
    ],
)
def test_the_state_follows_the_engines_own_account(engine_state: str, state: ReplicaState) -> None:
    watch = Watch()
    watch.supervisor.heartbeat(heartbeat(state=engine_state))  # type: ignore[arg-type]
    assert watch.state() is state


def test_three_missed_probes_make_a_replica_suspect() -> None:
    watch = Watch()
    watch.supervisor.heartbeat(heartbeat())
    watch.clock.advance(3.0)
    assert watch.state() is ReplicaState.READY
    watch.clock.advance(0.01)
    assert watch.state() is ReplicaState.SUSPECT


def test_silence_is_measured_from_the_last_heartbeat() -> None:
    watch = Watch()
    watch.supervisor.heartbeat(heartbeat())
    watch.clock.advance(2.0)
    watch.supervisor.heartbeat(heartbeat())
    watch.clock.advance(1.5)
    replica = watch.replica()
    assert replica is not None
    assert replica.silent_for_s == 1.5


def test_a_replica_that_stays_silent_is_forgotten() -> None:
    watch = Watch()
    watch.supervisor.heartbeat(heartbeat())
    watch.clock.advance(60.0)
    assert watch.state() is ReplicaState.SUSPECT
    watch.clock.advance(0.01)
    assert watch.state() is None


def test_a_replica_that_stops_in_good_order_is_forgotten_at_once() -> None:
    watch = Watch()
    watch.supervisor.heartbeat(heartbeat("a"))
    watch.supervisor.heartbeat(heartbeat("b", rank=1))
    watch.supervisor.goodbye("a")
    watch.supervisor.goodbye("unknown")
    assert [r.heartbeat.replica_id for r in watch.supervisor.view().replicas] == ["b"]


def test_replicas_are_listed_by_model_and_rank() -> None:
    watch = Watch()
    for beat in (heartbeat("x", model="n"), heartbeat("z", rank=1), heartbeat("y", rank=0)):
        watch.supervisor.heartbeat(beat)
    assert [r.heartbeat.replica_id for r in watch.supervisor.view().replicas] == ["y", "z", "x"]


# --- Sums over the Routers ---------------------------------------------------------------------------


def test_a_replicas_counters_are_summed_over_the_routers() -> None:
    watch = Watch()
    watch.supervisor.report(report("r1", ReplicaCounters("a", "m", 2, 1.5, 10, 1)))
    watch.supervisor.report(
        report("r2", ReplicaCounters("a", "m", 3, 1.5, 20, 4), ReplicaCounters("b", "m", 1, 1.0, 1, 0))
    )
    assert watch.supervisor.view().counters() == {
        "a": ReplicaCounters("a", "m", 5, 1.5, 30, 5),
        "b": ReplicaCounters("b", "m", 1, 1.0, 1, 0),
    }


def test_a_models_counters_are_summed_over_the_routers() -> None:
    watch = Watch()
    watch.supervisor.report(report("r1", models=(model_counters(),)))
    watch.supervisor.report(
        report("r2", models=(model_counters(outcomes=(("neutral", 5), ("success", 1)), ttft_sum_s=1.0),))
    )
    assert watch.supervisor.view().models() == {
        "m": model_counters(
            waiting=2,
            outcomes=(("failure", 1), ("neutral", 5), ("success", 3)),
            prompt_tokens=20,
            completion_tokens=40,
            images=6,
            ttft_buckets=tuple(2 * n for n in range(len(TTFT_BUCKETS_S))),
            ttft_sum_s=1.5,
        )
    }


def test_a_newer_report_of_a_router_replaces_its_older_one() -> None:
    watch = Watch()
    watch.supervisor.report(report("r1", ReplicaCounters("a", "m", 9, 1.0, 9, 9)))
    watch.supervisor.report(report("r1", ReplicaCounters("a", "m", 1, 1.0, 10, 9)))
    assert watch.supervisor.view().counters()["a"].in_flight == 1


def test_of_a_router_that_has_died_the_counters_are_shown_but_nothing_runs_or_waits_for_it() -> None:
    watch = Watch()
    watch.supervisor.report(
        report("r1", ReplicaCounters("a", "m", 3, 1.0, 7, 1, cost=5.0), models=(model_counters(waiting=4),))
    )
    watch.clock.advance(3.0)
    view = watch.supervisor.view()
    assert (view.counters()["a"].in_flight, view.models()["m"].waiting) == (3, 4)
    watch.clock.advance(0.1)
    replica, model = watch.supervisor.view().counters()["a"], watch.supervisor.view().models()["m"]
    assert (replica.in_flight, replica.cost, model.waiting) == (0, 0, 0)
    assert (replica.requests, dict(model.outcomes)) == (7, {"success": 2, "failure": 1})


def test_a_router_that_stays_silent_is_forgotten_with_its_in_flight_requests() -> None:
    watch = Watch()
    watch.supervisor.report(report("r2", ReplicaCounters("a", "m", 5, 1.0, 5, 0)))
    watch.clock.advance(20.0)
    watch.supervisor.report(report("r1", ReplicaCounters("a", "m", 1, 1.0, 1, 0)))
    view = watch.supervisor.view()
    assert [[r.router_id for r in reports] for reports in (view.reports, view.silent)] == [["r1"], ["r2"]]
    watch.clock.advance(10.01)
    watch.supervisor.report(report("r1", ReplicaCounters("a", "m", 1, 1.0, 1, 0)))
    view = watch.supervisor.view()
    assert (len(view.reports), view.silent) == (1, ())
    assert view.counters()["a"].in_flight == 1


def test_everything_drains_when_each_router_says_so_of_the_same_drain() -> None:
    watch = Watch()
    earlier = NO_CHANGES.after(SetAllDraining(True, 30.0))
    again = earlier.after(SetAllDraining(False)).after(SetAllDraining(True, 30.0))
    said = [(NO_CHANGES, again), (earlier, again), (again, earlier), (again, again), (NO_CHANGES, NO_CHANGES)]
    seen = []
    for controls in said:
        for router_id, control in zip(("r1", "r2"), controls, strict=True):
            watch.supervisor.report(RouterReport(router_id, (), (), control))
        seen.append(watch.supervisor.view().is_draining)
    assert seen == [False, False, False, True, False]


def test_a_router_that_has_died_keeps_no_drain_from_being_done() -> None:
    watch = Watch()
    counted = ReplicaCounters("a", "m", 3, 1.0, 7, 1)
    watch.supervisor.report(report("r1", counted))
    for drains in (False, True):
        watch.supervisor.report(report("r2", replace(counted, in_flight=0, draining=True)))
        assert watch.supervisor.view().counters()["a"].draining is drains
        watch.clock.advance(3.1)


def test_a_router_that_has_died_says_no_more_whether_everything_drains() -> None:
    watch = Watch()
    watch.supervisor.report(RouterReport("r1", (), (), NO_CHANGES))
    for _ in range(4):
        watch.clock.advance(1.0)
        watch.supervisor.report(RouterReport("r2", (), (), NO_CHANGES.after(SetAllDraining(True))))
    assert watch.supervisor.view().is_draining


def test_an_empty_cluster_has_an_empty_view() -> None:
    view = Watch().supervisor.view()
    assert (view.replicas, view.reports, view.counters(), view.models()) == ((), (), {}, {})


# --- Settings of replicas that are gone --------------------------------------------------------------


def decided(watch: Watch, *replica_ids: str) -> Control:
    """What operators want of these replicas, and of a model."""
    control = watch.supervisor.change(SetStrategy("m", "adaptive"), NO_CHANGES)
    for replica_id in replica_ids:
        watch.supervisor.change(SetWeight(replica_id, 0.5), NO_CHANGES)
        watch.supervisor.change(SetDraining(replica_id, True), NO_CHANGES)
        control = watch.supervisor.change(ActOnBreaker(replica_id, "open"), NO_CHANGES)
    return control


def followed(watch: Watch, *live: str) -> Control:
    """What a Router with these replicas in its live set is told now."""
    counters = (ReplicaCounters(replica_id, "m", 0, 1.0, 0, 0) for replica_id in live)
    return watch.supervisor.report(report("r1", *counters)).control


def test_settings_of_a_dead_replica_are_forgotten_in_time_as_a_change_of_their_own() -> None:
    watch = Watch()
    for replica_id in ("a", "b"):
        watch.supervisor.heartbeat(heartbeat(replica_id))
    control = decided(watch, "a", "b")
    watch.supervisor.goodbye("a")
    assert followed(watch) == control
    watch.clock.advance(SETTINGS_KEPT_S)
    watch.supervisor.heartbeat(heartbeat("b"))
    assert followed(watch) == control
    watch.clock.advance(0.01)
    left = followed(watch)
    assert left == control.without({"a"})
    assert (left.version, left.weights, left.strategies) == (
        control.version + 1,
        (("b", 0.5),),
        (("m", "adaptive"),),
    )
    assert followed(watch) == left  # once


def test_a_replica_that_falls_silent_is_dead_before_its_settings_begin_to_age() -> None:
    watch = Watch()
    watch.supervisor.heartbeat(heartbeat("a"))
    control = decided(watch, "a")
    watch.wait(2 * SETTINGS.stall_after_s + 0.01)
    assert followed(watch) == control
    watch.clock.advance(SETTINGS_KEPT_S)
    assert followed(watch) == control
    watch.clock.advance(0.01)
    assert followed(watch).replica_ids == set()


def test_settings_of_a_replica_that_was_never_heard_of_are_kept_as_long() -> None:
    """An actor that has come back learns them from a Router, maybe before the replica's next heartbeat."""
    watch = Watch()
    known = NO_CHANGES.after(SetWeight("a", 0.5))
    watch.clock.advance(2 * SETTINGS_KEPT_S)
    assert watch.supervisor.report(RouterReport("r1", (), (), known)).control == known
    watch.clock.advance(SETTINGS_KEPT_S)
    assert followed(watch) == known
    watch.clock.advance(0.01)
    assert followed(watch) == known.without({"a"})


def test_a_router_that_has_an_older_version_does_not_bring_forgotten_settings_back() -> None:
    watch = Watch()
    control = decided(watch, "a")
    followed(watch)
    watch.clock.advance(SETTINGS_KEPT_S + 0.01)
    left = followed(watch)
    assert watch.supervisor.report(RouterReport("r2", (), (), control)).control == left


def test_a_replica_that_comes_back_in_time_keeps_its_settings_and_its_time_begins_again() -> None:
    watch = Watch()
    control = decided(watch, "a")
    followed(watch)
    watch.clock.advance(SETTINGS_KEPT_S - 1)
    watch.supervisor.heartbeat(heartbeat("a"))
    assert followed(watch) == control
    watch.supervisor.goodbye("a")
    assert followed(watch) == control
    watch.clock.advance(SETTINGS_KEPT_S)
    assert followed(watch) == control
    watch.clock.advance(0.01)
    assert followed(watch).replica_ids == set()


def test_a_replica_in_a_live_set_keeps_its_settings_however_silent_it_is() -> None:
    watch = Watch()
    control = decided(watch, "a")
    for _ in range(3):
        assert followed(watch, "a") == control
        watch.clock.advance(SETTINGS_KEPT_S)


def test_the_view_of_the_cluster_forgets_them_too() -> None:
    watch = Watch()
    decided(watch, "a")
    watch.supervisor.view()
    watch.clock.advance(SETTINGS_KEPT_S + 0.01)
    watch.supervisor.view()
    assert followed(watch, "a").replica_ids == set()


def test_who_was_silent_is_well_again_after_two_heartbeats() -> None:
    watch = Watch()
    states = []
    for wait_s in (0.0, 4.0, 1.0, 1.0):
        watch.wait(wait_s)
        watch.supervisor.heartbeat(heartbeat("a"))
        states.append(watch.state())
    assert states == [ReplicaState.READY, ReplicaState.SUSPECT, ReplicaState.READY, ReplicaState.READY]


def test_a_silent_replica_stays_suspect_for_as_long_as_routers_may_pick_it() -> None:
    watch = Watch()
    watch.supervisor.heartbeat(heartbeat("a"))
    for second in range(1, 100):
        watch.clock.advance(1.0)
        news = watch.supervisor.report(report("r", ReplicaCounters("a", "m", 0, 1.0, 0, 0)))
        assert ("a" in news.suspects) is (second > 3)
    watch.clock.advance(1.0)
    watch.supervisor.report(report("r"))
    assert watch.state() is None
