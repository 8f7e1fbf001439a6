from __future__ import annotations

import pytest

from blaze.reports import ReplicaCounters
from blaze.routing.replicas import Outcome, ReplicaInfo, ReplicaTable
from tests.fakes import FakeClock


def table(*ids: str, cap: int = 10, clock: FakeClock | None = None) -> ReplicaTable:
    made = ReplicaTable(cap=cap, clock=clock or FakeClock())
    made.sync(ReplicaInfo(id) for id in ids)
    return made


def eligible(of: ReplicaTable, *excluded: str) -> list[str]:
    return [replica.id for replica in of.eligible(excluded)]


def counters(of: ReplicaTable, id: str) -> ReplicaCounters:
    return next(found for found in of.counters("m") if found.replica_id == id)


def test_replicas_are_sorted_by_id_whatever_the_order_they_came_in() -> None:
    made = table("c", "a")
    made.sync([ReplicaInfo("b"), ReplicaInfo("a"), ReplicaInfo("c")])
    assert eligible(made) == ["a", "b", "c"]
    assert len(made) == 3


def test_a_lease_counts_from_the_pick_on_and_exactly_once() -> None:
    made = table("a")
    lease = made.lease("a")
    assert (counters(made, "a").in_flight, counters(made, "a").requests) == (1, 1)
    assert lease.release(Outcome.FAILURE)
    assert not lease.release(Outcome.FAILURE)
    assert not lease.release(Outcome.SUCCESS)
    found = counters(made, "a")
    assert (found.in_flight, found.requests, found.failures) == (0, 1, 1)


@pytest.mark.parametrize("outcome", [Outcome.SUCCESS, Outcome.NEUTRAL])
def test_only_failures_are_held_against_a_replica(outcome: Outcome) -> None:
    made = table("a")
    made.lease("a").release(outcome)
    assert counters(made, "a").failures == 0


def test_a_replica_at_its_cap_is_not_eligible_until_a_lease_comes_back() -> None:
    made = table("a", "b", cap=2)
    leases = [made.lease("a"), made.lease("a")]
    assert eligible(made) == ["b"]
    leases[0].release(Outcome.SUCCESS)
    assert eligible(made) == ["a", "b"]


def test_excluded_replicas_are_not_eligible() -> None:
    assert eligible(table("a", "b", "c"), "b", "unknown") == ["a", "c"]


def test_those_that_stay_keep_their_counters() -> None:
    made = table("a", "b")
    lease = made.lease("a")
    made.sync([ReplicaInfo("a"), ReplicaInfo("c")])
    assert counters(made, "a").in_flight == 1
    assert eligible(made) == ["a", "c"]
    lease.release(Outcome.SUCCESS)
    assert counters(made, "a").in_flight == 0


def test_case_23_nothing_is_inherited_from_a_dead_id() -> None:
    made = table("a", "b")
    lease = made.lease("a")
    made.sync([ReplicaInfo("b")])
    made.sync([ReplicaInfo("a"), ReplicaInfo("b")])
    assert counters(made, "a") == ReplicaCounters("a", "m", in_flight=0, weight=1.0, requests=0, failures=0)
    lease.release(Outcome.FAILURE)  # of the one that died
    assert (counters(made, "a").in_flight, counters(made, "a").failures) == (0, 0)


def test_case_23_a_replica_that_was_lost_is_not_picked_until_its_suspension_ends() -> None:
    clock = FakeClock()
    made = table("a", "b", clock=clock)
    made.suspend("a", 2.0)
    made.suspend("unknown", 2.0)
    assert eligible(made) == ["b"]
    made.sync([ReplicaInfo("a"), ReplicaInfo("b")])
    assert eligible(made) == ["b"], "the pool still lists it: that says nothing"
    clock.advance(1.9)
    assert eligible(made) == ["b"]
    clock.advance(0.1)
    assert eligible(made) == ["a", "b"]


def test_a_replica_that_comes_back_under_its_id_is_not_suspended() -> None:
    made = table("a", "b")
    made.suspend("a", 2.0)
    made.sync([ReplicaInfo("b")])
    made.sync([ReplicaInfo("a"), ReplicaInfo("b")])
    assert eligible(made) == ["a", "b"]


def test_full_replicas_are_available_and_suspended_ones_are_not() -> None:
    made = table("a", "b", "c", cap=1)
    made.lease("a")
    made.suspend("b", 2.0)
    assert [replica.id for replica in made.available()] == ["a", "c"]
    assert [replica.id for replica in made.available(["c"])] == ["a"]
    assert eligible(made) == ["c"]


def test_capacity_is_announced_when_a_lease_ends_and_when_the_live_set_changes() -> None:
    made = table("a")
    announced: list[list[str]] = []
    made.on_capacity.append(lambda: announced.append(eligible(made)))
    lease = made.lease("a")
    assert announced == []
    lease.release(Outcome.SUCCESS)
    lease.release(Outcome.SUCCESS)
    made.sync([ReplicaInfo("a"), ReplicaInfo("b")])
    assert announced == [["a"], ["a", "b"]]


def test_weight_and_counts_are_reported() -> None:
    made = ReplicaTable(cap=4, clock=FakeClock())
    made.sync([ReplicaInfo("a", node="node-1", weight=2.5)])
    assert made.counters("m") == (ReplicaCounters("a", "m", 0, 2.5, 0, 0),)
