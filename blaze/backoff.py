"""Attempts that are made again and again, each after a longer pause, and not for ever."""

from __future__ import annotations

import math

from blaze.clock import Clock


class Backoff:
    """Pauses of ``first_s``, then twice as long each time, up to ``most_s``; ``max_attempts`` in all."""

    def __init__(self, clock: Clock, *, first_s: float, most_s: float, max_attempts: int) -> None:
        self._clock = clock
        self._first_s = first_s
        self._most_s = most_s
        self._max_attempts = max_attempts
        self._not_before = -math.inf
        self.attempts = 0

    @property
    def is_exhausted(self) -> bool:
        return self.attempts >= self._max_attempts

    @property
    def wait_s(self) -> float:
        """Until there may be another attempt."""
        return max(0.0, self._not_before - self._clock.now())

    def attempt(self) -> None:
        self.attempts += 1

    def pause(self) -> float:
        """An attempt has been made. Returns the seconds in which there will be no other."""
        longer = self._first_s * 2.0 ** min(self.attempts - 1, 64)
        seconds = min(self._most_s, longer)
        self._not_before = self._clock.now() + seconds
        return seconds

    def forget(self) -> None:
        """All is well: the next attempts are counted from the beginning. A pause that runs goes on."""
        self.attempts = 0
