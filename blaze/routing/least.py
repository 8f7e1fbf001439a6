"""Strategies that look for the replica with the least of something."""

from __future__ import annotations

import math
import random

import numpy as np

from blaze.routing.columns import Columns, Floats, Places
from blaze.routing.strategy import Ask, Pick, least

TAU_S = 10.0  # of the EWMA of response times
_REDRAWS = 8
_MEDIAN_AGE_S = 0.1


class LeastConnections:
    """The least ``(in_flight + 1) / weight``; ties are broken at random.

    One router looks at all replicas. With several, each of which hears of the others' requests late, all
    would herd onto the same minimum: each compares two random replicas instead (Mitzenmacher, "The Power of
    Two Choices in Randomized Load Balancing", 2001).
    """

    name = "least_connections"
    wants_credit = False
    binds_late = False

    def __init__(self, rng: random.Random, *, routers: int = 1) -> None:
        self._rng = rng
        self._two_choices = routers > 1

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:  # noqa: ARG002
        if not len(eligible):
            return None
        if self._two_choices and len(eligible) > 2:
            eligible = two_of(eligible, self._rng)
        return least(columns, eligible, _load(columns, eligible), self._rng)


class LeastResponseTime:
    """Peak EWMA (Finagle) of response times, times the requests in flight, the better of two random replicas.

    Between samples, what is known of a replica fades into the pool's median, so that one bad moment is not
    held against it for ever. Who was never measured counts as the median, and gets one request until it is.
    A replica that lets its oldest request wait for content is at least as slow as that.
    """

    name = "least_response_time"
    wants_credit = False
    binds_late = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._median = Median()

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:
        if not len(eligible):
            return None
        median = self._median.of(columns, columns.response, ask.now) or 0.0
        best = min(self._two(columns, eligible), key=lambda place: _slowness(columns, place, median, ask.now))
        return Pick(columns.ids[best])

    def _two(self, columns: Columns, eligible: Places) -> list[int]:
        for _ in range(_REDRAWS):
            drawn = two_of(eligible, self._rng).tolist()
            allowed = [place for place in drawn if not _being_measured(columns, place)]
            if allowed:
                return allowed
        known = ~(np.isnan(columns.response[eligible]) & (columns.in_flight[eligible] > 0))
        last: list[int] = two_of(eligible[known] if known.any() else eligible, self._rng).tolist()
        return last


class Median:
    """Of the numbers that are known, looked up a few times a second."""

    def __init__(self) -> None:
        self._looked_at = -math.inf
        self._membership = -1
        self._value: float | None = None

    def of(self, columns: Columns, numbers: Floats, now: float) -> float | None:
        known_before = self._value is not None and self._membership == columns.membership
        if not known_before or now - self._looked_at > _MEDIAN_AGE_S:
            known = numbers[~np.isnan(numbers)]
            self._value = float(np.median(known)) if len(known) else None
            self._looked_at, self._membership = now, columns.membership
        return self._value


def peak_ewma(known: float, age_s: float, sample: float) -> float:
    """Up at once, down slowly. ``known``: NaN before the first sample."""
    if not sample <= known:
        return sample
    keep = math.exp(-age_s / TAU_S)
    return keep * known + (1 - keep) * sample


def two_of(eligible: Places, rng: random.Random) -> Places:
    """Two different ones at random, or all where there are no more."""
    count = len(eligible)
    if count <= 2:
        return eligible
    first = rng.randrange(count)
    second = (first + 1 + rng.randrange(count - 1)) % count
    return eligible[[first, second]]


def _load(columns: Columns, eligible: Places) -> Floats:
    return (columns.in_flight[eligible] + 1) / (columns.weight[eligible] * columns.ramp[eligible])


def _being_measured(columns: Columns, place: int) -> bool:
    return math.isnan(columns.response[place]) and columns.in_flight[place] > 0


def _slowness(columns: Columns, place: int, median: float, now: float) -> tuple[float, float]:
    """Seconds, times the queue; then the queue alone, for there may be nothing to tell replicas apart by."""
    measured = float(columns.response[place])
    if math.isnan(measured):
        measured = median
    else:
        measured = median + (measured - median) * math.exp((columns.measured_at[place] - now) / TAU_S)
    seconds = max(measured, now - float(columns.waiting_since[place]))
    queue = float((columns.in_flight[place] + 1) / (columns.weight[place] * columns.ramp[place]))
    return seconds * queue, queue
