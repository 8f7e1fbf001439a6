"""A served application for cluster tests: real Ray, real Serve, real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from deployments.local import LocalCluster, free_port
from tests.waiting import eventually


@dataclass(frozen=True)
class Served:
    cluster: LocalCluster
    url: str
    config: dict[str, Any]

    def status(self) -> dict[str, Any]:
        body: dict[str, Any] = httpx.get(f"{self.url}/api/v1/blaze/status", timeout=10).json()
        return body

    def replicas(self, model: str) -> list[dict[str, Any]]:
        return [replica for replica in self.status()["replicas"] if replica["model"] == model]

    def in_flight(self) -> int:
        return sum(replica["in_flight"] for replica in self.status()["replicas"])

    def working(self) -> int:
        return sum(replica["running"] + replica["queued"] for replica in self.status()["replicas"])


def serve_config(
    port: int, models: list[dict[str, Any]], *, health: dict[str, Any] | None = None, **router: Any
) -> dict[str, Any]:
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "blaze",
                "route_prefix": "/",
                "import_path": "deployments.app:build_app",
                "args": {"router": router, "models": models, "health": health or {}},
            }
        ],
    }


def simulator(name: str = "sim", *, replicas: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "name": name,
        "engine": "simulator",
        "replicas": replicas,
        "resources": {"num_cpus": 0.05},
        "simulator": options,
    }


@contextmanager
def served(
    models: list[dict[str, Any]], *, fast: bool = True, health: dict[str, Any] | None = None, **router: Any
) -> Iterator[Served]:
    port = free_port()
    config = serve_config(port, models, health=health, **router)
    with LocalCluster(num_cpus=4, fast=fast) as cluster:
        cluster.deploy(config)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(cluster, url)
        yield Served(cluster, url, config)


def wait_until_ready(cluster: LocalCluster, url: str, *, within_s: float = 120) -> None:
    def ready() -> bool:
        progress = cluster.progress()
        assert progress.status != "DEPLOY_FAILED", progress
        return progress.status == "RUNNING" and answers(f"{url}/ready")

    eventually(ready, within_s=within_s, every_s=0.25)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
