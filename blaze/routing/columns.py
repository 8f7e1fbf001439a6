"""What strategies know of a model's replicas, as columns: one array for each number, one place a replica.

A pick looks at every replica, so the numbers are kept where numpy can look at all of them at once, and kept
up to date as requests come and go, not gathered for each pick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from blaze.types import ReplicaId

Floats: TypeAlias = npt.NDArray[np.float64]
Hashes: TypeAlias = npt.NDArray[np.uint64]
Places: TypeAlias = npt.NDArray[np.int64]  # of replicas, ascending

_FLOATS: dict[str, float] = {  # and what they are for a replica that has just come
    "weight": 1.0,
    "ramp": 1.0,
    "in_flight": 0.0,
    "in_flight_here": 0.0,
    "cost": 0.0,
    "drain": np.nan,
    "success": 1.0,
    "judged_at": -np.inf,
    "response": np.nan,
    "measured_at": -np.inf,
    "waiting_since": np.inf,
}


class Columns:
    """All arrays have one entry for each live replica, in the order of ids.

    ``weight``: the operator's. ``ramp``: 0.1 to 1, while a replica starts slowly. ``in_flight`` and ``cost``:
    of all Routers, as far as this one knows; ``in_flight_here``: of this one alone. ``drain``: EWMA of the
    cost served per busy second; NaN before anything was served. ``success``: EWMA of 1 for a success and 0
    for a failure, the last one at ``judged_at``. ``response``: peak EWMA of response times in seconds at
    ``measured_at``; NaN: never measured. ``waiting_since``: when the oldest request was sent that has no
    content yet; inf: there is none.

    ``cost_cap``: what a replica is taken to carry when it is full. ``peers_age_s``: how old the knowledge of
    other Routers' requests is; 0 where there are none.
    """

    weight: Floats
    ramp: Floats
    in_flight: Floats
    in_flight_here: Floats
    cost: Floats
    drain: Floats
    success: Floats
    judged_at: Floats
    response: Floats
    measured_at: Floats
    waiting_since: Floats

    def __init__(self, ids: Iterable[ReplicaId] = ()) -> None:
        self.ids: tuple[ReplicaId, ...] = ()
        self.place: dict[ReplicaId, int] = {}
        self.hashes: Hashes = np.empty(0, np.uint64)
        self.cost_cap = np.inf
        self.peers_age_s = 0.0
        self.membership = 0  # grows with each change of ``ids``
        for name in _FLOATS:
            setattr(self, name, np.empty(0))
        self.resize(ids)

    def resize(self, ids: Iterable[ReplicaId]) -> None:
        """Those that stay keep their numbers."""
        ordered = tuple(sorted(ids))
        kept = [(new, self.place[id]) for new, id in enumerate(ordered) if id in self.place]
        to, source = (np.array([pair[side] for pair in kept], np.int64) for side in (0, 1))
        for name, initial in _FLOATS.items():
            column = np.full(len(ordered), initial)
            column[to] = getattr(self, name)[source]
            setattr(self, name, column)
        self.ids = ordered
        self.place = {id: place for place, id in enumerate(ordered)}
        self.hashes = np.array([stable_hash(id) for id in ordered], np.uint64)
        self.membership += 1

    def __len__(self) -> int:
        return len(self.ids)


def stable_hash(text: str) -> int:
    """64 bits, the same in every process and on every machine."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


class Carried:
    """Numbers of a strategy's own for each replica; those that stay keep theirs."""

    def __init__(self, initial: Callable[[], float] = lambda: 0.0) -> None:
        self._initial = initial
        self._ids: tuple[ReplicaId, ...] = ()
        self._membership = -1
        self.values: Floats = np.empty(0)

    def follow(self, columns: Columns) -> Floats:
        if self._membership != columns.membership:
            before = dict(zip(self._ids, self.values.tolist(), strict=True))
            self.values = np.array([before.get(id, self._initial()) for id in columns.ids], np.float64)
            self._ids, self._membership = columns.ids, columns.membership
        return self.values
