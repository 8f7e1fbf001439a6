from __future__ import annotations

import gc
import math
import random
import threading
import tracemalloc

import pytest

from blaze.api.keys import ANYBODY, KeyHolder, KeyLimits
from blaze.api.limits import RateLimits
from blaze.clock import SystemClock
from blaze.errors import RateLimited, TokensLimited
from tests.fakes import FakeClock


def holder(name: str = "ann", *, requests: int | None = None, tokens: int | None = None) -> KeyHolder:
    return KeyHolder(name, limits=KeyLimits(requests, tokens))


class Bench:
    def __init__(self, who: KeyHolder, now: float = 1000.0) -> None:
        self.clock = FakeClock(now)
        self.limits = RateLimits(self.clock)
        self.who = who

    def refusal(self) -> RateLimited | None:
        try:
            self.limits.admit(self.who)
        except RateLimited as error:
            return error
        return None

    def wait_s(self) -> float:
        """How long the refused request is told to wait."""
        error = self.refusal()
        assert error is not None
        assert error.retry_after_s is not None
        return error.retry_after_s

    def admitted(self, attempts: int) -> int:
        return sum(self.refusal() is None for _ in range(attempts))


def test_a_key_without_limits_is_never_refused_and_costs_nothing() -> None:
    for who in (holder(), ANYBODY):
        bench = Bench(who)
        for _ in range(1000):
            assert bench.refusal() is None
            bench.limits.charge(who, 1_000_000)
        assert not bench.limits._windows._windows


# --- Requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_so_many_requests_a_minute_and_not_one_more(limit: int) -> None:
    assert Bench(holder(requests=limit)).admitted(limit + 10) == limit


def test_a_refusal_is_in_openais_terms() -> None:
    bench = Bench(holder(requests=1))
    bench.limits.admit(bench.who)
    error = bench.refusal()
    assert error is not None
    info = error.info
    assert (info.http_status, info.type, info.code) == (429, "requests", "rate_limit_exceeded")
    assert (info.retryable, info.is_failure, info.retry_after_s) == (False, False, 60.0)
    assert "1 requests per minute" in info.message
    assert "60 s" in info.message


def test_the_window_moves_with_the_clock() -> None:
    bench = Bench(holder(requests=3))
    for _ in range(3):  # at 0, 20 and 40 s
        assert bench.refusal() is None
        bench.clock.advance(20)
    assert bench.admitted(5) == 1  # at 60 s the first has left
    bench.clock.advance(19.9)
    assert bench.admitted(5) == 0
    bench.clock.advance(0.1)
    assert bench.admitted(5) == 1
    bench.clock.advance(1000)
    assert bench.admitted(5) == 3


def test_no_minute_holds_more_than_the_limit_wherever_it_begins() -> None:
    bench = Bench(holder(requests=7))
    rng = random.Random(5)
    admitted: list[float] = []
    for _ in range(5000):
        bench.clock.advance(rng.choice((0.001, 0.03, 0.2, 3.0)))
        if bench.refusal() is None:
            admitted.append(bench.clock.now())
    assert len(admitted) > 100
    for first, eighth in zip(admitted, admitted[7:], strict=False):
        assert eighth - first >= 60 - 1e-5


def test_requests_that_are_remembered_together_leave_with_the_last_of_them() -> None:
    bench = Bench(holder(requests=2))
    bench.limits.admit(bench.who)
    bench.clock.advance(0.09)
    bench.limits.admit(bench.who)
    bench.clock.advance(59.95)
    assert bench.admitted(5) == 0
    bench.clock.advance(0.05)
    assert bench.admitted(5) == 2


def test_a_refused_request_is_not_counted() -> None:
    bench = Bench(holder(requests=1))
    assert bench.refusal() is None
    for _ in range(59):
        bench.clock.advance(1)
        assert bench.refusal() is not None
    bench.clock.advance(1)
    assert bench.refusal() is None


@pytest.mark.parametrize(
    ("after_s", "wait_s"), [(0, 60), (0.4, 60), (1, 59), (30.5, 30), (59, 1), (59.99, 1)]
)
def test_retry_after_is_whole_seconds_and_never_too_few(after_s: float, wait_s: float) -> None:
    bench = Bench(holder(requests=1))
    bench.limits.admit(bench.who)
    bench.clock.advance(after_s)
    assert bench.wait_s() == wait_s
    bench.clock.advance(wait_s)
    assert bench.refusal() is None


def test_a_wait_that_rounding_makes_too_short_is_long_enough() -> None:
    bench = Bench(holder(requests=1), now=1002.1)
    bench.limits.admit(bench.who)
    bench.clock.advance(31)
    bench.clock.advance(bench.wait_s())
    assert bench.clock.now() - 60 < 1002.1
    assert bench.refusal() is None


@pytest.mark.parametrize("seed", range(20))
def test_who_waits_as_told_is_admitted(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench(holder(requests=rng.randint(1, 9), tokens=rng.randint(1, 300)), now=rng.uniform(0, 1e6))
    waits = 0
    for _ in range(300):
        error = bench.refusal()
        if error is not None:
            assert error.retry_after_s is not None
            assert error.retry_after_s == math.ceil(error.retry_after_s)
            assert 1 <= error.retry_after_s <= 60
            waits += 1
            bench.clock.advance(error.retry_after_s)
            assert bench.refusal() is None
        bench.limits.charge(bench.who, rng.randint(0, 100))
        bench.clock.advance(rng.uniform(0, 2))
    assert waits > 10


# --- Tokens ------------------------------------------------------------------------------------------


def test_tokens_are_charged_after_the_answer() -> None:
    bench = Bench(holder(tokens=100))
    assert bench.admitted(5) == 5  # nothing is known of them yet
    bench.limits.charge(bench.who, 99)
    assert bench.refusal() is None
    bench.limits.charge(bench.who, 1)
    error = bench.refusal()
    assert isinstance(error, TokensLimited)
    assert (error.http_status, error.type, error.code) == (429, "tokens", "rate_limit_exceeded")
    assert "100 tokens per minute" in error.message
    bench.clock.advance(60)
    assert bench.refusal() is None


def test_what_was_used_beyond_the_limit_is_not_forgotten() -> None:
    bench = Bench(holder(tokens=100))
    bench.limits.charge(bench.who, 90)
    bench.clock.advance(10)
    bench.limits.charge(bench.who, 5000)
    assert bench.wait_s() == 60  # the 90 leave in 50 s, which is of no use
    bench.clock.advance(59)
    assert bench.wait_s() == 1
    bench.clock.advance(1)
    assert bench.refusal() is None


def test_the_wait_is_for_as_much_as_must_leave() -> None:
    bench = Bench(holder(tokens=100))
    for _ in range(6):  # at 0, 5, ... 25 s; at 30 s all six are there
        bench.limits.charge(bench.who, 30)
        bench.clock.advance(5)
    assert bench.wait_s() == 40  # 180 - 3 x 30 is the first below 100: that of 10 s leaves at 70 s
    bench.clock.advance(40)
    assert bench.refusal() is None


@pytest.mark.parametrize("tokens", [0, -5])
def test_nothing_used_is_nothing_charged(tokens: int) -> None:
    bench = Bench(holder(tokens=1))
    bench.limits.charge(bench.who, tokens)
    assert bench.refusal() is None


def test_over_both_limits_the_longer_wait_counts() -> None:
    bench = Bench(holder(requests=1, tokens=10))
    bench.limits.admit(bench.who)
    bench.clock.advance(20)
    bench.limits.charge(bench.who, 10)
    error = bench.refusal()
    assert isinstance(error, TokensLimited)
    assert error.retry_after_s == 60
    other = Bench(holder(requests=1, tokens=10))
    other.limits.charge(other.who, 9)
    other.clock.advance(20)
    other.limits.admit(other.who)
    other.limits.charge(other.who, 1)
    later = other.refusal()
    assert later is not None
    assert (later.type, later.retry_after_s) == ("requests", 60)  # the tokens' is 40 s


def test_a_request_refused_for_its_tokens_is_not_counted_as_one() -> None:
    bench = Bench(holder(requests=1, tokens=10))
    bench.limits.charge(bench.who, 10)
    assert bench.admitted(10) == 0
    bench.clock.advance(60)
    assert bench.admitted(10) == 1


# --- Keys and memory ---------------------------------------------------------------------------------


def test_keys_do_not_share() -> None:
    bench = Bench(holder("ann", requests=2, tokens=2))
    bob = holder("bob", requests=2, tokens=2)
    assert bench.admitted(5) == 2
    bench.limits.charge(bench.who, 2)
    bench.limits.admit(bob)
    bench.limits.charge(bob, 1)
    bench.limits.admit(bob)
    with pytest.raises(RateLimited):
        bench.limits.admit(bob)


def test_requests_and_tokens_are_counted_apart_when_their_limits_are_the_same_number() -> None:
    bench = Bench(holder(requests=5, tokens=5))
    assert bench.admitted(5) == 5
    bench.clock.advance(60)
    bench.limits.charge(bench.who, 4)
    assert bench.admitted(6) == 5


def test_memory_does_not_grow_with_what_is_used() -> None:
    bench = Bench(holder(requests=10_000_000, tokens=10**12))
    threads = threading.active_count()

    def minutes(count: int) -> None:
        for _ in range(count * 6000):
            bench.clock.advance(0.01)
            bench.limits.admit(bench.who)
            bench.limits.charge(bench.who, 123_456)

    minutes(2)
    gc.collect()
    tracemalloc.start()
    try:
        minutes(2)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()
    windows = bench.limits._windows._windows
    assert len(windows) == 2
    assert all(len(window.slots) <= 601 for window in windows.values())
    assert all(window.total == sum(slot.amount for slot in window.slots) for window in windows.values())
    assert threading.active_count() == threads


def test_it_runs_on_the_systems_clock() -> None:
    limits = RateLimits(SystemClock())
    who = holder(requests=1)
    limits.admit(who)
    with pytest.raises(RateLimited) as caught:
        limits.admit(who)
    assert caught.value.retry_after_s == 60
