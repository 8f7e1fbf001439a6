"""Simulator replicas: an engine without a model."""

from __future__ import annotations

from ray import serve
from ray.serve.handle import DeploymentHandle

from blaze.config import HealthConfig, ModelConfig
from blaze.engines.simulator import SimulatorEngine
from deployments.engine import EngineReplica


class SimulatorReplica(EngineReplica):
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: ModelConfig, health: HealthConfig, actor: DeploymentHandle
    ) -> None:
        rank = int(serve.get_replica_context().rank.rank)
        await self._host(SimulatorEngine(model.simulator_options, rank=rank), model, health, actor)
