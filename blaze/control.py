"""What operators change while the cluster runs: values that cross processes, standard library only.

A change goes to the health actor, which numbers it; every Router takes over what it has not seen yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from blaze.types import ReplicaId

_BREAKER_ACTIONS = 64  # the last ones; a Router that was away for longer starts with closed breakers anyway


@dataclass(frozen=True)
class SetStrategy:
    model: str
    strategy: str


@dataclass(frozen=True)
class SetWeight:
    replica_id: ReplicaId
    weight: float


@dataclass(frozen=True)
class SetDraining:
    replica_id: ReplicaId
    draining: bool


@dataclass(frozen=True)
class ActOnBreaker:
    replica_id: ReplicaId
    action: Literal["open", "close", "reset"]


Change: TypeAlias = SetStrategy | SetWeight | SetDraining | ActOnBreaker


@dataclass(frozen=True)
class Control:
    """The sum of all changes. ``breakers``: (version at which it was asked for, action), in order."""

    version: int = 0
    strategies: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[ReplicaId, float], ...] = ()
    draining: tuple[ReplicaId, ...] = ()
    breakers: tuple[tuple[int, ActOnBreaker], ...] = ()

    def after(self, change: Change) -> Control:
        version = self.version + 1
        if isinstance(change, SetStrategy):
            changed = {**dict(self.strategies), change.model: change.strategy}
            return replace(self, version=version, strategies=tuple(changed.items()))
        if isinstance(change, SetWeight):
            weights = {**dict(self.weights), change.replica_id: change.weight}
            return replace(self, version=version, weights=tuple(weights.items()))
        if isinstance(change, SetDraining):
            draining = dict.fromkeys(self.draining)
            draining.pop(change.replica_id, None)
            if change.draining:
                draining[change.replica_id] = None
            return replace(self, version=version, draining=tuple(draining))
        breakers = (*self.breakers, (version, change))[-_BREAKER_ACTIONS:]
        return replace(self, version=version, breakers=breakers)


NO_CHANGES = Control()
