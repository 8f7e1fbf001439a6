from __future__ import annotations

import math

import pytest

from blaze.reports import PeerLoad, ReplicaCounters
from blaze.routing.breaker import BreakerBoard
from blaze.routing.orders import Orders
from blaze.routing.outcome import Outcome
from blaze.routing.replica import ReplicaInfo
from blaze.routing.replicas import ReplicaTable
from blaze.routing.trip import BreakerSettings
from tests.fakes import FakeClock
from tests.routing_columns import Jitter, TableBench

INF = math.inf
S, F, N = Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL


def counters(bench: TableBench, replica_id: str) -> ReplicaCounters:
    return next(found for found in bench.table.counters("m") if found.replica_id == replica_id)


def weighed(**weights: float) -> ReplicaTable:
    clock = FakeClock()
    breakers = BreakerBoard(BreakerSettings(), clock, Jitter(0.0))
    table = ReplicaTable(cap=4, clock=clock, breakers=breakers, slow_start_s=0.0)
    table.sync(ReplicaInfo(replica_id, weight=weight) for replica_id, weight in weights.items())
    return table


# --- Who there is ------------------------------------------------------------------------------------


def test_replicas_are_sorted_by_id_whatever_the_order_they_came_in() -> None:
    bench = TableBench("c", "a")
    bench.sync("b", "a", "c")
    assert bench.eligible() == ["a", "b", "c"]
    assert len(bench.table) == 3


def test_an_empty_table_has_nobody() -> None:
    bench = TableBench()
    assert (bench.eligible(), bench.available(), bench.table.counters("m")) == ([], [], ())
    assert not bench.table.panic
    assert not bench.table.all_weights_are_zero
    bench.sync("a")
    bench.sync()
    assert bench.eligible() == []


def test_those_that_stay_keep_their_counters() -> None:
    bench = TableBench("a", "b")
    lease = bench.table.lease("b", cost=7.0)
    bench.sync("b", "aa", "c")
    assert bench.column("in_flight") == {"aa": 0.0, "b": 1.0, "c": 0.0}
    assert bench.column("cost") == {"aa": 0.0, "b": 7.0, "c": 0.0}
    assert bench.eligible() == ["aa", "b", "c"]
    lease.release(S)
    assert counters(bench, "b").in_flight == 0


def test_those_that_stay_are_as_full_as_before() -> None:
    bench = TableBench("b", "c", cap=1)
    lease = bench.table.lease("c")
    bench.sync("a", "c", "d")
    assert bench.eligible() == ["a", "d"]
    lease.release(S)
    assert bench.eligible() == ["a", "c", "d"]


@pytest.mark.parametrize("ended", ["before it left", "before it came back"])
def test_of_a_replica_that_leaves_nothing_stays_behind_when_nothing_runs_there(ended: str) -> None:
    bench = TableBench("a", "b", "c")
    lease = bench.table.lease("a", cost=5.0)
    lease.first_content(0.3)
    if ended == "before it left":
        lease.release(F)
    bench.table.suspend("a", 2.0)
    bench.sync("b", "c")
    lease.release(F)
    bench.sync("a", "b", "c")
    fresh = ReplicaCounters("a", "m", in_flight=0, weight=1.0, requests=0, failures=0)
    assert counters(bench, "a") == fresh
    assert bench.eligible() == ["a", "b", "c"], "nor is it suspended"
    assert bench.column("success")["a"] == 1.0
    assert math.isnan(bench.column("drain")["a"])


def test_a_replica_that_comes_back_is_as_full_as_what_still_runs_there_makes_it() -> None:
    bench = TableBench("a", "b", cap=2)
    bench.table.set_peers({"a": PeerLoad(1, 1.0)})
    leases = [bench.table.lease("a", cost=5.0) for _ in range(2)]
    bench.sync()
    assert bench.table.in_flight == 2, "they still run"
    bench.sync("a", "b")
    assert bench.eligible() == ["b"]
    assert (bench.column("in_flight")["a"], bench.column("cost")["a"]) == (2.0, 10.0)
    assert not counters(bench, "a").draining
    leases[0].recost(7.0)
    leases[1].release(S)
    assert (bench.column("in_flight")["a"], bench.column("cost")["a"]) == (1.0, 7.0)
    assert bench.eligible() == ["a", "b"]
    leases[0].release(S)
    assert bench.table.in_flight == 0


def test_failures_of_a_dead_id_trip_no_breaker() -> None:
    bench = TableBench("a", "b")
    leases = [bench.table.lease("a") for _ in range(6)]
    bench.sync("b")
    bench.sync("a", "b")
    for lease in leases:
        lease.release(F)
    assert bench.eligible() == ["a", "b"]


# --- Leases ------------------------------------------------------------------------------------------


def test_a_lease_counts_from_the_pick_on_and_exactly_once() -> None:
    bench = TableBench("a")
    lease = bench.table.lease("a", cost=3.0)
    found = counters(bench, "a")
    assert (found.in_flight, found.requests, found.cost) == (1, 1, 3.0)
    assert lease.release(F)
    assert not lease.release(F)
    assert not lease.release(S)
    lease.first_content(9.0)
    lease.recost(9.0)
    found = counters(bench, "a")
    assert (found.in_flight, found.requests, found.failures, found.cost) == (0, 1, 1, 0.0)
    assert found.ewma_ms == 5000.0
    assert bench.table.in_flight == 0


@pytest.mark.parametrize(("outcome", "failures"), [(S, 0), (N, 0), (F, 1)])
def test_only_failures_are_held_against_a_replica(outcome: Outcome, failures: int) -> None:
    bench = TableBench("a")
    bench.send("a", outcome)
    assert counters(bench, "a").failures == failures


@pytest.mark.parametrize(
    ("outcomes", "success"),
    [((), 1.0), ((S, S), 1.0), ((N, N), 1.0), ((F,), 0.9), ((F, F), 0.81), ((F, N, S), 0.91)],
)
def test_the_rate_of_success_is_an_ewma_in_which_neutral_does_not_count(
    outcomes: tuple[Outcome, ...], success: float
) -> None:
    bench = TableBench("a")
    bench.send("a", *outcomes)
    assert bench.column("success") == {"a": pytest.approx(success)}


def test_costs_follow_what_is_learnt_of_a_request() -> None:
    bench = TableBench("a", "b")
    first, second = bench.table.lease("a", cost=10.0), bench.table.lease("a", cost=1.0)
    bench.table.lease("b", cost=2.0)
    assert bench.column("cost") == {"a": 11.0, "b": 2.0}
    first.recost(4.0)
    assert bench.column("cost") == {"a": 5.0, "b": 2.0}
    first.release(S)
    assert bench.column("cost") == {"a": 1.0, "b": 2.0}
    second.release(N)
    assert bench.column("cost") == {"a": 0.0, "b": 2.0}


def test_rounding_errors_of_costs_do_not_add_up() -> None:
    bench = TableBench("a", cap=1000)
    for cost in (0.1, 0.2, 0.7, 1e15, 0.3):
        leases = [bench.table.lease("a", cost=cost * share) for share in (1.0, 0.3, 7.7)]
        leases[0].recost(0.1)
        for lease in leases:
            lease.release(S)
        assert counters(bench, "a").cost == bench.column("cost")["a"] == 0.0


def test_speed_is_what_was_served_while_busy() -> None:
    bench = TableBench("a", "b")
    bench.clock.advance(100.0)  # idle: that does not count
    lease = bench.table.lease("a", cost=10.0)
    bench.clock.advance(2.0)
    lease.recost(30.0)
    lease.release(S)
    assert bench.column("drain")["a"] == pytest.approx(15.0)
    assert math.isnan(bench.column("drain")["b"])


@pytest.mark.parametrize("outcome", [F, N])
def test_time_in_which_nothing_was_served_says_nothing_of_speed(outcome: Outcome) -> None:
    bench = TableBench("a")
    for ending in (outcome, S):
        lease = bench.table.lease("a", cost=10.0)
        bench.clock.advance(1.0)
        lease.release(ending)
    assert bench.column("drain")["a"] == pytest.approx(10.0)


# --- Who may be picked -------------------------------------------------------------------------------


def test_a_replica_at_its_cap_is_not_eligible_until_a_lease_comes_back() -> None:
    bench = TableBench("a", "b", cap=2)
    leases = [bench.table.lease("a"), bench.table.lease("a")]
    assert (bench.eligible(), bench.available()) == (["b"], ["a", "b"])
    leases[0].release(S)
    assert bench.eligible() == ["a", "b"]


def test_excluded_replicas_are_not_eligible() -> None:
    bench = TableBench("a", "b", "c")
    assert bench.eligible("b", "unknown") == ["a", "c"]
    assert bench.available("b", "unknown") == ["a", "c"]
    assert bench.eligible() == ["a", "b", "c"], "the next one excludes nobody"


def test_full_replicas_are_available_and_suspended_ones_are_not() -> None:
    bench = TableBench("a", "b", "c", cap=1)
    bench.table.lease("a")
    bench.table.suspend("b", 2.0)
    assert bench.available() == ["a", "c"]
    assert bench.eligible() == ["c"]


def test_capacity_is_announced_whenever_there_may_be_more() -> None:
    bench = TableBench("a", "b", cap=1)
    announced: list[list[str]] = []
    bench.table.on_capacity.append(lambda: announced.append(bench.eligible()))
    lease = bench.table.lease("a")
    assert announced == []
    lease.release(S)
    lease.release(S)
    bench.table.follow(Orders({"b": 0.0}))
    bench.table.follow(Orders({"b": 0.0}, {"a": INF}))
    bench.table.follow(Orders({"b": 0.0}))
    bench.table.set_suspects(["a"])
    bench.sync("a", "b", "c")
    bench.table.follow(Orders({"b": 2.0}, {"c": INF}))
    assert announced == [["a", "b"], ["a"], [], ["a"], [], ["c"], ["b"]]


# --- Suspension --------------------------------------------------------------------------------------


def test_a_replica_that_was_lost_is_not_picked_until_its_suspension_ends() -> None:
    bench = TableBench("a", "b")
    assert bench.eligible() == ["a", "b"]
    bench.table.suspend("a", 2.0)
    bench.table.suspend("unknown", 2.0)
    assert bench.eligible() == ["b"]
    bench.sync("a", "b")
    assert bench.eligible() == ["b"], "the pool still lists it: that says nothing"
    bench.clock.advance(1.9)
    assert bench.eligible() == ["b"]
    bench.clock.advance(0.1)
    assert bench.eligible() == ["a", "b"]


@pytest.mark.parametrize(
    ("losses", "pause_s"), [(1, 2.0), (2, 4.0), (3, 8.0), (4, 16.0), (5, 30.0), (6, 30.0), (2000, 30.0)]
)
def test_each_loss_in_a_row_suspends_for_twice_as_long(losses: int, pause_s: float) -> None:
    bench = TableBench("a", "b")
    for loss in range(losses):
        bench.clock.advance(30.0 * (loss > 0))
        bench.table.suspend("a", 2.0)
    bench.clock.advance(pause_s - 0.1)
    assert bench.eligible() == ["b"]
    bench.clock.advance(0.1)
    assert bench.eligible() == ["a", "b"]


def test_calls_that_are_lost_together_are_one_loss() -> None:
    bench = TableBench("a", "b")
    for _ in range(16):
        bench.table.suspend("a", 2.0)
    bench.clock.advance(2.0)
    assert bench.eligible() == ["a", "b"]


@pytest.mark.parametrize(("outcome", "pause_s"), [(S, 2.0), (N, 16.0), (F, 16.0)])
def test_a_success_ends_the_row_of_losses(outcome: Outcome, pause_s: float) -> None:
    bench = TableBench("a", "b")
    for _ in range(3):
        bench.table.suspend("a", 2.0)
        bench.clock.advance(30.0)
    bench.send("a", outcome)
    bench.table.suspend("a", 2.0)
    bench.clock.advance(pause_s - 0.1)
    assert bench.eligible() == ["b"]
    bench.clock.advance(0.1)
    assert bench.eligible() == ["a", "b"]


def test_several_suspensions_end_one_after_the_other() -> None:
    bench = TableBench("a", "b", "c")
    bench.table.suspend("a", 3.0)
    bench.table.suspend("b", 1.0)
    seen = []
    for _ in range(4):
        seen.append("".join(bench.eligible()))
        bench.clock.advance(1.0)
    assert seen == ["c", "bc", "bc", "abc"]


# --- Weights, draining, suspects ---------------------------------------------------------------------


def test_weight_and_counts_are_reported() -> None:
    assert weighed(a=2.5).counters("m") == (ReplicaCounters("a", "m", 0, 2.5, 0, 0),)


def test_weight_0_is_never_picked_and_all_weights_0_is_told_apart() -> None:
    table = weighed(a=0.0, b=1.0)

    def found() -> tuple[list[int], list[int], bool]:
        return table.eligible().tolist(), table.available().tolist(), table.all_weights_are_zero

    assert found() == ([1], [1], False)
    table.follow(Orders({"b": 0.0}))
    assert found() == ([], [], True)
    table.follow(Orders({"b": 0.0, "a": 0.5}))
    assert found() == ([0], [0], False)
    assert table.columns.weight.tolist() == [0.5, 0.0]


def test_an_operators_weight_stays_whatever_the_pool_says() -> None:
    table = weighed(a=1.0, b=1.0)
    table.follow(Orders({"a": 3.0}))
    table.sync([ReplicaInfo("a", weight=1.0), ReplicaInfo("b", weight=2.0)])
    assert table.columns.weight.tolist() == [3.0, 2.0]


def test_a_draining_replica_is_not_picked_and_keeps_what_it_has() -> None:
    bench = TableBench("a", "b")
    lease = bench.table.lease("a")
    bench.table.follow(Orders(drained={"a": INF}))
    assert bench.eligible() == bench.available() == ["b"]
    assert (counters(bench, "a").draining, counters(bench, "a").in_flight) == (True, 1)
    lease.release(S)
    assert counters(bench, "a").in_flight == 0
    bench.table.follow(Orders())
    assert bench.eligible() == ["a", "b"]


def test_what_operators_decided_waits_for_replicas_that_are_not_there_yet() -> None:
    bench = TableBench("a", "b")
    bench.table.follow(Orders({"a": 4.0, "c": 5.0}, {"b": INF, "d": INF}))
    assert bench.eligible() == ["a"]
    bench.sync("a", "b", "c", "d")
    assert bench.eligible() == ["a", "c"]
    assert bench.column("weight") == {"a": 4.0, "b": 1.0, "c": 5.0, "d": 1.0}
    bench.table.follow(Orders({"a": 4.0, "c": 5.0}))
    assert bench.eligible() == ["a", "b", "c", "d"]


def test_suspects_are_not_picked_until_they_answer_again() -> None:
    bench = TableBench("a", "b", "c")
    bench.table.set_suspects(["a", "unknown"])
    assert bench.eligible() == bench.available() == ["b", "c"]
    bench.table.set_suspects(["b"])
    assert bench.eligible() == ["a", "c"]
    bench.table.set_suspects([])
    assert bench.eligible() == ["a", "b", "c"]


def test_when_all_are_suspects_none_is() -> None:
    bench = TableBench("a", "b")
    bench.table.set_suspects(["a", "b"])
    assert bench.eligible() == ["a", "b"]


def test_when_all_are_suspects_those_are_out_of_which_more_is_known() -> None:
    bench = TableBench("a", "b")
    assert bench.table.set_suspects(["a", "b"], ["a"]) == {"a"}
    assert bench.eligible() == ["b"]
    assert bench.table.set_suspects(["a", "b"], ["a", "b"]) == {"b"}
    assert bench.eligible() == []
    bench.table.set_suspects([])
    assert bench.eligible() == ["a", "b"]


# --- Slow start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after_s", "ramp"), [(0.0, 0.1), (3.0, 0.19), (15.0, 0.55), (29.0, 0.97), (30.0, 1.0), (1000.0, 1.0)]
)
def test_a_replica_that_joins_ramps_up_over_30_s(after_s: float, ramp: float) -> None:
    bench = TableBench("a", slow_start_s=30.0)
    bench.clock.advance(100.0)
    bench.sync("a", "b")
    bench.clock.advance(after_s)
    assert bench.column("ramp") == {"a": 1.0, "b": pytest.approx(ramp)}


def test_the_ramp_goes_on_while_requests_come() -> None:
    bench = TableBench("a", slow_start_s=30.0)
    seen = []
    for _ in range(4):
        seen.append(bench.column("ramp")["a"])
        bench.clock.advance(10.0)
    assert seen == pytest.approx([0.1, 0.4, 0.7, 1.0])


def test_a_new_member_does_not_start_the_others_again() -> None:
    bench = TableBench("a", slow_start_s=30.0)
    bench.clock.advance(10.0)
    bench.sync("a", "0")
    assert bench.column("ramp") == pytest.approx({"0": 0.1, "a": 0.4})


def test_a_breaker_that_closes_starts_the_replica_slowly() -> None:
    bench = TableBench("a", "b", slow_start_s=30.0)
    bench.clock.advance(100.0)
    bench.send("a", *[F] * 5)
    bench.clock.advance(1.0)
    assert bench.eligible() == ["a", "b"]
    bench.send("a", S)
    assert bench.column("ramp") == {"a": 1.0, "b": 1.0}
    bench.send("a", S)
    assert bench.column("ramp") == pytest.approx({"a": 0.1, "b": 1.0})
    bench.clock.advance(15.0)
    assert bench.column("ramp") == pytest.approx({"a": 0.55, "b": 1.0})


def test_without_slow_start_there_is_no_ramp() -> None:
    assert TableBench("a").column("ramp") == {"a": 1.0}


# --- Other Routers -----------------------------------------------------------------------------------


def test_peers_requests_count_beside_our_own() -> None:
    bench = TableBench("a", "b")
    assert bench.table.peers_known_at == -math.inf
    lease = bench.table.lease("a", cost=2.0)
    bench.clock.advance(1.0)
    bench.table.set_peers({"a": PeerLoad(3, 30.0), "unknown": PeerLoad(9, 9.0)})
    assert bench.column("in_flight") == {"a": 4.0, "b": 0.0}
    assert bench.column("cost") == {"a": 32.0, "b": 0.0}
    assert bench.table.peers_known_at == bench.clock.now()
    assert (counters(bench, "a").in_flight, counters(bench, "a").cost) == (1, 2.0), "reports are of our own"
    lease.release(S)
    assert bench.column("in_flight") == {"a": 3.0, "b": 0.0}
    assert bench.column("cost") == {"a": 30.0, "b": 0.0}
    bench.table.set_peers({"b": PeerLoad(1, 1.0)})
    assert bench.column("in_flight") == {"a": 0.0, "b": 1.0}
    assert bench.column("cost") == {"a": 0.0, "b": 1.0}


# --- Breakers ----------------------------------------------------------------------------------------


def test_a_replica_whose_breaker_is_open_is_not_picked_until_its_time_has_come() -> None:
    bench = TableBench("a", "b")
    bench.send("a", *[F] * 5)
    assert bench.eligible() == bench.available() == ["b"]
    assert counters(bench, "a").breaker == "open"
    bench.clock.advance(0.9)
    assert bench.eligible() == ["b"]
    bench.clock.advance(0.1)
    assert bench.eligible() == ["a", "b"]
    assert counters(bench, "a").breaker == "half_open"


def test_while_a_probe_is_out_the_replica_is_not_picked() -> None:
    bench = TableBench("a", "b")
    bench.send("a", *[F] * 5)
    bench.clock.advance(1.0)
    assert bench.eligible() == ["a", "b"]
    probe = bench.table.lease("a", expires_at=bench.clock.now() + 5.0)
    assert bench.eligible() == bench.available() == ["b"]
    probe.release(N)
    assert bench.eligible() == ["a", "b"], "neutral gives the permit back"
    bench.table.lease("a", expires_at=bench.clock.now() + 5.0)
    assert bench.eligible() == ["b"]
    bench.clock.advance(5.0)
    assert bench.eligible() == ["a", "b"], "its lease has ended"


def test_two_probes_bring_a_replica_back() -> None:
    bench = TableBench("a", "b")
    bench.send("a", *[F] * 5)
    bench.clock.advance(1.0)
    bench.eligible()
    bench.send("a", S, S)
    assert counters(bench, "a").breaker == "closed"
    leases = [bench.table.lease("a") for _ in range(3)]
    assert bench.eligible() == ["a", "b"], "no probes any more"
    assert all(lease.release(S) for lease in leases)


def test_breakers_that_refuse_more_than_half_are_ignored() -> None:
    bench = TableBench("a", "b", "c")
    for replica_id, eligible, panic in (("a", "bc", False), ("b", "abc", True), ("c", "abc", True)):
        bench.table.breakers.act(replica_id, "open")
        bench.table.changed()
        assert ("".join(bench.eligible()), bench.table.panic) == (eligible, panic)
    bench.table.breakers.act("a", "close")
    bench.table.breakers.act("b", "close")
    bench.table.changed()
    assert (bench.eligible(), bench.table.panic) == (["a", "b"], False)


def test_in_a_panic_drain_suspicion_suspension_and_weight_are_heeded_nevertheless() -> None:
    bench = TableBench(*"abcdef", cap=1)
    for replica_id in "abcdef":
        bench.table.breakers.act(replica_id, "open")
    bench.table.follow(Orders({"e": 0.0}, {"b": INF}))
    bench.table.set_suspects(["c"])
    bench.table.suspend("d", 2.0)
    bench.table.lease("f")
    assert (bench.eligible(), bench.available(), bench.table.panic) == (["a"], ["a", "f"], True)


def test_half_refused_is_no_panic_and_those_that_cannot_be_picked_do_not_count() -> None:
    bench = TableBench("a", "b", "c", "d")
    bench.table.breakers.act("a", "open")
    bench.table.breakers.act("b", "open")
    bench.table.changed()
    assert (bench.eligible(), bench.table.panic) == (["c", "d"], False)
    bench.table.follow(Orders(drained={"c": INF}))
    assert (bench.eligible(), bench.table.panic) == (["a", "b", "d"], True), "two of the three that are ready"
    bench.table.follow(Orders(drained={"a": INF, "c": INF}))
    assert (bench.eligible(), bench.table.panic) == (["d"], False), "one of two"


def test_fullness_is_no_reason_to_panic() -> None:
    bench = TableBench("a", "b", "c", cap=1)
    for replica_id in "abc":
        bench.table.lease(replica_id)
    assert (bench.eligible(), bench.table.panic) == ([], False)


def test_a_replica_on_trial_does_not_refuse() -> None:
    bench = TableBench("a", "b", "c", "d")
    bench.send("a", *[F] * 5)
    bench.send("b", *[F] * 5)
    bench.table.follow(Orders(drained={"c": INF}))
    bench.clock.advance(1.0)
    assert bench.eligible() == ["a", "b", "d"]
    for replica_id in "ab":
        bench.table.lease(replica_id, expires_at=bench.clock.now() + 5.0)
    assert (bench.eligible(), bench.table.panic) == (["d"], False)


# --- Idle ones ---------------------------------------------------------------------------------------


def test_idle_is_who_has_fewer_than_it_works_on_at_once() -> None:
    bench = TableBench("a", "b", cap=4, at_once=2)
    leases = [bench.table.lease("a") for _ in range(2)]
    assert (bench.idle(), bench.eligible()) == (["b"], ["a", "b"])
    leases.append(bench.table.lease("a"))
    leases[0].release(S)
    assert bench.idle() == ["b"]
    leases[1].release(S)
    assert bench.idle() == ["a", "b"]


def test_a_cap_below_what_it_works_on_at_once_holds_too() -> None:
    bench = TableBench("a", cap=1, at_once=8)
    bench.table.lease("a")
    assert (bench.idle(), bench.eligible()) == ([], [])


@pytest.mark.parametrize(
    ("here", "peers", "idle"),
    [(0, 9, True), (1, 9, True), (2, 2, False), (2, 9, False), (2, 1, True), (3, 0, True), (4, 0, False)],
)
def test_of_what_a_replica_works_on_each_router_has_its_share_and_what_the_others_leave(
    here: int, peers: int, idle: bool
) -> None:
    bench = TableBench("a", cap=8, at_once=4, routers=2)
    for _ in range(here):
        bench.table.lease("a")
    bench.table.set_peers({"a": PeerLoad(peers, 0.0)})
    assert bench.idle() == (["a"] if idle else [])


def test_news_of_the_others_make_room() -> None:
    bench = TableBench("a", cap=8, at_once=4, routers=2)
    for _ in range(2):
        bench.table.lease("a")
    bench.table.set_peers({"a": PeerLoad(2, 0.0)})
    announced: list[list[str]] = []
    bench.table.on_capacity.append(lambda: announced.append(bench.idle()))
    bench.table.set_peers({"a": PeerLoad(1, 0.0)})
    assert announced == [["a"]]


def test_who_answers_its_health_checks_again_is_tried_at_once() -> None:
    bench = TableBench("a", "b", "c")
    bench.send("a", *[F] * 5)
    bench.table.set_suspects(["a"])
    assert bench.table.breakers.state("a") == "open"
    bench.table.set_suspects([])
    assert bench.table.breakers.state("a") == "half_open"


def test_when_requests_wait_that_nobody_has_room_for_who_is_out_is_tried_after_a_second() -> None:
    bench = TableBench("a", "b", "c", cap=1)
    for _ in range(5):
        bench.send("a", *[F] * 5)
        bench.table.breakers.act("a", "close")
    bench.send("a", *[F] * 5)  # out for half a minute
    bench.table.needed()
    assert bench.table.breakers.state("a") == "open"
    bench.clock.advance(1.0)
    assert bench.eligible() == ["b", "c"]
    bench.table.needed()
    assert bench.eligible() == ["a", "b", "c"]
    assert bench.table.probes == ["a"]


def test_success_begins_anew_when_a_breaker_closes() -> None:
    bench = TableBench("a", "b", "c")
    bench.send("a", *[F] * 5)
    bench.clock.advance(1.0)
    assert bench.eligible() == ["a", "b", "c"]
    bench.send("a", S, S)
    assert bench.table.breakers.state("a") == "closed"
    assert bench.column("success") == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_who_is_not_ready_keeps_what_runs_there() -> None:
    bench = TableBench("a", "b", cap=1)
    lease = bench.table.lease("a")
    bench.table.sync([ReplicaInfo("a", ready=False), ReplicaInfo("b")])
    assert bench.available() == ["b"]
    bench.table.sync([ReplicaInfo("a"), ReplicaInfo("b")])
    assert (bench.available(), bench.eligible()) == (["a", "b"], ["b"])
    lease.release(S)
    assert bench.eligible() == ["a", "b"]


def test_suspicion_of_all_is_no_sign_of_health() -> None:
    bench = TableBench("a", "b", "c")
    bench.send("a", *[F] * 5)
    bench.table.set_suspects(["a"])
    bench.table.set_suspects(["a", "b", "c"])
    assert bench.table.breakers.state("a") == "open"
