"""When a breaker trips, and for how long it is open then."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

_BUCKET_S = 1.0
_JITTER = 0.5


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    failure_threshold: int = 5  # failures in a row
    success_threshold: int = 2  # probes that have to succeed
    recovery_timeout_s: float = 1.0  # open for so long after the first trip
    max_timeout_s: float = 60.0
    monitoring_window_s: float = 10.0
    min_outcomes: int = 10  # in the window, before the rate counts
    failure_rate: float = 0.5


def open_for_s(trips: int, settings: BreakerSettings, rng: random.Random) -> float:
    """``min(max, base * 2^(trips - 1)) * (1 + U(0, 0.5))``: twice as long each time, and never in step."""
    base = min(settings.max_timeout_s, settings.recovery_timeout_s * 2.0 ** min(trips - 1, 32))
    return base * (1 + rng.uniform(0, _JITTER))


class TripPolicy:
    """Failures in a row, or too many of those in the last seconds."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._in_a_row = 0
        self._buckets: deque[tuple[int, int, int]] = deque()  # second, successes, failures

    def success(self, now: float) -> None:
        self._in_a_row = 0
        self._count(now, 1, 0)

    def failure(self, now: float) -> str | None:
        """Why to trip now, if there is a reason."""
        self._in_a_row += 1
        self._count(now, 0, 1)
        if self._in_a_row >= self._settings.failure_threshold:
            return f"{self._in_a_row} failures in a row"
        failed = sum(bucket[2] for bucket in self._buckets)
        total = failed + sum(bucket[1] for bucket in self._buckets)
        if total >= self._settings.min_outcomes and failed >= self._settings.failure_rate * total:
            return f"{failed} of {total} requests failed in {self._settings.monitoring_window_s:g} s"
        return None

    def clear(self) -> None:
        self._in_a_row = 0
        self._buckets.clear()

    def _count(self, now: float, successes: int, failures: int) -> None:
        second = int(now // _BUCKET_S)
        while (
            self._buckets and second - self._buckets[0][0] >= self._settings.monitoring_window_s / _BUCKET_S
        ):
            self._buckets.popleft()
        if self._buckets and self._buckets[-1][0] == second:
            _, succeeded, failed = self._buckets.pop()
            successes, failures = successes + succeeded, failures + failed
        self._buckets.append((second, successes, failures))
