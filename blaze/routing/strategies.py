"""Balancing strategies: pure functions of (views, request, own state).

No I/O, no awaiting, no clock; randomness comes from an injected generator. Every strategy is given the
eligible replicas only, sorted by id, and answers with one of them or with None.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from blaze.errors import ConfigError
from blaze.types import ReplicaId, Request


class ReplicaView(Protocol):
    """What a strategy may know of a replica."""

    @property
    def id(self) -> ReplicaId: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Pick:
    replica_id: ReplicaId


class Strategy(Protocol):
    @property
    def name(self) -> str: ...

    def choose(self, views: Sequence[ReplicaView], request: Request) -> Pick | None:
        """Pick one of ``views`` (eligible, sorted by id). None when none may be chosen."""
        ...


class RoundRobin:
    """A cursor over the id-sorted list that skips whoever is not eligible.

    The cursor is the id that was picked last, not a position: when replicas come and go, the order of
    those that stay does not change. Each router starts at a random place, so that several routers do
    not march in step.
    """

    name = "round_robin"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._last: ReplicaId | None = None

    def choose(self, views: Sequence[ReplicaView], request: Request) -> Pick | None:  # noqa: ARG002
        if not views:
            return None
        if self._last is None:
            position = self._rng.randrange(len(views))
        else:
            position = bisect_right(views, self._last, key=_view_id) % len(views)
        self._last = views[position].id
        return Pick(self._last)


class LeastConnections:
    """The least ``(in_flight + 1) / weight``; ties are broken at random.

    One router scans all replicas. With several, each of which sees only its own requests, all would
    herd onto the same minimum: each compares two random replicas instead (Mitzenmacher, "The Power of
    Two Choices in Randomized Load Balancing", 2001). A weight of 0 is never chosen.
    """

    name = "least_connections"

    def __init__(self, rng: random.Random, *, routers: int = 1) -> None:
        self._rng = rng
        self._two_choices = routers > 1

    def choose(self, views: Sequence[ReplicaView], request: Request) -> Pick | None:  # noqa: ARG002
        candidates = [view for view in views if view.weight > 0]
        if not candidates:
            return None
        if self._two_choices and len(candidates) > 2:
            candidates = self._rng.sample(candidates, 2)
        least = min(_load(view) for view in candidates)
        tied = [view for view in candidates if _load(view) == least]
        winner = tied[0] if len(tied) == 1 else self._rng.choice(tied)
        return Pick(winner.id)


def _view_id(view: ReplicaView) -> ReplicaId:
    return view.id


def _load(view: ReplicaView) -> float:
    return (view.in_flight + 1) / view.weight


_STRATEGIES: dict[str, Callable[[random.Random, int], Strategy]] = {
    RoundRobin.name: lambda rng, _routers: RoundRobin(rng),
    LeastConnections.name: lambda rng, routers: LeastConnections(rng, routers=routers),
}


def make_strategy(name: str, *, rng: random.Random, routers: int = 1) -> Strategy:
    """The strategy of that name. Raises :class:`ConfigError` for an unknown one."""
    make = _STRATEGIES.get(name)
    if make is None:
        raise ConfigError(
            f"strategy: {name!r} is not one of {', '.join(sorted(_STRATEGIES))}", param="strategy"
        )
    return make(rng, routers)
