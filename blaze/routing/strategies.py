"""The strategies by name."""

from __future__ import annotations

import random
from collections.abc import Callable

from blaze.errors import ConfigError
from blaze.routing.adaptive import Adaptive
from blaze.routing.least import LeastConnections, LeastResponseTime
from blaze.routing.rendezvous import IPHash
from blaze.routing.strategy import Strategy
from blaze.routing.turns import RoundRobin, WeightedRoundRobin

_STRATEGIES: dict[str, Callable[[random.Random, int], Strategy]] = {
    RoundRobin.name: lambda rng, _routers: RoundRobin(rng),
    WeightedRoundRobin.name: lambda _rng, _routers: WeightedRoundRobin(),
    LeastConnections.name: lambda rng, routers: LeastConnections(rng, routers=routers),
    LeastResponseTime.name: lambda rng, _routers: LeastResponseTime(rng),
    IPHash.name: lambda rng, routers: IPHash(rng, routers=routers),
    Adaptive.name: lambda rng, _routers: Adaptive(rng),
}

STRATEGY_NAMES: tuple[str, ...] = tuple(sorted(_STRATEGIES))


def make_strategy(name: str, *, rng: random.Random, routers: int = 1) -> Strategy:
    """The strategy of that name. Raises :class:`ConfigError` for an unknown one."""
    make = _STRATEGIES.get(name)
    if make is None:
        raise ConfigError(f"strategy: {name!r} is not one of {', '.join(STRATEGY_NAMES)}", param="strategy")
    return make(rng, routers)
