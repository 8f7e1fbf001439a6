"""The cluster as JSON (`status`) and as Prometheus text (`/metrics`): both are sums over all Routers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from blaze.api.service import ModelCard, Readiness
from blaze.health.view import ClusterView, ReplicaHealth
from blaze.reports import TTFT_BUCKETS_S, ModelCounters, ReplicaCounters, ReplicaEvent, ReplicaState
from blaze.version import __version__


def status_object(
    cards: Sequence[ModelCard], view: ClusterView, readiness: Readiness, *, addresses: bool = True
) -> dict[str, Any]:
    """``addresses``: whether clients' are known, as `ip_hash` without sessions and users needs them."""
    models = view.models()
    return {
        "version": __version__,
        "ready": readiness.ready,
        "draining": view.is_draining,
        "models": [_model_status(card, view, models.get(card.name)) for card in cards],
        "replicas": _replica_statuses(view),
        "unheard": [
            {"id": r.replica_id, "node": r.node, "draining": r.draining, "in_flight": r.in_flight}
            for r in view.unheard()
        ],
        "complete": view.is_whole,
        "client_address": "available" if addresses else "unavailable",
        "events": _events(models.values(), view.events),
        "routers": [report.router_id for report in view.reports],
    }


def _events(models: Iterable[ModelCounters], events: Sequence[ReplicaEvent]) -> list[dict[str, Any]]:
    """Of breakers and of replicas, oldest first."""
    of_breakers = [{"about": "breaker", **asdict(event)} for model in models for event in model.events]
    of_replicas = [{"about": "replica", **asdict(event)} for event in events]
    return sorted(of_breakers + of_replicas, key=lambda event: -float(event["age_s"]))


def _model_status(card: ModelCard, view: ClusterView, counters: ModelCounters | None) -> dict[str, Any]:
    condition = next((found for found in view.conditions if found.model == card.name), None)
    restarts = sum(count for model, _, count in view.restarts if model == card.name)
    states = [replica.state for replica in view.replicas if replica.heartbeat.model == card.name]
    return {
        "name": card.name,
        "engine": card.engine.value,
        "strategy": counters.strategy if counters else None,
        "replicas": len(states),
        "ready": states.count(ReplicaState.READY),
        "condition": condition.state if condition else None,
        "reason": condition.detail if condition else "",
        "restarts": restarts,
        "waiting": counters.waiting if counters else 0,
        "open": counters.open if counters else 0,
        "retries": counters.retries if counters else 0,
        "resumed": counters.resumed if counters else 0,
        "panic": counters.panic if counters else False,
        "requests": dict(counters.outcomes) if counters else {},
    }


def _replica_statuses(view: ClusterView) -> list[dict[str, Any]]:
    counters = view.counters()
    rows = []
    for replica in view.replicas:
        beat = replica.heartbeat
        routed = counters.get(beat.replica_id)
        rows.append(
            {
                "id": beat.replica_id,
                "model": beat.model,
                "rank": beat.rank,
                "node": beat.node,
                "pid": beat.pid,
                "state": _state(replica, routed),
                "in_flight": routed.in_flight if routed else 0,
                "weight": routed.weight if routed else None,
                "breaker": routed.breaker if routed else "closed",
                "ewma_ms": routed.ewma_ms if routed else None,
                "cost": routed.cost if routed else 0.0,
                "requests": routed.requests if routed else 0,
                "failures": routed.failures if routed else 0,
                "running": beat.engine.running,
                "queued": beat.engine.queued,
                "steps": beat.engine.steps_done,
                "memory_bytes": beat.memory_bytes,
                "kv_cache": None if beat.engine.kv_cache is None else asdict(beat.engine.kv_cache),
                "diffusion": None if beat.engine.diffusion is None else asdict(beat.engine.diffusion),
                "detail": replica.reason or beat.engine.detail,
            }
        )
    return rows


def _state(replica: ReplicaHealth, routed: ReplicaCounters | None) -> str:
    draining = routed is not None and routed.draining and replica.state is ReplicaState.READY
    return (ReplicaState.DRAINING if draining else replica.state).value


def metrics_text(view: ClusterView) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ClusterCollector(view))
    return generate_latest(registry)


class _ClusterCollector(Collector):
    def __init__(self, view: ClusterView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        yield from self._models()
        yield from self._replicas()
        yield from self._kv_caches()
        yield from self._diffusion()

    def _models(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("blaze_requests", "Attempts that ended.", labels=["model", "outcome"])
        tokens = CounterMetricFamily("blaze_tokens", "Tokens of finished answers.", labels=["model", "kind"])
        images = CounterMetricFamily("blaze_images", "Images of finished answers.", labels=["model"])
        waiting = GaugeMetricFamily(
            "blaze_waiting_requests", "Requests without a replica yet.", labels=["model"]
        )
        retries = CounterMetricFamily("blaze_retries", "Attempts after the first one.", labels=["model"])
        resumed = CounterMetricFamily(
            "blaze_streams_resumed", "Answers that went on on another replica.", labels=["model"]
        )
        panic = GaugeMetricFamily(
            "blaze_router_panic",
            "1 while breakers are ignored, for they refuse most replicas.",
            labels=["model"],
        )
        breakers = CounterMetricFamily(
            "blaze_breaker_transitions", "Breakers that came to this state.", labels=["model", "state"]
        )
        ttft = HistogramMetricFamily(
            "blaze_time_to_first_content_seconds",
            "From the pick to the first token or image.",
            labels=["model"],
        )
        for name, model in sorted(self._view.models().items()):
            for outcome, count in model.outcomes:
                requests.add_metric([name, outcome], count)
            tokens.add_metric([name, "prompt"], model.prompt_tokens)
            tokens.add_metric([name, "completion"], model.completion_tokens)
            images.add_metric([name], model.images)
            waiting.add_metric([name], model.waiting)
            retries.add_metric([name], model.retries)
            resumed.add_metric([name], model.resumed)
            panic.add_metric([name], model.panic)
            for state, count in model.transitions:
                breakers.add_metric([name, state], count)
            ttft.add_metric([name], _buckets(model), model.ttft_sum_s)
        yield from (requests, tokens, images, waiting, retries, resumed, panic, breakers, ttft)

    def _replicas(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily(
            "blaze_in_flight_requests", "Routed, not ended.", labels=["model", "replica"]
        )
        routed = CounterMetricFamily("blaze_replica_requests", "Attempts sent.", labels=["model", "replica"])
        failed = CounterMetricFamily(
            "blaze_replica_failures", "Attempts failed.", labels=["model", "replica"]
        )
        memory = GaugeMetricFamily(
            "blaze_replica_memory_bytes", "Resident set size.", labels=["model", "replica"]
        )
        up = GaugeMetricFamily(
            "blaze_replica_ready", "1 when the replica is ready.", labels=["model", "replica"]
        )
        for replica_id, counters in sorted(self._view.counters().items()):
            labels = [counters.model, replica_id]
            in_flight.add_metric(labels, counters.in_flight)
            routed.add_metric(labels, counters.requests)
            failed.add_metric(labels, counters.failures)
        for replica in self._view.replicas:
            labels = [replica.heartbeat.model, replica.heartbeat.replica_id]
            memory.add_metric(labels, replica.heartbeat.memory_bytes)
            up.add_metric(labels, replica.state is ReplicaState.READY)
        restarts = CounterMetricFamily(
            "blaze_replica_restarts",
            "Unhealthy replicas that the health actor has ended.",
            labels=["model", "reason"],
        )
        for model, reason, count in self._view.restarts:
            restarts.add_metric([model, reason], count)
        yield from (in_flight, routed, failed, memory, up, restarts)

    def _kv_caches(self) -> Iterator[Metric]:
        labels = ["model", "replica"]
        memory = GaugeMetricFamily(
            "blaze_kv_cache_tokens", "Memory for keys and values, in tokens.", labels=[*labels, "state"]
        )
        queries = CounterMetricFamily("blaze_prefix_queries", "Prompt tokens looked up.", labels=labels)
        hits = CounterMetricFamily("blaze_prefix_hits", "Prompt tokens found computed.", labels=labels)
        preempted = CounterMetricFamily("blaze_preemptions", "Sequences put back.", labels=labels)
        for replica in self._view.replicas:
            cache = replica.heartbeat.engine.kv_cache
            if cache is None:
                continue
            names = [replica.heartbeat.model, replica.heartbeat.replica_id]
            used = cache.total_tokens - cache.free_tokens - cache.kept_tokens
            for state, tokens in (("used", used), ("kept", cache.kept_tokens), ("free", cache.free_tokens)):
                memory.add_metric([*names, state], tokens)
            queries.add_metric(names, cache.prefix_queries)
            hits.add_metric(names, cache.prefix_hits)
            preempted.add_metric(names, cache.preemptions)
        yield from (memory, queries, hits, preempted)

    def _diffusion(self) -> Iterator[Metric]:
        labels = ["model", "replica"]
        again = CounterMetricFamily(
            "blaze_images_decoded_again", "Too much for 16 bits: in fp32.", labels=labels
        )
        failed = CounterMetricFamily(
            "blaze_non_finite_requests", "Failed, for there was NaN or infinity.", labels=labels
        )
        for replica in self._view.replicas:
            if (status := replica.heartbeat.engine.diffusion) is not None:
                names = [replica.heartbeat.model, replica.heartbeat.replica_id]
                again.add_metric(names, status.decoded_again)
                failed.add_metric(names, status.non_finite)
        yield from (again, failed)


def _buckets(model: ModelCounters) -> list[tuple[str, float]]:
    """Prometheus' buckets are cumulative."""
    bounds = ("+Inf" if bound == float("inf") else str(bound) for bound in TTFT_BUCKETS_S)
    return [
        (bound, float(count)) for bound, count in zip(bounds, accumulate(model.ttft_buckets), strict=True)
    ]
