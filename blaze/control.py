"""What operators change while the cluster runs: values that cross processes, standard library only.

A change goes to the health actor, which numbers it; every Router takes over what it has not seen yet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from blaze.checks import check, check_timeout, is_number
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
    """No new requests; what runs there goes on elsewhere after ``timeout_s``, or as the config says."""

    replica_id: ReplicaId
    draining: bool
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        _check_id(self.replica_id)
        _check_draining(self.draining, self.timeout_s)


@dataclass(frozen=True)
class SetNodeDraining:
    """The same of all replicas of a node, those that come later too."""

    node: str  # as Ray names it
    draining: bool
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        check(isinstance(self.node, str) and 0 < len(self.node) <= 256, "node", "must be a node's id")
        _check_draining(self.draining, self.timeout_s)


@dataclass(frozen=True)
class SetAllDraining:
    """Nothing new is begun anywhere. What has come before may finish; after ``timeout_s``, if there is one,
    it ends with an error."""

    draining: bool
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        _check_draining(self.draining, self.timeout_s)


@dataclass(frozen=True)
class ActOnBreaker:
    replica_id: ReplicaId
    action: Literal["open", "close", "reset"]

    def __post_init__(self) -> None:
        _check_id(self.replica_id)
        check(self.action in ("open", "close", "reset"), "action", "must be open, close or reset")


SomeDraining: TypeAlias = SetDraining | SetNodeDraining | SetAllDraining
Change: TypeAlias = SetStrategy | SetWeight | SomeDraining | ActOnBreaker


@dataclass(frozen=True)
class Drain:
    """``version``: at which it was asked for; a Router counts the seconds from when it hears of that one."""

    version: int
    timeout_s: float | None = None


@dataclass(frozen=True)
class Control:
    """The sum of all changes. ``breakers``: (version at which it was asked for, action), in order."""

    version: int = 0
    strategies: tuple[tuple[str, str], ...] = ()
    weights: tuple[tuple[ReplicaId, float], ...] = ()
    draining: tuple[tuple[ReplicaId, Drain], ...] = ()
    draining_nodes: tuple[tuple[str, Drain], ...] = ()
    draining_all: Drain | None = None
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
        if isinstance(change, ActOnBreaker):
            return self._after_action(version, change)
        return self._after_draining(version, change)

    def _after_draining(self, version: int, change: SomeDraining) -> Control:
        drain = Drain(version, change.timeout_s) if change.draining else None
        if isinstance(change, SetAllDraining):
            return replace(self, version=version, draining_all=drain)
        if isinstance(change, SetNodeDraining):
            nodes = _with(self.draining_nodes, change.node, drain)
            return replace(self, version=version, draining_nodes=nodes)
        return replace(self, version=version, draining=_with(self.draining, change.replica_id, drain))

    def _after_action(self, version: int, change: ActOnBreaker) -> Control:
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
        drained = (replica_id for replica_id, _ in self.draining)
        acted_on = (action.replica_id for _, action in self.breakers)
        return frozenset((*weighed, *drained, *self.forced_open, *acted_on))

    def without(self, gone: Collection[ReplicaId]) -> Control:
        """Nothing is said of these replicas any more."""
        return replace(
            self,
            version=self.version + 1,
            weights=tuple(entry for entry in self.weights if entry[0] not in gone),
            draining=tuple(entry for entry in self.draining if entry[0] not in gone),
            forced_open=tuple(replica_id for replica_id in self.forced_open if replica_id not in gone),
            breakers=tuple(entry for entry in self.breakers if entry[1].replica_id not in gone),
        )


def _with(
    drains: tuple[tuple[str, Drain], ...], name: str, drain: Drain | None
) -> tuple[tuple[str, Drain], ...]:
    others = tuple(entry for entry in drains if entry[0] != name)
    return others if drain is None else (*others, (name, drain))


def _check_draining(draining: bool, timeout_s: float | None) -> None:
    check(isinstance(draining, bool), "draining", "must be true or false")
    check_timeout(timeout_s)


def _check_id(replica_id: ReplicaId) -> None:
    check(isinstance(replica_id, str) and 0 < len(replica_id) <= 256, "id", "must be a replica's id")


NO_CHANGES = Control()
