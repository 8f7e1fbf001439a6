"""Balancing by cost: what is outstanding, how fast it is served, and what a held prefix spares."""

from __future__ import annotations

import math
import random

import numpy as np

from blaze.routing.columns import Columns, Floats, Places
from blaze.routing.least import Median, two_of
from blaze.routing.strategy import Ask, Pick, least

HOT_QUANTILE = 0.84
HOT_FLOOR = 0.8  # of the capacity: in a small pool the quantile alone marks nothing, or anything
STALE_AFTER_S = 1.0
FORGOTTEN_AFTER_S = 60.0  # time constant: who was slow or failed once is tried again some time
_AS_GOOD_AS = 0.05  # scores that are so near to the least are taken for equal
_LEAST_SUCCESS = 0.01  # a replica that fails every time is still nearer than infinitely far


class Adaptive:
    """Among the replicas that are not hot, the one that will soonest have served this request too.

    Hot: its outstanding cost is above the pool's 84 % quantile and above 80 % of what a replica carries
    (hot and cold as in Prequal, NSDI 2024). Soonest: the least ``(C + q) / (drain / (n + 1) * success^2 *
    weight)``, with ``q`` the request's cost after the credit for a prefix that the replica holds, and ``n``
    the requests in flight: who serves many at once gets more done in a second than who was given few, without
    being any faster for one of them, and by ``drain`` alone the busy would be given ever more. Where several
    routers share replicas and this one has not heard of the others for a second, it would herd with them on
    old news: it takes the better of two random replicas instead, by cost alone.
    """

    name = "adaptive"
    wants_credit = True
    binds_late = True

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._drain = Median()

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:
        if not len(eligible):
            return None
        if columns.peers_age_s > STALE_AFTER_S:
            eligible = two_of(eligible, self._rng)
            return least(columns, eligible, self._outstanding(columns, eligible, ask), self._rng)
        load = columns.cost[eligible] / columns.cost_cap
        eligible = eligible[load <= max(_nearest_rank(load, HOT_QUANTILE), HOT_FLOOR)]
        keep = np.exp((columns.judged_at[eligible] - ask.now) / FORGOTTEN_AFTER_S)
        success = np.maximum(1.0 - (1.0 - columns.success[eligible]) * keep, _LEAST_SUCCESS)
        speed = self._drain_of(columns, eligible, keep, ask.now) * success * success
        speed /= columns.in_flight[eligible] + 1
        scores = self._outstanding(columns, eligible, ask) / speed
        return least(columns, eligible, scores, self._rng, tolerance=_AS_GOOD_AS)

    def _outstanding(self, columns: Columns, eligible: Places, ask: Ask) -> Floats:
        """With this request, for each of weight."""
        own: Floats | float = ask.cost
        if ask.credit is not None:
            own = np.maximum(ask.cost - ask.credit[eligible], 0.0)
        weighted: Floats = (columns.cost[eligible] + own) / (
            columns.weight[eligible] * columns.ramp[eligible]
        )
        return weighted

    def _drain_of(self, columns: Columns, eligible: Places, keep: Floats, now: float) -> Floats:
        """Who has served nothing yet, or nothing for long, is taken to be as fast as the median."""
        median = self._drain.of(columns, columns.drain, now)
        known = 1.0 if median is None else median
        drain = columns.drain[eligible]
        return np.where(np.isnan(drain), known, known + (drain - known) * keep)


def _nearest_rank(numbers: Floats, quantile: float) -> float:
    """The smallest number that at least that part of all numbers does not exceed."""
    return float(np.sort(numbers)[math.ceil(quantile * len(numbers)) - 1])
