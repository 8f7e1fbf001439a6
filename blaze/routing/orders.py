"""What operators have decided of replicas, also of those that are not there yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from blaze.clock import Clock
from blaze.control import Control, Drain
from blaze.types import ReplicaId


@dataclass(frozen=True, slots=True)
class Orders:
    """``drained`` and ``drained_nodes``: until when what runs there may stay, by this Router's own clock."""

    weights: Mapping[ReplicaId, float] = field(default_factory=dict)
    drained: Mapping[ReplicaId, float] = field(default_factory=dict)
    drained_nodes: Mapping[str, float] = field(default_factory=dict)
    forced_open: frozenset[ReplicaId] = frozenset()

    def drained_until(self, replica_id: ReplicaId, node: str) -> float | None:
        """None: it is not drained."""
        until = min(self.drained.get(replica_id, math.inf), self.drained_nodes.get(node, math.inf))
        known = replica_id in self.drained or node in self.drained_nodes
        return until if known else None


class DrainTimes:
    """From seconds, counted since this Router has heard of a drain, to times of its own clock."""

    def __init__(self, clock: Clock, default_s: float) -> None:
        self._clock = clock
        self._default_s = default_s
        self._ends: dict[tuple[str, int], float] = {}  # of a name and version
        self._of_all: tuple[int, float] | None = None

    def follow(self, control: Control) -> Orders:
        ends: dict[tuple[str, int], float] = {}
        orders = Orders(
            weights=dict(control.weights),
            drained=self._times(control.draining, ends),
            drained_nodes=self._times(control.draining_nodes, ends),
            forced_open=frozenset(control.forced_open),
        )
        self._ends = ends
        return orders

    def _times(
        self, drains: Iterable[tuple[str, Drain]], ends: dict[tuple[str, int], float]
    ) -> dict[str, float]:
        times = {}
        for name, drain in drains:
            timeout_s = self._default_s if drain.timeout_s is None else drain.timeout_s
            key = (name, drain.version)  # versions are asked for once: a node's is never a replica's
            times[name] = ends[key] = self._ends.get(key, self._clock.now() + timeout_s)
        return times

    def end_of_all(self, drain: Drain | None) -> float | None:
        """Until when what runs anywhere may go on; None: to its end."""
        if drain is None or drain.timeout_s is None:
            self._of_all = None
            return None
        if self._of_all is None or self._of_all[0] != drain.version:
            self._of_all = (drain.version, self._clock.now() + drain.timeout_s)
        return self._of_all[1]
