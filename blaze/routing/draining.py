"""Drains, carried out: what runs on a draining replica goes on elsewhere when its time is up."""

from __future__ import annotations

import asyncio
import math

from blaze.clock import Clock
from blaze.control import Control, Drain
from blaze.errors import Draining
from blaze.routing.attempt import Attempt
from blaze.routing.orders import DrainTimes
from blaze.routing.picker import Picker
from blaze.routing.replicas import ReplicaTable
from blaze.routing.running import Running
from blaze.routing.settings import DispatchSettings

_BACK_IN_S = 5.0  # a guess: how long maintenance takes is not known here


def draining_error() -> Draining:
    return Draining("The cluster is draining: nothing new is begun now.", retry_after_s=_BACK_IN_S)


class Drainage:
    """Moves nobody before there is a place for it elsewhere. Lives on one event loop."""

    def __init__(
        self,
        table: ReplicaTable,
        running: Running,
        picker: Picker,
        *,
        clock: Clock,
        settings: DispatchSettings,
    ) -> None:
        self._table = table
        self._running = running
        self._picker = picker
        self._clock = clock
        self._settings = settings
        self._times = DrainTimes(clock, settings.drain_timeout_s)
        self._of_all: Drain | None = None
        self._all_end_at: float | None = None
        self._look_at = -math.inf  # nothing is to be done before
        self._timer: asyncio.TimerHandle | None = None
        # Before the waiting room: what has to leave a replica comes before what has not begun yet.
        table.on_capacity.insert(0, self.look)

    @property
    def refuses(self) -> bool:
        """Nothing new is begun."""
        return self._of_all is not None

    def follow(self, control: Control) -> None:
        if self._of_all is not None and control.draining_all is None:
            self._picker.reopen()
        self._of_all = control.draining_all
        self._all_end_at = self._times.end_of_all(control.draining_all)
        self.expect_changes()
        self._table.follow(self._times.follow(control))

    def expect_changes(self) -> None:
        """Of what drains: the table is about to tell."""
        self._look_at = -math.inf

    def look(self) -> None:
        """At all that drains: has its time come, is there room elsewhere? Called when a place comes free."""
        now, next_at = self._clock.now(), math.inf
        if now < self._look_at:
            return
        for until, attempts in self._running.draining():
            next_at = min(next_at, until)
            if until > now:
                continue
            for attempt in attempts:
                self._move(attempt)
        if self._all_end_at is not None:
            next_at = min(next_at, self._all_end_at)
            if self._all_end_at <= now:
                self._end_all()
        self._look_at = next_at
        self._look_again(next_at - now)

    def _move(self, attempt: Attempt) -> None:
        route = attempt.route
        if attempt.may_move and not route.is_poison and route.lost < self._settings.max_lost:
            lease = self._picker.lease_elsewhere(route)
            if lease is not None:
                attempt.move_to(lease)

    def _end_all(self) -> None:
        self._all_end_at = None
        error = draining_error()
        self._picker.refuse(error, for_good=True)
        self._running.end(error)

    def _look_again(self, in_s: float) -> None:
        """When the next time is up; then, as long as there is no room, again and again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if math.isfinite(in_s):
            # Not only at the time itself: places come free by time alone, and the clock is not the loop's.
            pause = min(self._settings.recheck_s, in_s) if in_s > 0 else self._settings.recheck_s
            self._timer = asyncio.get_running_loop().call_later(pause, self._look_now)

    def _look_now(self) -> None:
        self.expect_changes()
        self.look()
