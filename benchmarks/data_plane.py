"""What does Blaze's Router cost? Requests per second and latency of two streaming hops, in one run:

(a) stock Ray Serve, (b) the same bare two hops with the data-plane flags that `blaze up` sets, (c) Blaze's
Router with the simulator (no wait, one token). All take the same bytes by POST and send the same bytes
back over a streaming call. Run: `python -m benchmarks.data_plane [--rounds 3] [--seconds 8]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import Load, closed_loop, read_answer
from deployments.local import LocalCluster, free_port

BODY = json.dumps(
    {"model": "sim", "stream": True, "messages": [{"role": "user", "content": "Say one word."}]}
).encode()
CONNECTIONS = (1, 16)


def bare(answer: str) -> dict[str, Any]:
    return {"import_path": "benchmarks.bare_two_hops:build", "args": {"answer": answer}}


def blaze() -> dict[str, Any]:
    model = {
        "name": "sim",
        "engine": "simulator",
        "resources": {"num_cpus": 0.1},
        "simulator": {"ttft_ms": 0, "inter_token_ms": 0, "tokens": 1, "slots": 64},
    }
    return {"import_path": "deployments.app:build_app", "args": {"models": [model]}}


@contextmanager
def served(application: dict[str, Any], *, fast: bool) -> Iterator[str]:
    """The application on a cluster of its own; gives the URL of its chat endpoint."""
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "blaze", "route_prefix": "/", **application}],
    }
    with LocalCluster(fast=fast) as cluster:
        cluster.deploy(config)
        give_up = time.monotonic() + 120
        while (progress := cluster.progress()).status != "RUNNING":
            if progress.status == "DEPLOY_FAILED" or time.monotonic() > give_up:
                raise RuntimeError(f"not running: {progress}")
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"


async def one_answer(url: str) -> bytes:
    host_port = url.split("/")[2]
    reader, writer = await asyncio.open_connection(*host_port.split(":"))
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(BODY)}\r\n\r\n".encode()
        + BODY
    )
    try:
        return await read_answer(reader)
    finally:
        writer.close()


async def measure(url: str, rounds: int, seconds: float) -> dict[int, list[Load]]:
    return {
        connections: [
            await closed_loop(url, BODY, connections=connections, seconds=seconds) for _ in range(rounds)
        ]
        for connections in CONNECTIONS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    results: dict[str, dict[int, list[Load]]] = {}
    with served(blaze(), fast=True) as url:
        answer = asyncio.run(one_answer(url)).decode()  # what the bare hops are to send
        results["(c) Blaze"] = asyncio.run(measure(url, options.rounds, options.seconds))
    for name, fast in (("(b) bare, fast data plane", True), ("(a) stock Ray Serve", False)):
        with served(bare(answer), fast=fast) as url:
            got = asyncio.run(one_answer(url)).decode()
            if got != answer:
                raise RuntimeError(f"{name} sends other bytes: {got!r}")
            results[name] = asyncio.run(measure(url, options.rounds, options.seconds))

    report(results, answer, options.json)


def report(results: dict[str, dict[int, list[Load]]], answer: str, target: Path | None) -> None:
    rounds = len(results["(c) Blaze"][CONNECTIONS[0]])
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{len(BODY)} bytes in, {len(answer)} bytes out; medians of {rounds} rounds")
    print(f"{'':28}{'connections':>12}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}")
    rows = []
    for name, by_connections in sorted(results.items()):
        for connections, loads in by_connections.items():
            row = {
                "name": name,
                "connections": connections,
                "requests_per_s": statistics.median(load.per_second for load in loads),
                "p50_ms": statistics.median(load.p50_ms for load in loads),
                "p99_ms": statistics.median(load.p99_ms for load in loads),
            }
            rows.append(row)
            numbers = f"{row['requests_per_s']:>12.0f}{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}"
            print(f"{name:28}{connections:>12}{numbers}")
    most = CONNECTIONS[-1]
    stock, rival, ours = (row["requests_per_s"] for row in rows if row["connections"] == most)
    print(f"at {most} connections: (c)/(a) = {ours / stock:.2f}, (c)/(b) = {ours / rival:.2f}")
    if target:
        target.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
