"""A real dispatcher over a fake pool, and what dispatcher tests ask about it."""

from __future__ import annotations

import random
from typing import Any

from blaze.routing.dispatcher import Dispatcher
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategies import make_strategy
from blaze.types import Event, Request, Usage
from tests.fakes import FakeClock, FakePool
from tests.samples import collect

_AT_ONCE = {"deadline_grace_s": 0.0, "recheck_s": 0.0, "retry_pause": 0.0, "slow_start_s": 0.0}


class RoutingBench:
    def __init__(
        self, pool: FakePool, *, strategy: str = "round_robin", seed: int = 0, **settings: Any
    ) -> None:
        self.pool = pool
        self.clock = FakeClock()
        rng = random.Random(seed)
        self.dispatcher = Dispatcher(
            "m",
            pool,
            make_strategy(strategy, rng=rng),
            clock=self.clock,
            rng=rng,
            settings=DispatchSettings(**_AT_ONCE | settings),
        )

    async def ask(self, request: Request) -> list[Event]:
        """The whole answer, as a caller that reads to the end gets it."""
        async with await self.dispatcher.open(request) as stream:
            return await collect(stream)

    @property
    def called(self) -> list[str]:
        """Ids of the replicas that were called, in order."""
        return [replica_id for replica_id, _ in self.pool.calls]

    @property
    def in_flight(self) -> dict[str, int]:
        return {replica.replica_id: replica.in_flight for replica in self.dispatcher.counters()[1]}

    @property
    def failures(self) -> dict[str, int]:
        return {replica.replica_id: replica.failures for replica in self.dispatcher.counters()[1]}

    @property
    def requests(self) -> dict[str, int]:
        return {replica.replica_id: replica.requests for replica in self.dispatcher.counters()[1]}

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(self.dispatcher.counters()[0].outcomes)

    @property
    def waiting(self) -> int:
        return self.dispatcher.counters()[0].waiting

    @property
    def usage(self) -> Usage:
        model = self.dispatcher.counters()[0]
        return Usage(model.prompt_tokens, model.completion_tokens, images=model.images)
