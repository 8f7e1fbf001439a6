"""What does a pick cost? Microseconds of each strategy at 64 and 1,000 replicas, beside Ray Serve's router.

Blaze: "pick" is asking the table who is eligible and the strategy to choose; "whole" adds the lease and the
release of a request that ends. A tenth of the replicas are full, others drain, are suspects, are kept out by
an operator, start slowly or fail, so that breakers open and close; a request ends for each that comes, and
the clock goes on by 1 ms between them.

Ray Serve: its power-of-two-choices router as a deployment handle runs it, in this process, one request after
the other, over replicas that answer at once; its cache of queue lengths is on. "pick" is the awaited choice,
"whole" adds what is counted when a request is sent and when it ends.

Run: `python -m benchmarks.pick_cost [--picks 5000] [--rounds 3] [--json PATH]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from blaze.routing.breaker import BreakerBoard
from blaze.routing.columns import stable_hash
from blaze.routing.orders import Orders
from blaze.routing.outcome import Outcome
from blaze.routing.replica import Lease, ReplicaInfo
from blaze.routing.replicas import ReplicaTable
from blaze.routing.strategies import STRATEGY_NAMES, make_strategy
from blaze.routing.strategy import Ask
from blaze.routing.trip import BreakerSettings

SIZES = (64, 1000)
TARGETS_US = {64: (30.0, 100.0), 1000: (300.0, None)}  # of a pick: median, p99
RAY = "Ray Serve, two choices"
CAP, USUAL = 16, 4  # requests of a replica: when it is full, and most of the time
STEP_S = 0.001
KEYS = [stable_hash(f"session:{number}") for number in range(10_000)]
COSTS = (20.0, 150.0, 400.0, 1500.0)


@dataclass
class Times:
    """Microseconds of each pick, and of all that a request costs."""

    pick: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        found = {}
        for name, values in (("pick", self.pick), ("whole", self.whole)):
            found[f"{name}_median_us"] = statistics.median(values)
            found[f"{name}_p99_us"] = statistics.quantiles(values, n=100)[98]
        return found


class SteppedClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


# --- Blaze -------------------------------------------------------------------------------------------


class Pool:
    """A table in the middle of its work."""

    def __init__(self, size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = SteppedClock()
        breakers = BreakerBoard(
            BreakerSettings(),
            self.clock,
            self.rng,
            lambda change: self._closed(change.replica_id, change.after),
        )
        self.table = ReplicaTable(cap=CAP, clock=self.clock, breakers=breakers)
        ids = [f"replica-{number:04}-{self.rng.getrandbits(32):08x}" for number in range(size)]
        new = size // 16  # start slowly while they are measured
        self.table.sync(ReplicaInfo(id, weight=self.rng.choice((1.0, 1.0, 2.0))) for id in ids[new:])
        self.clock.time += 60.0
        self.table.sync(ReplicaInfo(id, weight=self.rng.choice((1.0, 1.0, 2.0))) for id in ids)
        self.rng.shuffle(ids)
        some = size // 32
        self.failing = set(ids[:some])
        for id in ids[some : 2 * some]:
            breakers.act(id, "open")
        self.table.follow(Orders(drained=dict.fromkeys(ids[2 * some : 3 * some], math.inf)))
        self.table.set_suspects(ids[3 * some : 4 * some])
        self.running: list[Lease] = []
        full = size // 10
        for id in ids[4 * some : 4 * some + full]:
            for _ in range(CAP):
                self._lease(id)  # for ever
        for id in ids[4 * some + full :]:
            self.running += [self._lease(id) for _ in range(USUAL)]
        self.table.columns.cost_cap = CAP * statistics.mean(COSTS)

    def _closed(self, replica_id: str, state: str) -> None:
        if state == "closed":
            self.table.closed(replica_id)

    def _lease(self, replica_id: str) -> Lease:
        lease = self.table.lease(replica_id, cost=self.rng.choice(COSTS), expires_at=self.clock.time + 600)
        if self.rng.random() < 0.9:
            lease.first_content(self.rng.uniform(0.05, 0.5))
        return lease

    def requests(self, count: int) -> Iterator[Ask]:
        for _ in range(count):
            self.clock.time += STEP_S
            yield Ask(self.clock.time, self.rng.choice(COSTS), self.rng.choice(KEYS))

    def ending(self) -> tuple[Lease, Outcome]:
        """Somebody's request, and how it ends."""
        at = self.rng.randrange(len(self.running))
        self.running[at], self.running[-1] = self.running[-1], self.running[at]
        lease = self.running.pop()
        if lease.replica.id in self.failing:
            return lease, Outcome.FAILURE
        return lease, Outcome.NEUTRAL if self.rng.random() < 0.02 else Outcome.SUCCESS


def time_blaze(name: str, size: int, picks: int, seed: int) -> Times:
    pool, times, now = Pool(size, seed), Times(), time.perf_counter_ns
    table, strategy = pool.table, make_strategy(name, rng=random.Random(seed))
    for ask in pool.requests(picks):
        begin = now()
        eligible = table.eligible()
        pick = strategy.choose(table.columns, eligible, ask)
        picked = now()
        if pick is None:
            raise RuntimeError(f"{name}: nobody was picked")
        lease = table.lease(pick.replica_id, cost=ask.cost, expires_at=ask.now + 600)
        leased = now()
        if pool.rng.random() < 0.95:
            lease.first_content(pool.rng.uniform(0.05, 0.5))
        pool.running.append(lease)
        ended, outcome = pool.ending()
        ending = now()
        ended.release(outcome)
        end = now()
        times.pick.append((picked - begin) / 1000)
        times.whole.append((leased - begin + end - ending) / 1000)
    return times


# --- Ray Serve ---------------------------------------------------------------------------------------


def time_ray(size: int, picks: int, seed: int) -> Times:
    return asyncio.run(_time_ray(size, picks, seed))


async def _time_ray(size: int, picks: int, seed: int) -> Times:
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
    from ray.serve._private.request_router.common import PendingRequest
    from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

    rng, times, now = random.Random(seed), Times(), time.perf_counter_ns
    random.seed(seed)  # its draws come from the module's generator
    deployment = DeploymentID(name="replica", app_name="pick-cost")
    router = PowerOfTwoChoicesRequestRouter(
        deployment_id=deployment,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        self_node_id="node",
        prefer_local_node_routing=False,
    )
    replicas = _ray_replicas(deployment, size)
    router.update_replicas(replicas)
    await asyncio.sleep(0.1)  # it asks all of them once
    running: list[Any] = []
    for replica in replicas[size // 10 :]:
        for _ in range(USUAL):
            router.on_send_request(replica.replica_id)
            running.append(replica)
    for replica in replicas[: size // 10]:
        replica.queue_len = CAP
        router.on_new_queue_len_info(replica.replica_id, CAP)
    for number in range(picks):
        metadata = RequestMetadata(request_id=f"r{number}", internal_request_id=f"i{number}")
        pending = PendingRequest(args=[], kwargs={}, metadata=metadata)
        begin = now()
        chosen = await router._choose_replica_for_request(pending)
        picked = now()
        router.on_send_request(chosen.replica_id)
        sent = now()
        running.append(chosen)
        at = rng.randrange(len(running))
        running[at], running[-1] = running[-1], running[at]
        ended = running.pop()
        ending = now()
        router.decrement_queue_len_cache(ended.replica_id)
        end = now()
        times.pick.append((picked - begin) / 1000)
        times.whole.append((sent - begin + end - ending) / 1000)
    return times


def _ray_replicas(deployment: Any, size: int) -> list[Any]:
    from ray.serve._private.common import ReplicaID, RunningReplicaInfo
    from ray.serve._private.request_router.replica_wrapper import RunningReplica

    class LocalReplica(RunningReplica):  # type: ignore[misc]
        """Answers at once, without an actor behind it."""

        def __init__(self, number: int) -> None:
            self._replica_info = RunningReplicaInfo(
                replica_id=ReplicaID(f"{number:08x}", deployment_id=deployment),
                node_id="node",
                node_ip=None,
                availability_zone=None,
                actor_name=f"replica-{number}",
                max_ongoing_requests=CAP,
            )
            self._multiplexed_model_ids: set[str] = set()
            self.queue_len = USUAL

        async def get_queue_len(self, *, deadline_s: float) -> int:  # noqa: ARG002
            return self.queue_len

    return [LocalReplica(number) for number in range(size)]


# --- All of them -------------------------------------------------------------------------------------


def measure(picks: int, rounds: int) -> list[dict[str, Any]]:
    """In turns, each round with numbers of its own; all picks of a contestant together."""
    contestants: dict[str, Callable[[int, int, int], Times]] = {
        name: lambda size, picks, seed, name=name: time_blaze(name, size, picks, seed)  # type: ignore[misc]
        for name in STRATEGY_NAMES
    }
    contestants[RAY] = time_ray
    rows = []
    for size in SIZES:
        times = {name: Times() for name in contestants}
        for seed in range(rounds):
            for name, run in contestants.items():
                found = run(size, picks, seed)
                times[name].pick += found.pick
                times[name].whole += found.whole
        rows += [{"replicas": size, "name": name, **times[name].row()} for name in contestants]
    return rows


def report(rows: list[dict[str, Any]], picks: int, rounds: int, others: float) -> None:
    print(f"{machine.describe()}; others used {others:.2f} cores")
    print(f"{rounds} rounds of {picks} picks; microseconds")
    print(f"{'replicas':>8}  {'':24}{'pick p50':>10}{'p99':>9}{'whole p50':>11}{'p99':>9}  target of a pick")
    for row in rows:
        median, p99 = TARGETS_US[row["replicas"]]
        met = row["pick_median_us"] <= median and (p99 is None or row["pick_p99_us"] <= p99)
        target = f"{median:.0f}" + ("" if p99 is None else f" / {p99:.0f}")
        print(
            f"{row['replicas']:>8}  {row['name']:24}{row['pick_median_us']:>10.1f}{row['pick_p99_us']:>9.1f}"
            f"{row['whole_median_us']:>11.1f}{row['whole_p99_us']:>9.1f}"
            + ("" if row["name"] == RAY else f"  {target}: {'met' if met else 'MISSED'}")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--picks", type=int, default=5000, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="does it run? one round of 200 picks")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    picks, rounds = (200, 1) if options.quick else (options.picks, options.rounds)
    with machine.CpuUse([]) as use:
        rows = measure(picks, rounds)
    report(rows, picks, rounds, use.others)
    if options.json:
        whole = {
            "machine": machine.describe(),
            "versions": machine.versions(),
            "picks": picks,
            "rounds": rounds,
            "others_cores": use.others,
            "rows": rows,
        }
        options.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
