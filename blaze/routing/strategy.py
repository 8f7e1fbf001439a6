"""What a balancing strategy is: one pure function of (columns, eligible places, request, its own state).

No I/O, no awaiting, no clock; randomness comes from an injected generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blaze.routing.columns import Columns, Floats, Places
from blaze.types import ReplicaId


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, as far as its place is concerned.

    ``cost``: in the units of :mod:`blaze.routing.cost`. ``key``: a stable hash of its session, user or client
    address. ``credit``: of the cost, what each replica is spared by a prefix that it holds.
    """

    now: float
    cost: float = 1.0
    key: int | None = None
    credit: Floats | None = None


@dataclass(frozen=True, slots=True)
class Pick:
    replica_id: ReplicaId


class Strategy(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def wants_credit(self) -> bool:
        """Whether it looks at what prefixes would spare: finding that out takes a while."""
        ...

    @property
    def binds_late(self) -> bool:
        """Whether requests rather wait here, where they can still go anywhere, than on a busy replica."""
        ...

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:
        """One of ``eligible``: ascending places, all with a weight above 0. None where there are none."""
        ...


def least(
    columns: Columns, eligible: Places, scores: Floats, rng: random.Random, *, tolerance: float = 0.0
) -> Pick:
    """One of the places with the least score, at random; ``tolerance``: or with so little more, in parts."""
    tied = np.flatnonzero(scores <= scores.min() * (1.0 + tolerance))
    at = tied[0] if len(tied) == 1 else tied[rng.randrange(len(tied))]
    return Pick(columns.ids[eligible[at]])
