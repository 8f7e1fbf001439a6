"""Waiting for a replica: a bounded queue by priority, arrival and size, whose waits end with the deadline."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import TypeAlias

from blaze.clock import Clock
from blaze.errors import BlazeError, Overloaded
from blaze.routing.outcome import Outcome
from blaze.routing.replica import Lease

Attempt: TypeAlias = Callable[[], Lease | None]

_AGING_S = 10.0  # of waiting, worth as much as one level of priority: nobody starves
_LARGE = 4.0  # times the usual size, or more
_LARGE_YIELDS_S = 4.0  # of waiting, that it lets others pass who came so much later
_EWMA = 0.2
_LONGEST_HINT_S = 60.0


@dataclass(frozen=True, slots=True)
class _Ticket:
    rank: tuple[float, int]
    attempt: Attempt
    selective: bool
    granted: asyncio.Future[Lease]


class WaitingRoom:
    """Requests that nobody can take yet. Lives on one event loop.

    A place that comes free is leased to the first in line there and then, inside :meth:`pump`: nobody can
    slip in between, and no wake-up is lost.
    """

    def __init__(self, clock: Clock, *, max_queued: int) -> None:
        self._clock = clock
        self._max_queued = max_queued
        self._waiting: list[_Ticket] = []
        self._serial = count()
        self._granted_at: float | None = None
        self._gap_s: float | None = None  # EWMA between one place that came free and the next

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(
        self,
        attempt: Attempt,
        timeout_s: float,
        *,
        selective: bool = False,
        admitted: bool = False,
        came_at: float | None = None,
        priority: int = 0,
        size: float = 0.0,
        retry_after_s: Callable[[], float] | None = None,
    ) -> Lease:
        """The first lease that ``attempt`` gets once it is this caller's turn. Lower priorities come first.

        ``came_at``: when it came first, where that is not now: a second attempt keeps its place in the line.
        ``size``: in those of a usual request. Small ones overtake large ones that came up to 4 s before them:
        a mild form of shortest job first, which shortens the wait of nearly all and starves nobody.
        ``selective``: it refuses some replicas that others would take, so others may pass it by.
        ``admitted``: it has been at work before, and is not turned away because the queue has filled since.
        ``retry_after_s`` says when to come back, for whoever gets nothing.

        Raises :class:`Overloaded` at once when the queue is full, and when ``timeout_s`` has passed.
        """
        hint = retry_after_s or self.expected_wait_s
        if len(self._waiting) >= self._max_queued and not admitted:
            raise Overloaded(
                "All replicas are busy and the waiting queue is full.", retry_after_s=_whole(hint())
            )
        yields_s = _LARGE_YIELDS_S * min(1.0, size / _LARGE)
        came_at = self._clock.now() if came_at is None else came_at
        rank = (came_at + priority * _AGING_S + yields_s, next(self._serial))
        ticket = _Ticket(rank, attempt, selective, asyncio.get_running_loop().create_future())
        insort(self._waiting, ticket, key=_by_rank)
        self.pump()
        try:
            async with asyncio.timeout(timeout_s):
                return await ticket.granted
        except TimeoutError:
            if _is_granted(ticket):
                return ticket.granted.result()
            raise Overloaded(
                "No replica became free before the deadline.", retry_after_s=_whole(hint())
            ) from None
        except asyncio.CancelledError:
            if _is_granted(ticket):  # the caller left in the moment that its turn came
                ticket.granted.result().release(Outcome.NEUTRAL)
            raise
        finally:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def pump(self) -> None:
        """Capacity may have come free: lease it out in order."""
        place = 0
        while place < len(self._waiting):
            ticket = self._waiting[place]
            if not ticket.granted.done():
                _try(ticket)
            if ticket.granted.done():
                self._waiting.remove(ticket)
                self._note_grant()
            elif ticket.selective:
                place += 1
            else:
                return  # what it does not get, nobody behind it gets

    def fail(self, error: BlazeError) -> None:
        """Nobody who waits now will get a place."""
        waiting, self._waiting = self._waiting, []
        for ticket in waiting:
            if not ticket.granted.done():
                ticket.granted.set_exception(error)

    def expected_wait_s(self) -> float:
        """Until whoever came now would get a place, at the pace of the last ones."""
        gap = 1.0 if self._gap_s is None else self._gap_s
        return min(_LONGEST_HINT_S, gap * (len(self._waiting) + 1))

    def _note_grant(self) -> None:
        now = self._clock.now()
        if self._granted_at is not None:
            gap = now - self._granted_at
            self._gap_s = gap if self._gap_s is None else self._gap_s + _EWMA * (gap - self._gap_s)
        self._granted_at = now if self._waiting else None


def _try(ticket: _Ticket) -> None:
    """What goes wrong is the waiting request's own: not of whoever has just made room for it."""
    try:
        lease = ticket.attempt()
    except Exception as error:
        ticket.granted.set_exception(error)
        return
    if lease is not None:
        ticket.granted.set_result(lease)


def _whole(seconds: float) -> float:
    """As the header wants it."""
    return float(max(1, ceil(seconds)))


def _by_rank(ticket: _Ticket) -> tuple[float, int]:
    return ticket.rank


def _is_granted(ticket: _Ticket) -> bool:
    granted = ticket.granted
    return granted.done() and not granted.cancelled() and granted.exception() is None
