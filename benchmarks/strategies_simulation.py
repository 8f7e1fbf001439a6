"""The simulation of `strategies.py`: Blaze's own dispatcher and Ray's own routers in time that is not waited
for.

An event loop whose clock jumps to the next timer runs them; only the replicas are models. A replica has slots
as the simulator engine has, a queue of first come, first served before them, and room for as many requests as
it has places: Blaze keeps the others in its Router, Ray Serve in its own.

Ray Serve has no retries: what fails there has failed. So it has less to do than Blaze, which answers all;
with ", repeated" its client sends failed requests again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from benchmarks.strategies_replicas import Ask, SimulatedReplica, VirtualLoop, Work
from benchmarks.strategies_routers import RAY_ROUTERS, ray
from benchmarks.strategies_workload import CAP, REPLICAS, SLOTS, Arrival, Tally, Workload
from blaze.errors import Overloaded
from blaze.routing.dispatcher import Dispatcher
from blaze.routing.replica import ReplicaInfo
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategies import make_strategy
from blaze.routing.trip import BreakerSettings
from blaze.sampling_params import SamplingParams
from blaze.types import (
    Caller,
    ChoiceFinished,
    Events,
    Finished,
    GenerateRequest,
    ReplicaId,
    Request,
    Started,
    TextDelta,
    TextPrompt,
    Usage,
)

REPEATED = ", repeated"  # a name that ends so: by a client that has as many attempts as Blaze
ATTEMPTS = 3
UNBROKEN = ", no breakers"  # the same for Blaze: with breakers that never trip
_NEVER = BreakerSettings(failure_threshold=10**9, min_outcomes=10**9)
_IDS = tuple(range(4096))

# --- Blaze -------------------------------------------------------------------------------------------


class SimulatedCall:
    def __init__(self, work: Work, arrival: Arrival) -> None:
        self._work = work
        self._arrival = arrival
        self._begun = False

    def __aiter__(self) -> SimulatedCall:
        return self

    async def __anext__(self) -> Events:
        if not self._begun:
            self._begun = True
            await self._work.first_token()
            return (Started(_IDS[: self._arrival.prompt_tokens]), TextDelta(0, "x", (0,)))
        await self._work.rest()
        usage = Usage(self._arrival.prompt_tokens, self._arrival.tokens)
        return (ChoiceFinished(0, "length"), Finished(usage))

    def cancel(self) -> None:
        self._work.end()


class SimulatedPool:
    """Requests are known by the place of their arrival."""

    def __init__(self, replicas: list[SimulatedReplica], asked: Sequence[Arrival], tally: Tally) -> None:
        self._replicas = {f"replica-{replica.rank}": replica for replica in replicas}
        self._asked = asked
        self._tally = tally

    def live(self) -> tuple[ReplicaInfo, ...]:
        return tuple(map(ReplicaInfo, self._replicas))

    def subscribe(self, listener: Callable[[tuple[ReplicaInfo, ...]], None]) -> None:
        """The pool does not change."""

    def wake(self) -> None:
        """Nor does it sleep."""

    def call(self, replica_id: ReplicaId, request: Request) -> SimulatedCall:
        replica, arrival = self._replicas[replica_id], self._asked[int(request.request_id)]
        self._tally.attempts[replica.rank] += 1
        return SimulatedCall(Work(replica, arrival.tokens), arrival)


def blaze(
    name: str, replicas: list[SimulatedReplica], asked: Sequence[Arrival], tally: Tally, seed: int
) -> Ask:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    rng, strategy = random.Random(seed), name.removesuffix(UNBROKEN)
    breaker = BreakerSettings() if strategy == name else _NEVER
    dispatcher = Dispatcher(
        "sim",
        SimulatedPool(replicas, asked, tally),
        make_strategy(strategy, rng=rng),
        clock=loop,
        rng=rng,
        settings=DispatchSettings(max_in_flight=CAP, at_once=SLOTS, breaker=breaker),
    )

    async def ask(arrival: Arrival) -> float | None:
        request = GenerateRequest(
            request_id=str(arrival.number),
            model="sim",
            prompt=TextPrompt(arrival.prompt),
            sampling=SamplingParams(max_tokens=arrival.max_tokens, seed=0),
            caller=Caller(session_id=arrival.session),
        )
        try:
            stream = await dispatcher.open(request)
        except Overloaded:
            return None
        async with stream:
            first_s = loop.now() - arrival.at_s
            async for _ in stream:
                pass
            return first_s if stream.error is None else None

    return ask


# --- A run -------------------------------------------------------------------------------------------


def simulate(name: str, workload: Workload, asked: Sequence[Arrival], tally: Tally, seed: int) -> None:
    """All of the arrivals under one strategy or router, to the end of the last answer."""
    for logger in ("blaze", "ray.serve"):  # breakers and full queues do what they are there for
        logging.getLogger(logger).setLevel(logging.ERROR)
    random.seed(seed)  # Ray's draws come from the module's generator
    replicas = [SimulatedReplica(workload, rank, seed) for rank in range(REPLICAS)]
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(_simulate(name, replicas, asked, tally, seed))


async def _simulate(
    name: str, replicas: list[SimulatedReplica], asked: Sequence[Arrival], tally: Tally, seed: int
) -> None:
    loop = asyncio.get_running_loop()
    router = name.removesuffix(REPEATED)
    if router in RAY_ROUTERS:
        ask = ray(router, replicas, tally, attempts=1 if router == name else ATTEMPTS)
    else:
        ask = blaze(name, replicas, asked, tally, seed)

    async def one(arrival: Arrival) -> None:
        ttft_s = await ask(arrival)
        tally.ended(arrival.at_s, ttft_s, loop.time())

    async with asyncio.TaskGroup() as group:
        for arrival in asked:
            await asyncio.sleep(arrival.at_s - loop.time())
            group.create_task(one(arrival))
