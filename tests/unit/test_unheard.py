"""Replicas that were silent before the health actor came: Routers have them, and nothing else says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blaze.health.settings import HealthSettings
from blaze.reports import ReplicaCounters, ReplicaState, RouterReport
from tests.health_watch import HealthWatch
from tests.samples import heartbeat

SETTINGS = HealthSettings(stall_after_s=10.0)


def watch(*ids: str) -> HealthWatch:
    made = HealthWatch(SETTINGS)
    made.add(*ids)
    made.run(3)
    return made


@pytest.mark.parametrize("frozen_for_s", [0, 2, 5])
def test_one_that_froze_before_the_actor_came_is_ended_in_time(frozen_for_s: int) -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "frozen"
    cluster.run(frozen_for_s)
    cluster.replace_actor()
    came_at = cluster.now
    cluster.run(SETTINGS.suspect_after_s + 2)
    assert cluster.report() == ("a",)
    cluster.run(10)
    ((at, kill),) = cluster.kills
    assert (kill.replica_id, kill.actor, kill.ailment.kind) == ("a", "actor-a", "silent")
    assert at - came_at <= SETTINGS.stall_after_s + 2
    cluster.run(5)
    assert (cluster.state("m-1"), cluster.state("b")) == (ReplicaState.READY, ReplicaState.READY)


def test_who_was_suspect_stays_suspect_until_it_is_well() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "frozen"
    cluster.run(5)
    assert cluster.report() == ("a",)
    cluster.replace_actor()
    for _ in range(6):
        assert cluster.report() == ("a",)
        cluster.run(1)
    cluster.patients["a"].fault = ""
    cluster.run(1)
    assert cluster.state("a") is ReplicaState.SUSPECT
    cluster.run(1)
    assert (cluster.state("a"), cluster.report(), cluster.killed) == (ReplicaState.READY, (), [])


def test_what_one_router_knows_of_a_suspect_the_others_hear() -> None:
    cluster = watch()
    unsure = ReplicaCounters("a", "m", 0, 1.0, 0, 0)
    sure = replace(unsure, suspect=True)
    assert cluster.supervisor.report(RouterReport("r1", (), (unsure,))).suspects == ()
    assert cluster.supervisor.report(RouterReport("r2", (), (sure,))).suspects == ("a",)
    assert cluster.supervisor.report(RouterReport("r1", (), (unsure,))).suspects == ("a",)


def test_one_that_has_died_meanwhile_is_asked_after_and_removed() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "frozen"
    cluster.replace_actor()
    cluster.run(5)
    assert [beat.actor for beat in cluster.supervisor.to_ask_after()] == ["actor-a"]
    cluster.end("a")
    assert cluster.supervisor.to_ask_after() == ()
    cluster.run(20)
    assert cluster.killed == []
    assert cluster.events("a") == [("ready", "suspect"), ("suspect", "gone")]


def test_those_that_are_well_are_never_suspect_though_the_actor_has_just_come() -> None:
    cluster = watch("a", "b")
    cluster.replace_actor()
    assert cluster.report() == ()
    for _ in range(20):
        cluster.run(1)
        assert (cluster.report(), cluster.killed) == ((), [])


def test_one_that_no_router_has_any_more_is_forgotten() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "frozen"
    cluster.replace_actor()
    cluster.run(5)
    del cluster.patients["a"]
    cluster.run(1)
    assert cluster.report() == ()
    cluster.run(60)
    assert cluster.killed == []


def test_what_a_router_that_is_gone_had_is_not_waited_for() -> None:
    """Its replicas may have stopped in good order since its last report."""
    cluster = watch("a")
    gone = ReplicaCounters("b", "m", 0, 1.0, 0, 0, actor="actor-b")
    cluster.supervisor.report(RouterReport("gone", (), (gone,)))
    cluster.run(5)
    assert (cluster.report(), cluster.supervisor.to_ask_after()) == ((), ())


def test_it_is_not_listed_before_it_is_heard() -> None:
    """Its process, memory and steps are not known."""
    cluster = watch("a")
    counters = ReplicaCounters("b", "m", 0, 1.0, 0, 0, actor="actor-b")
    cluster.supervisor.report(RouterReport("r", (), (counters,)))
    assert cluster.replica("b") is None
    cluster.supervisor.heartbeat(heartbeat("b", rank=1))
    found = cluster.replica("b")
    assert found is not None
    assert (found.heartbeat.rank, found.state) == (1, ReplicaState.READY)
