"""What all engine replicas have in common: run requests, push heartbeats, say when they are unwell."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing

import psutil
from ray import serve
from ray.serve.handle import DeploymentHandle

from blaze.config import HealthConfig, ModelConfig
from blaze.engines.base import Engine
from blaze.reports import EngineStatus, Heartbeat
from blaze.types import Events, Request

logger = logging.getLogger("ray.serve")

_PATIENCE_S = 1.0  # with the health actor, where one can do without


class EngineReplica:
    """An engine in a Serve replica. The first heartbeat leaves before the model is loaded."""

    async def _host(
        self, engine: Engine, model: ModelConfig, health: HealthConfig, actor: DeploymentHandle
    ) -> None:
        """The rest of the constructor of every kind."""
        self._engine = engine
        context = serve.get_replica_context()
        self._replica_id: str = context.replica_tag
        self._actor_name: str = context.replica_id.to_full_id_str()
        self._model = model.name
        self._node = _node_id()
        self._process = psutil.Process(os.getpid())
        self._actor = actor
        self._stall_after_s = health.stall_after_s
        self._delivered_at = asyncio.get_running_loop().time()
        self._heartbeats = asyncio.create_task(self._beat(actor, health.probe_period_s))
        await asyncio.sleep(await self._load_in_s())
        try:
            await engine.start()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            await self._tell(actor.not_loaded.remote(self._replica_id, self._model, self._rank, why))
            raise

    @property
    def _rank(self) -> int:
        """As it is now: Serve closes gaps between ranks when replicas have gone."""
        return int(serve.get_replica_context().rank.rank)

    async def __del__(self) -> None:
        """Serve awaits it when the replica stops in good order; also when the constructor has failed."""
        if not hasattr(self, "_heartbeats"):
            return
        self._heartbeats.cancel()
        await self._engine.stop()
        await self._tell(self._actor.goodbye.remote(self._replica_id))

    async def _load_in_s(self) -> float:
        """The health actor knows how often replicas in this one's place died; it may not be there yet."""
        try:
            wait_s: float = await asyncio.wait_for(
                self._actor.load_in_s.remote(self._model, self._rank), timeout=_PATIENCE_S
            )
        except Exception as error:
            logger.info("the health actor does not say when to load: %s", type(error).__name__)
            return 0.0
        if wait_s > 0:
            logger.warning("loading in %.0f s: the ones before this replica have died", wait_s)
        return wait_s

    async def _tell(self, response: Awaitable[None]) -> None:
        """News that may get lost: when all of the application stops, the health actor may be gone first."""
        try:
            await asyncio.wait_for(response, timeout=_PATIENCE_S)
        except Exception as error:
            logger.info("the health actor was not told: %s", type(error).__name__)

    async def run(self, request: Request, **_pin: str) -> AsyncGenerator[Events]:
        """Events of one request. ``_pin`` names this replica; the request router has read it."""
        async with aclosing(self._engine.run(request)) as answer:
            async for events in answer:
                yield events

    async def get_health_status(self, **_pin: str) -> EngineStatus:
        return await self._engine.get_health_status()

    async def check_health(self) -> None:
        """Serve's own probe. Raises when the engine cannot work any more and the health actor is away, which
        restarts such replicas with pauses and not for ever."""
        status = await self._engine.get_health_status()
        away_s = asyncio.get_running_loop().time() - self._delivered_at
        if status.state == "failed" and away_s > self._stall_after_s:
            raise RuntimeError(status.detail or "the engine has failed")

    async def _beat(self, actor: DeploymentHandle, period_s: float) -> None:
        """A heartbeat every period; one that cannot be delivered must not stop the next."""
        failing = False
        while True:
            try:
                await asyncio.wait_for(actor.heartbeat.remote(await self._heartbeat()), timeout=10 * period_s)
                self._delivered_at = asyncio.get_running_loop().time()
                failing = False
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if not failing:
                    logger.warning("heartbeats are not delivered: %s", error)
                failing = True
            await asyncio.sleep(period_s)

    async def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            replica_id=self._replica_id,
            model=self._model,
            rank=self._rank,
            node=self._node,
            pid=os.getpid(),
            engine=await self._engine.get_health_status(),
            memory_bytes=self._process.memory_info().rss,
            actor=self._actor_name,
        )


def _node_id() -> str:
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node
