"""Strategies that take turns: whatever the replicas do, each gets its share of the requests."""

from __future__ import annotations

import random
from bisect import bisect_right

import numpy as np

from blaze.routing.columns import Carried, Columns, Floats, Places
from blaze.routing.strategy import Ask, Pick
from blaze.types import ReplicaId


class RoundRobin:
    """A cursor over the id-sorted list that skips whoever is not eligible.

    The cursor is the id that was picked last, not a position: when replicas come and go, the order of those
    that stay does not change. Each router starts at a random place, so that several do not march in step.
    """

    name = "round_robin"
    wants_credit = False
    binds_late = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._last: ReplicaId | None = None

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:  # noqa: ARG002
        if not len(eligible):
            return None
        if self._last is None:
            at = self._rng.randrange(len(eligible))
        else:
            at = int(np.searchsorted(eligible, bisect_right(columns.ids, self._last))) % len(eligible)
        self._last = columns.ids[eligible[at]]
        return Pick(self._last)


class WeightedRoundRobin:
    """Smooth weighted round robin, as in nginx: turns in proportion to weights, spread out evenly.

    Each pick, everybody's credit grows by its weight; who has most (of equal ones, the lowest id) is picked
    and pays the sum. Weights 5, 1, 1 give a a b a c a a.
    """

    name = "weighted_round_robin"
    wants_credit = False
    binds_late = False

    def __init__(self) -> None:
        self._credit = Carried()
        self._weights: Floats = np.empty(0)  # that the credit is of
        self._membership = -1

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:  # noqa: ARG002
        if not len(eligible):
            return None
        credit = self._credit.follow(columns)
        if not np.array_equal(self._weights, columns.weight):
            if self._membership == columns.membership:
                credit[:] = 0.0  # of other weights: who had most would be picked until it is used up
            self._weights, self._membership = columns.weight.copy(), columns.membership
        weights = columns.weight[eligible] * columns.ramp[eligible]
        grown = credit[eligible] + weights
        credit[eligible] = grown
        place = eligible[grown.argmax()]
        credit[place] -= weights.sum()
        return Pick(columns.ids[place])
