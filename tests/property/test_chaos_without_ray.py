"""Chaos in one process: dispatcher and HTTP over simulators that die, freeze and fail under load."""

from __future__ import annotations

import asyncio
import random
from itertools import count
from typing import Any

import httpx
import pytest

from blaze.api.app import create_app
from blaze.clock import SystemClock
from blaze.engine_config import SimulatorConfig
from blaze.engines.faults import Faults
from blaze.engines.simulator import SimulatorEngine
from blaze.errors import Cancelled, ReplicaLost, ReplicaUnreachable
from blaze.routing import route
from blaze.routing.settings import DispatchSettings
from blaze.types import Events, Failed, Finished, ReplicaId, Request
from tests.chaos.expected import simulated
from tests.chaos.workload import draw_request, what_is_wrong
from tests.fakes import FakeClock, FakePool, FakeService
from tests.streams import ask
from tests.waiting import until

OPTIONS = SimulatorConfig(ttft_ms=1, inter_token_ms=1, tokens=20, jitter=0.5, slots=4)
REPLICAS, CLIENTS, FAULTS = 3, 12, 40


class RealTime(FakeClock):
    def now(self) -> float:
        return SystemClock().now()


class Call:
    """One request on one replica, whose connection may break, or say nothing any more."""

    def __init__(self, engine: SimulatorEngine, request: Request) -> None:
        self._answer = engine.run(request)
        self._closing: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Events:
        events = asyncio.ensure_future(anext(self._answer))
        try:
            await asyncio.wait([events, self._ended], return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                raise self._ended.result()
            batch = await events
            if isinstance(batch[-1], Finished | Failed):
                self._closing = asyncio.create_task(self._close())
            return batch
        finally:
            events.cancel()
            await asyncio.gather(events, return_exceptions=True)

    def end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_result(error)
            self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        """As Serve does: who is done or gone needs no slot."""
        while True:
            try:
                return await self._answer.aclose()
            except RuntimeError:  # somebody reads; who does is about to stop
                await asyncio.sleep(0)

    def cancel(self) -> None:
        self.end(Cancelled("The call was cancelled."))


class DyingPool(FakePool):
    """Replicas that are replaced when they die, a moment after."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(())
        self._rng = rng
        self._numbers = count()
        self.engines: dict[ReplicaId, SimulatorEngine] = {}
        self._running: list[tuple[ReplicaId, Call]] = []
        for _ in range(REPLICAS):
            self.add()

    def add(self) -> None:
        number = next(self._numbers)
        self.engines[f"r{number}"] = SimulatorEngine(OPTIONS, rank=number)
        self.set_live(*self.engines)

    def call(self, replica_id: ReplicaId, request: Request) -> Any:
        call = Call(self.engines[replica_id], request) if replica_id in self.engines else _gone()
        self._running.append((replica_id, call))
        return call

    async def kill(self, replica_id: ReplicaId) -> None:
        """The connections break at once, and the live set says so later."""
        del self.engines[replica_id]
        for called, call in self._running:
            if called == replica_id:
                call.end(self._rng.choice([ReplicaLost("died"), ReplicaUnreachable("away")]))
        await asyncio.sleep(self._rng.uniform(0, 0.02))
        self.set_live(*self.engines)
        await asyncio.sleep(self._rng.uniform(0, 0.05))
        self.add()


def _gone() -> Call:
    call = Call(SimulatorEngine(OPTIONS), None)  # type: ignore[arg-type]  # it is never run
    call.end(ReplicaLost("gone"))
    return call


async def fault(pool: DyingPool, service: FakeService, rng: random.Random) -> None:
    """To one of the replicas; another one is always well."""
    victim = rng.choice(list(pool.engines)[1:])
    engine = pool.engines[victim]
    kind = rng.choice(["kill", "kill", "freeze", "break", "fail", "burst", "slow"])
    if kind == "kill":
        await pool.kill(victim)
    elif kind == "freeze":
        engine.set_faults(Faults(wedged=True))
        await asyncio.sleep(0.02)
        service.dispatchers["m"].set_suspects([victim])
        await asyncio.sleep(0.02)
        await pool.kill(victim)
        service.dispatchers["m"].set_suspects([])
    else:
        faults = {
            "break": Faults(break_rate=0.5),
            "fail": Faults(fail_rate=0.5),
            "burst": Faults(fail_running=True),
            "slow": Faults(slowdown=10.0),
        }
        engine.set_faults(faults[kind])
        await asyncio.sleep(0.05)
        engine.set_faults(Faults())


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_lost_or_wrong_while_replicas_die_freeze_and_fail(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Replicas die more often than a request takes: one that meets two deaths is not to blame for them.
    monkeypatch.setattr(route, "POISON_DEATHS", 100)
    rng = random.Random(seed)
    pool = DyingPool(rng)
    # Faults follow each other within a request's time here: three of them may well meet the same one.
    settings = DispatchSettings(slow_start_s=0.0, suspend_s=0.05, recheck_s=0.01, max_retries=8)
    problems: list[str] = []
    right = 0
    stopping = False

    async def client(http: httpx.AsyncClient, number: int) -> None:
        nonlocal right
        draws = random.Random(f"{seed}/{number}")
        while not stopping:
            asked = draw_request(draws, "m", tokens=OPTIONS.tokens)
            answer = await ask(http, asked.path, asked.body)
            problem = answer.lost or what_is_wrong(answer, simulated(OPTIONS, asked.body))
            if problem:
                problems.append(problem)
            right += not problem

    service = FakeService({"m": pool}, settings=settings, clock=RealTime(), seed=seed)
    app = create_app(service, max_body_bytes=1 << 20, echo_request_id=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://blaze") as http:
        clients = [asyncio.create_task(client(http, number)) for number in range(CLIENTS)]
        for _ in range(FAULTS):
            await fault(pool, service, rng)
        stopping = True
        await asyncio.gather(*clients)
        assert problems == []
        assert right > FAULTS + CLIENTS  # there was something to lose at every fault
        await until(lambda: service.in_flight == 0)
        (model,) = (await service.status())["models"]
        assert (model["waiting"], model["open"]) == (0, 0)
