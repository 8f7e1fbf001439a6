"""One seeded run: faults under load, then peace, in which everything has to become as it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.chaos.effects import Effects
from tests.chaos.injector import Injector
from tests.chaos.load import Load
from tests.chaos.models import Model
from tests.chaos.peace import settle
from tests.chaos.schedule import DEFAULT_KINDS, Kind, schedule
from tests.chaos.score import Score, score
from tests.cluster.served import Served
from tests.streams import new_client


@dataclass(frozen=True)
class Plan:
    seconds: float = 60.0
    period_s: float = 5.0
    kinds: tuple[Kind, ...] = DEFAULT_KINDS
    restart_s: float = 15.0  # how long a frozen or wedged replica is left to the health actor
    settle_s: float = 90.0  # until all is well again


@dataclass(frozen=True)
class Result:
    """``unsettled``: what was not as it should be at the end of the time for that; leaked slots are there."""

    seed: int
    score: Score
    faults: dict[str, int]
    skipped: int
    not_replaced: int
    resumed: int | None  # None: not known, for Routers were replaced
    settled_s: float
    unsettled: tuple[str, ...]

    @property
    def leaked(self) -> tuple[str, ...]:
        return tuple(what for what in self.unsettled if "leaked" in what)

    @property
    def is_good(self) -> bool:
        return not (self.score.lost or self.score.wrong or self.unsettled)


async def run(
    app: Served, models: Sequence[Model], seed: int, plan: Plan, say: Callable[[str], None]
) -> Result:
    effects = Effects(app)
    began_at = time.monotonic()

    def at(text: str) -> None:
        say(f"  {time.monotonic() - began_at:5.1f} s  {text}")

    injector = Injector(effects, models, restart_s=plan.restart_s, say=at)
    resumed_before = resumed(app)
    planned = schedule(
        seed,
        seconds=plan.seconds,
        period_s=plan.period_s,
        kinds=plan.kinds,
        models=[model.name for model in models],
    )
    async with new_client() as client:
        try:
            async with Load(client, app.url, models, seed) as load:
                for fault in planned:
                    await asyncio.sleep(began_at + fault.at_s - time.monotonic())
                    await injector.inject(fault)
                await asyncio.sleep(began_at + plan.seconds - time.monotonic())
            await injector.undo_all()
        finally:
            effects.end_all_frozen()
        ended_at = time.monotonic()
        unsettled = await settle(effects, models, client, app.url, within_s=plan.settle_s)
    replaced = injector.router_kills or injector.done[Kind.REDEPLOY]
    return Result(
        seed=seed,
        score=score(load.records, began_at=began_at, router_kills=injector.router_kills),
        faults={kind.value: count for kind, count in injector.done.items()},
        skipped=injector.skipped,
        not_replaced=injector.not_replaced,
        resumed=None if replaced else resumed(app) - resumed_before,
        settled_s=time.monotonic() - ended_at,
        unsettled=unsettled,
    )


def resumed(app: Served) -> int:
    return sum(model["resumed"] for model in app.status()["models"])
