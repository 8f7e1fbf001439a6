"""The attempts that are under way, by replica."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blaze.errors import BlazeError
from blaze.types import ReplicaId

if TYPE_CHECKING:
    from blaze.routing.attempt import Attempt


class Running:
    def __init__(self) -> None:
        self._attempts: dict[ReplicaId, set[Attempt]] = defaultdict(set)

    def add(self, attempt: Attempt) -> None:
        self._attempts[attempt.replica_id].add(attempt)

    def discard(self, attempt: Attempt) -> None:
        attempts = self._attempts[attempt.replica_id]
        attempts.discard(attempt)
        if not attempts:
            del self._attempts[attempt.replica_id]

    def lose(self, replica_id: ReplicaId) -> None:
        for attempt in tuple(self._attempts.get(replica_id, ())):
            attempt.lose()

    def end(self, error: BlazeError) -> None:
        """Of all that runs, now."""
        for attempts in tuple(self._attempts.values()):
            for attempt in tuple(attempts):
                attempt.end(error)

    def draining(self) -> Iterator[tuple[float, tuple[Attempt, ...]]]:
        """What runs on draining replicas, and until when it may stay there."""
        for attempts in tuple(self._attempts.values()):
            until = next(iter(attempts)).stays_until
            if until is not None:
                yield until, tuple(attempts)
