"""The real pool for the contract of ``blaze/routing/pool.py``: Serve replicas of the simulator."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ray import serve
from ray.serve.handle import DeploymentHandle

import deployments.pinned_state as state
from blaze.errors import ReplicaLost
from blaze.reports import EngineStatus
from blaze.types import ReplicaId, Request
from deployments.pool import RayReplicaPool
from tests.cluster.served import Served
from tests.samples import text_request
from tests.waiting import until

MODEL = {"ttft_ms": 0, "inter_token_ms": 5, "tokens": 5000, "slots": 8}


class RayHarness:
    def __init__(self, app: Served, handle: DeploymentHandle) -> None:
        self._app = app
        self._status = handle.options(method_name="get_health_status")
        self.pool = RayReplicaPool(handle)
        self.short: Request = text_request(max_tokens=1)
        self.endless: Request = text_request("on and on")
        self._before: dict[ReplicaId, int] = {}

    async def settle(self) -> None:
        """Until two replicas are live and answer, as at the start of every test."""
        while True:
            await until(lambda: len(self.pool.live()) == 2, within_s=60)
            try:
                self._before = {info.id: (await self._ask(info.id)).steps_done for info in self.pool.live()}
                return
            except ReplicaLost:  # one that the test before has killed is still listed
                await asyncio.sleep(0.1)

    async def _ask(self, replica_id: ReplicaId) -> EngineStatus:
        status: EngineStatus = await self._status.remote(**{state.PIN: replica_id})
        return status

    async def lose(self, replica_id: ReplicaId) -> None:
        pids = {replica["id"]: replica["pid"] for replica in self._app.replicas("sim")}
        os.kill(pids[replica_id], signal.SIGKILL)

    async def served(self, replica_id: ReplicaId) -> int:
        """A short request is one token, and that one step."""
        return (await self._ask(replica_id)).steps_done - self._before[replica_id]

    async def working(self) -> int:
        running = 0
        for replica in self._app.replicas("sim"):
            if replica["id"] in {info.id for info in self.pool.live()} and replica["state"] == "ready":
                try:
                    running += (await self._ask(replica["id"])).running
                except Exception:
                    continue
        return running


@asynccontextmanager
async def ray_pool(app: Served) -> AsyncIterator[RayHarness]:
    harness = RayHarness(app, serve.get_deployment_handle("simulator-sim", "blaze"))
    await harness.settle()
    yield harness
