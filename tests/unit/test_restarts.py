"""Which replicas are ended, in which order, how often, and what is told of it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from blaze.health.conditions import DeploymentFacts
from blaze.health.journal import EVENTS
from blaze.health.settings import HealthSettings
from blaze.reports import ModelCondition, ReplicaState
from tests.health_watch import HealthWatch, Patient
from tests.samples import heartbeat

SETTINGS = HealthSettings(
    stall_after_s=10.0, max_restarts=3, backoff_s=5.0, max_backoff_s=60.0, forgive_after_s=60.0
)


def watch(*ids: str, **options: object) -> HealthWatch:
    made = HealthWatch(SETTINGS, **options)  # type: ignore[arg-type]
    made.add(*ids)
    made.run(2)
    return made


# --- Who is ended, and when --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "within_s", "kind"),
    [("frozen", 11, "silent"), ("wedged", 13, "stalled"), ("failed", 3, "failed")],
)
def test_an_unhealthy_replica_is_ended_in_time_and_replaced(fault: str, within_s: int, kind: str) -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = fault
    cluster.run(within_s)
    assert [(kill.replica_id, kill.actor, kill.ailment.kind) for _, kill in cluster.kills] == [
        ("a", "actor-a", kind)
    ]
    cluster.run(10)
    states = [(r.heartbeat.replica_id, r.state) for r in cluster.supervisor.view().replicas]
    assert states == [("m-1", ReplicaState.READY), ("b", ReplicaState.READY)]
    assert cluster.supervisor.view().restarts == (("m", kind, 1),)
    assert cluster.killed == ["a"]


def test_nobody_who_is_well_is_ended() -> None:
    cluster = watch("a", "b")
    cluster.patients["b"].fault = "loading"
    cluster.run(1000)
    assert cluster.killed == []


def test_routers_hear_of_a_wedged_replica_before_it_is_ended() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "wedged"
    while "a" not in cluster.report():
        assert cluster.killed == []
        cluster.run(1)
    assert (cluster.killed, cluster.state("a")) == ([], ReplicaState.SUSPECT)
    cluster.run(1)
    assert cluster.killed == ["a"]


def test_who_makes_progress_again_before_its_turn_is_left_alone() -> None:
    cluster = watch("a")
    cluster.patients["a"].fault = "wedged"
    while cluster.state("a") is not ReplicaState.SUSPECT:
        cluster.run(1)
    cluster.patients["a"].fault = ""
    cluster.run(60)
    assert cluster.killed == []
    assert cluster.events("a") == [("ready", "suspect"), ("suspect", "ready")]


def test_a_replica_without_an_actor_is_never_ended() -> None:
    cluster = watch()
    cluster.supervisor.heartbeat(heartbeat("a", state="failed"))
    cluster.run(5)
    assert (cluster.killed, cluster.state("a")) == ([], ReplicaState.SUSPECT)


def test_the_only_replica_of_a_model_is_ended_too_when_it_serves_nobody() -> None:
    cluster = watch("a")
    cluster.patients["a"].fault = "wedged"
    cluster.run(15)
    assert cluster.killed == ["a"]


# --- Caps --------------------------------------------------------------------------------------------


def test_one_at_a_time_for_each_model_until_the_replacement_is_ready() -> None:
    cluster = watch("a", "b", takes_s=20.0)
    cluster.add("x", model="n")
    cluster.run(2)
    for replica_id in ("a", "b", "x"):
        cluster.patients[replica_id].fault = "frozen"
    cluster.run(12)
    assert sorted(cluster.killed) == ["a", "x"]
    cluster.run(18)
    assert sorted(cluster.killed) == ["a", "x"]
    cluster.run(4)
    assert sorted(cluster.killed) == ["a", "b", "x"]


def test_a_replacement_that_does_not_come_is_not_waited_for_for_ever() -> None:
    cluster = watch("a", "b", takes_s=None)
    for replica_id in ("a", "b"):
        cluster.patients[replica_id].fault = "frozen"
    cluster.run(12 + SETTINGS.replacement_s - 2)
    assert cluster.killed == ["a"]
    cluster.run(4)
    assert cluster.killed == ["a", "b"]


def test_pauses_grow_and_a_slot_is_given_up_after_a_bounded_number() -> None:
    cluster = watch("a", "b", comes_back="failed", takes_s=1.0)
    cluster.patients["a"].fault = "failed"
    cluster.run(400)
    times = [at for at, _ in cluster.kills]
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[0] >= SETTINGS.backoff_s
    assert len(times) == SETTINGS.max_restarts
    last = cluster.replica("m-3")
    assert last is not None
    assert (last.state, last.reason) == (
        ReplicaState.DEAD,
        "given up after 3 restarts: the engine has failed",
    )
    assert cluster.state("b") is ReplicaState.READY
    assert (cluster.condition().state, cluster.condition().reason) == (
        "ready",
        "replicas failed again and again, and are not restarted any more",
    )


def test_a_model_all_of_whose_slots_are_given_up_fails() -> None:
    cluster = watch("a", comes_back="failed")
    cluster.patients["a"].fault = "failed"
    cluster.run(400)
    assert len(cluster.killed) == SETTINGS.max_restarts
    assert cluster.condition().state == "failing"
    assert ("loading", "failing") in cluster.events("") or ("ready", "failing") in cluster.events("")


def test_a_slot_that_is_well_for_long_begins_anew() -> None:
    cluster = watch("a")
    for _ in range(3 * SETTINGS.max_restarts):
        cluster.patients[next(iter(cluster.patients))].fault = "failed"
        cluster.run(10 + SETTINGS.forgive_after_s)
    assert len(cluster.killed) == 3 * SETTINGS.max_restarts


def test_two_that_share_a_slot_and_are_well_for_long_begin_anew() -> None:
    cluster = watch("a", "b")
    for _ in range(2 * SETTINGS.max_restarts):
        for patient in cluster.patients.values():
            patient.rank = 2
        cluster.patients[next(iter(cluster.patients))].fault = "failed"
        cluster.run(10 + SETTINGS.forgive_after_s)
    assert len(cluster.killed) == 2 * SETTINGS.max_restarts


@pytest.mark.parametrize("facts", [DeploymentFacts("UPDATING", "", 1), DeploymentFacts("HEALTHY", "", 0)])
def test_a_slot_that_was_given_up_begins_anew_with_a_new_version_and_after_a_scale_down(
    facts: DeploymentFacts,
) -> None:
    cluster = watch("a", comes_back="failed")
    cluster.supervisor.learn({"m": DeploymentFacts("HEALTHY", "", 1)})
    cluster.patients["a"].fault = "failed"
    cluster.run(400)
    assert len(cluster.killed) == SETTINGS.max_restarts
    cluster.supervisor.learn({"m": facts})
    cluster.run(400)
    assert len(cluster.killed) == 2 * SETTINGS.max_restarts


def test_replicas_that_die_by_themselves_are_not_held_against_their_slot() -> None:
    """A poison request kills its replicas: the router refuses it, and they are as good as before."""
    cluster = watch("a")
    for _ in range(10 * SETTINGS.max_restarts):
        cluster.end(next(iter(cluster.patients)))
        cluster.run(4)
    assert (cluster.killed, cluster.condition().state) == ([], "ready")
    cluster.patients[next(iter(cluster.patients))].fault = "failed"
    cluster.run(5)
    assert len(cluster.killed) == 1


# --- Ends --------------------------------------------------------------------------------------------


def test_one_that_has_ended_is_removed_at_once_and_suspect_while_routers_may_pick_it() -> None:
    cluster = watch("a", "b", takes_s=None)
    cluster.supervisor.ended("a")
    assert cluster.state("a") is None
    assert cluster.report() == ("a",)  # the Router has it still
    del cluster.patients["a"]
    cluster.run(SETTINGS.stall_after_s + 1)
    assert cluster.report() == ()


def test_a_heartbeat_that_was_still_on_the_way_does_not_bring_it_back() -> None:
    cluster = watch("a", "b")
    cluster.supervisor.ended("a")
    cluster.run(1)  # with one of its own
    assert cluster.state("a") is None


def test_one_that_was_wrongly_taken_for_ended_is_seen_again() -> None:
    cluster = watch("a", "b")
    cluster.supervisor.ended("a")
    cluster.run(6)
    assert cluster.state("a") is ReplicaState.READY
    assert cluster.report() == ()


def test_the_silent_and_those_that_are_being_ended_are_asked_after() -> None:
    cluster = watch("a", "b")
    assert cluster.supervisor.to_ask_after() == ()
    cluster.patients["a"].fault = "frozen"
    cluster.run(4)
    assert [beat.replica_id for beat in cluster.supervisor.to_ask_after()] == ["a"]


def test_what_could_not_be_ended_is_tried_again_after_a_pause() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "failed"
    tried: list[float] = []
    for _ in range(12):
        cluster.clock.advance(1.0)
        for patient in cluster.patients.values():
            cluster._beat(patient)
        for kill in cluster.supervisor.decide():
            tried.append(cluster.now)
            assert cluster.state("a") is ReplicaState.RESTARTING
            cluster.supervisor.not_ended(kill.replica_id, "ConnectionError")
    assert len(tried) == 2
    assert tried[1] - tried[0] >= SETTINGS.backoff_s
    assert ("restarting", "dead") in cluster.events("a")


def test_one_that_goes_on_after_it_was_ended_is_ended_again() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "failed"
    kills = 0
    for _ in range(40):
        cluster.clock.advance(1.0)
        for patient in cluster.patients.values():
            cluster._beat(patient)
        kills += len(cluster.supervisor.decide())
    assert kills == 3


# --- This actor's own trouble ------------------------------------------------------------------------


def test_an_actor_that_stood_still_itself_ends_nobody() -> None:
    cluster = watch("a", "b")
    cluster.clock.advance(1000.0)
    assert cluster.supervisor.decide() == ()
    cluster.run(20)
    assert cluster.killed == []


def test_after_it_stood_still_nobody_is_suspect_and_silence_is_counted_anew() -> None:
    cluster = watch("a", "b")
    cluster.clock.advance(1000.0)
    assert cluster.report() == ()  # though a report comes before anything else
    cluster.patients["a"].fault = "frozen"
    cluster.run(2)
    assert cluster.report() == ()
    cluster.run(2)
    assert cluster.report() == ("a",)


def test_decisions_that_come_late_are_no_absence() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "frozen"
    for second in range(12):
        cluster.clock.advance(1.0)
        cluster.supervisor.heartbeat(heartbeat("b", rank=1, actor="actor-b"))
        if second % 4 == 3:
            cluster.kills.extend((cluster.now, kill) for kill in cluster.supervisor.decide())
    assert cluster.killed == ["a"]


def test_probes_that_are_far_apart_are_no_absence() -> None:
    """Whether this actor stands still has nothing to do with how often it hears of others."""
    cluster = HealthWatch(HealthSettings(probe_period_s=5.0, missed_probes=1, stall_after_s=30.0))
    cluster.add("a", "b")
    cluster.run(10)
    cluster.patients["a"].fault = "frozen"
    for _ in range(8):
        for _ in range(4):
            cluster.clock.advance(1.25)
            cluster.supervisor.awake()
        cluster.run(5.0)
    assert cluster.killed == ["a"]


def test_an_actor_that_hears_nothing_at_all_is_cut_off_and_ends_nobody() -> None:
    cluster = watch("a", "b")
    for patient in cluster.patients.values():
        patient.fault = "frozen"
    cluster.router = False
    cluster.run(100)
    assert cluster.killed == []
    cluster.router = True
    cluster.run(2)
    assert cluster.killed == ["a"]


def test_one_that_comes_back_does_not_end_the_replacement_of_whom_it_has_ended() -> None:
    cluster = watch("a", "b", comes_back="loading", takes_s=1.0)
    cluster.patients["a"].fault = "frozen"
    cluster.run(12)
    assert cluster.killed == ["a"]
    again = HealthWatch(SETTINGS)
    again.patients = cluster.patients
    again.run(60)
    assert again.killed == []


# --- What is told ------------------------------------------------------------------------------------


def test_every_decision_is_an_event_with_a_reason() -> None:
    cluster = watch("a", "b")
    cluster.patients["a"].fault = "frozen"
    cluster.run(20)
    told = [(e.replica_id, e.before, e.after, e.reason) for e in cluster.supervisor.view().events]
    assert told == [
        ("a", "ready", "suspect", "no heartbeat for 4.0 s"),
        ("a", "suspect", "restarting", "no heartbeat for 11.0 s (restart 1 of 3, no other for 5 s)"),
        ("a", "restarting", "gone", "its process has ended"),
        ("a", "restarting", "replaced", "the replacement is ready, 2.0 s after the restart"),
    ]
    ages = [event.age_s for event in cluster.supervisor.view().events]
    assert ages == sorted(ages, reverse=True)


def test_a_load_that_takes_very_long_is_told_and_nobody_is_ended_for_it() -> None:
    cluster = watch()
    cluster.patients["a"] = Patient("a", fault="loading")
    cluster.run(SETTINGS.patience_s)
    assert cluster.condition() == ModelCondition("m", "loading")
    cluster.run(2)
    told, replica = "it has been loading for 301 s", cluster.replica("a")
    assert cluster.condition() == ModelCondition("m", "loading", "a replica takes very long to load", told)
    assert (replica and replica.state, replica and replica.reason) == (ReplicaState.STARTING, told)
    cluster.patients["a"].fault = ""
    cluster.run(1)
    assert cluster.condition() == ModelCondition("m", "ready")
    cluster.patients["a"].fault = "loading"  # its model was unloaded, and comes again
    cluster.run(2)
    assert (cluster.condition(), cluster.killed) == (ModelCondition("m", "loading"), [])


def test_the_log_is_bounded() -> None:
    cluster = watch("a")
    for _ in range(EVENTS):
        cluster.supervisor.ended(next(iter(cluster.patients)))
        cluster.end(next(iter(cluster.patients)))
        cluster.run(3)
    assert len(cluster.supervisor.view().events) == EVENTS


# --- What Routers are told ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "condemned"), [("frozen", False), ("wedged", True), ("failed", True), ("loading", False)]
)
def test_a_verdict_condemns_and_silence_does_not(fault: str, condemned: bool) -> None:
    cluster = watch("a", takes_s=None)
    cluster.patients["a"].fault = fault
    while "a" not in cluster.news().suspects and cluster.now < 30:
        cluster.run(1)
    assert cluster.killed == []
    assert ("a" in cluster.news().condemned) is condemned


def test_who_has_ended_or_was_given_up_is_condemned() -> None:
    cluster = watch("a", takes_s=1.0, comes_back="wedged")
    cluster.patients["a"].fault = "frozen"
    cluster.run(12)
    assert cluster.killed == ["a"] and "a" in cluster.news().condemned
    cluster.run(200)
    (last,) = cluster.patients
    assert cluster.state(last) is ReplicaState.DEAD
    cluster.patients[last].fault = "frozen"
    cluster.run(30)
    assert last in cluster.news().condemned


def test_who_is_silent_and_out_of_reach_may_be_well_all_the_same() -> None:
    cluster = watch("a")
    cluster.patients["a"].fault = "frozen"
    for _ in range(300):
        cluster.clock.advance(1.0)
        assert cluster.news().condemned == ()
        for kill in cluster.supervisor.decide():
            cluster.supervisor.not_ended(kill.replica_id, "ConnectionError")
    assert cluster.state("a") is ReplicaState.DEAD
