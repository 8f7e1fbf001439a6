"""How a simulated replica misbehaves, changed while it runs: for tests and drills."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

from blaze.checks import check, is_number
from blaze.errors import EngineFailure

LONGEST_BLOCK_S = 3600.0
_BLOCKS_AFTER_S = 0.05  # time for the answer to whoever has asked for it


@dataclass(frozen=True)
class Faults:
    """Rates are shares of requests, each drawn by itself. Raises :class:`InvalidRequest` naming the field."""

    slowdown: float = 1.0  # factor on all waits, beside the configured one
    fail_rate: float = 0.0  # an error before the first token
    break_rate: float = 0.0  # an error somewhere in the middle
    raise_rate: float = 0.0  # an exception that is nobody's
    garbage_rate: float = 0.0  # something that is no event
    wedged: bool = False  # takes requests, and makes no step
    fail_running: bool = False  # once: all that runs fails together, as in a failed step
    block_s: float = 0.0  # once: the event loop stands still for so long

    def __post_init__(self) -> None:
        good = is_number(self.slowdown) and 0 < self.slowdown <= 1_000_000
        check(good, "slowdown", "must be above 0")
        for name in ("fail_rate", "break_rate", "raise_rate", "garbage_rate"):
            rate = getattr(self, name)
            check(is_number(rate) and 0 <= rate <= 1, name, "must be 0 to 1")
        for name in ("wedged", "fail_running"):
            check(isinstance(getattr(self, name), bool), name, "must be true or false")
        good = is_number(self.block_s) and 0 <= self.block_s <= LONGEST_BLOCK_S
        check(good, "block_s", f"must be 0 to {LONGEST_BLOCK_S:,.0f} seconds")


@dataclass(frozen=True)
class Fate:
    """What becomes of one request."""

    fails: bool = False
    raises: bool = False
    garbage: bool = False
    breaks_after: float | None = None  # share of the tokens that it makes
    failures_before: int = 0  # of all that ran

    def breaks_at(self, begin: int, end: int) -> int | None:
        """The position, of ``begin`` to ``end``, at which it breaks."""
        return None if self.breaks_after is None else begin + int(self.breaks_after * (end - begin))


class FaultSwitch:
    """The faults of one replica as they are now. Its draws are its own: they change no answer."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._faults = Faults()
        self._moving = asyncio.Event()
        self._moving.set()
        self._failures = 0  # of all that ran

    @property
    def slowdown(self) -> float:
        return self._faults.slowdown

    def set(self, faults: Faults) -> None:
        self._faults = faults
        self._failures += faults.fail_running
        if faults.wedged:
            self._moving.clear()
        else:
            self._moving.set()
        if faults.block_s > 0:
            asyncio.get_running_loop().call_later(_BLOCKS_AFTER_S, time.sleep, faults.block_s)

    def draw(self) -> Fate:
        """All is drawn whatever the rates are, so that one rate does not change what another one hits."""
        faults, draws = self._faults, [self._rng.random() for _ in range(5)]
        return Fate(
            fails=draws[0] < faults.fail_rate,
            raises=draws[1] < faults.raise_rate,
            garbage=draws[2] < faults.garbage_rate,
            breaks_after=draws[4] if draws[3] < faults.break_rate else None,
            failures_before=self._failures,
        )

    async def while_wedged(self, deadline: float | None) -> None:
        """Raises :class:`TimeoutError` at the deadline."""
        if not self._moving.is_set():
            async with asyncio.timeout_at(deadline):
                await self._moving.wait()

    def check_running(self, fate: Fate) -> None:
        """Raises :class:`EngineFailure` if all that ran has failed since."""
        if fate.failures_before != self._failures:
            raise EngineFailure("The simulator was told to fail all that ran.")

    def release(self) -> None:
        """The engine stops: nobody is held any more."""
        self._moving.set()


def misbehave(fate: Fate) -> tuple[Any, ...]:
    """What is given in place of events, if anything; raises what the request is to fail with."""
    if fate.fails:
        raise EngineFailure("The simulator was told to fail this request.")
    if fate.raises:
        raise RuntimeError("the simulator was told to raise")
    return ("garbage",) if fate.garbage else ()
