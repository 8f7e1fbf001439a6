"""A cluster that is told to stop: how long it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blaze.control import Change, SetAllDraining
from blaze.errors import Overloaded, ReplicaLost
from deployments.graceful_stop import let_finish
from tests.fakes import FakeClock


class FakeCluster:
    """Answers are being given until ``done_at``, and for ``lingering`` longer once they are told to end."""

    def __init__(self, clock: FakeClock, *, done_at: float, ended_after_s: float = 0.5) -> None:
        self.clock = clock
        self.done_at = done_at
        self.ended_after_s = ended_after_s
        self.away_until = 0.0
        self.changes: list[Change] = []
        self._end_at = float("inf")
        self._told_at = float("inf")

    def change(self, change: Change) -> None:
        if self.clock.now() < self.away_until:
            raise Overloaded("Changes cannot be made now.")
        self.changes.append(change)
        assert isinstance(change, SetAllDraining) and change.timeout_s is not None
        self._told_at = self.clock.now()
        self._end_at = self._told_at + change.timeout_s + self.ended_after_s

    def status(self) -> dict[str, Any]:
        now = self.clock.now()
        if now < self.away_until:
            raise ReplicaLost("The Router did not answer.")
        left = 0 if now >= min(self.done_at, self._end_at) else 2
        draining = now >= self._told_at + 0.5  # until every Router has heard of it
        return {"draining": draining, "models": [{"open": 0}, {"open": left}]}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(0.0)


def stop(cluster: FakeCluster, grace_s: float, show: Callable[[str], None] = lambda _: None) -> bool:
    return let_finish(cluster, grace_s, show, clock=cluster.clock, sleep=cluster.clock.advance)


def test_it_is_over_when_nothing_is_being_answered_any_more(clock: FakeClock) -> None:
    cluster = FakeCluster(clock, done_at=4.0)
    shown: list[str] = []
    assert stop(cluster, 30.0, shown.append)
    assert 4.0 <= clock.now() < 5.0
    assert cluster.changes == [SetAllDraining(True, 30.0)]
    assert "2 answers" in shown[-1]


def test_an_idle_cluster_is_waited_for_until_every_router_refuses_what_is_new(clock: FakeClock) -> None:
    assert stop(FakeCluster(clock, done_at=0.0), 30.0)
    assert 0.5 <= clock.now() < 1.5


def test_what_is_longer_than_the_grace_is_given_the_time_to_say_so(clock: FakeClock) -> None:
    assert stop(FakeCluster(clock, done_at=100.0), 10.0)
    assert 10.5 <= clock.now() < 11.5


def test_what_does_not_end_even_then_is_left(clock: FakeClock) -> None:
    assert not stop(FakeCluster(clock, done_at=100.0, ended_after_s=50.0), 10.0)
    assert 13.0 <= clock.now() < 13.5


def test_a_cluster_that_does_not_answer_is_asked_again_with_the_time_that_is_left(clock: FakeClock) -> None:
    cluster = FakeCluster(clock, done_at=100.0)
    cluster.away_until = 4.0
    assert stop(cluster, 10.0)
    assert cluster.changes == [SetAllDraining(True, 6.0)]
    assert clock.now() < 11.5


def test_a_dead_cluster_is_not_waited_for_for_ever(clock: FakeClock) -> None:
    cluster = FakeCluster(clock, done_at=0.0)
    cluster.away_until = 1000.0
    assert not stop(cluster, 10.0)
    assert clock.now() < 13.5
