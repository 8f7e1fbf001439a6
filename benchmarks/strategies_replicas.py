"""What the simulation of `strategies.py` is made of: time that is not waited for, and modelled replicas.

A replica fares as one with the simulator engine does: it has slots, a queue before them in which who comes
first is served first, and failures from a generator of its own.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from benchmarks.strategies_workload import SLOTS, Arrival, Workload
from blaze.errors import EngineFailure

Ask: TypeAlias = Callable[[Arrival], Coroutine[Any, Any, float | None]]  # seconds to the first token

# --- Time --------------------------------------------------------------------------------------------


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing is waited for: when nobody can go on, it is the time of the next timer."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(_Skipping(self))

    def time(self) -> float:
        return self.now_s

    def now(self) -> float:
        """It is a :class:`blaze.clock.Clock` too."""
        return self.now_s


class _Skipping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits, and for nothing")
        self._loop.now_s += max(0.0, timeout)
        return []


# --- Replicas ----------------------------------------------------------------------------------------


class SimulatedReplica:
    def __init__(self, workload: Workload, rank: int, seed: int) -> None:
        self.rank = rank
        self.ongoing = 0
        self.slots = asyncio.Semaphore(SLOTS)
        engine = workload.engine
        slowdown = engine.slowdown.get(rank, 1.0)
        self.ttft_s = slowdown * engine.ttft_ms / 1000
        self.inter_token_s = slowdown * engine.inter_token_ms / 1000
        self._fail_rate = engine.fail_rate.get(rank, 0.0)
        self._faults = random.Random(f"{seed}/{rank}")

    def fails(self) -> bool:
        return self._faults.random() < self._fail_rate


class Work:
    """One request on one replica, in two parts."""

    def __init__(self, replica: SimulatedReplica, tokens: int) -> None:
        self._replica = replica
        self._tokens = tokens
        self._has_slot = False
        self._ended = False
        replica.ongoing += 1

    async def first_token(self) -> None:
        await self._replica.slots.acquire()
        self._has_slot = True
        if self._replica.fails():
            self.end()
            raise EngineFailure("The simulation was told to fail this request.")
        await asyncio.sleep(self._replica.ttft_s)

    async def rest(self) -> None:
        await asyncio.sleep((self._tokens - 1) * self._replica.inter_token_s)
        self.end()

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._replica.ongoing -= 1
            if self._has_slot:
                self._replica.slots.release()
