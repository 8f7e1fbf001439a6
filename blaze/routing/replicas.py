"""The router's own account of its replicas, and the lease that keeps the account balanced."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from blaze.clock import Clock
from blaze.reports import ReplicaCounters
from blaze.types import ReplicaId

_LONGEST_SUSPENSION_S = 30.0


class Outcome(StrEnum):
    """How an attempt ended, as far as its replica is concerned."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"  # client errors, cancels and overload say nothing about the replica


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A member of the live set, as the pool reports it."""

    id: ReplicaId
    node: str = ""
    weight: float = 1.0


class Replica:
    """Mutable counters of one replica; satisfies :class:`blaze.routing.strategies.ReplicaView`."""

    __slots__ = ("failures", "id", "in_flight", "lost_calls", "node", "requests", "suspended_until", "weight")

    def __init__(self, info: ReplicaInfo) -> None:
        self.id = info.id
        self.node = info.node
        self.weight = info.weight
        self.in_flight = 0
        self.requests = 0
        self.failures = 0
        self.lost_calls = 0  # in a row
        self.suspended_until = -math.inf  # a call to it was lost: not picked before this time


class Lease:
    """One attempt on one replica: raises its in-flight count at once, and lowers it exactly once."""

    __slots__ = ("_open", "_table", "replica")

    def __init__(self, table: ReplicaTable, replica: Replica) -> None:
        self._table = table
        self.replica = replica
        self._open = True
        replica.in_flight += 1
        replica.requests += 1

    def release(self, outcome: Outcome) -> bool:
        """Record the outcome; later calls change nothing. True for the call that counted."""
        if not self._open:
            return False
        self._open = False
        self.replica.in_flight -= 1
        if outcome is Outcome.FAILURE:
            self.replica.failures += 1
        elif outcome is Outcome.SUCCESS:
            self.replica.lost_calls = 0
        self._table.released()
        return True


class ReplicaTable:
    """The replicas of one model, sorted by id, kept in step with the pool's live set."""

    def __init__(self, *, cap: int, clock: Clock) -> None:
        self._cap = cap
        self._clock = clock
        self._by_id: dict[ReplicaId, Replica] = {}
        self._sorted: list[Replica] = []
        self.on_capacity: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def sync(self, live: Iterable[ReplicaInfo]) -> None:
        """Take over a new live set: those that stay keep their counters, a dead id leaves nothing behind."""
        infos = {info.id: info for info in live}
        for gone in self._by_id.keys() - infos.keys():
            del self._by_id[gone]
        self._sorted = [replica for replica in self._sorted if replica.id in self._by_id]
        for replica_id, info in infos.items():
            if replica_id not in self._by_id:
                replica = Replica(info)
                self._by_id[replica_id] = replica
                insort(self._sorted, replica, key=_by_id)
        self._notify()

    def suspend(self, replica_id: ReplicaId, seconds: float) -> None:
        """A call to it was lost: do not pick it for a while, for twice as long after each loss in a row.

        A dead replica leaves the live set in the meantime; one that was only out of reach for a moment is
        picked again.
        """
        replica = self._by_id.get(replica_id)
        if replica is not None:
            pause = min(_LONGEST_SUSPENSION_S, seconds * 2**replica.lost_calls)
            replica.lost_calls += 1
            replica.suspended_until = self._clock.now() + pause

    def available(self, excluded: Collection[ReplicaId] = ()) -> Sequence[Replica]:
        """Replicas that are alive as far as is known, full or not, sorted by id."""
        now = self._clock.now()
        return [r for r in self._sorted if r.suspended_until <= now and r.id not in excluded]

    def eligible(self, excluded: Collection[ReplicaId] = ()) -> Sequence[Replica]:
        """Replicas that may take one more request, sorted by id."""
        now, cap = self._clock.now(), self._cap
        return [
            r for r in self._sorted if r.in_flight < cap and r.suspended_until <= now and r.id not in excluded
        ]

    def lease(self, replica_id: ReplicaId) -> Lease:
        return Lease(self, self._by_id[replica_id])

    def released(self) -> None:
        self._notify()

    def _notify(self) -> None:
        for listener in self.on_capacity:
            listener()

    def counters(self, model: str) -> tuple[ReplicaCounters, ...]:
        return tuple(
            ReplicaCounters(
                replica_id=r.id,
                model=model,
                in_flight=r.in_flight,
                weight=r.weight,
                requests=r.requests,
                failures=r.failures,
            )
            for r in self._sorted
        )


def _by_id(replica: Replica) -> ReplicaId:
    return replica.id
