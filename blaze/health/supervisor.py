"""Heartbeats and reports in, one picture of the cluster out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from blaze.clock import Clock
from blaze.control import Change, Control
from blaze.reports import (
    Heartbeat,
    ModelCounters,
    News,
    PeerLoad,
    ReplicaCounters,
    ReplicaState,
    RouterReport,
)
from blaze.types import ReplicaId

GOOD_HEARTBEATS = 2  # in a row, and who was silent is well again
SETTINGS_KEPT_S = 600.0  # of a replica that nobody sees: it may only be cut off, and come back


@dataclass(frozen=True, slots=True)
class HealthSettings:
    probe_period_s: float = 1.0
    missed_probes: int = 3  # in a row: suspect
    stall_after_s: float = 30.0  # silent for this long: taken to be gone


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    heartbeat: Heartbeat
    state: ReplicaState
    silent_for_s: float


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything known at one moment, of all replicas and all Routers."""

    replicas: tuple[ReplicaHealth, ...]
    reports: tuple[RouterReport, ...]

    def counters(self) -> dict[ReplicaId, ReplicaCounters]:
        """Per replica, summed over the Routers."""
        grouped: dict[ReplicaId, list[ReplicaCounters]] = defaultdict(list)
        for report in self.reports:
            for replica in report.replicas:
                grouped[replica.replica_id].append(replica)
        return {replica_id: _sum_replica(parts) for replica_id, parts in grouped.items()}

    def models(self) -> dict[str, ModelCounters]:
        """Per model, summed over the Routers."""
        grouped: dict[str, list[ModelCounters]] = defaultdict(list)
        for report in self.reports:
            for model in report.models:
                grouped[model.model].append(model)
        return {name: _sum_model(parts) for name, parts in grouped.items()}


class Supervisor:
    """Collects heartbeats of replicas and reports of Routers; who falls silent is suspect, then gone."""

    def __init__(self, settings: HealthSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._heartbeats: dict[ReplicaId, tuple[float, Heartbeat]] = {}
        self._reports: dict[str, tuple[float, RouterReport]] = {}
        self._good_again: dict[ReplicaId, int] = {}  # heartbeats in a row of those that were silent
        self._control = Control()
        self._unseen_since: dict[ReplicaId, float] = {}  # replicas that operators have settings for

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        replica_id, now = heartbeat.replica_id, self._clock.now()
        before = self._heartbeats.get(replica_id)
        self._heartbeats[replica_id] = (now, heartbeat)
        if before is not None and self._is_silent(now - before[0]):
            self._good_again[replica_id] = 1
        elif replica_id in self._good_again:
            self._good_again[replica_id] += 1
            if self._good_again[replica_id] >= GOOD_HEARTBEATS:
                del self._good_again[replica_id]

    def _is_silent(self, seconds: float) -> bool:
        return seconds > self._settings.missed_probes * self._settings.probe_period_s

    def report(self, report: RouterReport) -> News:
        """Take a Router's account, and tell it what it should know."""
        now = self._clock.now()
        self._reports[report.router_id] = (now, report)
        if report.control.version > self._control.version:  # from before this actor came back
            self._control = report.control
        self._forget_the_gone(now)
        return News(
            self._control,
            self._loads_beside(report.router_id),
            self._suspects(now),
            tuple(
                (id, beat.engine.prefixes)
                for id, (_, beat) in self._heartbeats.items()
                if beat.engine.prefixes
            ),
        )

    def change(self, change: Change, known: Control) -> Control:
        """An operator's; every Router hears of it with its next report. ``known``: to the Router that brings
        it, which may have seen more than an actor that has just come back."""
        self._control = max(known, self._control, key=lambda control: control.version).after(change)
        return self._control

    def _loads_beside(self, router_id: str) -> tuple[tuple[ReplicaId, PeerLoad], ...]:
        loads: dict[ReplicaId, PeerLoad] = {}
        limit = self._clock.now() - self._settings.missed_probes * self._settings.probe_period_s
        for other, (at, report) in self._reports.items():
            if other != router_id and at >= limit:
                for replica in report.replicas:
                    known = loads.get(replica.replica_id, PeerLoad())
                    loads[replica.replica_id] = PeerLoad(
                        known.in_flight + replica.in_flight, known.cost + replica.cost
                    )
        return tuple(loads.items())

    def _suspects(self, now: float) -> tuple[ReplicaId, ...]:
        unwell = (ReplicaState.SUSPECT, ReplicaState.DEAD)
        return tuple(
            replica_id
            for replica_id, (at, beat) in self._heartbeats.items()
            if self._health(at, beat, now).state in unwell
        )

    def goodbye(self, replica_id: ReplicaId) -> None:
        """The replica is stopping in good order."""
        self._heartbeats.pop(replica_id, None)
        self._good_again.pop(replica_id, None)

    def view(self) -> ClusterView:
        now = self._clock.now()
        self._forget_the_gone(now)
        replicas = [self._health(at, beat, now) for at, beat in self._heartbeats.values()]
        replicas.sort(key=lambda replica: (replica.heartbeat.model, replica.heartbeat.rank))
        return ClusterView(
            replicas=tuple(replicas),
            reports=tuple(
                # The work of a Router that has died ends with it; its counters are kept for a while.
                report.without_load() if self._is_silent(now - at) else report
                for at, report in sorted(self._reports.values(), key=lambda r: r[1].router_id)
            ),
        )

    def _health(self, at: float, heartbeat: Heartbeat, now: float) -> ReplicaHealth:
        silent_for_s = now - at
        if self._is_silent(silent_for_s) or heartbeat.replica_id in self._good_again:
            state = ReplicaState.SUSPECT
        elif heartbeat.engine.state == "loading":
            state = ReplicaState.STARTING
        elif heartbeat.engine.state == "failed":
            state = ReplicaState.DEAD
        else:
            state = ReplicaState.READY
        return ReplicaHealth(heartbeat, state, silent_for_s)

    def _forget_the_gone(self, now: float) -> None:
        limit = self._settings.stall_after_s
        routed_to = self._routed_to()
        for replica_id in [key for key, (at, _) in self._heartbeats.items() if now - at > limit]:
            if replica_id not in routed_to:  # who is silent is suspect for as long as Routers may pick it
                del self._heartbeats[replica_id]
                self._good_again.pop(replica_id, None)
        for router_id in [key for key, (at, _) in self._reports.items() if now - at > limit]:
            del self._reports[router_id]
        self._forget_settings(now)

    def _routed_to(self) -> set[ReplicaId]:
        return {replica.replica_id for _, report in self._reports.values() for replica in report.replicas}

    def _forget_settings(self, now: float) -> None:
        """Of replicas that have neither sent a heartbeat nor been in a Router's live set for long. The time
        begins when that is first noticed: this actor may have been away, too."""
        seen = self._heartbeats.keys() | self._routed_to()
        self._unseen_since = {
            replica_id: self._unseen_since.get(replica_id, now)
            for replica_id in self._control.replica_ids - seen
        }
        gone = [id for id, since in self._unseen_since.items() if now - since > SETTINGS_KEPT_S]
        if gone:
            self._control = self._control.without(gone)


_HOW_OPEN = ("closed", "half_open", "open")  # each Router has breakers of its own: the worst one is shown


def _sum_replica(parts: list[ReplicaCounters]) -> ReplicaCounters:
    first = parts[0]
    return ReplicaCounters(
        replica_id=first.replica_id,
        model=first.model,
        in_flight=sum(part.in_flight for part in parts),
        weight=first.weight,
        requests=sum(part.requests for part in parts),
        failures=sum(part.failures for part in parts),
        cost=sum(part.cost for part in parts),
        ewma_ms=max((part.ewma_ms for part in parts if part.ewma_ms is not None), default=None),
        breaker=max((part.breaker for part in parts), key=_HOW_OPEN.index),
        draining=any(part.draining for part in parts),
    )


def _sum_model(parts: list[ModelCounters]) -> ModelCounters:
    first = parts[0]
    return ModelCounters(
        model=first.model,
        strategy=" / ".join(dict.fromkeys(part.strategy for part in parts)),  # while a change spreads
        waiting=sum(part.waiting for part in parts),
        outcomes=_sum_outcomes(part.outcomes for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        images=sum(part.images for part in parts),
        ttft_buckets=tuple(map(sum, zip(*(part.ttft_buckets for part in parts), strict=True))),
        ttft_sum_s=sum(part.ttft_sum_s for part in parts),
        retries=sum(part.retries for part in parts),
        resumed=sum(part.resumed for part in parts),
        panic=any(part.panic for part in parts),
        transitions=_sum_outcomes(part.transitions for part in parts),
        events=tuple(event for part in parts for event in part.events),
    )


def _sum_outcomes(parts: Iterable[tuple[tuple[str, int], ...]]) -> tuple[tuple[str, int], ...]:
    totals: dict[str, int] = defaultdict(int)
    for outcomes in parts:
        for name, count in outcomes:
            totals[name] += count
    return tuple(sorted(totals.items()))
