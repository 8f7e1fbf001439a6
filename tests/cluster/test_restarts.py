"""Unhealthy replicas are restarted and nobody who reads an answer can tell; what cannot start says so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.local import processes
from tests.cluster.served import Served, served, simulator
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

STALL_AFTER_S = 4.0
TOKENS = 60
STREAMS = 8


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("no-model")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    models = [
        simulator("sim", replicas=2, ttft_ms=20, inter_token_ms=50, tokens=TOKENS, slots=32),
        # The replica of rank 1 never gets on with anything, and neither does its replacement.
        simulator("wedged", replicas=2, ttft_ms=5, inter_token_ms=5, tokens=8, slots=4, hang={1: 1.0}),
        {"name": "broken", "engine": "llm", "source": str(folder), "resources": {"num_cpus": 0.05}},
    ]
    health = {"stall_after_s": STALL_AFTER_S, "probe_period_s": 0.5}
    with served(
        models, ready=False, health=health, strategy="round_robin", replicas=1, slow_start_s=0
    ) as running:
        yield running


def ask(app: Served, model: str, number: int) -> tuple[int, str]:
    body = {"model": model, "messages": [{"role": "user", "content": f"Story {number}."}], "seed": number}
    answer = httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=60)
    text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
    return answer.status_code, text


def all_of(app: Served, model: str) -> list[tuple[int, str]]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda number: ask(app, model, number), range(STREAMS)))


def states(app: Served, model: str) -> list[str]:
    return sorted(replica["state"] for replica in app.replicas(model))


def model_of(app: Served, name: str) -> dict[str, Any]:
    return next(model for model in app.status()["models"] if model["name"] == name)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def health_actor(app: Served) -> psutil.Process:
    (actor,) = [p for p in processes(app.cluster.cluster_id) if any("Health" in part for part in p.cmdline())]
    return actor


def test_a_frozen_replica_is_replaced_in_time_and_no_answer_changes(app: Served) -> None:
    eventually(lambda: states(app, "sim") == ["ready", "ready"])
    expected = all_of(app, "sim")
    assert [status for status, _ in expected] == [200] * STREAMS
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(all_of, app, "sim")
        eventually(lambda: sum(replica["in_flight"] for replica in app.replicas("sim")) == STREAMS)
        victim = app.replicas("sim")[0]
        os.kill(victim["pid"], signal.SIGSTOP)
        try:
            eventually(
                lambda: is_gone(victim["pid"]) and states(app, "sim") == ["ready", "ready"],
                within_s=STALL_AFTER_S + 5.0,
            )
            assert answers.result(timeout=60) == expected
        finally:
            if not is_gone(victim["pid"]):
                os.kill(victim["pid"], signal.SIGKILL)  # a frozen process would outlive the cluster
    told = [event["after"] for event in app.status()["events"] if event["replica_id"] == victim["id"]]
    assert told[:3] == ["suspect", "restarting", "gone"]
    assert (
        'blaze_replica_restarts_total{model="sim",reason="silent"} 1.0'
        in httpx.get(f"{app.url}/metrics").text
    )


def test_a_replica_that_does_not_get_on_with_its_work_is_restarted_and_no_answer_is_lost(app: Served) -> None:
    eventually(lambda: states(app, "wedged") == ["ready", "ready"])
    victim = next(replica for replica in app.replicas("wedged") if replica["rank"] == 1)
    found = all_of(app, "wedged")
    assert [status for status, _ in found] == [200] * STREAMS
    eventually(lambda: is_gone(victim["pid"]))
    eventually(lambda: states(app, "wedged") == ["ready", "ready"])
    assert model_of(app, "wedged")["restarts"] == 1


def test_a_model_that_cannot_be_started_says_why_and_others_serve(app: Served) -> None:
    eventually(lambda: model_of(app, "broken")["condition"] == "failing", within_s=60)
    ready = httpx.get(f"{app.url}/ready")
    assert (ready.status_code, ready.json()) == (
        503,
        {
            "ready": False,
            "draining": False,
            "missing": ["broken"],
            "reasons": {"broken": "replicas could not be started (ModelSourceError)"},
        },
    )
    asked_at = time.monotonic()
    status, error = ask(app, "broken", 1)
    assert (status, time.monotonic() - asked_at < 5.0) == (503, True)
    assert "model_unavailable" in error
    assert "/" not in model_of(app, "sim")["reason"]
    assert ask(app, "sim", 1)[0] == 200


def test_without_the_health_actor_serving_goes_on_and_it_comes_back_with_its_picture(app: Served) -> None:
    eventually(lambda: states(app, "sim") == ["ready", "ready"])
    before = {replica["id"] for replica in app.replicas("sim")}
    expected = all_of(app, "sim")
    health_actor(app).kill()
    assert all_of(app, "sim") == expected
    eventually(lambda: {replica["id"] for replica in app.replicas("sim")} == before, within_s=60)
    assert states(app, "sim") == ["ready", "ready"]
    told = [event["replica_id"] for event in app.status()["events"] if event["about"] == "replica"]
    assert before.isdisjoint(told)  # it has found nobody unwell, and ended nobody


def test_a_replica_that_froze_before_the_health_actor_came_back_is_replaced(app: Served) -> None:
    eventually(lambda: states(app, "sim") == ["ready", "ready"])
    victim = app.replicas("sim")[0]
    os.kill(victim["pid"], signal.SIGSTOP)
    try:
        health_actor(app).kill()
        eventually(
            lambda: is_gone(victim["pid"]) and states(app, "sim") == ["ready", "ready"],
            within_s=45.0,  # Serve's own checks would take 90 s
        )
    finally:
        if not is_gone(victim["pid"]):
            os.kill(victim["pid"], signal.SIGKILL)
    told = [event["after"] for event in app.status()["events"] if event["replica_id"] == victim["id"]]
    assert told[:3] == ["suspect", "restarting", "gone"]
