"""The health actor: one replica that everybody reports to, that answers for the whole cluster, and restarts
replicas that are unhealthy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import ray
from ray import serve
from ray.serve.schema import DeploymentStatusOverview

from blaze.clock import SystemClock
from blaze.config import HealthConfig
from blaze.control import Change, Control
from blaze.health.conditions import DeploymentFacts
from blaze.health.settings import HealthSettings
from blaze.health.supervisor import Supervisor
from blaze.health.view import ClusterView
from blaze.reports import Heartbeat, News, RouterReport
from blaze.types import ReplicaId
from deployments.rounds import Rounds, forever

_FACTS_EVERY_S = 2.0
_NAMESPACE = "serve"  # in which Serve names its actors


class HealthActor:
    """Its state is rebuilt from the next heartbeats and reports when Serve brings it back."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: HealthConfig, deployments: Mapping[str, str]
    ) -> None:
        """``deployments``: of the engines, by model."""
        settings = settings_of(config)
        self._supervisor = Supervisor(settings, SystemClock())
        self._deployments = deployments
        self._app = serve.get_replica_context().app_name
        # Before that, Routers may know of changes that this actor, back from its death, has not heard of: the
        # number of a new one could be taken.
        self._knows_all_at = asyncio.get_running_loop().time() + 2 * min(1.0, config.probe_period_s)
        self._rounds = Rounds(self._supervisor, settings, has_ended=_has_ended, end=_end)
        self._looking = asyncio.create_task(forever(self._look_at_deployments, _FACTS_EVERY_S))

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        self._supervisor.heartbeat(heartbeat)

    async def report(self, report: RouterReport) -> News:
        return self._supervisor.report(report)

    async def change(self, change: Change, known: Control) -> Control:
        await asyncio.sleep(self._knows_all_at - asyncio.get_running_loop().time())
        return self._supervisor.change(change, known)

    async def goodbye(self, replica_id: ReplicaId) -> None:
        self._supervisor.goodbye(replica_id)

    async def load_in_s(self, model: str, rank: int) -> float:
        return self._supervisor.load_in_s(model, rank)

    async def not_loaded(self, replica_id: ReplicaId, model: str, rank: int, why: str) -> None:
        self._supervisor.not_loaded(replica_id, model, rank, why)

    async def view(self, report: RouterReport) -> ClusterView:
        """The cluster, with the asking Router's own numbers as they are now."""
        self._supervisor.report(report)
        return self._supervisor.view()

    async def _look_at_deployments(self) -> None:
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(self._app)
        if application is None:
            return
        facts: dict[str, DeploymentFacts] = {}
        for model, name in self._deployments.items():
            found = application.deployments.get(name)
            if found is not None:
                facts[model] = facts_of(found)
        self._supervisor.learn(facts)


def facts_of(found: DeploymentStatusOverview) -> DeploymentFacts:
    """Serve gives up starting replicas after some in a row; where it was to scale up, as from zero, it calls
    that ``UNHEALTHY``."""
    failed = found.status_trigger == "REPLICA_STARTUP_FAILED"
    return DeploymentFacts(
        "DEPLOY_FAILED" if failed else str(found.status.value),
        found.message,
        replicas=sum(found.replica_states.values()),
        stopping=found.replica_states.get("STOPPING", 0),
    )


def settings_of(config: HealthConfig) -> HealthSettings:
    stall_after_s = config.stall_after_s
    return HealthSettings(
        probe_period_s=config.probe_period_s,
        missed_probes=config.missed_probes,
        stall_after_s=stall_after_s,
        # Who becomes unhealthy after a restart shows it only when that time has passed again.
        replacement_s=max(60.0, 2 * stall_after_s),
        forgive_after_s=max(120.0, 4 * stall_after_s),
    )


def _has_ended(actor: str) -> bool:
    """Whether Ray knows that the actor is gone. Blocks for a few milliseconds."""
    try:
        ray.get_actor(actor, namespace=_NAMESPACE)
    except ValueError:
        return True
    return False


def _end(actor: str) -> None:
    """Its process is killed, whatever state it is in, also when it was stopped with SIGSTOP: Ray asks it, and
    then does it by force, see RAY_kill_worker_timeout_milliseconds in data_plane.py."""
    try:
        handle = ray.get_actor(actor, namespace=_NAMESPACE)
    except ValueError:
        return  # it has ended by itself
    ray.kill(handle)
