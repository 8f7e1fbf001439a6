"""What goes wrong, and when: drawn from a seed before anything runs."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    KILL = "kill"  # SIGKILL
    STOP = "stop"  # SIGSTOP: frozen, and nothing says so
    SLOW = "slow"  # 20 times slower
    FAIL = "fail"  # errors before and in the middle of answers, exceptions, garbage
    HANG = "hang"  # takes requests, and makes no step
    BLOCK = "block"  # its event loop stands still
    DRAIN = "drain"  # and later undrained
    REDEPLOY = "redeploy"  # of the whole application, with a changed config
    STRATEGY = "strategy"  # another one for all of the model's requests
    ROUTER = "router"  # SIGKILL of a Router: breaks its own connections, and is scored apart


DEFAULT_KINDS = tuple(kind for kind in Kind if kind is not Kind.ROUTER)
NEED_A_SIMULATOR = frozenset({Kind.SLOW, Kind.FAIL, Kind.HANG, Kind.BLOCK})
ENDED_BY_HEALTH_ACTOR = frozenset({Kind.STOP, Kind.HANG})
NEED_NO_REPLICA = frozenset({Kind.REDEPLOY, Kind.STRATEGY, Kind.ROUTER})


@dataclass(frozen=True)
class PlannedFault:
    """``draw``: which of the replicas that may be hit, as a share of their number. ``lasts_s``: until it is
    undone, where it can be."""

    at_s: float
    kind: Kind
    model: str
    draw: float
    lasts_s: float


@dataclass(frozen=True)
class SeenReplica:
    id: str
    model: str
    healthy: bool  # ready, and its breaker is closed
    working: bool = False  # by its own account
    pause_s: float = 0.0  # until the health actor would restart it, for it has restarted others in its place


def schedule(
    seed: int, *, seconds: float, period_s: float, kinds: Sequence[Kind], models: Sequence[str]
) -> tuple[PlannedFault, ...]:
    """One fault a period, none in the first half of one. Every kind has its turn before one comes again."""
    rng = random.Random(f"chaos/{seed}")
    turns = _in_turns(rng, kinds)
    planned = []
    for number in range(1, int(seconds / period_s) + 1):
        at_s = (number + rng.uniform(-0.4, 0.4)) * period_s
        fault = PlannedFault(
            at_s, next(turns), rng.choice(models), rng.random(), rng.uniform(0.6, 1.6) * period_s
        )
        if at_s < seconds:
            planned.append(fault)
    return tuple(planned)


def _in_turns(rng: random.Random, kinds: Sequence[Kind]) -> Iterator[Kind]:
    while True:
        yield from rng.sample(kinds, len(kinds))


def victim(
    seen: Iterable[SeenReplica],
    model: str,
    troubled: Collection[str],
    draw: float,
    *,
    longest_pause_s: float = math.inf,
) -> SeenReplica | None:
    """Which replica is hit. None: one healthy replica of the model is spared, and there are no more, or all
    the others have a longer pause."""
    healthy = sorted(
        (r for r in seen if r.model == model and r.healthy and r.id not in troubled), key=lambda r: r.id
    )
    found = [replica for replica in healthy if replica.pause_s <= longest_pause_s]
    return found[int(draw * len(found))] if found and len(healthy) > 1 else None
