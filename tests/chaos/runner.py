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
    stall_after_s: float = 5.0  # of the cluster
    # After that a frozen or wedged replica has 5 s to be replaced, and as much again where two cores are
    # shared by all replicas, the load, and those that start.
    replaced_within_s: float = 10.0
    least_share: float = 0.1  # right answers a second and client, without which it was no load
    settle_s: float = 90.0  # until all is well again


@dataclass(frozen=True)
class Result:
    """``unsettled``: what was not as it should be at the end of the time for that; leaked slots are there.
    ``right``: answers under load, of which there must be ``least_right``."""

    seed: int
    score: Score
    faults: dict[str, int]
    skipped: int
    not_replaced: int
    longest_restart_s: float  # beyond stall_after_s
    right: int
    least_right: float
    resumed: int | None  # None: not known, for Routers were replaced
    settled_s: float
    unsettled: tuple[str, ...]

    @property
    def leaked(self) -> tuple[str, ...]:
        return tuple(what for what in self.unsettled if "leaked" in what)

    @property
    def shortfalls(self) -> tuple[str, ...]:
        """Why the run shows nothing, whatever came out."""
        done, found = sum(self.faults.values()), []
        if self.right < max(1.0, self.least_right):
            found.append(f"{self.right} right answers, of at least {self.least_right:.0f}")
        if done <= self.skipped:
            found.append(f"{done} faults, and {self.skipped} skipped")
        return tuple(found)

    @property
    def is_good(self) -> bool:
        bad = self.score.lost or self.score.wrong or self.unsettled or self.not_replaced or self.shortfalls
        return not bad


async def run(
    app: Served,
    effects: Effects,
    models: Sequence[Model],
    seed: int,
    plan: Plan,
    say: Callable[[str], None],
) -> Result:
    began_at = time.monotonic()

    def at(text: str) -> None:
        say(f"  {time.monotonic() - began_at:5.1f} s  {text}")

    injector = Injector(
        effects, models, stall_after_s=plan.stall_after_s, replaced_within_s=plan.replaced_within_s, say=at
    )
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
            injector.clean_up()
        ended_at = time.monotonic()
        settled = await settle(effects, models, client, app.url, within_s=plan.settle_s)
    replaced = injector.router_kills or injector.done[Kind.REDEPLOY]
    return Result(
        seed=seed,
        score=score([*load.records, *settled.records], began_at=began_at, router_kills=injector.router_kills),
        faults={kind.value: count for kind, count in injector.done.items()},
        skipped=injector.skipped,
        not_replaced=injector.not_replaced,
        longest_restart_s=injector.longest_restart_s,
        right=sum(record.is_right for record in load.records),
        least_right=plan.least_share * plan.seconds * sum(model.clients for model in models),
        resumed=None if replaced else resumed(app) - resumed_before,
        settled_s=time.monotonic() - ended_at,
        unsettled=settled.unwell,
    )


def resumed(app: Served) -> int:
    return sum(model["resumed"] for model in app.status()["models"])
