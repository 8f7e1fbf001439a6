"""`python -m tests.chaos --seeds 1-10 --seconds 60 --period 5`: a table, and exit code 1 if anything was
lost, wrong or leaked, if somebody was not replaced, or if too little happened to show anything."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.chaos.effects import Effects
from tests.chaos.models import Model, SimulatedModel, SmolLM2
from tests.chaos.runner import Plan, Result, run
from tests.chaos.schedule import DEFAULT_KINDS, Kind
from tests.chaos.score import Problem
from tests.cluster.served import Served, served
from tests.streams import new_client

_STALL_AFTER_S = 5.0
_SHOWN = 10  # problems of a run


def main() -> int:
    options = parse()
    models = chosen_models(options.models, replicas=options.replicas, clients=options.clients)
    plan = Plan(
        seconds=options.seconds,
        period_s=options.period,
        kinds=options.kinds,
        stall_after_s=options.stall_after,
        settle_s=options.settle,
    )
    health = {"probe_period_s": 0.5, "stall_after_s": options.stall_after}
    with served([model.config for model in models], replicas=options.routers, health=health) as app:
        results = asyncio.run(run_all(app, models, options.seeds, plan))
    say("\n" + "\n".join([HEAD, RULE, *map(row, results)]))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1, default=str))
    return 0 if all(result.is_good for result in results) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=seeds, default=seeds("1-10"), help="such as 1-10 or 3,7")
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults, per seed")
    parser.add_argument("--period", type=float, default=5.0, help="seconds between faults")
    parser.add_argument("--kinds", type=kinds, default=DEFAULT_KINDS, help=f"of {', '.join(Kind)}")
    parser.add_argument("--models", default="sim,other", help="names of simulators, or smollm2")
    parser.add_argument("--replicas", type=int, default=3, help="of each simulator")
    parser.add_argument("--clients", type=int, default=8, help="of each simulator")
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--stall-after", type=float, default=_STALL_AFTER_S, help="health.stall_after_s")
    parser.add_argument("--settle", type=float, default=90.0, help="seconds until all must be well again")
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def seeds(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def kinds(text: str) -> tuple[Kind, ...]:
    return tuple(Kind(name) for name in text.split(","))


def chosen_models(names: str, *, replicas: int, clients: int) -> list[Model]:
    return [
        SmolLM2() if name == SmolLM2.name else SimulatedModel(name, replicas=replicas, clients=clients)
        for name in names.split(",")
    ]


async def run_all(app: Served, models: Sequence[Model], seeds: Sequence[int], plan: Plan) -> list[Result]:
    async with new_client() as client:
        for model in models:
            await model.prepare(client, app.url)
    results, effects = [], Effects(app)
    for seed in seeds:
        say(f"seed {seed}")
        results.append(await run(app, effects, models, seed, plan, say))
        say(row(results[-1]))
        tell_problems(results[-1])
    return results


HEAD = (
    "| seed | faults (skipped) | sent | lost | wrong | leaked | resumed | broke with their Router |"
    " left by the client | longest gap, s | longest wait, s | not replaced |"
    " longest restart, s past stall_after_s | well again after, s |"
)
RULE = "|" + "---|" * HEAD.replace("| seed", "seed").count("|")


def row(result: Result) -> str:
    score = result.score
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(result.faults.items()))
    settled = f"{result.settled_s:.0f}" if not result.unsettled else "NOT: " + "; ".join(result.unsettled)
    cells = (
        result.seed,
        f"{faults} ({result.skipped})",
        score.sent,
        len(score.lost),
        len(score.wrong),
        len(result.leaked),
        "?" if result.resumed is None else result.resumed,
        score.apart,
        score.left,
        f"{score.longest_gap_s:.2f}",
        f"{score.longest_wait_s:.2f}",
        result.not_replaced,
        f"{result.longest_restart_s:.1f}",
        settled,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def tell_problems(result: Result) -> None:
    for shortfall in result.shortfalls:
        say(f"  shows nothing: {shortfall}")
    for kind, problems in (("lost", result.score.lost), ("wrong", result.score.wrong)):
        for problem in problems[:_SHOWN]:
            say(f"  {kind}: {told(problem)}")


def told(problem: Problem) -> str:
    body = {
        k: v for k, v in problem.asked.body.items() if k in ("model", "seed", "max_tokens", "stream", "n")
    }
    when = f"{problem.began_s:.2f} to {problem.ended_s:.2f} s"
    return f"{when}, first on {problem.replica}, {problem.asked.path} {body}: {problem.what}"


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
