"""What was found and decided lately: bounded, logged, and counted."""

from __future__ import annotations

import logging
from collections import Counter, deque

from blaze.clock import Clock
from blaze.reports import ReplicaEvent
from blaze.types import ReplicaId

logger = logging.getLogger(__name__)

EVENTS = 256


class Journal:
    """Events of all models, oldest first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._events: deque[tuple[float, ReplicaEvent]] = deque(maxlen=EVENTS)  # and when they were
        self._restarts: Counter[tuple[str, str]] = Counter()

    def note(self, model: str, replica_id: ReplicaId, before: str, after: str, reason: str) -> None:
        """``replica_id``: "" for what concerns the model as a whole."""
        about = f"replica {replica_id} of {model}" if replica_id else f"model {model}"
        logger.warning("%s: %s, was %s: %s", about, after, before, reason)
        event = ReplicaEvent(model, replica_id, before, after, reason, age_s=0.0)
        self._events.append((self._clock.now(), event))

    def count_restart(self, model: str, kind: str) -> None:
        self._restarts[model, kind] += 1

    def events(self) -> tuple[ReplicaEvent, ...]:
        now = self._clock.now()
        return tuple(
            ReplicaEvent(e.model, e.replica_id, e.before, e.after, e.reason, now - at)
            for at, e in self._events
        )

    def restarts(self) -> tuple[tuple[str, str, int], ...]:
        """(model, kind of reason, how many)"""
        return tuple((model, kind, count) for (model, kind), count in sorted(self._restarts.items()))
