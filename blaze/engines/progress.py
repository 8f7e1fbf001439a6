"""What an engine counts so that others can tell work from a stall."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from blaze.clock import Clock
from blaze.reports import EngineStatus
from blaze.types import EngineKind


class StepCounter:
    """Written by the compute thread, read by the event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._accepted = 0  # queued or running
        self._running = 0
        self._steps = 0
        self._last_step_at: float | None = None

    @contextmanager
    def queued(self) -> Iterator[None]:
        """The span from admission to the end of the answer."""
        with self._lock:
            self._accepted += 1
        try:
            yield
        finally:
            with self._lock:
                self._accepted -= 1

    @contextmanager
    def running(self, requests: int) -> Iterator[None]:
        """The span in which the compute thread works on this many requests."""
        with self._lock:
            self._running += requests
        try:
            yield
        finally:
            with self._lock:
                self._running -= requests

    def set_running(self, requests: int) -> None:
        """For an engine whose requests come and go between steps."""
        with self._lock:
            self._running = requests

    def step(self) -> None:
        with self._lock:
            self._steps += 1
            self._last_step_at = self._clock.now()

    def status(self, kind: EngineKind, *, loaded: bool, failed: str | None) -> EngineStatus:
        with self._lock:
            last = self._last_step_at
            running = min(self._running, self._accepted)
            return EngineStatus(
                kind=kind,
                state="failed" if failed else "loading" if not loaded else "busy" if running else "idle",
                running=running,
                queued=self._accepted - running,
                steps_done=self._steps,
                last_step_age_s=None if last is None else self._clock.now() - last,
                detail=failed,
            )
