"""Diffusion engine replicas."""

from __future__ import annotations

from ray.serve.handle import DeploymentHandle

from blaze.config import HealthConfig, ModelConfig, cache_dir
from blaze.engines.openmp import share_cores
from deployments.engine import EngineReplica


class DiffusionReplica(EngineReplica):
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: ModelConfig, health: HealthConfig, actor: DeploymentHandle
    ) -> None:
        share_cores()
        # Imported in the replica: torch and diffusers are heavy, and needed nowhere else.
        from blaze.engines.diffusion.engine import DiffusionEngine
        from blaze.models.sources import parse_source

        source = parse_source(model.source or "", revision=model.revision)
        engine = DiffusionEngine(source, model.diffusion_options, threads=model.threads, cache=cache_dir())
        await self._host(engine, model, health, actor)
