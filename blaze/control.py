"""What operators change while the cluster runs: values that cross processes, standard library only.

A change goes to the health actor, which numbers it; every Router takes over what it has not seen yet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from blaze.checks import check, is_number
from blaze.types import ReplicaId

MOST_WEIGHT = 1_000_000
_BREAKER_ACTIONS = 64  # the last ones; a Router that was away for longer starts with closed breakers anyway


@dataclass(frozen=True)
class SetStrategy:
    model: str
    strategy: str

    def __post_init__(self) -> None:
        check(isinstance(self.model, str), "model", "must be a name")
        check(isinstance(self.strategy, str), "strategy", "must be a name")


@dataclass(frozen=True)
class SetWeight:
    replica_id: ReplicaId
    weight: float

    def __post_init__(self) -> None:
        """Raises :class:`InvalidRequest`, as the others do: calls over a handle pass no other validation."""
        _check_id(self.replica_id)
        check(
            is_number(self.weight) and 0 <= self.weight <= MOST_WEIGHT,
            "weight",
            f"must be 0 to {MOST_WEIGHT:,}",
        )


@dataclass(frozen=True)
class SetDraining:
    replica_id: ReplicaId
    draining: bool

    def __post_init__(self) -> None:
        _check_id(self.replica_id)
        check(isinstance(self.draining, bool), "draining", "must be true or false")


@dataclass(frozen=True)
class ActOnBreaker:
    replica_id: ReplicaId
    action: Literal["open", "close", "reset"]

    def __post_init__(self) -> None:
        _check_id(self.replica_id)
        check(self.action in ("open", "close", "reset"), "action", "must be open, close or reset")


Change: TypeAlias = SetStrategy | SetWeight | SetDraining | ActOnBreaker


@dataclass(frozen=True)
class Control:
    """The sum of all changes. ``breakers``: (version at which it was asked for, action), in order."""

    version: int = 0
    strategies: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[ReplicaId, float], ...] = ()
    draining: tuple[ReplicaId, ...] = ()
    forced_open: tuple[ReplicaId, ...] = ()
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
        forced = dict.fromkeys(self.forced_open)
        forced.pop(change.replica_id, None)
        if change.action == "open":
            forced[change.replica_id] = None
        return replace(self, version=version, breakers=breakers, forced_open=tuple(forced))

    @property
    def replica_ids(self) -> frozenset[ReplicaId]:
        """All that anything is said of."""
        weighed = (replica_id for replica_id, _ in self.weights)
        acted_on = (action.replica_id for _, action in self.breakers)
        return frozenset((*weighed, *self.draining, *self.forced_open, *acted_on))

    def without(self, gone: Collection[ReplicaId]) -> Control:
        """Nothing is said of these replicas any more."""
        return replace(
            self,
            version=self.version + 1,
            weights=tuple(entry for entry in self.weights if entry[0] not in gone),
            draining=tuple(replica_id for replica_id in self.draining if replica_id not in gone),
            forced_open=tuple(replica_id for replica_id in self.forced_open if replica_id not in gone),
            breakers=tuple(entry for entry in self.breakers if entry[1].replica_id not in gone),
        )


def _check_id(replica_id: ReplicaId) -> None:
    check(isinstance(replica_id, str) and 0 < len(replica_id) <= 256, "id", "must be a replica's id")


NO_CHANGES = Control()
