"""One replica as the router accounts for it, and the lease of one attempt on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from blaze.reports import PeerLoad, ReplicaCounters
from blaze.routing.breaker import Permit
from blaze.routing.columns import Columns
from blaze.routing.outcome import Outcome
from blaze.routing.speed import Speed
from blaze.types import ReplicaId


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A member of the live set, as the pool reports it."""

    id: ReplicaId
    node: str = ""
    weight: float = 1.0
    ready: bool = True  # False: no new requests, but what runs there goes on
    actor: str = ""  # the name by which it can be ended, where it has one


class Replica:
    """What one router knows of one replica, but for the columns."""

    __slots__ = (
        "actor",
        "cost",
        "drained_until",
        "failures",
        "id",
        "in_flight",
        "joined_at",
        "lost_calls",
        "node",
        "peers",
        "ready",
        "requests",
        "speed",
        "suspect",
        "suspended_until",
        "waiting",
    )

    def __init__(self, info: ReplicaInfo, now: float) -> None:
        self.id = info.id
        self.actor = info.actor
        self.node = info.node
        self.ready = info.ready
        self.in_flight = 0  # from here, as is ``cost``
        self.cost = 0.0
        self.peers = PeerLoad()
        self.requests = 0
        self.failures = 0
        self.lost_calls = 0  # in a row
        self.suspended_until = -math.inf  # a call to it was lost: not picked before this time
        self.drained_until: float | None = None  # draining: and until when what runs there may stay
        self.suspect = False
        self.joined_at = now  # or when its breaker closed: the beginning of its slow start
        self.waiting: dict[Lease, float] = {}  # requests without content yet, the oldest first
        self.speed = Speed()

    @property
    def is_wanted(self) -> bool:
        return self.ready and not (self.draining or self.suspect)

    @property
    def draining(self) -> bool:
        return self.drained_until is not None

    @property
    def waiting_since(self) -> float:
        """When the request was sent that waits for content for the longest; inf: none does."""
        return next(iter(self.waiting.values()), math.inf)


class Ledger(Protocol):
    """Where leases are accounted for."""

    def recost(self, lease: Lease, cost: float) -> None: ...

    def first_content(self, lease: Lease, response_s: float | None) -> None: ...

    def released(self, lease: Lease, permit: Permit, outcome: Outcome, response_s: float | None) -> None: ...


class Lease:
    """One attempt on one replica: raises its counters at once, and lowers them exactly once."""

    __slots__ = ("_ledger", "_open", "_permit", "cost", "replica", "started_at")

    def __init__(
        self, ledger: Ledger, replica: Replica, permit: Permit, cost: float, started_at: float
    ) -> None:
        self._ledger = ledger
        self.replica = replica
        self._permit = permit
        self.cost = cost
        self.started_at = started_at
        self._open = True

    @property
    def is_probe(self) -> bool:
        return self._permit.probe

    def recost(self, cost: float) -> None:
        """More is known of the request now."""
        if self._open:
            self._ledger.recost(self, cost)

    def first_content(self, response_s: float | None = None) -> None:
        """Content has come. ``response_s``: what that says of the replica's speed, if it does."""
        if self._open:
            self._ledger.first_content(self, response_s)

    def release(self, outcome: Outcome, *, response_s: float | None = None) -> bool:
        """Record the outcome; later calls change nothing. True for the call that counted.

        ``response_s``: a sample of the response time; of a failure, how long to stay away at least.
        """
        if not self._open:
            return False
        self._open = False
        self._ledger.released(self, self._permit, outcome, response_s)
        return True


def counters_of(model: str, replica: Replica, columns: Columns, place: int, breaker: str) -> ReplicaCounters:
    response = float(columns.response[place])
    return ReplicaCounters(
        replica_id=replica.id,
        model=model,
        in_flight=replica.in_flight,
        weight=float(columns.weight[place]),
        requests=replica.requests,
        failures=replica.failures,
        cost=replica.cost,
        ewma_ms=None if math.isnan(response) else response * 1000,
        breaker=breaker,
        draining=replica.draining,
        node=replica.node,
        actor=replica.actor,
        suspect=replica.suspect,
    )
