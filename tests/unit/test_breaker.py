from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from blaze.errors import InvalidRequest
from blaze.routing.breaker import BreakerState, Permit
from blaze.routing.outcome import Outcome
from blaze.routing.trip import BreakerSettings, open_for_s
from tests.routing_columns import BreakerBench, Jitter

OUTCOMES = {"S": Outcome.SUCCESS, "F": Outcome.FAILURE, "N": Outcome.NEUTRAL}
S, F, N = OUTCOMES.values()


def bench_of(count: int) -> BreakerBench:
    return BreakerBench(*"abcdefghij"[:count])


def reasons(bench: BreakerBench) -> list[str]:
    return [f"{change.replica_id} {change.after}: {change.reason}" for change in bench.transitions]


# --- When to trip ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ("FFFF", "closed"),
        ("FFFFF", "open"),
        ("FFFFS", "closed"),
        ("FFFFSFFFF", "closed"),
        ("SFFFFSFFFF", "open"),  # 8 of 10
        ("FFFFNF", "open"),  # neutral resets no counter
        ("FNNFNNFNNFNN", "closed"),
        ("FNNFNNFNNFNNF", "open"),
        ("SFSFSFSF", "closed"),
        ("SFSFSFSFF", "closed"),  # 9 outcomes are too few for the rate
        ("SFSFSFSFSF", "open"),  # 5 of 10
        ("SSSFSFSFSF", "closed"),  # 4 of 10
        ("SSSFSFSFSFF", "closed"),  # 5 of 11
        ("SSSFSFSFSFFF", "open"),  # 6 of 12
        ("SFSFSFSFNN", "closed"),  # neutral is no outcome
        ("SFNSFNSFNSFNSFN", "open"),
        ("N" * 100, "closed"),
        ("S" * 100 + "FFFF", "closed"),
        ("S" * 100 + "FFFFF", "open"),
    ],
)
def test_five_failures_in_a_row_or_half_of_ten_trip(outcomes: str, state: str) -> None:
    bench = bench_of(2)
    bench.send("a", *(OUTCOMES[outcome] for outcome in outcomes))
    assert bench.states("a", "b") == [state, "closed"]


def test_the_reason_says_which_rule_it_was() -> None:
    bench = bench_of(4)
    bench.trip("a")
    bench.send("b", *[S, F] * 5)
    assert reasons(bench) == ["a open: 5 failures in a row", "b open: 5 of 10 requests failed in 10 s"]


@pytest.mark.parametrize(
    ("after_s", "state"),
    [(0.0, "open"), (8.0, "open"), (9.0, "open"), (9.99, "open"), (10.0, "closed"), (60.0, "closed")],
)
def test_outcomes_count_for_ten_buckets_of_a_second(after_s: float, state: str) -> None:
    bench = bench_of(2)
    bench.send("a", *[S, F] * 4)
    bench.clock.advance(after_s)
    bench.send("a", S, F)
    assert bench.states("a") == [state]


def test_old_buckets_leave_one_by_one() -> None:
    bench = bench_of(2)
    for _ in range(40):  # a failure and two successes each second: at most 10 of 30 are failures
        bench.send("a", S, F, S)
        bench.clock.advance(1.0)
    assert bench.states("a") == ["closed"]
    for _ in range(20):
        bench.send("a", S, F)
        bench.clock.advance(1.0)
    assert bench.states("a") != ["closed"], "the better times before are forgotten"


def test_failures_in_a_row_count_however_far_apart() -> None:
    bench = bench_of(2)
    for _ in range(5):
        bench.clock.advance(30.0)
        bench.send("a", F)
    assert bench.states("a") == ["open"]


def test_each_breaker_counts_for_itself() -> None:
    bench = bench_of(3)
    for _ in range(4):
        bench.send("a", F)
        bench.send("b", F)
    assert bench.states("a", "b", "c") == ["closed"] * 3


def test_what_was_counted_before_a_trip_is_forgotten_with_it() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.probe("a", S, S)
    bench.send("a", F, F, F, F)
    assert bench.states("a") == ["closed"]
    bench.send("a", F)
    assert bench.states("a") == ["open"]


# --- For how long ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trips", "base_s"),
    [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 60), (8, 60), (100, 60), (5000, 60)],
)
def test_open_times_double_up_to_the_maximum_and_are_jittered_by_half(trips: int, base_s: float) -> None:
    rng = random.Random(0)
    times = [open_for_s(trips, BreakerSettings(), rng) for _ in range(1000)]
    assert base_s <= min(times) < 1.01 * base_s
    assert 1.49 * base_s < max(times) <= 1.5 * base_s


def test_the_first_time_and_the_maximum_are_settings() -> None:
    settings = BreakerSettings(recovery_timeout_s=0.5, max_timeout_s=3.0)
    assert [open_for_s(trips, settings, Jitter(0.0)) for trips in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_each_trip_in_a_row_is_open_for_twice_as_long() -> None:
    bench = bench_of(2)
    bench.trip("a")
    for open_s in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        assert bench.board.next_change() == bench.clock.now() + open_s
        bench.clock.advance(open_s - 0.001)
        assert bench.states("a") == ["open"]
        bench.clock.advance(0.001)
        assert bench.states("a") == ["half_open"]
        bench.send("a", F)


@pytest.mark.parametrize(
    ("healthy_s", "open_s"),
    [(0.0, 8.0), (59.9, 8.0), (60.0, 4.0), (119.0, 4.0), (120.0, 2.0), (180.0, 1.0), (3600.0, 1.0)],
)
def test_a_trip_is_forgiven_for_each_minute_of_health(healthy_s: float, open_s: float) -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.probe("a", F)
    bench.probe("a", F)
    bench.probe("a", S, S)  # three trips in a row, then closed
    bench.clock.advance(healthy_s)
    bench.trip("a")
    assert bench.board.next_change() == pytest.approx(bench.clock.now() + open_s)


def test_successes_in_between_do_not_spoil_the_minute() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.probe("a", F)
    bench.probe("a", S, S)
    for _ in range(5):  # at 75 s the first trip is forgiven, at 125 s the second
        bench.clock.advance(25.0)
        bench.send("a", S)
    bench.trip("a")
    assert bench.board.next_change() == pytest.approx(bench.clock.now() + 1.0)


def test_the_minute_begins_when_the_breaker_closes() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(300.0)  # open, then half open without a probe: that is no health
    bench.probe("a", S, S)
    bench.trip("a")
    assert bench.board.next_change() == bench.clock.now() + 2.0


def test_a_later_failure_extends_the_time_and_never_shortens_it() -> None:
    bench = BreakerBench("a", "b", rng=Jitter(1.0, 0.0))
    bench.trip("a")
    opened = bench.clock.now()
    assert bench.board.next_change() == opened + 1.5
    bench.send("a", F)  # in spite of it: panic
    assert bench.board.next_change() == opened + 1.5, "and not 1.0"
    bench.clock.advance(1.0)
    bench.send("a", F)
    assert bench.board.next_change() == opened + 2.0
    bench.clock.advance(0.9)
    assert bench.states("a") == ["open"]
    bench.clock.advance(0.1)
    assert bench.states("a") == ["half_open"]


# --- Half open ---------------------------------------------------------------------------------------


def test_half_open_is_reached_when_somebody_asks() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(100.0)
    assert [change.after for change in bench.transitions] == ["open"]
    assert bench.board.admits("a")
    assert [change.after for change in bench.transitions] == ["open", "half_open"]


def test_the_permit_is_taken_at_dispatch_not_when_filtering() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert [bench.board.admits("a") for _ in range(5)] == [True] * 5
    assert bench.board.take("a", math.inf).probe
    assert [bench.board.admits("a") for _ in range(5)] == [False] * 5


def test_of_a_closed_breaker_permits_are_no_probes_and_without_number() -> None:
    bench = bench_of(2)
    assert not any(bench.board.take("a", math.inf).probe for _ in range(10))
    assert bench.board.admits("a")


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ("", "half_open"),
        ("S", "half_open"),
        ("SS", "closed"),
        ("F", "open"),
        ("SF", "open"),
        ("N", "half_open"),
        ("SN", "half_open"),
        ("NNNNNN", "half_open"),  # neutral closes nothing
        ("SNNS", "closed"),  # and resets nothing
        ("NF", "open"),
    ],
)
def test_two_probes_close_and_a_failure_opens_again(outcomes: str, state: str) -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    for outcome in outcomes:
        assert bench.board.admits("a"), "each outcome gives the permit back"
        bench.send("a", OUTCOMES[outcome])
    assert bench.states("a") == [state]
    if state == "open":
        assert bench.board.next_change() == bench.clock.now() + 2.0, "the second trip in a row"


def test_a_success_before_a_reopening_does_not_count_afterwards() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.probe("a", S, F)
    bench.probe("a", S)
    assert bench.states("a") == ["half_open"]


def test_a_probes_lease_ends_with_its_deadline() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    bench.board.take("a", bench.clock.now() + 5.0)
    assert bench.board.next_change() == bench.clock.now() + 5.0
    bench.clock.advance(4.9)
    assert not bench.board.admits("a")
    bench.clock.advance(0.1)
    assert bench.board.admits("a")


@pytest.mark.parametrize("late", [S, N])
def test_a_probe_that_is_late_does_not_give_back_the_next_ones_lease(late: Outcome) -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    first = bench.board.take("a", bench.clock.now() + 5.0)
    bench.clock.advance(5.0)
    second = bench.board.take("a", bench.clock.now() + 5.0)
    assert first.probe and second.probe
    bench.board.settle(first, late)
    assert not bench.board.admits("a"), "the second is out"
    bench.board.settle(second, N)
    assert bench.board.admits("a")


def test_who_is_sent_beside_a_probe_is_none() -> None:
    # In a panic, breakers are not asked.
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    probe = bench.board.take("a", bench.clock.now() + 5.0)
    others = [bench.board.take("a", bench.clock.now() + 600.0) for _ in range(3)]
    assert not any(other.probe for other in others)
    bench.board.settle(others[0], S)
    bench.board.settle(others[1], S)
    assert not bench.board.admits("a")
    assert bench.states("a") == ["half_open"], "probes alone close it"
    bench.board.settle(probe, S)
    assert bench.states("a") == ["half_open"]
    bench.board.settle(others[2], F)
    assert bench.states("a") == ["open"], "but any failure opens it"


def test_a_success_while_open_closes_nothing_and_forgives_nothing() -> None:
    bench = bench_of(2)
    bench.clock.advance(59.5)
    bench.trip("a")
    bench.clock.advance(0.5)
    bench.send("a", *[S] * 10)
    assert bench.states("a") == ["open"]
    bench.probe("a", F)
    assert bench.board.next_change() == bench.clock.now() + 2.0, "the second trip in a row"


# --- Generations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", [S, F, N])
def test_outcomes_from_before_a_change_are_ignored(stale: Outcome) -> None:
    bench = bench_of(2)
    while_closed = [bench.board.take("a", math.inf) for _ in range(3)]
    bench.trip("a")
    until = bench.board.next_change()
    bench.board.settle(while_closed[0], stale)
    assert (bench.states("a"), bench.board.next_change()) == (["open"], until)
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    probe = bench.board.take("a", math.inf)
    bench.board.settle(while_closed[1], stale)
    bench.board.settle(while_closed[2], stale)
    assert bench.states("a") == ["half_open"]
    assert not bench.board.admits("a"), "the probe is still out"
    bench.board.settle(probe, S)
    bench.send("a", S)
    assert bench.states("a") == ["closed"]


def test_failures_from_before_do_not_trip_a_breaker_that_has_closed() -> None:
    bench = bench_of(2)
    stale = [bench.board.take("a", math.inf) for _ in range(10)]
    bench.trip("a")
    bench.probe("a", S, S)
    for permit in stale:
        bench.board.settle(permit, F)
    assert bench.states("a") == ["closed"]


def test_a_probe_from_before_a_reopening_does_not_close_it() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    late = bench.board.take("a", bench.clock.now() + 1.0)
    bench.clock.advance(1.0)
    bench.send("a", F)
    bench.probe("a", S)
    bench.board.settle(late, S)
    assert bench.states("a") == ["half_open"]


def test_a_replica_that_comes_back_under_its_id_starts_anew() -> None:
    bench = bench_of(4)
    bench.send("a", F, F, F, F)
    stale = [bench.board.take(replica_id, math.inf) for replica_id in "ab" for _ in range(5)]
    bench.trip("b")
    bench.board.sync("cd")
    bench.board.sync("abcd")
    assert bench.states("a", "b") == ["closed", "closed"]
    for permit in stale:
        bench.board.settle(permit, F)
    bench.send("a", F, F, F, F)
    assert bench.states("a", "b") == ["closed", "closed"], "of the dead ones' failures nothing is left"
    bench.send("a", F)
    assert bench.states("a", "b") == ["open", "closed"]


def test_outcomes_of_replicas_that_are_gone_are_ignored() -> None:
    bench = bench_of(2)
    permit = bench.board.take("a", math.inf)
    bench.board.sync("b")
    bench.board.settle(permit, F)
    bench.board.settle(Permit("never was", 1, probe=True), S)
    assert bench.states("b") == ["closed"]


# --- How many at a time ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "ejected"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 3), (7, 3), (10, 5)]
)
def test_half_of_them_at_the_most_and_never_the_last_one(replicas: int, ejected: int) -> None:
    bench = bench_of(replicas)
    ids = "abcdefghij"[:replicas]
    bench.trip(*ids)
    assert bench.states(*ids) == ["open"] * ejected + ["closed"] * (replicas - ejected)
    assert all(bench.board.admits(replica_id) for replica_id in ids[ejected:])


def test_half_open_counts_as_ejected() -> None:
    bench = bench_of(3)
    bench.trip("a")
    bench.clock.advance(1.0)
    bench.trip("b")
    assert bench.states("a", "b") == ["half_open", "closed"]


def test_trips_that_wait_are_carried_out_the_oldest_first() -> None:
    bench = bench_of(3)
    bench.trip("a", "c", "b")
    assert bench.states("a", "b", "c") == ["open", "closed", "closed"]
    bench.probe("a", S, S)
    assert bench.states("a", "b", "c") == ["closed", "closed", "open"]
    bench.probe("c", S, S)
    assert bench.states("a", "b", "c") == ["closed", "open", "closed"]
    bench.probe("b", S, S)
    assert bench.states("a", "b", "c") == ["closed", "closed", "closed"]
    assert "c open: 5 failures in a row, and it was its turn" in reasons(bench)


def test_a_trip_that_waits_is_one_trip_however_many_failures_follow() -> None:
    bench = bench_of(3)
    bench.trip("a", "b", "c")
    bench.trip("b", "b", "b")
    bench.probe("a", S, S)
    assert bench.states("a", "b", "c") == ["closed", "open", "closed"], "b had waited longer, and still has"
    assert bench.board.next_change() == bench.clock.now() + 1.0, "its first trip"


def test_new_replicas_make_room_for_a_waiting_trip() -> None:
    bench = bench_of(3)
    bench.trip("a", "b", "c")
    bench.board.sync("abcde")
    assert bench.states(*"abcde") == ["open", "open", "closed", "closed", "closed"]
    bench.board.sync("abcdef")
    assert bench.states(*"abcdef") == ["open", "open", "open", "closed", "closed", "closed"]


def test_an_ejected_replica_that_goes_makes_room_for_a_waiting_trip() -> None:
    bench = bench_of(4)
    bench.trip("a", "b", "c")
    bench.board.sync("bcd")
    assert bench.states(*"bcd") == ["open", "closed", "closed"], "of three, one"
    bench.board.sync("bcde")
    assert bench.states(*"bcde") == ["open", "open", "closed", "closed"]


def test_a_waiting_trip_goes_with_its_replica() -> None:
    bench = bench_of(3)
    bench.trip("a", "b", "c")
    bench.board.sync("ac")
    bench.board.sync("abc")
    bench.probe("a", S, S)
    assert bench.states("a", "b", "c") == ["closed", "closed", "open"]


@pytest.mark.parametrize(
    ("outcomes", "b_then"),
    [("", "open"), ("S", "open"), ("SFS", "open"), ("SS", "closed"), ("SNS", "closed"), ("FSS", "closed")],
)
def test_a_trip_that_waits_is_withdrawn_after_two_successes_in_a_row(outcomes: str, b_then: str) -> None:
    bench = bench_of(3)
    bench.trip("a", "b")
    bench.send("b", *(OUTCOMES[outcome] for outcome in outcomes))
    assert bench.states("b") == ["closed"]
    bench.probe("a", S, S)
    assert bench.states("b") == [b_then]


def test_who_trips_again_after_that_waits_behind_the_others() -> None:
    bench = bench_of(3)
    bench.trip("a", "b", "c")
    bench.send("b", S, S)
    bench.trip("b")
    bench.probe("a", S, S)
    assert bench.states("a", "b", "c") == ["closed", "closed", "open"]


# --- When they are needed ------------------------------------------------------------------------------


def test_who_is_needed_is_tried_after_the_time_of_a_first_trip_but_not_earlier() -> None:
    bench = bench_of(3)
    for _ in range(4):
        bench.trip("a")
        bench.board.act("a", "close")
    bench.trip("a")  # for 16 s
    for wait_s, state in ((0.0, "open"), (0.99, "open"), (0.01, "half_open")):
        bench.clock.advance(wait_s)
        assert bench.states("a") == ["open"], "nobody needs it"
        bench.board.needed()
        assert bench.states("a") == [state]


def test_who_may_be_dead_is_tried_less_and_less_often() -> None:
    bench = bench_of(3)
    bench.trip("a")
    for open_s in (1.0, 1.0, 2.0, 4.0, 4.0):
        bench.clock.advance(open_s - 0.01)
        bench.board.needed()
        assert bench.states("a") == ["open"]
        bench.clock.advance(0.01)
        bench.board.needed()
        assert bench.states("a") == ["half_open"]
        bench.send("a", F)
    bench.clock.advance(bench.board.next_change() - bench.clock.now())
    assert bench.states("a") == ["half_open"]
    bench.send("a", S, F)
    bench.clock.advance(1.0)
    bench.board.needed()
    assert bench.states("a") == ["half_open"], "it is not dead: something has succeeded"


def test_who_was_opened_by_hand_is_not_tried_whoever_needs_it() -> None:
    bench = bench_of(2)
    bench.board.act("a", "open")
    bench.clock.advance(1e6)
    bench.board.needed()
    assert bench.states("a") == ["open"]


# --- By hand -----------------------------------------------------------------------------------------


def test_opened_by_hand_it_stays_open_until_closed_by_hand() -> None:
    bench = bench_of(2)
    bench.board.act("a", "open")
    bench.clock.advance(1e6)
    bench.board.health_passed("a")
    bench.send("a", *[S] * 5, *[F] * 5)
    bench.clock.advance(1e6)
    assert bench.states("a") == ["open"]
    assert not bench.board.admits("a")
    assert bench.board.next_change() == math.inf
    bench.board.act("a", "close")
    assert bench.states("a") == ["closed"]
    assert bench.board.admits("a")


def test_by_hand_all_of_them_can_be_opened() -> None:
    bench = bench_of(3)
    for replica_id in "abc":
        bench.board.act(replica_id, "open")
    assert bench.states("a", "b", "c") == ["open"] * 3
    assert bench.board.refusing("abc") == 3


def test_who_was_opened_by_hand_counts_as_ejected() -> None:
    bench = bench_of(3)
    bench.board.act("a", "open")
    bench.trip("b")
    assert bench.states("a", "b", "c") == ["open", "closed", "closed"]
    bench.board.act("a", "close")
    assert bench.states("a", "b", "c") == ["closed", "open", "closed"]


@pytest.mark.parametrize("action", ["open", "close", "reset"])
def test_by_hand_a_waiting_trip_is_settled(action: str) -> None:
    bench = bench_of(3)
    bench.trip("a", "b")
    bench.board.act("b", action)
    bench.board.act("b", "close")
    bench.probe("a", S, S)
    assert bench.states("b") == ["closed"]


@pytest.mark.parametrize("before", ["closed", "open", "half_open", "by hand"])
@pytest.mark.parametrize(("action", "state"), [("open", "open"), ("close", "closed"), ("reset", "closed")])
def test_actions_work_in_every_state(before: str, action: str, state: str) -> None:
    bench = bench_of(2)
    if before == "by hand":
        bench.board.act("a", "open")
    elif before != "closed":
        bench.trip("a")
        bench.clock.advance(1.0 if before == "half_open" else 0.0)
        assert bench.states("a") == [before]
    in_flight = bench.board.take("a", math.inf)
    bench.board.act("a", action)
    assert bench.states("a") == [state]
    bench.board.settle(in_flight, F)
    bench.clock.advance(1e6)
    assert bench.states("a") == [state], "the outcome was from before"


@pytest.mark.parametrize(("action", "open_s"), [("close", 4.0), ("reset", 1.0)])
def test_reset_forgets_earlier_trips_and_close_does_not(action: str, open_s: float) -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.probe("a", F)
    bench.board.act("a", action)
    bench.trip("a")
    assert bench.board.next_change() == bench.clock.now() + open_s


@pytest.mark.parametrize("action", ["close", "reset"])
def test_closed_by_hand_the_counting_starts_anew(action: str) -> None:
    bench = bench_of(2)
    bench.send("a", F, F, F, F)
    bench.board.act("a", action)
    bench.send("a", F, F, F, F)
    assert bench.states("a") == ["closed"]


@pytest.mark.parametrize("action", ["", "OPEN", "force_open", "half_open"])
def test_an_unknown_action_is_refused_and_changes_nothing(action: str) -> None:
    bench = bench_of(2)
    bench.trip("a")
    with pytest.raises(InvalidRequest) as caught:
        bench.board.act("a", action)
    assert caught.value.param == "action"
    assert bench.states("a", "b") == ["open", "closed"]


def test_who_is_told_that_a_breaker_was_opened_by_hand_finds_it_so() -> None:
    bench = bench_of(2)
    found: list[bool] = []
    bench.board.on_transition = lambda change: found.append(bench.board.admits(change.replica_id))
    bench.board.act("a", "open")
    assert found == [False]
    assert bench.states("a") == ["open"]


# --- Health ------------------------------------------------------------------------------------------


def test_a_health_check_half_opens_and_never_closes() -> None:
    bench = bench_of(2)
    bench.trip("a")
    for _ in range(5):
        bench.board.health_passed("a")
    assert bench.states("a") == ["half_open"]
    assert bench.board.take("a", math.inf).probe


def test_a_health_check_disturbs_no_probe_and_no_closed_breaker() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    probe = bench.board.take("a", math.inf)
    bench.send("b", F, F, F)
    for replica_id in ("a", "b", "unknown"):
        bench.board.health_passed(replica_id)
    assert not bench.board.admits("a")
    bench.board.settle(probe, S)
    bench.send("a", S)
    assert bench.states("a", "b") == ["closed", "closed"]
    bench.send("b", F, F)
    assert bench.states("b") == ["open"], "five in a row"


def test_after_a_health_check_a_failed_probe_opens_for_longer() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.board.health_passed("a")
    bench.send("a", F)
    assert bench.board.next_change() == bench.clock.now() + 2.0


# --- What others ask ---------------------------------------------------------------------------------


def test_who_refuses_is_open_and_not_on_trial() -> None:
    bench = bench_of(6)
    bench.trip("a", "b")
    bench.board.act("c", "open")
    assert bench.board.refusing("abcdef") == 3
    assert bench.board.refusing("adef") == 1
    bench.clock.advance(1.0)
    assert bench.board.refusing("abcdef") == 1
    bench.board.take("a", math.inf)
    assert bench.board.refusing("abcdef") == 1, "a waits for its probe"


def test_the_next_change_is_the_earliest_of_all() -> None:
    bench = bench_of(6)
    assert bench.board.next_change() == math.inf
    bench.trip("a")
    begun = bench.clock.now()
    bench.clock.advance(0.25)
    bench.trip("b")
    assert bench.board.next_change() == begun + 1.0
    bench.clock.advance(0.75)
    assert bench.states("a", "b") == ["half_open", "open"]
    bench.board.take("a", begun + 1.1)
    assert bench.board.next_change() == begun + 1.1
    bench.clock.advance(0.1)
    assert bench.board.next_change() == begun + 1.25
    bench.clock.advance(10.0)
    assert bench.board.next_change() == math.inf


@pytest.mark.parametrize("change", ["trip", "probe given back", "half open", "by hand", "health", "new"])
def test_the_version_grows_when_an_answer_may_have_changed(change: str) -> None:
    bench = bench_of(4)
    bench.trip("a")
    bench.clock.advance(1.0)
    assert bench.board.admits("a")
    probe = bench.board.take("a", math.inf)
    bench.board.act("c", "open")
    bench.send("b", F, F, F, F)
    before = bench.board.version
    if change == "trip":
        bench.board.act("c", "close")
        before = bench.board.version
        bench.send("b", F)
    elif change == "probe given back":
        bench.board.settle(probe, N)
    elif change == "half open":
        bench.board.settle(probe, F)
        before = bench.board.version
        bench.clock.advance(2.0)
        assert bench.board.admits("a")
    elif change == "by hand":
        bench.board.act("d", "open")
    elif change == "health":
        bench.board.settle(probe, F)
        before = bench.board.version
        bench.board.health_passed("a")
    else:
        bench.board.sync("abcde")
    assert bench.board.version > before


def test_transitions_are_told_once_each_with_what_was_before() -> None:
    bench = bench_of(2)
    bench.trip("a")
    bench.probe("a", F)
    bench.probe("a", S, S)
    bench.board.act("a", "close")
    told: Sequence[tuple[BreakerState, BreakerState]] = [(c.before, c.after) for c in bench.transitions]
    assert [f"{before} > {after}" for before, after in told] == [
        "closed > open",
        "open > half_open",
        "half_open > open",
        "open > half_open",
        "half_open > closed",
    ]
    assert reasons(bench)[-1] == "a closed: 2 probes succeeded"
