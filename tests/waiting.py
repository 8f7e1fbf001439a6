"""Waiting on conditions: tests never sleep for a fixed time and hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

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
