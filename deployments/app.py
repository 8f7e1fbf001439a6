"""What ``serve deploy`` imports: from the ``args`` of the config file to a Serve application."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from blaze.config import ModelConfig, parse_args
from blaze.models.sources import check_sources
from blaze.types import EngineKind
from deployments.autoscaling import scaling_options
from deployments.data_plane import check_bodies_fit
from deployments.diffusion import DiffusionReplica
from deployments.engine import EngineReplica
from deployments.health import HealthActor
from deployments.llm import LLMReplica
from deployments.router import Router
from deployments.simulator import SimulatorReplica

_REPLICA_CLASSES: Mapping[EngineKind, type[EngineReplica]] = {
    EngineKind.LLM: LLMReplica,
    EngineKind.DIFFUSION: DiffusionReplica,
    EngineKind.SIMULATOR: SimulatorReplica,
}
_MANY = 10_000  # Serve's limit on calls at once, where Blaze has an admission of its own
_LOOK_EVERY_S = 2.0  # how soon Serve finds that a Router or the health actor has died; its own is 10 s
_FROZEN_S = 10.0  # without an answer, three times in a row: it is replaced; Serve's own is 30 s


def build_app(args: dict[str, Any]) -> Application:
    """Validate everything, then build the Router, one engine deployment per model, and the health actor.

    Raises :class:`blaze.errors.ConfigError` naming every wrong field, before anything on the cluster changes.
    """
    config = parse_args(args)
    check_sources(config)
    check_bodies_fit(config.router.max_body_bytes)
    # The Router and the health actor ask for no CPU: they must start on a node that engines have filled.
    health = serve.deployment(
        HealthActor,
        name="Health",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        health_check_period_s=_LOOK_EVERY_S,
        health_check_timeout_s=_FROZEN_S,
        logging_config={"enable_access_log": False},  # every heartbeat is a call
    ).bind(config.health)
    engines = {
        model.name: engine_deployment(model, config.router.replicas).bind(model, config.health, health)
        for model in config.models
    }
    router = serve.deployment(
        Router,
        name="Router",
        num_replicas=config.router.replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        health_check_period_s=_LOOK_EVERY_S,
        health_check_timeout_s=_FROZEN_S,
        logging_config={"enable_access_log": config.router.access_log},
    )
    return router.bind(config, engines, health)


def engine_deployment(model: ModelConfig, routers: int) -> Deployment:
    resources = model.resources
    actor_options: dict[str, float] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.memory is not None:
        actor_options["memory"] = resources.memory
    return serve.deployment(
        _REPLICA_CLASSES[model.engine],
        name=f"{model.engine.value}-{re.sub(r'[^A-Za-z0-9._-]', '-', model.name)}",
        ray_actor_options=actor_options,
        logging_config={"enable_access_log": False},  # a line per call, on the path of every request
        # The dispatcher holds the real cap; Serve's must only never be the first to refuse.
        max_ongoing_requests=2 * model.in_flight_cap * routers,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.pinned_router:PinnedRouter"
        ),
        **scaling_options(model),
    )
