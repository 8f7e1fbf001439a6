"""What an engine counts so that others can tell work from a stall."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from blaze.clock import Clock
from blaze.reports import EngineStatus
from blaze.types import EngineKind


class ThreadTimer:
    """The processor time of one thread, readable from others. Made on that thread: its identifier must not be
    used once it has ended, while the clock behind it only stops being there."""

    def __init__(self) -> None:
        self._clock_id: int | None = None
        if sys.platform == "linux":
            self._clock_id = time.pthread_getcpuclockid(threading.get_ident())

    def cpu_s(self) -> float | None:
        """None where threads have no clocks, and after the thread's end."""
        if self._clock_id is None:
            return None
        try:
            return time.clock_gettime(self._clock_id)
        except OSError:
            return None


class StepCounter:
    """Written by the compute thread, read by the event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._accepted = 0  # queued or running
        self._running = 0
        self._steps = 0
        self._last_step_at: float | None = None
        self._timers: list[ThreadTimer] = []

    def time_this_thread(self) -> None:
        """Called by the compute thread, and by those that do a part of its work: that they compute is a sign
        of progress where a step takes long."""
        with self._lock:
            self._timers.append(ThreadTimer())

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

    def status(self, kind: EngineKind, *, loaded: bool, failed: str | None, unread: int = 0) -> EngineStatus:
        """``unread``: of those queued, answers that are complete and only wait for their readers."""
        with self._lock:
            last = self._last_step_at
            pending = self._accepted - unread
            running = min(self._running, pending)
            return EngineStatus(
                kind=kind,
                state="failed" if failed else "loading" if not loaded else "busy" if running else "idle",
                running=running,
                queued=pending - running,
                steps_done=self._steps,
                last_step_age_s=None if last is None else self._clock.now() - last,
                detail=failed,
                compute_cpu_s=self._cpu_s(),
            )

    def _cpu_s(self) -> float | None:
        times = [time_s for timer in self._timers if (time_s := timer.cpu_s()) is not None]
        return sum(times) if times else None
