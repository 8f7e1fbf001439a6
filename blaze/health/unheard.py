"""Replicas that Routers have, and that the health actor has not heard since it came."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import count

from blaze.reports import EngineStatus, Heartbeat, ReplicaCounters, RouterReport
from blaze.types import EngineKind, ReplicaId


class Unheard:
    """Those that fell silent before this actor came: without a heartbeat nothing else would speak of them.
    The time in which they should be heard begins when a Router first tells of them."""

    def __init__(self) -> None:
        self._ids: set[ReplicaId] = set()
        self._slots = count(-1, -1)

    def __contains__(self, replica_id: ReplicaId) -> bool:
        return replica_id in self._ids

    def discard(self, replica_id: ReplicaId) -> None:
        self._ids.discard(replica_id)

    def find(
        self, reports: Iterable[RouterReport], known: Collection[ReplicaId]
    ) -> dict[ReplicaId, ReplicaCounters]:
        """All of them that Routers have now, also those that are not ``known`` yet. Whether one is suspect,
        the Router that says so knows best."""
        found: dict[ReplicaId, ReplicaCounters] = {}
        for replica in (replica for report in reports for replica in report.replicas):
            replica_id = replica.replica_id
            unheard = replica_id not in known or replica_id in self._ids
            if unheard and (replica.suspect or replica_id not in found):
                found[replica_id] = replica
        return found

    def stand_in(self, counters: ReplicaCounters) -> Heartbeat:
        """In place of a heartbeat: its name is all that is known. Its rank is not, so it has a slot of its
        own, below those of Serve."""
        self._ids.add(counters.replica_id)
        unknown = EngineStatus(EngineKind.LLM, "idle", 0, 0, 0, None)
        return Heartbeat(
            counters.replica_id, counters.model, next(self._slots), "", 0, unknown, 0, counters.actor
        )
