"""What operators change, summed up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blaze.control import (
    NO_CHANGES,
    ActOnBreaker,
    Change,
    Control,
    Drain,
    SetAllDraining,
    SetDraining,
    SetNodeDraining,
    SetStrategy,
    SetWeight,
)
from blaze.errors import InvalidRequest
from blaze.health.settings import HealthSettings
from blaze.health.supervisor import Supervisor
from blaze.reports import EngineStatus, Heartbeat, PeerLoad, ReplicaCounters, RouterReport
from blaze.types import EngineKind
from tests.fakes import FakeClock


def test_each_change_has_a_number_and_the_last_one_counts() -> None:
    control = NO_CHANGES
    for change in (
        SetStrategy("m", "ip_hash"),
        SetStrategy("n", "adaptive"),
        SetStrategy("m", "round_robin"),
        SetWeight("a", 2.0),
        SetWeight("a", 0.0),
        SetDraining("a", True),
        SetDraining("b", True),
        SetDraining("a", False),
        ActOnBreaker("a", "open"),
    ):
        control = control.after(change)
    assert control.version == 9
    assert dict(control.strategies) == {"m": "round_robin", "n": "adaptive"}
    assert control.weights == (("a", 0.0),)
    assert control.draining == (("b", Drain(7)),)
    assert control.breakers == ((9, ActOnBreaker("a", "open")),)
    assert control.forced_open == ("a",)
    assert control.after(ActOnBreaker("a", "close")).forced_open == ()
    assert NO_CHANGES.version == 0


def test_what_is_drained_carries_its_seconds_and_the_number_of_the_last_change() -> None:
    control = NO_CHANGES
    for change in (
        SetDraining("a", True, 5.0),
        SetNodeDraining("n1", True),
        SetNodeDraining("n2", True, 1.5),
        SetAllDraining(True, 9.0),
        SetDraining("a", True, 2.0),
        SetNodeDraining("n1", False),
        SetNodeDraining("n3", False),
    ):
        control = control.after(change)
    assert control.draining == (("a", Drain(5, 2.0)),)
    assert control.draining_nodes == (("n2", Drain(3, 1.5)),)
    assert control.draining_all == Drain(4, 9.0)
    assert control.after(SetAllDraining(False)).draining_all is None
    assert control.without({"a"}).draining_nodes == control.draining_nodes


def test_breaker_actions_are_remembered_only_so_long() -> None:
    control = NO_CHANGES
    for _ in range(100):
        control = control.after(ActOnBreaker("a", "reset"))
    assert [version for version, _ in control.breakers] == list(range(37, 101))


def test_of_a_replica_that_is_forgotten_nothing_is_left_and_of_the_others_everything() -> None:
    control = NO_CHANGES.after(SetStrategy("m", "adaptive"))
    for replica_id in ("a", "b"):
        for change in (
            SetWeight(replica_id, 2.0),
            SetDraining(replica_id, True),
            ActOnBreaker(replica_id, "open"),
        ):
            control = control.after(change)
    assert control.replica_ids == {"a", "b"}
    assert control.without({"a"}) == Control(
        version=8,
        strategies=(("m", "adaptive"),),
        weights=(("b", 2.0),),
        draining=(("b", Drain(6)),),
        forced_open=("b",),
        breakers=((7, ActOnBreaker("b", "open")),),
    )
    assert control.without({"a"}).replica_ids == {"b"}
    assert control.version == 7  # itself it is as before


@pytest.mark.parametrize(
    "change",
    [SetWeight("a", 2.0), SetDraining("a", True), ActOnBreaker("a", "open"), ActOnBreaker("a", "reset")],
)
def test_every_kind_of_setting_names_its_replica(change: Change) -> None:
    assert NO_CHANGES.after(change).replica_ids == {"a"}


def counters(replica_id: str, in_flight: int, cost: float) -> ReplicaCounters:
    return ReplicaCounters(replica_id, "m", in_flight, 1.0, 10, 0, cost)


def heartbeat(replica_id: str, prefixes: bytes = b"") -> Heartbeat:
    status = EngineStatus(EngineKind.LLM, "idle", 0, 0, 0, None, prefixes=prefixes)
    return Heartbeat(replica_id, "m", 0, "node", 1, status, 0)


def test_a_router_hears_of_the_others_loads_but_not_of_its_own() -> None:
    supervisor = Supervisor(HealthSettings(), FakeClock())
    supervisor.report(RouterReport("r1", (), (counters("a", 3, 30.0), counters("b", 1, 5.0))))
    supervisor.report(RouterReport("r2", (), (counters("a", 2, 7.0),)))
    news = supervisor.report(RouterReport("r3", (), (counters("a", 9, 99.0),)))
    assert dict(news.peers) == {"a": PeerLoad(5, 37.0), "b": PeerLoad(1, 5.0)}


def test_a_router_that_is_gone_is_no_peer_any_more() -> None:
    clock = FakeClock()
    supervisor = Supervisor(HealthSettings(stall_after_s=30.0), clock)
    supervisor.report(RouterReport("r1", (), (counters("a", 3, 30.0),)))
    clock.advance(31.0)
    assert supervisor.report(RouterReport("r2", (), ())).peers == ()


def test_a_change_reaches_every_router_with_its_next_report() -> None:
    supervisor = Supervisor(HealthSettings(), FakeClock())
    supervisor.report(RouterReport("r1", (), ()))
    made = supervisor.change(SetWeight("a", 0.5), NO_CHANGES)
    assert supervisor.report(RouterReport("r1", (), ())).control == made
    assert supervisor.report(RouterReport("r2", (), ())).control == made


def test_a_health_actor_that_has_come_back_learns_from_the_routers() -> None:
    first = Supervisor(HealthSettings(), FakeClock())
    made = first.change(SetStrategy("m", "adaptive"), NO_CHANGES)
    second = Supervisor(HealthSettings(), FakeClock())
    assert second.report(RouterReport("r1", (), (), made)).control == made
    assert second.report(RouterReport("r2", (), ())).control == made
    assert second.change(SetWeight("a", 2.0), NO_CHANGES).version == made.version + 1


def test_a_change_that_reaches_a_new_health_actor_first_undoes_nothing() -> None:
    known = Supervisor(HealthSettings(), FakeClock()).change(SetStrategy("m", "adaptive"), NO_CHANGES)
    made = Supervisor(HealthSettings(), FakeClock()).change(SetWeight("a", 0.0), known)
    assert (made.version, made.strategies, made.weights) == (2, (("m", "adaptive"),), (("a", 0.0),))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SetWeight("a", float("nan")),
        lambda: SetWeight("a", -1),
        lambda: SetWeight("a", 1e9),
        lambda: SetWeight("a", "x"),  # type: ignore[arg-type]
        lambda: SetWeight("", 1),
        lambda: SetDraining("a", "yes"),  # type: ignore[arg-type]
        lambda: SetDraining("a", True, float("nan")),
        lambda: SetDraining("a", True, -1.0),
        lambda: SetDraining("a", True, float("inf")),
        lambda: SetDraining("a", True, "5"),  # type: ignore[arg-type]
        lambda: SetDraining("a", True, True),
        lambda: SetNodeDraining("", True),
        lambda: SetNodeDraining("n" * 257, True),
        lambda: SetNodeDraining("n", None),  # type: ignore[arg-type]
        lambda: SetNodeDraining("n", True, -1.0),
        lambda: SetAllDraining("no"),  # type: ignore[arg-type]
        lambda: SetAllDraining(True, float("nan")),
        lambda: ActOnBreaker("a", "explode"),  # type: ignore[arg-type]
        lambda: SetStrategy("m", None),  # type: ignore[arg-type]
    ],
)
def test_a_change_that_makes_no_sense_cannot_be_made(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidRequest):
        make()


def test_who_is_silent_or_has_failed_is_suspect() -> None:
    clock = FakeClock()
    supervisor = Supervisor(HealthSettings(probe_period_s=1.0, missed_probes=3), clock)
    supervisor.heartbeat(heartbeat("silent"))
    for _ in range(4):
        clock.advance(0.8)
        supervisor.heartbeat(heartbeat("well"))
    supervisor.heartbeat(
        Heartbeat("failed", "m", 0, "node", 1, EngineStatus(EngineKind.LLM, "failed", 0, 0, 0, None), 0)
    )
    news = supervisor.report(RouterReport("r1", (), ()))
    assert set(news.suspects) == {"silent", "failed"}
    assert news.condemned == ("failed",), "of the silent one nothing is known"


def test_prefixes_of_replicas_are_passed_on() -> None:
    supervisor = Supervisor(HealthSettings(), FakeClock())
    supervisor.heartbeat(heartbeat("a", b"1234"))
    supervisor.heartbeat(heartbeat("b"))
    assert supervisor.report(RouterReport("r1", (), ())).prefixes == (("a", b"1234"),)
