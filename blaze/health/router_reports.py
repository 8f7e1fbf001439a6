"""The latest report of each Router, and what all of them say together."""

from __future__ import annotations

from blaze.health.settings import HealthSettings
from blaze.reports import PeerLoad, RouterReport
from blaze.types import ReplicaId


class RouterReports:
    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._latest: dict[str, tuple[float, RouterReport]] = {}  # by Router, and when it came

    def take(self, report: RouterReport, now: float) -> None:
        self._latest[report.router_id] = (now, report)

    def forget_silent(self, now: float) -> None:
        """Routers that have been silent for long."""
        limit = now - self._settings.stall_after_s
        self._latest = {id: latest for id, latest in self._latest.items() if latest[0] >= limit}

    def fresh(self, now: float) -> tuple[RouterReport, ...]:
        """Of Routers that live."""
        limit = now - self._settings.suspect_after_s
        return tuple(report for at, report in self._in_order() if at >= limit)

    def silent(self, now: float) -> tuple[RouterReport, ...]:
        """The work of a Router that has died ends with it; its counters are kept for a while."""
        limit = now - self._settings.suspect_after_s
        return tuple(report.without_load() for at, report in self._in_order() if at < limit)

    def loads_beside(self, router_id: str, now: float) -> tuple[tuple[ReplicaId, PeerLoad], ...]:
        """What the others that live have in flight."""
        loads: dict[ReplicaId, PeerLoad] = {}
        for report in self.fresh(now):
            if report.router_id != router_id:
                for replica in report.replicas:
                    known = loads.get(replica.replica_id, PeerLoad())
                    loads[replica.replica_id] = PeerLoad(
                        known.in_flight + replica.in_flight, known.cost + replica.cost
                    )
        return tuple(loads.items())

    def had_requests_on(self, replica_id: ReplicaId) -> bool:
        """When it died, by what any Router knows."""
        return any(report.had_requests_on(replica_id) for _, report in self._latest.values())

    def routed_to(self) -> set[ReplicaId]:
        """Replicas that are, or lately were, in a Router's live set."""
        return {replica.replica_id for _, report in self._latest.values() for replica in report.replicas}

    def _in_order(self) -> list[tuple[float, RouterReport]]:
        return [self._latest[router_id] for router_id in sorted(self._latest)]
