"""Simulator replicas: an engine without a model, which can be told to misbehave."""

from __future__ import annotations

from ray import serve
from ray.serve.handle import DeploymentHandle

from blaze.config import HealthConfig, ModelConfig
from blaze.engines.faults import Faults
from blaze.engines.simulator import SimulatorEngine
from deployments.engine import EngineReplica


class SimulatorReplica(EngineReplica):
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: ModelConfig, health: HealthConfig, actor: DeploymentHandle
    ) -> None:
        rank = int(serve.get_replica_context().rank.rank)
        self._simulator = SimulatorEngine(model.simulator_options, rank=rank)
        await self._host(self._simulator, model, health, actor)

    async def set_faults(self, faults: Faults, **_pin: str) -> None:
        """For tests and drills, over a handle; no client's request comes here."""
        self._simulator.set_faults(faults)
