"""The health actor: one replica that everybody reports to, and that answers for the whole cluster."""

from __future__ import annotations

import asyncio

from blaze.clock import SystemClock
from blaze.config import HealthConfig
from blaze.control import Change, Control
from blaze.health.supervisor import ClusterView, HealthSettings, Supervisor
from blaze.reports import Heartbeat, News, RouterReport
from blaze.types import ReplicaId


class HealthActor:
    """Its state is rebuilt from the next heartbeats and reports when Serve brings it back."""

    async def __init__(self, config: HealthConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = HealthSettings(
            probe_period_s=config.probe_period_s,
            missed_probes=config.missed_probes,
            stall_after_s=config.stall_after_s,
        )
        self._supervisor = Supervisor(settings, SystemClock())
        # Before that, Routers may know of changes that this actor, back from its death, has not heard of: the
        # number of a new one could be taken.
        self._knows_all_at = asyncio.get_running_loop().time() + 2 * min(1.0, config.probe_period_s)

    async def heartbeat(self, heartbeat: Heartbeat) -> None:
        self._supervisor.heartbeat(heartbeat)

    async def report(self, report: RouterReport) -> News:
        return self._supervisor.report(report)

    async def change(self, change: Change, known: Control) -> Control:
        await asyncio.sleep(self._knows_all_at - asyncio.get_running_loop().time())
        return self._supervisor.change(change, known)

    async def goodbye(self, replica_id: ReplicaId) -> None:
        self._supervisor.goodbye(replica_id)

    async def view(self, report: RouterReport) -> ClusterView:
        """The cluster, with the asking Router's own numbers as they are now."""
        self._supervisor.report(report)
        return self._supervisor.view()
