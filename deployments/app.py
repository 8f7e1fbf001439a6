"""What ``serve deploy`` imports: from the ``args`` of the config file to a Serve application."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from blaze.config import ROUTER_NAME, HealthConfig, ModelConfig, RouterConfig, parse_args
from blaze.models.sources import check_sources
from blaze.types import EngineKind
from deployments.autoscaling import scaling_options
from deployments.data_plane import check_bodies_fit, check_requests_outlive_updates, idle_connections_end_s
from deployments.diffusion import DiffusionReplica
from deployments.engine import EngineReplica
from deployments.health import HealthActor
from deployments.llm import LLMReplica
from deployments.router import Router
from deployments.simulator import SimulatorReplica
from deployments.versions import as_loaded, as_routed, bind, files_of

_REPLICA_CLASSES: Mapping[EngineKind, type[EngineReplica]] = {
    EngineKind.LLM: LLMReplica,
    EngineKind.DIFFUSION: DiffusionReplica,
    EngineKind.SIMULATOR: SimulatorReplica,
}
_MANY = 10_000  # Serve's limit on calls at once, where Blaze has an admission of its own
_START_ATTEMPTS = 6  # then an update is given up and the old version serves on; Serve's: 20
_LOOK_EVERY_S = 1.0  # how soon Serve finds that a replica has died; its own is 10 s
_FROZEN_S = 10.0  # three times, and a Router that does not answer is replaced; Serve's own is 30 s
_LATE_S = 30.0  # beyond the deadline of the last request, before a replica that stops is killed
_SURGE_PERCENT = 25  # of the Routers; they ask for no CPU


def build_app(args: dict[str, Any]) -> Application:
    """Validate everything, then build the Router, one engine deployment per model, and the health actor.

    Raises :class:`blaze.errors.ConfigError` naming every wrong field, before anything on the cluster changes.
    """
    config = parse_args(args)
    check_sources(config)
    check_bodies_fit(config.router.max_body_bytes)
    check_requests_outlive_updates(config.router.request_timeout_s)
    # The Router and the health actor ask for no CPU: they must start on a node that engines have filled.
    names = {model.name: deployment_name(model) for model in config.models}
    health = bind(_health_deployment(), config.health, names)
    engines = {
        model.name: bind(
            engine_deployment(model, config.router, config.health),
            as_loaded(model),
            config.health,
            health,
            files=files_of(model),
        )
        for model in config.models
    }
    return bind(_router_deployment(config.router), as_routed(config), engines, health)


def _health_deployment() -> Deployment:
    """One at a time: of two, each would hear of half of the heartbeats and miss the others."""
    return serve.deployment(
        HealthActor,
        name="Health",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        health_check_period_s=_LOOK_EVERY_S,
        health_check_timeout_s=_FROZEN_S,
        logging_config={"enable_access_log": False},  # every heartbeat is a call
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
        max_constructor_retry_count=_START_ATTEMPTS,
    )


def _router_deployment(router: RouterConfig) -> Deployment:
    return serve.deployment(
        Router,
        name=ROUTER_NAME,
        num_replicas=router.replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MANY,
        health_check_period_s=_LOOK_EVERY_S,
        health_check_timeout_s=_FROZEN_S,
        logging_config={"enable_access_log": router.access_log},
        max_surge_percent=_SURGE_PERCENT,
        graceful_shutdown_timeout_s=idle_connections_end_s() + _drain_s(router),
        max_constructor_retry_count=_START_ATTEMPTS,
    )


def deployment_name(model: ModelConfig) -> str:
    return f"{model.engine.value}-{re.sub(r'[^A-Za-z0-9._-]', '-', model.name)}"


def engine_deployment(model: ModelConfig, router: RouterConfig, health: HealthConfig) -> Deployment:
    resources = model.resources
    actor_options: dict[str, float] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.memory is not None:
        actor_options["memory"] = resources.memory
    return serve.deployment(
        _REPLICA_CLASSES[model.engine],
        # How soon Serve notices that a replica has died, and brings another one. Whether one that lives is
        # well is the health actor's to say; Serve's own three timeouts are for when that is away.
        health_check_period_s=_LOOK_EVERY_S,
        health_check_timeout_s=max(_FROZEN_S, health.stall_after_s),
        name=deployment_name(model),
        ray_actor_options=actor_options,
        logging_config={"enable_access_log": False},  # a line per call, on the path of every request
        # The dispatcher holds the real cap; Serve's must only never be the first to refuse. A number that
        # does not depend on the config: while Serve changes it, replicas leave the live set.
        max_ongoing_requests=_MANY,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.pinned_router:PinnedRouter"
        ),
        # A replica that stops is not picked any more, and ends when its requests have. The Routers move them
        # after drain_timeout_s; those that no other replica can go on with have all the time they need.
        graceful_shutdown_timeout_s=_drain_s(router),
        max_surge_percent=model.max_surge_percent,
        max_constructor_retry_count=_START_ATTEMPTS,
        **scaling_options(model),
    )


def _drain_s(router: RouterConfig) -> float:
    """How long the last request that a replica has may take."""
    return router.request_timeout_s + _LATE_S
