"""What does Blaze's Router cost? Requests per second and latency of two streaming hops, in one run:

(a) stock Ray Serve, (b) the same bare two hops with the data-plane flags that `blaze up` sets, (c) Blaze's
Router with the simulator (no wait, one token) and everything that a request can pass switched on: a key with
limits, a session that is kept, balancing by cost, breakers. All take the same bytes by POST and send the same
bytes back over a streaming call. Each has a Ray cluster and a process of its own; all three are up at once
and are measured in turns, so that a machine that speeds up or slows down does so for all.

Run: `python -m benchmarks.data_plane [--rounds 5] [--seconds 6]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import Load, closed_loop, read_answer
from deployments.local import LocalCluster, free_port

BODY = json.dumps(
    {"model": "sim", "stream": True, "seed": 1, "messages": [{"role": "user", "content": "Say one word."}]}
).encode()
KEY = "sk-benchmark"
HEADERS = f"authorization: Bearer {KEY}\r\nx-session-id: benchmark\r\n"
CONNECTIONS = (1, 16)
NAMES = STOCK, BARE, BLAZE = ("(a) stock Ray Serve", "(b) bare, fast data plane", "(c) Blaze")


def bare(answer: str) -> dict[str, Any]:
    return {"import_path": "benchmarks.bare_two_hops:build", "args": {"answer": answer}}


def blaze() -> dict[str, Any]:
    model = {
        "name": "sim",
        "engine": "simulator",
        "resources": {"num_cpus": 0.1},
        "simulator": {"ttft_ms": 0, "inter_token_ms": 0, "tokens": 1, "slots": 64},
    }
    limits = {"requests_per_minute": 10**9, "tokens_per_minute": 10**9}
    router = {
        "strategy": "adaptive",
        "sticky_sessions": True,
        "api_keys": [{"name": "benchmark", "key": KEY, **limits}],
    }
    return {"import_path": "deployments.app:build_app", "args": {"router": router, "models": [model]}}


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
        + f"{HEADERS}content-length: {len(BODY)}\r\n\r\n".encode()
        + BODY
    )
    try:
        return await read_answer(reader)
    finally:
        writer.close()


@contextmanager
def server(name: str, answer: str) -> Iterator[str]:
    """One of the three in a process of its own; gives its URL."""
    command = [sys.executable, "-m", "benchmarks.data_plane", "--serve", name, "--answer", answer]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()  # the word to stop


def serve(name: str, answer: str) -> None:
    """The inside of such a process: up until standard input ends."""
    application = blaze() if name == BLAZE else bare(answer)
    with served(application, fast=name != STOCK) as url:
        print(url, flush=True)
        sys.stdin.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=NAMES)
    parser.add_argument("--answer", default="")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.answer)
        return
    with ExitStack() as servers:
        ours = servers.enter_context(server(BLAZE, ""))
        answer = asyncio.run(one_answer(ours)).decode()  # what the bare hops are to send
        urls = {name: servers.enter_context(server(name, answer)) for name in (STOCK, BARE)} | {BLAZE: ours}
        for name in (STOCK, BARE):
            if (got := asyncio.run(one_answer(urls[name])).decode()) != answer:
                raise RuntimeError(f"{name} sends other bytes: {got!r}")
        results = measure(urls, options.rounds, options.seconds)
    report(results, answer, options.json)


def measure(urls: dict[str, str], rounds: int, seconds: float) -> dict[str, dict[int, list[Load]]]:
    results: dict[str, dict[int, list[Load]]] = {name: {count: [] for count in CONNECTIONS} for name in urls}
    for _ in range(rounds):
        for connections in CONNECTIONS:
            for name, url in urls.items():
                load = closed_loop(url, BODY, connections=connections, seconds=seconds, headers=HEADERS)
                results[name][connections].append(asyncio.run(load))
    return results


def report(results: dict[str, dict[int, list[Load]]], answer: str, target: Path | None) -> None:
    rounds = len(results[BLAZE][CONNECTIONS[0]])
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
    for rival in (STOCK, BARE):
        ratios = [
            ours.per_second / theirs.per_second
            for ours, theirs in zip(results[BLAZE][most], results[rival][most], strict=True)
        ]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"(c)/{rival[:3]} at {most} connections: {statistics.median(ratios):.2f}  (rounds: {shown})")
    if target:
        target.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
