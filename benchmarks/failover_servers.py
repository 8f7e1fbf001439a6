"""The contestants of `failover.py`, each on a cluster of its own: Blaze, and the same engines on Ray Serve.
What is done to a replica is the same for both."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.smollm2 import SOURCE
from blaze.config import APP_NAME
from blaze.engines.faults import Faults
from deployments.local import LocalCluster, free_port

BLAZE, FAST, STOCK = "Blaze", "Ray Serve, fast data plane", "Ray Serve"
CONTESTANTS = (BLAZE, FAST, STOCK)
SIMULATOR, SMOLLM2 = "simulator", "smollm2"
MODELS: dict[str, dict[str, Any]] = {
    SIMULATOR: {
        "name": SIMULATOR,
        "engine": "simulator",
        "replicas": 3,
        "resources": {"num_cpus": 0.05},
        "simulator": {"ttft_ms": 20, "inter_token_ms": 50, "tokens": 80, "slots": 64},
    },
    SMOLLM2: {
        "name": SMOLLM2,
        "engine": "llm",
        "source": SOURCE,
        "replicas": 2,
        "resources": {"num_cpus": 0.1},
        "llm": {"max_model_len": 512, "max_batch_size": 16, "threads": 1},
    },
}
_START_S = 180.0
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Replica:
    id: str
    pid: int
    works: bool  # as the contestant itself sees it: it gets new requests
    in_flight: int = 0


class Server:
    def __init__(self, cluster: LocalCluster, url: str, model: str) -> None:
        self._cluster = cluster
        self.url = url
        self.model = model
        self.wanted = int(MODELS[model]["replicas"])

    def replicas(self) -> list[Replica]:
        raise NotImplementedError

    async def set_faults(self, replica: Replica, faults: Faults) -> None:
        """All of them on one event loop: Serve's handles are bound to theirs."""
        raise NotImplementedError

    def is_whole(self) -> bool:
        found = self.replicas()
        return len(found) == self.wanted and all(replica.works for replica in found)

    def signal(self, replica: Replica, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(replica.pid, number)


class BlazeServer(Server):
    def replicas(self) -> list[Replica]:
        status = httpx.get(f"{self.url}/api/v1/blaze/status", timeout=10, trust_env=False).json()
        return [
            Replica(r["id"], r["pid"], r["state"] == "ready" and r["breaker"] == "closed", r["in_flight"])
            for r in status["replicas"]
        ]

    async def set_faults(self, replica: Replica, faults: Faults) -> None:
        from ray import serve

        handle = serve.get_deployment_handle(f"simulator-{self.model}", APP_NAME)
        method = handle.options(method_name="set_faults")
        await asyncio.wait_for(method.remote(faults, blaze_pin=replica.id), _PATIENCE_S)


class PlainServer(Server):
    def replicas(self) -> list[Replica]:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        details = ServeSubmissionClient(self._cluster.dashboard).get_serve_details()
        found = details["applications"][APP_NAME]["deployments"]["PlainEngine"]["replicas"]
        return [Replica(r["replica_id"], r.get("pid") or 0, r["state"] == "RUNNING") for r in found]

    async def set_faults(self, replica: Replica, faults: Faults) -> None:
        from ray import serve

        handle = serve.get_deployment_handle("PlainEngine", APP_NAME)
        await handle.broadcast("set_faults", replica.pid, faults).results_async(timeout_s=_PATIENCE_S)


def application(name: str, model: str, stall_after_s: float) -> dict[str, Any]:
    if name != BLAZE:
        return {"import_path": "benchmarks.plain_engines:build", "args": {"model": MODELS[model]}}
    args = {"models": [MODELS[model]], "health": {"stall_after_s": stall_after_s}}
    return {"import_path": "deployments.app:build_app", "args": args}


@contextmanager
def served(name: str, model: str, *, stall_after_s: float) -> Iterator[Server]:
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": APP_NAME, "route_prefix": "/", **application(name, model, stall_after_s)}],
    }
    with LocalCluster(num_cpus=4, fast=name != STOCK) as cluster:
        cluster.deploy(config)
        server = (BlazeServer if name == BLAZE else PlainServer)(cluster, f"http://127.0.0.1:{port}", model)
        _wait(lambda: cluster.progress().status == "RUNNING")
        _wait(lambda: _answers(f"{server.url}/ready"))
        _wait(server.is_whole)
        yield server


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _wait(condition: Any) -> None:
    give_up = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > give_up:
            raise RuntimeError("did not come up")
        time.sleep(0.25)
