"""What a model's breakers have done, for whoever asks."""

from __future__ import annotations

import logging
from collections import deque

from blaze.clock import Clock
from blaze.reports import BreakerEvent
from blaze.routing.breaker import BreakerState, Transition

logger = logging.getLogger(__name__)

_EVENTS = 64


class BreakerLog:
    def __init__(self, model: str, clock: Clock) -> None:
        self._model = model
        self._clock = clock
        self._events: deque[tuple[float, Transition]] = deque(maxlen=_EVENTS)  # and when they were
        self._transitions = dict.fromkeys(BreakerState, 0)

    def note(self, change: Transition) -> None:
        logger.warning(
            "%s: breaker of %s: %s: %s", self._model, change.replica_id, change.after, change.reason
        )
        self._transitions[change.after] += 1
        self._events.append((self._clock.now(), change))

    @property
    def transitions(self) -> tuple[tuple[str, int], ...]:
        """How often breakers have come to each state."""
        return tuple((state.value, count) for state, count in self._transitions.items())

    def events(self) -> tuple[BreakerEvent, ...]:
        """The last ones."""
        now = self._clock.now()
        return tuple(self._event(change, now - at) for at, change in self._events)

    def _event(self, change: Transition, age_s: float) -> BreakerEvent:
        before, after = change.before.value, change.after.value
        return BreakerEvent(self._model, change.replica_id, before, after, change.reason, age_s)
