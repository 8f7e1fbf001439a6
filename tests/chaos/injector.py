"""Carries planned faults out, undoes those that pass, and keeps account of who is in trouble.

Frozen and wedged replicas are left to the health actor. That it does not replace them is a fault of Blaze.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import psutil

from blaze.engines.faults import Faults
from tests.chaos.effects import STRATEGIES, Effects, has_ended
from tests.chaos.models import Model
from tests.chaos.replacement import Replacement
from tests.chaos.schedule import (
    ENDED_BY_HEALTH_ACTOR,
    NEED_A_SIMULATOR,
    NEED_NO_REPLICA,
    Kind,
    PlannedFault,
    SeenReplica,
    victim,
)

Value = TypeVar("Value")

SLOWDOWN = 20.0
_LOOK_EVERY_S = 0.5
_FAILURES = (
    Faults(fail_rate=1.0),
    Faults(fail_rate=0.3, break_rate=0.3),
    Faults(raise_rate=0.5),
    Faults(garbage_rate=0.5),
    Faults(fail_running=True),
)


class Injector:
    def __init__(
        self,
        effects: Effects,
        models: Sequence[Model],
        *,
        stall_after_s: float,
        replaced_within_s: float,
        say: Callable[[str], None],
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        """``stall_after_s``: of the cluster. ``replaced_within_s``: how long after it a frozen or wedged
        replica must have been replaced."""
        self._effects = effects
        self._models = {model.name: model for model in models}
        self._stall_after_s = stall_after_s
        self._replaced_within_s = replaced_within_s
        self._look_every_s = look_every_s
        self._say = say
        self._troubled: set[str] = set()
        self._undoing: list[asyncio.Task[None]] = []
        self._left_alone: list[psutil.Process] = []  # frozen and wedged ones: they are the health actor's
        self._load_has_ended = False
        self.done: Counter[Kind] = Counter()
        self.skipped = 0
        self.not_replaced = 0  # frozen or wedged, and the health actor has left them so for too long
        self.longest_restart_s = 0.0  # beyond stall_after_s
        self.router_kills: list[float] = []  # times of the monotonic clock

    async def inject(self, fault: PlannedFault) -> None:
        """Never raises: what cannot be done now is skipped."""
        try:
            hit = await self._carry_out(fault)
        except Exception as error:  # the cluster is in trouble, and may not answer its operator either
            hit = None
            self._say(f"{fault.kind} of {fault.model}: {type(error).__name__}: {str(error)[:200]}")
        if hit is None:
            self.skipped += 1
            self._say(f"{fault.kind} of {fault.model}: skipped")
        else:
            self.done[fault.kind] += 1
            self._say(f"{fault.kind}: {hit}")

    async def undo_all(self) -> None:
        """After the load, until everybody is well again or has been waited for long enough."""
        self._load_has_ended = True
        await asyncio.gather(*self._undoing)

    def clean_up(self) -> None:
        """A frozen process would outlive the cluster."""
        for process in self._left_alone:
            if not has_ended(process):
                self._say(f"pid {process.pid} is killed at the end")
                with suppress(psutil.NoSuchProcess):  # it has ended after all
                    process.kill()

    async def _carry_out(self, fault: PlannedFault) -> str | None:
        """Who was hit; None: nobody may be."""
        if fault.kind in NEED_NO_REPLICA:
            return await self._hit_no_replica(fault)
        found = await self._victim(fault)
        if found is None:
            return None
        self._troubled.add(found.id)
        try:
            await self._hit(fault, found)
        except Exception:
            self._troubled.discard(found.id)
            raise
        return found.id

    async def _victim(self, fault: PlannedFault) -> SeenReplica | None:
        """Of the planned model, or of another one if that has none to spare."""
        seen = await _away(self._effects.seen)
        # Where it has restarted somebody lately, the health actor waits before it does so again. That it
        # replaces somebody in time can be asked of it only where that pause is over by then.
        pause_s = self._stall_after_s if fault.kind in ENDED_BY_HEALTH_ACTOR else math.inf
        for name in (fault.model, *(name for name in self._models if name != fault.model)):
            fits = self._models[name].is_simulator or fault.kind not in NEED_A_SIMULATOR
            found = victim(seen, name, self._troubled, fault.draw, longest_pause_s=pause_s)
            if fits and found is not None:
                return found
        return None

    async def _hit_no_replica(self, fault: PlannedFault) -> str | None:
        effects = self._effects
        if fault.kind is Kind.STRATEGY:
            strategy = STRATEGIES[int(fault.draw * len(STRATEGIES))]
            await _away(lambda: effects.set_strategy(fault.model, strategy))
            return f"{fault.model}: {strategy}"
        if not await _away(effects.is_deployed):
            return None
        if fault.kind is Kind.REDEPLOY:
            await _away(effects.redeploy)
            return "all"
        routers = await _away(effects.routers)
        if len(routers) < 2:
            return None
        router = routers[int(fault.draw * len(routers))]
        self.router_kills.append(time.monotonic())
        router.kill()
        return f"Router of pid {router.pid}"

    async def _hit(self, fault: PlannedFault, found: SeenReplica) -> None:
        effects, kind = self._effects, fault.kind
        if kind is Kind.KILL:
            (await _away(lambda: effects.process(found.id))).kill()
        elif kind in ENDED_BY_HEALTH_ACTOR:
            await self._make_unhealthy(fault, found)
        elif kind is Kind.DRAIN:
            await _away(lambda: effects.drain(found.id, True))
            undrain = partial(effects.drain, found.id, False)
            self._undo_later(fault.lasts_s, found, lambda: _away(undrain))
        else:
            await effects.set_faults(found.model, found.id, self._faults(fault))
            self._undo_later(fault.lasts_s, found, lambda: self._heal(found))

    async def _make_unhealthy(self, fault: PlannedFault, found: SeenReplica) -> None:
        """Nobody but the health actor ends it, until :meth:`clean_up`."""
        effects, wedged = self._effects, fault.kind is Kind.HANG
        process = await _away(lambda: effects.process(found.id))
        known = {replica.id for replica in await _away(effects.seen)}
        self._left_alone.append(process)
        if wedged:
            await effects.set_faults(found.model, found.id, self._faults(fault))
        else:
            process.suspend()
        replacement = Replacement(
            found,
            known,
            time.monotonic(),
            only_with_work=wedged,
            stall_after_s=self._stall_after_s,
            within_s=self._replaced_within_s,
        )
        self._undoing.append(asyncio.create_task(self._watch(replacement, process)))

    async def _watch(self, replacement: Replacement, process: psutil.Process) -> None:
        while True:
            await asyncio.sleep(self._look_every_s)
            try:
                seen = await _away(self._effects.seen)
            except Exception:  # the cluster is in trouble, and the time goes on
                seen = []
            replacement.look(time.monotonic(), seen, has_ended=has_ended(process))
            out_of_work = self._load_has_ended and replacement.is_idle
            if replacement.is_there or replacement.is_overdue or out_of_work:
                break
        self._say(f"{replacement.victim.id}: {replacement.told}")
        if replacement.is_there:
            self._troubled.discard(replacement.victim.id)
            self.longest_restart_s = max(self.longest_restart_s, replacement.replaced_s or 0.0)
        if replacement.is_overdue:
            self.not_replaced += 1
            await self._tell_about(replacement.victim.model)

    async def _tell_about(self, model: str) -> None:
        try:
            for event in await _away(lambda: self._effects.told_of(model)):
                self._say(f"  {event}")
        except Exception as error:
            self._say(f"  nothing is told of it: {type(error).__name__}")

    def _faults(self, fault: PlannedFault) -> Faults:
        if fault.kind is Kind.SLOW:
            return Faults(slowdown=SLOWDOWN)
        if fault.kind is Kind.HANG:
            return Faults(wedged=True)
        if fault.kind is Kind.BLOCK:
            return Faults(block_s=fault.lasts_s)
        return random.Random(fault.draw).choice(_FAILURES)

    async def _heal(self, found: SeenReplica) -> None:
        if any(replica.id == found.id for replica in await _away(self._effects.seen)):
            await self._effects.set_faults(found.model, found.id, Faults())

    def _undo_later(self, after_s: float, found: SeenReplica, undo: Callable[[], Awaitable[None]]) -> None:
        async def later() -> None:
            await asyncio.sleep(after_s)
            try:
                await undo()
            except Exception as error:  # it is gone by now
                self._say(f"undoing for {found.id}: {type(error).__name__}: {str(error)[:100]}")
            self._troubled.discard(found.id)

        self._undoing.append(asyncio.create_task(later()))


async def _away(work: Callable[[], Value]) -> Value:
    """On a thread: the clients go on reading."""
    return await asyncio.to_thread(work)
