"""Who belongs to a model: the replicas that are there, and those that left while requests ran on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from blaze.reports import PeerLoad
from blaze.routing.replica import Replica, ReplicaInfo
from blaze.types import ReplicaId


class Members:
    """An id names one process for good: who comes back under it is who left, with all that runs there."""

    def __init__(self, drain_timeout_s: float) -> None:
        self.by_id: dict[ReplicaId, Replica] = {}
        self._drain_timeout_s = drain_timeout_s
        self._left: dict[ReplicaId, Replica] = {}  # as long as something runs there

    @property
    def in_flight(self) -> int:
        """Of this router, on all of them."""
        return sum(replica.in_flight for replica in (*self.by_id.values(), *self._left.values()))

    def sync(self, infos: Mapping[ReplicaId, ReplicaInfo], now: float) -> None:
        for gone in self.by_id.keys() - infos.keys():
            replica = self.by_id.pop(gone)
            replica.drained_until = now + self._drain_timeout_s  # it may be finishing its work
            replica.peers = PeerLoad()
            if replica.in_flight:
                self._left[gone] = replica
        for replica_id in infos.keys() - self.by_id.keys():
            known = self._left.pop(replica_id) if replica_id in self._left else None
            replica = self.by_id[replica_id] = known or Replica(infos[replica_id], now)
            replica.joined_at = now

    def doubtful(self, suspects: Collection[ReplicaId], condemned: Collection[ReplicaId]) -> set[ReplicaId]:
        """Who should not be picked. If nobody is heard at all, it may be who listens that is cut off: then
        only the ``condemned`` are out, of whom more is known than that they are silent."""
        out = self.by_id.keys() & {*suspects, *condemned}
        return out if len(out) < len(self.by_id) else self.by_id.keys() & set(condemned)

    def is_idle(self, replica: Replica) -> None:
        """Nothing runs there any more: if it has left, nothing is left of it."""
        self._left.pop(replica.id, None)
