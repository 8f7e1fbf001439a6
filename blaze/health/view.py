"""Everything known of the cluster at one moment: what status and metrics show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from blaze.reports import (
    Heartbeat,
    ModelCondition,
    ModelCounters,
    ReplicaCounters,
    ReplicaEvent,
    ReplicaState,
    RouterReport,
)
from blaze.types import ReplicaId


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    heartbeat: Heartbeat
    state: ReplicaState
    silent_for_s: float
    reason: str = ""  # for the state, where it is not as it should be


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything known at one moment, of all replicas and all Routers.

    ``silent``: the last reports of Routers that send none any more: what they have counted, without load.
    ``is_whole``: False while a Router may be missing, which then may be doing anything.
    """

    replicas: tuple[ReplicaHealth, ...]
    reports: tuple[RouterReport, ...]
    silent: tuple[RouterReport, ...] = ()
    is_whole: bool = True
    events: tuple[ReplicaEvent, ...] = ()  # the last ones, oldest first
    restarts: tuple[tuple[str, str, int], ...] = ()  # (model, kind of reason, how many)
    conditions: tuple[ModelCondition, ...] = ()

    @property
    def is_draining(self) -> bool:
        """No Router begins anything new: each has said so of the same drain."""
        drains = {report.control.draining_all for report in self.reports}
        return self.is_whole and len(drains) == 1 and None not in drains

    def counters(self) -> dict[ReplicaId, ReplicaCounters]:
        """Per replica, summed over the Routers."""
        grouped: dict[ReplicaId, list[ReplicaCounters]] = defaultdict(list)
        for report in (*self.reports, *self.silent):
            for replica in report.replicas:
                grouped[replica.replica_id].append(replica)
        return {replica_id: _sum_replica(parts) for replica_id, parts in grouped.items()}

    def unheard(self) -> tuple[ReplicaCounters, ...]:
        """Replicas that Routers know of, and the health actor does not: it has just come back, or they have
        just come or ended."""
        heard = {replica.heartbeat.replica_id for replica in self.replicas}
        known = {replica.replica_id for report in self.reports for replica in report.replicas}
        return tuple(found for id, found in sorted(self.counters().items()) if id in known - heard)

    def models(self) -> dict[str, ModelCounters]:
        """Per model, summed over the Routers."""
        grouped: dict[str, list[ModelCounters]] = defaultdict(list)
        for report in (*self.reports, *self.silent):
            for model in report.models:
                grouped[model.model].append(model)
        return {name: _sum_model(parts) for name, parts in grouped.items()}


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
        draining=all(part.draining for part in parts),  # none of them sends it requests any more
        node=first.node,
        actor=first.actor,
        suspect=any(part.suspect for part in parts),
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
        open=sum(part.open for part in parts),
        panic=any(part.panic for part in parts),
        transitions=_sum_outcomes(part.transitions for part in parts),
        events=tuple(event for part in parts for event in part.events),
        died_at_work=tuple(dict.fromkeys(id for part in parts for id in part.died_at_work)),
    )


def _sum_outcomes(parts: Iterable[tuple[tuple[str, int], ...]]) -> tuple[tuple[str, int], ...]:
    totals: dict[str, int] = defaultdict(int)
    for outcomes in parts:
        for name, count in outcomes:
            totals[name] += count
    return tuple(sorted(totals.items()))
