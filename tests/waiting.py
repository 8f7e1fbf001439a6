"""Waiting on conditions: tests never sleep for a fixed time and hope."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from blaze.engines.base import HealthCheckable

Value = TypeVar("Value")


def eventually(probe: Callable[[], Value | None], *, within_s: float = 30.0, every_s: float = 0.05) -> Value:
    """The first truthy value of ``probe``. Fails with its last value when there is none in time."""
    give_up = time.monotonic() + within_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > give_up:
            raise AssertionError(f"still {value!r} after {within_s} s")
        time.sleep(every_s)


async def until(condition: Callable[[], object], *, within_s: float = 30.0) -> None:
    """Let everything else run until the condition holds. Fails when it does not in time."""
    give_up = time.monotonic() + within_s
    turns = 0
    while not condition():
        if time.monotonic() > give_up:
            raise AssertionError(f"did not come true within {within_s} s")
        turns += 1
        # Tasks of the loop need a turn only; threads, after a while, need the processor.
        await asyncio.sleep(0 if turns < 1000 else 0.001)


async def until_status(engine: HealthCheckable, **expected: object) -> None:
    """Until the engine's own account of itself has these values."""
    give_up = time.monotonic() + 30.0
    while True:
        status = await engine.get_health_status()
        if all(getattr(status, name) == value for name, value in expected.items()):
            return
        if time.monotonic() > give_up:
            raise AssertionError(f"still {status}, not {expected}")
        await asyncio.sleep(0.001)
