from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from blaze.routing.least import LeastResponseTime
from blaze.routing.outcome import Outcome
from blaze.routing.strategy import Ask
from tests.routing_columns import TableBench, columns, picks

NAN = math.nan
NOW = 1000.0
AT_NOW = Ask(now=NOW)


# --- Peak EWMA: what the table makes of samples ------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "known"),
    [
        ([(0, 0.3)], 0.3),
        ([(0, 0.3), (5, 0.8)], 0.8),  # up at once
        ([(0, 0.8), (10, 0.3)], 0.3 + 0.5 * math.exp(-1)),  # down with tau = 10 s
        ([(0, 0.8), (5, 0.3)], 0.3 + 0.5 * math.exp(-0.5)),
        ([(0, 0.8), (5, 0.3), (5, 0.3)], 0.3 + 0.5 * math.exp(-1)),
        ([(0, 0.8), (0, 0.3)], 0.8),  # in no time nothing is forgotten
        ([(0, 0.8), (0, 0.9), (0, 0.1)], 0.9),
        ([(0, 0.8), (1000, 0.3)], 0.3),
        ([(0, 0.3), (10, NAN), (0, math.inf)], 0.3),
        ([(0, NAN), (0, -math.inf)], None),
        ([(0, NAN), (0, 0.3)], 0.3),
        ([], None),
    ],
)
def test_times_go_up_at_once_and_down_slowly(
    samples: Sequence[tuple[float, float]], known: float | None
) -> None:
    bench = TableBench("a")
    for after_s, seconds in samples:
        bench.clock.advance(after_s)
        bench.table.lease("a").first_content(seconds)
    (found,) = bench.table.counters("m")
    assert found.ewma_ms == (None if known is None else pytest.approx(1000 * known))


@pytest.mark.parametrize(
    ("silent_s", "streamed_s", "response_s", "known"),
    [
        (0.0, 0.0, None, 5.0),  # fast errors attract nothing
        (4.9, 0.0, None, 5.0),
        (7.0, 0.0, None, 7.0),
        (7.0, 0.0, 12.0, 12.0),  # Retry-After
        (7.0, 0.0, 6.0, 7.0),
        (0.0, 0.0, 0.5, 5.0),
        (0.1, 300.0, None, 5.0),  # a stream that breaks: how long it ran says nothing
        (0.1, 300.0, 12.0, 12.0),
        (0.0, 0.0, NAN, 5.0),
    ],
)
def test_a_failure_counts_as_5_seconds_at_least(
    silent_s: float, streamed_s: float, response_s: float | None, known: float
) -> None:
    bench = TableBench("a")
    lease = bench.table.lease("a")
    bench.clock.advance(silent_s)
    if streamed_s:
        lease.first_content()
        bench.clock.advance(streamed_s)
    lease.release(Outcome.FAILURE, response_s=response_s)
    assert bench.column("response") == {"a": pytest.approx(known)}


def test_a_cancel_observes_nothing() -> None:
    bench = TableBench("a")
    bench.table.lease("a").first_content(0.2)
    lease = bench.table.lease("a")
    bench.clock.advance(60.0)
    lease.release(Outcome.NEUTRAL, response_s=9.0)
    assert bench.column("response") == {"a": 0.2}


@pytest.mark.parametrize(("response_s", "known"), [(None, 0.2), (0.7, 0.7)])
def test_a_success_observes_what_it_is_told_and_never_its_own_length(
    response_s: float | None, known: float
) -> None:
    bench = TableBench("a")
    lease = bench.table.lease("a")
    lease.first_content(0.2)
    bench.clock.advance(60.0)
    lease.release(Outcome.SUCCESS, response_s=response_s)
    assert bench.column("response") == {"a": pytest.approx(known)}


def test_the_oldest_request_without_content_is_known() -> None:
    bench = TableBench("a")
    assert bench.column("waiting_since") == {"a": math.inf}
    since = []
    leases = []
    for _ in range(3):
        since.append(bench.clock.now())
        leases.append(bench.table.lease("a"))
        bench.clock.advance(1.0)
    assert bench.column("waiting_since") == {"a": since[0]}
    leases[1].first_content()
    assert bench.column("waiting_since") == {"a": since[0]}
    leases[0].release(Outcome.NEUTRAL)
    assert bench.column("waiting_since") == {"a": since[2]}
    leases[2].first_content(0.5)
    assert bench.column("waiting_since") == {"a": math.inf}


# --- Which of two ------------------------------------------------------------------------------------


def pick(**numbers: tuple[float, float]) -> str | None:
    """Of "a" and "b"; the others make the pool's median 2 s, whatever these two are."""
    usual = {"response": 2.0, "measured_at": NOW, "waiting_since": math.inf}
    seen = columns("abcde", **usual)
    for name, (a, b) in numbers.items():
        getattr(seen, name)[:2] = a, b
    (picked,) = set(picks(LeastResponseTime(random.Random(0)), seen, 20, among="ab", ask=AT_NOW))
    return picked


@pytest.mark.parametrize(
    ("numbers", "better"),
    [
        ({"response": (0.1, 0.2)}, "a"),
        ({"response": (0.1, 0.2), "in_flight": (2.0, 0.0)}, "b"),  # 0.1 * 3 > 0.2 * 1
        ({"response": (0.1, 0.2), "in_flight": (2.0, 1.0)}, "a"),  # 0.1 * 3 < 0.2 * 2
        ({"response": (0.4, 0.2), "weight": (4.0, 1.0)}, "a"),
        ({"response": (0.1, 0.2), "ramp": (0.1, 1.0)}, "b"),
        # Whose oldest request has waited for 3 s is at least as slow as that.
        ({"response": (0.1, 0.2), "waiting_since": (NOW - 3.0, math.inf)}, "b"),
        ({"response": (0.1, 4.0), "waiting_since": (NOW - 3.0, math.inf)}, "a"),
        ({"response": (0.1, 0.2), "waiting_since": (NOW - 0.15, math.inf)}, "a"),
    ],
)
def test_the_score_is_time_times_queue_over_weight(
    numbers: dict[str, tuple[float, float]], better: str
) -> None:
    assert pick(**numbers) == better


@pytest.mark.parametrize(
    ("response", "seconds_ago", "counts_as"),
    [
        (8.0, 0.0, 8.0),
        (8.0, 10.0, 2.0 + 6.0 * math.exp(-1)),
        (8.0, 30.0, 2.0 + 6.0 * math.exp(-3)),
        (0.1, 10.0, 2.0 - 1.9 * math.exp(-1)),  # a fast one is forgotten just so
        (8.0, 1000.0, 2.0),
        (NAN, math.inf, 2.0),  # never measured
    ],
)
def test_what_is_known_fades_into_the_pools_median(
    response: float, seconds_ago: float, counts_as: float
) -> None:
    for rival, better in ((counts_as - 0.01, "b"), (counts_as + 0.01, "a")):
        assert pick(response=(response, rival), measured_at=(NOW - seconds_ago, NOW)) == better


def test_two_choices_do_not_herd_onto_the_fastest() -> None:
    seen = columns("abcdefgh", response=(0.1, 1, 1, 1, 1, 1, 1, 2), measured_at=NOW)
    chosen = Counter(picks(LeastResponseTime(random.Random(0)), seen, 400, ask=AT_NOW))
    assert 60 < chosen["a"] < 140, "among two of eight for a quarter of the picks"
    assert set(chosen) == set("abcdefg"), "the slowest wins no comparison"


def test_the_median_follows_what_is_learnt() -> None:
    seen, strategy = (
        columns("abc", response=(NAN, 1.0, 1.0), measured_at=NOW),
        LeastResponseTime(random.Random(0)),
    )
    seen.in_flight[:] = (0, 1, 1)
    assert set(picks(strategy, seen, 5, among="ab", ask=AT_NOW)) == {"a"}
    seen.response[2] = 100.0  # now "a" counts as 50.5 s
    assert set(picks(strategy, seen, 5, among="ab", ask=Ask(now=NOW + 1.0))) == {"b"}


# --- Replicas without a measurement ------------------------------------------------------------------


@pytest.mark.parametrize("others", [1, 2, 7, 63])
def test_one_request_until_measured(others: int) -> None:
    # One replica is known, to be slow and busy; all others have their one request already.
    ids = ["known", *(f"new-{number}" for number in range(others))]
    seen = columns(ids, response=NAN, in_flight=1.0, waiting_since=NOW)
    seen.response[seen.place["known"]], seen.measured_at[seen.place["known"]] = 100.0, NOW
    seen.in_flight[seen.place["known"]] = 50.0
    assert set(picks(LeastResponseTime(random.Random(0)), seen, 50, ask=AT_NOW)) == {"known"}


def test_new_replicas_get_one_request_each_and_the_next_when_they_are_measured() -> None:
    bench, strategy = TableBench("a", "b", "c"), LeastResponseTime(random.Random(0))

    def send() -> str:
        pick = strategy.choose(bench.table.columns, bench.table.eligible(), Ask(bench.clock.now()))
        assert pick is not None
        return pick.replica_id

    leases = {}
    for _ in range(3):
        chosen = send()
        assert chosen not in leases
        leases[chosen] = bench.table.lease(chosen)
    bench.clock.advance(0.2)
    leases["b"].first_content(0.2)
    assert {send() for _ in range(20)} == {"b"}
    leases["c"].release(Outcome.SUCCESS)
    bench.clock.advance(10.0)
    assert "c" in {send() for _ in range(20)}, "it has nothing in flight"
    assert "a" not in {send() for _ in range(20)}


def test_when_all_are_being_measured_somebody_is_picked_nevertheless() -> None:
    seen = columns("abc", response=NAN, in_flight=(3.0, 1.0, 2.0))
    chosen = Counter(picks(LeastResponseTime(random.Random(0)), seen, 300, ask=AT_NOW))
    assert set(chosen) == {"b", "c"}, "of any two, the one with less in flight"
    assert chosen["b"] > chosen["c"]


def test_nothing_known_of_anybody_is_the_least_in_flight_of_two() -> None:
    seen = columns("ab", response=NAN, in_flight=0.0, weight=(1.0, 3.0))
    assert set(picks(LeastResponseTime(random.Random(0)), seen, 20, ask=AT_NOW)) == {"b"}
