"""Does it pay to look at the replicas? Blaze's strategies against Ray Serve's own routers, when one of eight
replicas is five times as slow and one fails three requests of ten.

Simulation: Blaze's own dispatcher, strategies, breakers and costs, and Ray's own routers, over modelled
replicas in virtual time (`strategies_simulation.py`). Serve: the simulator engine on real Ray Serve, through
Blaze and behind Ray's routers, and a client over HTTP (`strategies_on_serve.py`). Requests come in an open
loop, the same ones for all contestants: four of five answers are short, one is long.

TTFT is that of answers; failures are requests without one. 100 % load is what all slots can do, the slow
replica counted as a fifth and the failing one as 70 %.

Run: `python -m benchmarks.strategies [--only simulation|serve] [--quick] [--json PATH] [--plot PATH]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks import strategies_on_serve as on_serve
from benchmarks.line_chart import line_chart
from benchmarks.strategies_routers import RAY_ROUTERS
from benchmarks.strategies_simulation import ATTEMPTS, REPEATED, UNBROKEN, simulate
from benchmarks.strategies_workload import SERVED, SIMULATED, Measured, Tally, Workload
from blaze.routing.strategies import STRATEGY_NAMES

LOADS = (0.7, 0.95)
PLOTTED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
OURS = "adaptive"
TURNS = "round_robin"
TWO = "ray_two_choices"
TARGETS = {TURNS: 0.5, "ray_round_robin": 0.5, TWO: 0.8}  # adaptive's p99 TTFT, in those of the others
VARIANTS = (OURS + UNBROKEN, TWO + REPEATED)  # what breakers cost, and what it costs to answer all
CONTESTANTS = (*STRATEGY_NAMES, *RAY_ROUTERS, *VARIANTS)
ON_SERVE = (OURS, TURNS, "least_connections", *RAY_ROUTERS)


# --- Simulation --------------------------------------------------------------------------------------


def simulation(
    workload: Workload, loads: Sequence[float], *, rounds: int, seconds: float, warmup_s: float
) -> list[Measured]:
    found = []
    for load in loads:
        asked = [workload.arrivals(load, seconds, seed) for seed in range(rounds)]
        for name in CONTESTANTS:
            tallies = [Tally(warmup_s, seconds) for _ in range(rounds)]
            for seed, tally in enumerate(tallies):
                simulate(name, workload, asked[seed], tally, seed)
            found.append(Measured.of(name, load, tallies))
    return found


def plot(rows: Sequence[Measured], path: Path) -> None:
    loads = sorted({row.load for row in rows})
    series = {
        name: [row.ttft_p99_s for load in loads for row in rows if (row.name, row.load) == (name, load)]
        for name in CONTESTANTS
    }
    path.write_text(
        line_chart(
            "p99 TTFT in seconds; one of eight replicas slow, one failing (simulation)",
            "load, of the capacity",
            loads,
            series,
            dashed=dict.fromkeys(RAY_ROUTERS, 1) | dict.fromkeys(VARIANTS, 2),
        ),
        encoding="utf-8",
    )


# --- On Serve ----------------------------------------------------------------------------------------


def serve(
    workload: Workload, loads: Sequence[float], contestants: Sequence[str], *, rounds: int, seconds: float
) -> Iterator[tuple[Measured, list[on_serve.Turn]]]:
    """Each contestant on a cluster of its own, and there all of its turns."""

    def play(server: on_serve.Server, name: str, load: float) -> tuple[Measured, list[on_serve.Turn]]:
        tallies, turns = [Tally(seconds / 4, seconds) for _ in range(rounds)], []
        for seed, tally in enumerate(tallies):
            asked = workload.arrivals(load, seconds, seed)
            attempts = ATTEMPTS if name.endswith(REPEATED) else 1
            turns.append(asyncio.run(server.play(asked, tally, attempts=attempts)))
        return Measured.of(name, load, tallies), turns

    ours = [name for name in contestants if name in STRATEGY_NAMES]
    if ours:
        with on_serve.blaze(workload) as (server, change):
            for load in loads:
                for name in ours:
                    change(name)
                    yield play(server, name, load)
    for router in RAY_ROUTERS:
        theirs = [name for name in contestants if name.removesuffix(REPEATED) == router]
        if theirs:
            with on_serve.ray(router, workload) as server:
                for load in loads:
                    for name in theirs:
                        yield play(server, name, load)


# --- All of it ---------------------------------------------------------------------------------------


def report(rows: Sequence[Measured], turns: Sequence[list[on_serve.Turn]] = ()) -> None:
    print(
        f"{'load':>5}  {'':26}{'requests':>9}{'p50 s':>8}{'p99 s':>8}{'failed':>8}{'done/s':>8}"
        f"{'on slow':>9}{'failing':>9}"
        + "   p99 of the rounds"
        + ("; cores of client, server, others; late by" if turns else "")
    )
    for number, row in enumerate(rows):
        if row.load not in LOADS:
            continue
        last = "   " + ", ".join(f"{value:.2f}" for value in row.rounds_p99_s)
        for turn in turns[number] if turns else ():
            cores = (turn.client_cores, turn.server_cores, turn.others_cores)
            last += f"; {' '.join(f'{value:.2f}' for value in cores)}; {1000 * turn.client_late_s:.0f} ms"
        print(
            f"{row.load:>5.0%}  {row.name:26}{row.requests:>9}{row.ttft_p50_s:>8.3f}{row.ttft_p99_s:>8.2f}"
            f"{row.failures:>8}{row.finished_per_s:>8.2f}{row.slow_share:>9.1%}{row.failing_share:>9.1%}{last}"
        )
    for load in sorted({row.load for row in rows} & {*LOADS}):
        of = {row.name: row for row in rows if row.load == load}
        for rival, most in TARGETS.items():
            if not {OURS, rival} <= of.keys():
                continue
            ratio = of[OURS].ttft_p99_s / of[rival].ttft_p99_s
            met = ratio <= most and of[OURS].failures <= of[rival].failures
            print(
                f"{load:.0%}: {OURS} / {rival}: p99 TTFT {ratio:.2f}, at most {most}; "
                f"failures {of[OURS].failures} and {of[rival].failures}: {'met' if met else 'MISSED'}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("simulation", "serve"))
    parser.add_argument(
        "--rounds", type=int, default=6, help="of the simulation, each with a seed of its own"
    )
    parser.add_argument("--turns", type=int, default=1, help="the same on Serve")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, choices=LOADS)
    parser.add_argument(
        "--contestants", nargs="+", default=ON_SERVE, help=f"on Serve, also Ray's with '{REPEATED}'"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, for each turn on Serve")
    parser.add_argument(
        "--unknown", action="store_true", help="requests do not say how long their answers will be"
    )
    parser.add_argument("--quick", action="store_true", help="does it run? a few seconds of each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="simulate more loads, and draw p99 TTFT over them: an SVG")
    options = parser.parse_args()
    whole: dict[str, Any] = {"machine": machine.describe(), "versions": machine.versions()}
    print(whole["machine"])
    if options.only != "serve":
        rounds, seconds, warmup_s = (1, 60.0, 20.0) if options.quick else (options.rounds, 1200.0, 120.0)
        simulated = sorted({*options.loads, *(PLOTTED if options.plot else ())})
        workload = replace(SIMULATED, known=not options.unknown)
        print(f"simulation: {rounds} rounds of {seconds:.0f} s, {workload}, {workload.capacity_per_s:.2f}/s")
        rows = simulation(workload, simulated, rounds=rounds, seconds=seconds, warmup_s=warmup_s)
        report(rows)
        whole["simulation"] = [row.row() for row in rows]
        if options.plot:
            plot(rows, options.plot)
    if options.only != "simulation":
        workload = replace(SERVED, known=not options.unknown)
        loads, contestants = options.loads, options.contestants
        if options.quick:
            loads, contestants = LOADS[:1], (OURS, TURNS, "least_connections", TWO)
            workload = replace(workload, inter_token_ms=25.0)
        seconds = 4.0 if options.quick else options.seconds
        print(f"Serve: {seconds:.0f} s a turn, {workload}, {workload.capacity_per_s:.2f}/s")
        played = []
        for row, of_row in serve(workload, loads, contestants, rounds=options.turns, seconds=seconds):
            played.append((row, of_row))
            print(f"{row.load:.0%} {row.name}: p99 {row.ttft_p99_s:.2f}, failed {row.failures}", flush=True)
        served, turns = [row for row, _ in played], [of_row for _, of_row in played]
        report(served, turns)
        whole["serve"] = [row.row() | {"turns": [vars(turn) for turn in of_row]} for row, of_row in played]
    if options.json:
        options.json.write_text(json.dumps(whole, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
