"""Columns, tables and breakers, with only what a test is about spelt out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np

from blaze.routing.breaker import BreakerBoard, Transition
from blaze.routing.columns import Columns, Places
from blaze.routing.outcome import Outcome
from blaze.routing.replica import ReplicaInfo
from blaze.routing.replicas import ReplicaTable
from blaze.routing.strategy import Ask, Strategy
from blaze.routing.trip import BreakerSettings
from blaze.types import ReplicaId
from tests.fakes import FakeClock

ASK = Ask(now=0.0)


def columns(ids: Iterable[ReplicaId], **numbers: float | Sequence[float]) -> Columns:
    """``numbers``: for each replica in the order of ids, or one for all of them."""
    made = Columns(ids)
    made.judged_at[:] = 0.0  # what is said of speed and success is fresh
    for name, values in numbers.items():
        getattr(made, name)[:] = values
    return made


def places(of: Columns, ids: Iterable[ReplicaId] | None = None) -> Places:
    return np.array(sorted(of.place[id] for id in (of.ids if ids is None else ids)), np.int64)


def picks(
    strategy: Strategy,
    seen: Columns,
    count: int = 1,
    *,
    among: Iterable[ReplicaId] | None = None,
    ask: Ask = ASK,
) -> list[ReplicaId | None]:
    eligible = places(seen, among)
    chosen = (strategy.choose(seen, eligible, ask) for _ in range(count))
    return [None if pick is None else pick.replica_id for pick in chosen]


class Jitter(random.Random):
    """Draws what it is told to between the bounds, 0 to 1; then the last one again and again."""

    def __init__(self, *draws: float) -> None:
        super().__init__(0)
        self._draws = list(draws)

    def uniform(self, a: float, b: float) -> float:
        draw = self._draws.pop(0) if len(self._draws) > 1 else self._draws[0]
        return a + (b - a) * draw


class BreakerBench:
    """A board whose breakers stay open for exactly 1, 2, 4 ... seconds, and what became of it."""

    def __init__(self, *ids: ReplicaId, rng: random.Random | None = None) -> None:
        self.clock = FakeClock()
        self.transitions: list[Transition] = []
        self.board = BreakerBoard(BreakerSettings(), self.clock, rng or Jitter(0.0), self.transitions.append)
        self.board.sync(ids)

    def send(self, replica_id: ReplicaId, *outcomes: Outcome) -> None:
        """One request after the other, each with its outcome at once."""
        for outcome in outcomes:
            self.board.settle(self.board.take(replica_id, self.clock.now() + 600), outcome)

    def trip(self, *ids: ReplicaId) -> None:
        for replica_id in ids:
            self.send(replica_id, *[Outcome.FAILURE] * 5)

    def probe(self, replica_id: ReplicaId, *outcomes: Outcome) -> None:
        """Wait until it may be tried, and send requests."""
        while not self.board.admits(replica_id):
            self.clock.advance(self.board.next_change() - self.clock.now())
        self.send(replica_id, *outcomes)

    def states(self, *ids: ReplicaId) -> list[str]:
        return [self.board.state(replica_id).value for replica_id in ids]


class TableBench:
    """A table without slow start, unless a test is about that, over breakers without jitter."""

    def __init__(
        self,
        *ids: ReplicaId,
        cap: int = 10,
        at_once: int | None = None,
        routers: int = 1,
        slow_start_s: float = 0.0,
    ) -> None:
        self.clock = FakeClock()
        board = BreakerBoard(BreakerSettings(), self.clock, Jitter(0.0), self._on_transition)
        self.table = ReplicaTable(
            cap=cap,
            at_once=at_once,
            routers=routers,
            clock=self.clock,
            breakers=board,
            slow_start_s=slow_start_s,
        )
        self.sync(*ids)

    def _on_transition(self, change: Transition) -> None:
        if change.after == "closed":
            self.table.closed(change.replica_id)

    def sync(self, *ids: ReplicaId) -> None:
        self.table.sync(ReplicaInfo(id) for id in ids)

    def eligible(self, *excluded: ReplicaId) -> list[ReplicaId]:
        return [self.table.columns.ids[place] for place in self.table.eligible(excluded)]

    def idle(self) -> list[ReplicaId]:
        return [self.table.columns.ids[place] for place in self.table.eligible(idle=True)]

    def available(self, *excluded: ReplicaId) -> list[ReplicaId]:
        return [self.table.columns.ids[place] for place in self.table.available(excluded)]

    def send(self, replica_id: ReplicaId, *outcomes: Outcome) -> None:
        for outcome in outcomes:
            self.table.lease(replica_id, expires_at=self.clock.now() + 600).release(outcome)

    def column(self, name: str) -> dict[ReplicaId, float]:
        self.table.eligible()
        values: list[float] = getattr(self.table.columns, name).tolist()
        return dict(zip(self.table.columns.ids, values, strict=True))
