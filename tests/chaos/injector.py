"""Carries planned faults out, undoes them, and keeps account of who is in trouble."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from blaze.engines.faults import Faults
from tests.chaos.effects import STRATEGIES, Effects
from tests.chaos.models import Model
from tests.chaos.schedule import NEED_A_SIMULATOR, NEED_NO_REPLICA, Kind, PlannedFault, SeenReplica, victim

Value = TypeVar("Value")

SLOWDOWN = 20.0
_FAILURES = (
    Faults(fail_rate=1.0),
    Faults(fail_rate=0.3, break_rate=0.3),
    Faults(raise_rate=0.5),
    Faults(garbage_rate=0.5),
    Faults(fail_running=True),
)


class Injector:
    def __init__(
        self, effects: Effects, models: Sequence[Model], *, restart_s: float, say: Callable[[str], None]
    ) -> None:
        """``restart_s``: how long a frozen or wedged replica is left to the health actor."""
        self._effects = effects
        self._models = {model.name: model for model in models}
        self._restart_s = restart_s
        self._say = say
        self._troubled: set[str] = set()
        self._undoing: list[asyncio.Task[None]] = []
        self.done: Counter[Kind] = Counter()
        self.skipped = 0
        self.not_replaced = 0  # frozen or wedged, and the health actor has left them so
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
        await asyncio.gather(*self._undoing)

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
        for name in (fault.model, *(name for name in self._models if name != fault.model)):
            fits = self._models[name].is_simulator or fault.kind not in NEED_A_SIMULATOR
            found = victim(seen, name, self._troubled, fault.draw) if fits else None
            if found is not None:
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
        pids = await _away(effects.router_pids)
        if len(pids) < 2:
            return None
        pid = pids[int(fault.draw * len(pids))]
        self.router_kills.append(time.monotonic())
        await _away(lambda: effects.kill(pid))
        return f"Router of pid {pid}"

    async def _hit(self, fault: PlannedFault, found: SeenReplica) -> None:
        effects, kind = self._effects, fault.kind
        if kind in (Kind.KILL, Kind.STOP):
            pid = await _away(lambda: effects.pid(found.id))
            if kind is Kind.KILL:
                effects.kill(pid)
            else:
                effects.freeze(pid)
                self._undo_later(self._restart_s, found, lambda: _away(lambda: self._end_frozen(pid)))
        elif kind is Kind.DRAIN:
            await _away(lambda: effects.drain(found.id, True))
            undrain = partial(effects.drain, found.id, False)
            self._undo_later(fault.lasts_s, found, lambda: _away(undrain))
        else:
            await effects.set_faults(found.model, found.id, self._faults(fault))
            lasts_s = self._restart_s if kind is Kind.HANG else fault.lasts_s
            self._undo_later(lasts_s, found, lambda: self._heal(kind, found))

    def _faults(self, fault: PlannedFault) -> Faults:
        if fault.kind is Kind.SLOW:
            return Faults(slowdown=SLOWDOWN)
        if fault.kind is Kind.HANG:
            return Faults(wedged=True)
        if fault.kind is Kind.BLOCK:
            return Faults(block_s=fault.lasts_s)
        return random.Random(fault.draw).choice(_FAILURES)

    def _end_frozen(self, pid: int) -> None:
        if self._effects.end_frozen(pid):
            self.not_replaced += 1
            self._say(f"pid {pid} was still frozen after {self._restart_s:.0f} s: killed")

    async def _heal(self, kind: Kind, found: SeenReplica) -> None:
        if any(replica.id == found.id for replica in await _away(self._effects.seen)):
            await self._effects.set_faults(found.model, found.id, Faults())
            if kind is Kind.HANG:
                self.not_replaced += 1
                self._say(f"{found.id} still hung after {self._restart_s:.0f} s: freed")

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
