"""Replicas die and freeze under streams, and nobody who reads one can tell."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.cluster.served import Served, served, simulator
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

STREAMS = 16
TOKENS = 80
INTER_TOKEN_S = 0.05


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    models = [
        simulator("sim", replicas=3, ttft_ms=20, inter_token_ms=1000 * INTER_TOKEN_S, tokens=TOKENS, slots=32)
    ]
    with served(models, strategy="least_connections", replicas=1, slow_start_s=0) as running:
        yield running


@dataclass
class Stream:
    """What a client has read, and its longest wait for more."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    ids: frozenset[str] = frozenset()
    errors: int = 0
    done: bool = False
    longest_gap_s: float = 0.0


def body(number: int) -> dict[str, Any]:
    return {
        "model": "sim",
        "messages": [{"role": "user", "content": f"Tell story {number}."}],
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def read(app: Served, number: int) -> Stream:
    found, at = Stream(), time.perf_counter()
    with httpx.stream("POST", f"{app.url}/v1/chat/completions", json=body(number), timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            now = time.perf_counter()
            found.longest_gap_s, at = max(found.longest_gap_s, now - at), now
            if line == "data: [DONE]":
                found.done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                found.errors += 1
                continue
            found.ids |= {chunk["id"]}
            found.usage = chunk.get("usage") or found.usage
            for choice in chunk["choices"]:
                found.text += choice["delta"].get("content") or ""
                found.finish_reason = choice["finish_reason"] or found.finish_reason
    return found


def all_of(app: Served) -> list[Stream]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda number: read(app, number), range(STREAMS)))


def assert_unbroken(found: list[Stream], unbroken: list[Stream]) -> None:
    for stream, expected in zip(found, unbroken, strict=True):
        assert (stream.errors, stream.done, len(stream.ids)) == (0, True, 1)
        assert stream.text == expected.text
        assert (stream.finish_reason, stream.usage) == (expected.finish_reason, expected.usage)


def busiest(app: Served) -> dict[str, Any]:
    return max(app.replicas("sim"), key=lambda replica: replica["in_flight"])


def resumed(app: Served) -> int:
    counts: list[int] = [model["resumed"] for model in app.status()["models"] if model["name"] == "sim"]
    return counts[0]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_no_stream_breaks_when_its_replica_dies_or_freezes(app: Served, fault: signal.Signals) -> None:
    eventually(lambda: [r["state"] for r in app.replicas("sim")].count("ready") == 3, within_s=60)
    unbroken = all_of(app)
    before = resumed(app)
    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(all_of, app)
        eventually(lambda: app.in_flight() == STREAMS)
        victim = busiest(app)
        assert victim["in_flight"] >= 3
        os.kill(victim["pid"], fault)
        try:
            found = streams.result(timeout=60)
        finally:
            if fault is signal.SIGSTOP:
                os.kill(victim["pid"], signal.SIGKILL)  # a frozen process would outlive the cluster
    assert_unbroken(found, unbroken)
    eventually(lambda: resumed(app) - before >= victim["in_flight"])
    eventually(lambda: app.in_flight() == 0)
