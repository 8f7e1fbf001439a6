"""Streamed chats over HTTP, the whole path: Blaze (`blaze up`, one replica) against vLLM's server.

SmolLM2-135M in bf16; prompts of 16 to 600 tokens, drawn with a fixed seed and never twice; 64 tokens out,
greedy. Closed loops of 1, 8 and 32 connections: tokens/s, median time to the first token, and the 99th
percentile of the gaps between arrivals of text, all on the client's clock (see :mod:`benchmarks.streams`).
Both servers have their defaults, prefix caching included, which here finds nothing but the chat template's
own beginning; vLLM runs as it comes and tuned as its documentation says. All are up at once and measured in
turns, so that what the machine does at the time is the same for all. A server that waits is not quite idle
(Ray's processes look after each other), which costs whoever is measured: it is printed as idle cores, and
with --halted whoever waits is stopped (SIGSTOP).

Run: `python -m benchmarks.llm_http [--rounds 3] [--halted] [--without NAME ...] [--json PATH]`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import machine
from benchmarks.contestants import Contestant
from benchmarks.http_servers import (
    BLAZE,
    MODEL,
    VLLM,
    Server,
    blaze_server,
    vllm_server,
    vllm_version,
    wait_until_ready,
)
from benchmarks.llm_engine import NOISY_CORES, SETTLE_S
from benchmarks.rivals import vllm_cpu
from benchmarks.smollm2 import random_text
from benchmarks.streams import StreamLoad

REQUESTS = {1: 12, 8: 32, 32: 64}  # connections: requests in a turn
PROMPT_TOKENS = (16, 600)
NEW_TOKENS = 64
AWAKE_S = 3.0  # after it was halted: timers that are overdue, connections that look dead
SHORT = {"vllm": tuple(VLLM), "vllm-default": (VLLM[0],), "vllm-tuned": (VLLM[1],)}


@dataclass(frozen=True)
class Turn:
    load: StreamLoad
    own_cores: float
    other_cores: float


Results: TypeAlias = dict[str, dict[int, list[Turn]]]
Metric: TypeAlias = Callable[[StreamLoad], float]
METRICS: dict[str, Metric] = {
    "tokens/s": lambda load: load.tokens_per_s,
    "TTFT p50 ms": lambda load: load.ttft_p50_ms,
    "gap p99 ms": lambda load: load.gap_p99_ms,
}


def bodies(draw: random.Random, count: int) -> list[dict[str, Any]]:
    return [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": random_text(draw, draw.randint(*PROMPT_TOKENS))}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(count)
    ]


def turn(client: Contestant, server: Server, requests: list[dict[str, Any]], connections: int) -> Turn:
    server.process.wakes()
    time.sleep(SETTLE_S)
    with machine.CpuUse([*server.process.processes(), *client.processes()]) as use:
        found = client.ask({"url": server.url, "bodies": requests, "connections": connections})
    server.process.rests()
    load = StreamLoad(**found)
    if load.completion_tokens != len(requests) * NEW_TOKENS:
        raise RuntimeError(f"{server.process.name}: usage says {load.completion_tokens} tokens")
    return Turn(load, use.own, use.others)


@dataclass(frozen=True)
class Load:
    """What a round is: for each number of connections, the requests that all servers get."""

    warm_up: dict[int, list[dict[str, Any]]]
    counted: dict[int, list[dict[str, Any]]]


def loads(rounds: int, requests: dict[int, int]) -> Iterator[Load]:
    """No prompt comes twice, so that no cache holds one. The first round has some that do not count."""
    draw = random.Random(0)
    for number in range(rounds):
        warm = {n: bodies(draw, n) for n in requests} if number == 0 else {}
        yield Load(warm, {n: bodies(draw, count) for n, count in requests.items()})


def play(client: Contestant, server: Server, load: Load, connections: int, results: Results) -> None:
    got = turn(client, server, load.counted[connections], connections)
    results[server.process.name][connections].append(got)
    shown = ", ".join(f"{metric(got.load):.1f} {name}" for name, metric in METRICS.items())
    print(f"{connections} connections: {server.process.name} {shown}", file=sys.stderr, flush=True)


def warm_up(client: Contestant, server: Server, load: Load) -> None:
    for connections, requests in load.warm_up.items():
        turn(client, server, requests, connections)


@contextmanager
def awake(server: Server) -> Iterator[None]:
    """The others are halted."""
    server.process.go_on()
    wait_until_ready(server)
    time.sleep(AWAKE_S)
    yield
    server.process.halt()


def measure(
    client: Contestant, servers: list[Server], rounds: int, requests: dict[int, int], *, halted: bool
) -> Results:
    """They take turns at each number of connections."""
    results: Results = {server.process.name: {n: [] for n in requests} for server in servers}
    its_turn = awake if halted else nullcontext
    with ExitStack() as running:
        for server in servers:
            running.enter_context(server.process)
            wait_until_ready(server)  # one after another: loading is work too
            if halted:
                server.process.halt()
        for number, load in enumerate(loads(rounds, requests)):
            for server in servers:
                with its_turn(server):
                    warm_up(client, server, load)
            first = number % len(servers)
            for connections in requests:
                for server in servers[first:] + servers[:first]:
                    with its_turn(server):
                        play(client, server, load, connections, results)
    return results


def check_same_work(results: Results) -> None:
    for connections in REQUESTS:
        counts = {
            tuple(turn.load.prompt_tokens for turn in by_connections.get(connections, ()))
            for by_connections in results.values()
        }
        if len(counts) > 1:
            raise RuntimeError(f"the servers count different prompts, not the same work: {counts}")


def median_of(turns: list[Turn], metric: Metric) -> float:
    return statistics.median(metric(turn.load) for turn in turns)


def ratios(results: Results, rival: str, connections: int, metric: Metric) -> list[float]:
    pairs = zip(results[BLAZE][connections], results[rival][connections], strict=True)
    return [metric(ours.load) / metric(theirs.load) for ours, theirs in pairs]


def report(results: Results, servers: list[Server]) -> None:
    print(
        f"\n{'':14}{'connections':>12}" + "".join(f"{name:>13}" for name in METRICS) + f"{'idle cores':>12}"
    )
    for server in servers:
        name = server.process.name
        idle = max(server.process.idle_cores, default=0.0)
        for connections, turns in results[name].items():
            row = "".join(f"{median_of(turns, metric):>13.1f}" for metric in METRICS.values())
            print(f"{name:14}{connections:>12}{row}{idle:>12.3f}")
    print("\nrounds")
    for what, metric in METRICS.items():
        for name, by_connections in results.items():
            for connections, turns in by_connections.items():
                shown = "  ".join(
                    f"{metric(turn.load):.1f}{'*' * (turn.other_cores > NOISY_CORES)}" for turn in turns
                )
                print(f"{what:12}{name:14}{connections:>4}  {shown}")
    print(f"* others used more than {NOISY_CORES} cores meanwhile, idle contestants included")
    if BLAZE not in results or len(results) < 2:
        return
    print("\nBlaze / rival, medians of the rounds' own (rounds); below 1 is better for times")
    for rival in (name for name in results if name != BLAZE):
        for what, metric in METRICS.items():
            for connections in results[rival]:
                found = ratios(results, rival, connections, metric)
                shown = ", ".join(f"{ratio:.2f}" for ratio in found)
                print(f"{rival:14}{what:12}{connections:>4}{statistics.median(found):>7.2f}  ({shown})")


def as_json(results: Results, servers: list[Server]) -> dict[str, Any]:
    rivals = [name for name in results if name != BLAZE] if BLAZE in results else []
    return {
        "turns": {
            name: {
                connections: [
                    {what: metric(turn.load) for what, metric in METRICS.items()}
                    | {"own_cores": turn.own_cores, "other_cores": turn.other_cores}
                    for turn in turns
                ]
                for connections, turns in by_connections.items()
            }
            for name, by_connections in results.items()
        },
        "idle_cores": {server.process.name: server.process.idle_cores for server in servers},
        "blaze_to_rival": {
            rival: {
                what: {
                    connections: statistics.median(ratios(results, rival, connections, metric))
                    for connections in results[rival]
                }
                for what, metric in METRICS.items()
            }
            for rival in rivals
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="does it run? one round, few requests")
    parser.add_argument("--halted", action="store_true", help="stop whoever waits, so that it uses nothing")
    parser.add_argument("--no-prefix-caching", action="store_true", help="off in both, instead of on")
    parser.add_argument("--without", choices=SHORT, nargs="*", default=[], help="leave these out")
    parser.add_argument("--vllm-venv", type=Path, help="where vLLM is (or: BLAZE_VLLM_VENV)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds, requests = (1, {1: 2, 8: 8}) if options.quick else (options.rounds, REQUESTS)
    left_out = {name for short in options.without for name in SHORT[short]}
    prefix_caching = not options.no_prefix_caching

    with tempfile.TemporaryDirectory(prefix="blaze-benchmark-") as name, ExitStack() as running:
        scratch, versions = Path(name), machine.versions()
        made = [blaze_server(scratch, prefix_caching=prefix_caching)]
        if wanted := [vllm for vllm in VLLM if vllm not in left_out]:
            venv = vllm_cpu.venv_from(options.vllm_venv)
            versions["vllm"] = vllm_version(venv)
            setups: dict[str, vllm_cpu.Setup] = {VLLM[0]: "default", VLLM[1]: "tuned"}
            made += [
                vllm_server(vllm, venv, setups[vllm], scratch, prefix_caching=prefix_caching)
                for vllm in wanted
            ]
        client = running.enter_context(
            Contestant("client", [sys.executable, "-m", "benchmarks.streams"], scratch / "client.log")
        )
        client.hear()
        results = measure(client, made, rounds, requests, halted=options.halted)
        check_same_work(results)

    print(machine.describe())
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    low, high = PROMPT_TOKENS
    print(
        f"prompts of {low} to {high} tokens, {NEW_TOKENS} out; prefix caching "
        f"{'on' if prefix_caching else 'off'} in all; medians of {rounds} rounds"
    )
    report(results, made)
    if options.json:
        whole = {
            "machine": machine.describe(),
            "versions": versions,
            "rounds": rounds,
            "requests": requests,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "prefix_caching": prefix_caching,
            "halted": options.halted,
            **as_json(results, made),
        }
        options.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
