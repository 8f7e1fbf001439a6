"""The real runs of `strategies.py`: 8 replicas of the simulator engine on Ray Serve, on a cluster each for
Blaze, whose strategy is changed between turns, and for every one of Ray's own routers.

Requests come when the clock says so, over HTTP; the time to the first token is the client's.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks import machine
from benchmarks.strategies_routers import RAY_ROUTERS
from benchmarks.strategies_workload import CAP, REPLICAS, Arrival, Tally, Workload, p99
from deployments.local import MARKER, LocalCluster, free_port

_TEXT = re.compile(rb'"content": ?"[^"]')
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Turn:
    client_cores: float
    server_cores: float  # of the whole cluster: proxy, router, replicas, controller
    others_cores: float
    client_late_s: float  # p99: how long after its time a request was sent


@dataclass(frozen=True)
class Server:
    url: str
    cluster_id: str
    attempts: Callable[[], list[int]] | None  # by rank, so far; None: answers name their replica

    async def play(self, asked: Sequence[Arrival], tally: Tally, *, attempts: int = 1) -> Turn:
        """``attempts``: of the client, for what fails."""
        before = self.attempts() if self.attempts else []
        late: list[float] = []
        client_s, begin = time.process_time(), time.perf_counter()
        with machine.CpuUse(machine.marked(MARKER, self.cluster_id)) as use:
            async with asyncio.TaskGroup() as group:
                for arrival in asked:
                    await asyncio.sleep(max(0.0, begin + arrival.at_s - time.perf_counter()))
                    late.append(time.perf_counter() - begin - arrival.at_s)
                    group.create_task(self._one(arrival, begin, tally, attempts))
        client = (time.process_time() - client_s) / (time.perf_counter() - begin)
        if self.attempts:
            await asyncio.sleep(3.0)  # the health actor hears of the last ones
            tally.attempts = [now - then for now, then in zip(self.attempts(), before, strict=True)]
        return Turn(client, use.own, use.others, p99(late))

    async def _one(self, arrival: Arrival, begin: float, tally: Tally, attempts: int) -> None:
        ttft_s: float | None = None
        while ttft_s is None and attempts > 0:
            attempts -= 1
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    ttft_s = await self._answer(arrival, begin, tally)
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                pass
        tally.ended(arrival.at_s, ttft_s, time.perf_counter() - begin)

    async def _answer(self, arrival: Arrival, begin: float, tally: Tally) -> float | None:
        """Seconds from when it was to come to the first text; None when it fails."""
        body = json.dumps(
            {
                "model": "sim",
                "stream": True,
                "seed": 0,
                "max_tokens": arrival.max_tokens,
                "messages": [{"role": "user", "content": arrival.prompt}],
            }
        ).encode()
        parts = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n"
                f"x-session-id: {arrival.session}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            rank = re.search(rb"x-rank: (\d+)", head)
            if rank:
                tally.attempts[int(rank[1])] += 1
            if not head.startswith(b"HTTP/1.1 200"):
                return None
            answer, first_s = b"", None
            while data := await reader.read(65536):
                answer += data
                if first_s is None and _TEXT.search(answer):
                    first_s = time.perf_counter() - begin - arrival.at_s
            whole = len(_TEXT.findall(answer)) >= 1 and b"[DONE]" in answer and b'"error"' not in answer
            return first_s if whole else None
        finally:
            writer.close()


@contextmanager
def served(application: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The URL, and the id of the cluster."""
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "blaze", "route_prefix": "/", **application}],
    }
    with LocalCluster(num_cpus=4) as cluster:
        cluster.deploy(config)
        give_up = time.monotonic() + 180
        while (progress := cluster.progress()).status != "RUNNING":
            if progress.status == "DEPLOY_FAILED" or time.monotonic() > give_up:
                raise RuntimeError(f"not running: {progress}")
            time.sleep(0.25)
        time.sleep(3.0)  # the proxy hears of the application after Serve says that it runs
        yield f"http://127.0.0.1:{port}", cluster.cluster_id


@contextmanager
def blaze(workload: Workload) -> Iterator[tuple[Server, Callable[[str], None]]]:
    """The server, and how its strategy is changed."""
    model = {
        "name": "sim",
        "engine": "simulator",
        "replicas": REPLICAS,
        "max_in_flight": CAP,
        "resources": {"num_cpus": 0.05},
        "simulator": workload.engine.model_dump(),
    }
    application = {
        "import_path": "deployments.app:build_app",
        "args": {"models": [model], "router": {"seed": 0}},
    }
    with served(application) as (url, cluster_id):

        def replicas() -> list[dict[str, Any]]:
            status: dict[str, Any] = httpx.get(f"{url}/api/v1/blaze/status", timeout=10).json()
            found: list[dict[str, Any]] = sorted(status["replicas"], key=lambda replica: replica["rank"])
            return found

        def change(strategy: str) -> None:
            body = {"model": "sim", "strategy": strategy}
            httpx.post(f"{url}/api/v1/blaze/strategy", json=body, timeout=10).raise_for_status()
            for replica in replicas():  # each turn begins with breakers that remember nothing
                path = f"{url}/api/v1/blaze/replicas/{replica['id']}/breaker"
                httpx.post(path, json={"action": "reset"}, timeout=10).raise_for_status()
            time.sleep(1.5)  # every Router follows within a second

        yield Server(url, cluster_id, lambda: [replica["requests"] for replica in replicas()]), change


@contextmanager
def ray(name: str, workload: Workload) -> Iterator[Server]:
    args = {
        "router": None if name == "ray_two_choices" else RAY_ROUTERS[name],
        "replicas": REPLICAS,
        "cap": CAP,
        "options": workload.engine.model_dump(),
    }
    with served({"import_path": "benchmarks.plain_simulator:build", "args": args}) as (url, cluster_id):
        yield Server(url, cluster_id, None)
