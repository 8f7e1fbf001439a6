from __future__ import annotations

import dataclasses

from prometheus_client.parser import text_string_to_metric_families

from blaze.api.report import metrics_text, status_object
from blaze.api.service import ModelCard, Readiness
from blaze.errors import EngineFailure
from blaze.health.view import ClusterView, ReplicaHealth
from blaze.reports import (
    TTFT_BUCKETS_S,
    BreakerEvent,
    DiffusionStatus,
    ModelCondition,
    ModelCounters,
    ReplicaCounters,
    ReplicaEvent,
    ReplicaState,
    RouterReport,
)
from blaze.types import EngineKind
from blaze.version import __version__
from tests.fakes import FakePool, FakeService, Script
from tests.samples import collect, heartbeat, image_answer, image_request, text_request

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

CARDS = [ModelCard("m", EngineKind.LLM, 0)]
MODEL = ModelCounters("m", "round_robin", 0, (), 0, 0, 0, (0,) * len(TTFT_BUCKETS_S), 0.0)


def samples(text: bytes) -> Samples:
    """Every sample by its name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


async def used_service() -> FakeService:
    """Two answers and a failure of model m, two images of model d."""
    pools = {
        "m": FakePool(("a",), scripts={"a": [[EngineFailure("broke")]]}),
        "d": FakePool(("x",), scripts={"x": [image_answer(1, 2)]}),
    }
    service = FakeService(pools, kinds={"d": EngineKind.DIFFUSION})
    for request in (text_request(), text_request()):
        async with await service.dispatchers["m"].open(request) as stream:
            await collect(stream)
    async with await service.dispatchers["d"].open(image_request(n=2)) as stream:
        await collect(stream)
    service.heartbeat(heartbeat("a", state="busy", running=1, queued=2))
    service.heartbeat(heartbeat("x", model="d", state="loading"))
    return service


async def test_metrics_parse_and_are_sums() -> None:
    found = samples(await (await used_service()).metrics())
    m, a = ("model", "m"), (("model", "m"), ("replica", "a"))
    assert found["blaze_requests_total", (m, ("outcome", "success"))] == 2
    assert found["blaze_requests_total", (m, ("outcome", "failure"))] == 1
    assert found["blaze_requests_total", (m, ("outcome", "neutral"))] == 0
    assert found["blaze_tokens_total", (("kind", "completion"), m)] == 2
    assert found["blaze_tokens_total", (("kind", "prompt"), m)] == 6
    assert found["blaze_images_total", (("model", "d"),)] == 2
    assert found["blaze_waiting_requests", (m,)] == 0
    assert found["blaze_in_flight_requests", a] == 0
    assert found["blaze_replica_requests_total", a] == 3
    assert found["blaze_replica_failures_total", a] == 1
    assert found["blaze_replica_ready", a] == 1
    assert found["blaze_replica_ready", (("model", "d"), ("replica", "x"))] == 0
    assert found["blaze_replica_memory_bytes", a] == 1 << 20


async def test_the_histogram_of_first_content_is_cumulative() -> None:
    found = samples(await (await used_service()).metrics())
    name = "blaze_time_to_first_content_seconds"
    bounds = ["+Inf" if bound == float("inf") else str(bound) for bound in TTFT_BUCKETS_S]
    buckets = [found[f"{name}_bucket", (("le", bound), ("model", "m"))] for bound in bounds]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found[f"{name}_count", (("model", "m"),)] == 2
    assert found[f"{name}_sum", (("model", "m"),)] == 0.0  # the clock of the test stood still


async def test_images_that_were_no_numbers_are_counted() -> None:
    service = await used_service()
    service.heartbeat(heartbeat("x", model="d", diffusion=DiffusionStatus(decoded_again=3, non_finite=1)))
    found = samples(await service.metrics())
    x = (("model", "d"), ("replica", "x"))
    assert found["blaze_images_decoded_again_total", x] == 3
    assert found["blaze_non_finite_requests_total", x] == 1
    assert not any(
        name.startswith("blaze_non_finite") and dict(labels)["model"] == "m" for name, labels in found
    )
    replicas = (await service.status())["replicas"]
    assert {replica["id"]: replica["diffusion"] for replica in replicas} == {
        "a": None,
        "x": {"decoded_again": 3, "non_finite": 1},
    }


def test_metrics_of_an_empty_cluster_parse() -> None:
    assert samples(metrics_text(ClusterView((), ()))) == {}


async def test_case_46_unknown_names_make_no_labels() -> None:
    service = await used_service()
    names = {dict(labels).get("model") for _, labels in samples(await service.metrics())}
    assert names == {"m", "d"}


async def test_status_tells_models_and_replicas() -> None:
    body = await (await used_service()).status()
    assert (body["version"], body["ready"], body["routers"]) == (__version__, True, ["router-1"])
    model = body["models"][0]
    assert model == {
        "name": "m",
        "engine": "llm",
        "strategy": "round_robin",
        "replicas": 1,
        "ready": 1,
        "condition": "ready",
        "reason": "",
        "restarts": 0,
        "waiting": 0,
        "open": 0,
        "retries": 1,
        "resumed": 0,
        "panic": False,
        "requests": {"success": 2, "failure": 1, "neutral": 0},
    }
    assert (body["models"][1]["replicas"], body["models"][1]["ready"]) == (1, 0)
    replica = next(row for row in body["replicas"] if row["id"] == "a")
    expected = {
        "model": "m",
        "rank": 0,
        "node": "node-1",
        "pid": 4711,
        "state": "ready",
        "in_flight": 0,
        "weight": 1.0,
        "breaker": "closed",
        "cost": 0.0,
        "requests": 3,
        "failures": 1,
        "running": 1,
        "queued": 2,
    }
    assert expected.items() <= replica.items()


async def test_status_tells_how_long_ago_breakers_changed() -> None:
    failing: list[Script] = [[EngineFailure("broke")] for _ in range(5)]
    service = FakeService({"m": FakePool(("a", "b"), scripts={"a": failing})})
    for _ in range(10):
        async with await service.dispatchers["m"].open(text_request()) as stream:
            await collect(stream)
    assert [event["age_s"] for event in (await service.status())["events"]] == [0.0]
    service.clock.advance(0.5)
    service.dispatchers["m"].table.breakers.act("a", "close")
    service.clock.advance(2.0)
    about = {"about": "breaker", "model": "m", "replica_id": "a"}
    opened = {"before": "closed", "after": "open", "reason": "5 failures in a row", "age_s": 2.5}
    closed = {"before": "open", "after": "closed", "reason": "closed by hand", "age_s": 2.0}
    assert (await service.status())["events"] == [about | opened, about | closed]


def test_a_model_that_nobody_has_reported_yet_is_listed_empty() -> None:
    view = ClusterView((), (RouterReport("r1", (), ()),))
    body = status_object([ModelCard("m", EngineKind.LLM, 0)], view, Readiness(("m",)))
    assert body["ready"] is False
    assert body["models"][0]["strategy"] is None
    assert (body["models"][0]["replicas"], body["models"][0]["requests"]) == (0, {})


async def test_events_of_breakers_and_replicas_are_told_together_oldest_first() -> None:
    breaker = BreakerEvent("m", "a", "closed", "open", "5 failures in a row", age_s=2.0)
    events = (
        ReplicaEvent("m", "b", "ready", "suspect", "no heartbeat for 4.0 s", age_s=3.0),
        ReplicaEvent("m", "b", "suspect", "restarting", "no heartbeat for 31.0 s", age_s=1.0),
    )
    reports = RouterReport("r1", (dataclasses.replace(MODEL, events=(breaker,)),), ())
    body = status_object(CARDS, ClusterView((), (reports,), events=events), Readiness(()))
    assert [(event["about"], event["after"], event["age_s"]) for event in body["events"]] == [
        ("replica", "suspect", 3.0),
        ("breaker", "open", 2.0),
        ("replica", "restarting", 1.0),
    ]


def test_replicas_of_which_only_routers_know_are_told_apart() -> None:
    known = (
        ReplicaCounters("a", "m", 2, 1.0, 9, 0, draining=True, node="n1"),
        ReplicaCounters("b", "m", 1, 1.0, 9, 0, node="n1"),
    )
    reports = tuple(RouterReport(router_id, (), known) for router_id in ("r1", "r2"))
    health = ReplicaHealth(heartbeat("b"), ReplicaState.READY, 0.0)
    body = status_object(CARDS, ClusterView((health,), reports, is_whole=False), Readiness(()))
    assert body["unheard"] == [{"id": "a", "node": "n1", "draining": True, "in_flight": 4}]
    assert [row["id"] for row in body["replicas"]] == ["b"]
    assert body["complete"] is False


async def test_restarts_are_counted_by_model_and_reason() -> None:
    view = ClusterView((), (), restarts=(("m", "silent", 2), ("m", "stalled", 1)))
    found = samples(metrics_text(view))
    labels = [(("model", "m"), ("reason", reason)) for reason in ("silent", "stalled")]
    assert [found["blaze_replica_restarts_total", label] for label in labels] == [2, 1]
    assert status_object(CARDS, view, Readiness(()))["models"][0]["restarts"] == 3


async def test_a_models_condition_is_told_with_what_operators_may_know() -> None:
    condition = ModelCondition("m", "failing", "it could not be started", "no such folder: /x")
    body = status_object(CARDS, ClusterView((), (), conditions=(condition,)), Readiness(("m",)))
    assert (body["models"][0]["condition"], body["models"][0]["reason"]) == ("failing", "no such folder: /x")


def test_a_replica_says_why_it_is_not_as_it_should_be() -> None:
    health = ReplicaHealth(heartbeat("a"), ReplicaState.SUSPECT, 4.0, "no heartbeat for 4.0 s")
    row = status_object(CARDS, ClusterView((health,), ()), Readiness(()))["replicas"][0]
    assert (row["state"], row["detail"]) == ("suspect", "no heartbeat for 4.0 s")
