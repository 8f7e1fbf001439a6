"""What clients notice when a replica fails: Blaze, and the same engines on Ray Serve with its defaults.

16 clients stream answers, one after another, without a pause. After a few seconds one replica is hit. Every
answer is compared with the one that an undisturbed cluster has given before.

    python -m benchmarks.failover                                       all of it, about 35 minutes
    python -m benchmarks.failover --faults kill --contestants blaze     the shortest answer to the question
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import machine
from benchmarks.failover_servers import (
    BLAZE,
    CONTESTANTS,
    FAST,
    SIMULATOR,
    SMOLLM2,
    STOCK,
    Replica,
    Server,
    served,
)
from blaze.engines.faults import Faults
from tests.streams import Answer, ask, new_client

STREAMS = 16
BODIES = 32  # different ones, in turn
BEFORE_S, LOAD_S = 3.0, 15.0  # of load: before the fault, and after it at the least
HARMED_S = 2.0  # an answer with a longer silence than this is harmed
POLL_S = 0.2

FAULTS = {
    "kill": "SIGKILL of a replica",
    "stop": "SIGSTOP of a replica",
    "wedge": "wedged engine: takes requests, makes no step",
    "slow": "replica 20 times slower",
    "errors": "replica answers 500",
    "block": "event loop blocked for 10 s",
}
SIMULATED: Mapping[str, Faults] = {
    "wedge": Faults(wedged=True),
    "slow": Faults(slowdown=20.0),
    "errors": Faults(fail_rate=1.0),
    "block": Faults(block_s=10.0),
}
REPLACED = ("kill", "stop", "wedge")  # the others pass or stay, and are healed by hand
SAMPLING: Mapping[str, Mapping[str, float]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
}
NAMES = {"blaze": BLAZE, "fast": FAST, "stock": STOCK}


@dataclass(frozen=True)
class Measured:
    """Times in seconds.

    ``detected_s``: until the contestant itself says that the replica does not work; None: never, in the time
    of the measurement. ``harmed_until_s``: when the last answer was asked for that failed, or in which
    nothing came for longer than ``HARMED_S``. ``whole_s``: until as many replicas worked as before.
    """

    contestant: str
    model: str
    sampling: str
    fault: str
    answers: int
    broken: int  # of those under way at the fault
    failed: int  # all
    differing: int
    longest_gap_s: float
    longest_wait_s: float  # for the first token
    detected_s: float | None
    harmed_until_s: float
    whole_s: float | None


def bodies(model: str, sampling: str) -> list[dict[str, Any]]:
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 80}
    return [
        {
            **common,
            **SAMPLING[sampling],
            "seed": number,
            "messages": [{"role": "user", "content": f"Tell me a story about {number + 2} brave sailors."}],
        }
        for number in range(BODIES)
    ]


class Load:
    """Clients that ask on until they are told to stop."""

    def __init__(self, client: httpx.AsyncClient, url: str, asked: Sequence[dict[str, Any]]) -> None:
        self.answers: list[tuple[int, Answer]] = []  # with the number of the body
        self._client, self._url, self._asked = client, f"{url}/v1/chat/completions", asked
        self._stopping = False

    async def one(self, number: int) -> Answer:
        return await ask(self._client, self._url, self._asked[number % len(self._asked)])

    async def clients(self) -> None:
        numbers = iter(range(1_000_000))

        async def on_and_on() -> None:
            while not self._stopping:
                number = next(numbers)
                answer = await self.one(number)
                self.answers.append((number, answer))
                if answer.lost:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(on_and_on() for _ in range(STREAMS)))

    def stop(self) -> None:
        self._stopping = True


async def measure(server: Server, contestant: str, sampling: str, fault: str, patience_s: float) -> Measured:
    asked = bodies(server.model, sampling)
    async with new_client(timeout_s=patience_s) as client:
        load = Load(client, server.url, asked)
        expected = [
            answer
            for begin in range(0, BODIES, STREAMS)
            for answer in await asyncio.gather(*map(load.one, range(begin, begin + STREAMS)))
        ]
        bad = [answer.lost for answer in expected if answer.lost]
        if bad:
            raise RuntimeError(f"{contestant} fails without a fault: {bad[0]}")
        running = asyncio.create_task(load.clients())
        await asyncio.sleep(BEFORE_S)
        victim = await asyncio.to_thread(busiest, server)
        hit_at = time.monotonic()
        try:
            await hit(server, victim, fault)
            detected_s, whole_s = await watch(server, victim, fault, hit_at, patience_s)
            await asyncio.sleep(max(0.0, hit_at + LOAD_S - time.monotonic()))
            await heal(server, victim, fault)
            load.stop()
            await running
        finally:
            if fault == "stop":
                server.signal(victim, signal.SIGKILL)  # a frozen process would outlive the cluster
    return Measured(
        contestant,
        server.model,
        sampling,
        fault,
        detected_s=detected_s,
        whole_s=whole_s,
        **counted(load.answers, expected, hit_at),
    )


def counted(
    answers: Sequence[tuple[int, Answer]], expected: Sequence[Answer], hit_at: float
) -> dict[str, Any]:
    lost = [answer for _, answer in answers if answer.lost]
    harmed = [
        answer.started_at - hit_at
        for _, answer in answers
        if answer.lost or max(answer.longest_gap_s, answer.first_text_s or 0.0) > HARMED_S
    ]
    return {
        "answers": len(answers),
        "broken": sum(answer.started_at < hit_at for answer in lost),
        "failed": len(lost),
        "differing": sum(
            not answer.lost and not same(answer, expected[number % BODIES]) for number, answer in answers
        ),
        "longest_gap_s": max(answer.longest_gap_s for _, answer in answers),
        "longest_wait_s": max(answer.first_text_s or 0.0 for _, answer in answers),
        "harmed_until_s": max(0.0, *harmed) if harmed else 0.0,
    }


def same(found: Answer, expected: Answer) -> bool:
    return (found.texts, found.finish_reasons, found.tokens) == (
        expected.texts,
        expected.finish_reasons,
        expected.tokens,
    )


def busiest(server: Server) -> Replica:
    return max(server.replicas(), key=lambda replica: replica.in_flight)


async def hit(server: Server, victim: Replica, fault: str) -> None:
    if fault in SIMULATED:
        await server.set_faults(victim, SIMULATED[fault])
    else:
        server.signal(victim, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


async def heal(server: Server, victim: Replica, fault: str) -> None:
    if fault == "stop":
        server.signal(victim, signal.SIGKILL)
    elif fault in SIMULATED and any(r.id == victim.id for r in await asyncio.to_thread(server.replicas)):
        await server.set_faults(victim, Faults())


async def watch(
    server: Server, victim: Replica, fault: str, hit_at: float, patience_s: float
) -> tuple[float | None, float | None]:
    """When the victim is seen not to work, and when all is whole again."""
    watches_for_s = patience_s if fault in REPLACED else LOAD_S
    detected_s: float | None = None
    while (now := time.monotonic()) < hit_at + watches_for_s:
        try:
            found = await asyncio.to_thread(server.replicas)
        except (httpx.HTTPError, OSError, RuntimeError):
            found = []
        if found:
            works = any(replica.id == victim.id and replica.works for replica in found)
            if detected_s is None and not works:
                detected_s = now - hit_at
            # Who is to be replaced does not count, whatever is still said of it.
            working = [r for r in found if r.works and not (fault in REPLACED and r.id == victim.id)]
            if detected_s is not None and len(working) >= server.wanted:
                return detected_s, now - hit_at
        await asyncio.sleep(POLL_S)
    return detected_s, None


# --- All of it ---------------------------------------------------------------------------------------


def play(options: argparse.Namespace) -> list[Measured]:
    """Each cluster has a process of its own: Serve's handles remember the first one."""
    found: list[Measured] = []
    processes = multiprocessing.get_context("spawn")
    for model in options.models:
        faults = options.faults if model == SIMULATOR else [f for f in options.faults if f == "kill"]
        for contestant in options.contestants if faults else ():
            with ProcessPoolExecutor(1, mp_context=processes) as process:
                asked = (NAMES[contestant], model, faults, options.stall_after, options.patience)
                found += process.submit(on_a_cluster, *asked).result()
    return found


def on_a_cluster(
    contestant: str, model: str, faults: Sequence[str], stall_after_s: float, patience_s: float
) -> list[Measured]:
    with served(contestant, model, stall_after_s=stall_after_s) as server:
        return asyncio.run(suffer(server, contestant, faults, patience_s))


async def suffer(server: Server, contestant: str, faults: Sequence[str], patience_s: float) -> list[Measured]:
    found: list[Measured] = []
    for sampling in ("greedy", "sampled") if server.model == SMOLLM2 else ("greedy",):
        for fault in faults:
            found.append(await measure(server, contestant, sampling, fault, patience_s))
            print(row(found[-1]), flush=True)
            await until_whole(server, sampling)
    return found


async def until_whole(server: Server, sampling: str, *, within_s: float = 180.0) -> None:
    """With a little load: breakers close by requests only."""
    give_up = time.monotonic() + within_s
    async with new_client(timeout_s=30.0) as client:
        load = Load(client, server.url, [body | {"max_tokens": 1} for body in bodies(server.model, sampling)])
        while time.monotonic() < give_up:
            try:
                if await asyncio.to_thread(server.is_whole):
                    return
            except (httpx.HTTPError, OSError, RuntimeError):
                pass
            await asyncio.gather(*map(load.one, range(4)))
            await asyncio.sleep(0.5)
    raise RuntimeError("the pool did not become whole again")


HEAD = (
    "| fault | | answers | broken | failed | differing | longest gap | longest wait | detected | harmed until"
    " | whole again |"
)


def row(found: Measured) -> str:
    model = found.model if found.model == SIMULATOR else f"{found.model}, {found.sampling}"
    times = (
        found.longest_gap_s,
        found.longest_wait_s,
        found.detected_s,
        found.harmed_until_s,
        found.whole_s,
    )
    cells = (
        f"{FAULTS[found.fault]} ({model})",
        found.contestant,
        found.answers,
        found.broken,
        found.failed,
        found.differing,
        *("no" if seconds is None else f"{seconds:.1f} s" for seconds in times),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def table(found: Sequence[Measured]) -> str:
    order = list(FAULTS)
    rows = sorted(found, key=lambda one: (order.index(one.fault), one.model != SIMULATOR, one.sampling))
    return "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *map(row, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=tuple(FAULTS), default=tuple(FAULTS))
    parser.add_argument("--models", nargs="+", choices=(SIMULATOR, SMOLLM2), default=(SIMULATOR, SMOLLM2))
    parser.add_argument("--contestants", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    parser.add_argument("--stall-after", type=float, default=30.0, help="Blaze's health.stall_after_s")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds of silence that a client puts up with"
    )
    parser.add_argument("--quick", action="store_true", help="does it run? one fault on Blaze")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.faults, options.models, options.contestants = ("kill",), (SIMULATOR,), ("blaze",)
    assert {NAMES[name] for name in options.contestants} <= set(CONTESTANTS)
    described = f"{machine.describe()}; {machine.versions()}"
    print(described)
    found = play(options)
    print(
        f"\n{STREAMS} streams, stall_after_s {options.stall_after:g}, clients wait {options.patience:g} s\n"
    )
    print(table(found))
    if options.json:
        whole = {"machine": described, "rows": [asdict(one) for one in found]}
        options.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
