"""Waiting for a replica: a bounded first-in, first-out queue whose waits end with the deadline."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

from blaze.errors import Overloaded
from blaze.routing.replicas import Lease, Outcome

Attempt: TypeAlias = Callable[[], Lease | None]


@dataclass(frozen=True, slots=True)
class _Ticket:
    attempt: Attempt
    selective: bool
    granted: asyncio.Future[Lease]


class WaitingRoom:
    """Requests that nobody can take yet. Lives on one event loop.

    A place that comes free is leased to the longest waiter there and then, inside :meth:`pump`: nobody
    can slip in between, and no wake-up is lost.
    """

    def __init__(self, *, max_queued: int, retry_after_s: float = 1.0) -> None:
        self._max_queued = max_queued
        self._retry_after_s = retry_after_s
        self._waiting: deque[_Ticket] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, attempt: Attempt, timeout_s: float, *, selective: bool = False) -> Lease:
        """The first lease that ``attempt`` gets once it is this caller's turn.

        ``selective``: it refuses some replicas that others would take, so others may pass it by.

        Raises :class:`Overloaded` at once when the queue is full, and when ``timeout_s`` has passed.
        """
        if len(self._waiting) >= self._max_queued:
            raise Overloaded(
                "All replicas are busy and the waiting queue is full.", retry_after_s=self._hint()
            )
        ticket = _Ticket(attempt, selective, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self.pump()
        try:
            async with asyncio.timeout(timeout_s):
                return await ticket.granted
        except TimeoutError:
            if _is_granted(ticket):
                return ticket.granted.result()
            raise Overloaded(
                "No replica became free before the deadline.", retry_after_s=self._hint()
            ) from None
        except asyncio.CancelledError:
            if _is_granted(ticket):  # the caller left in the moment that its turn came
                ticket.granted.result().release(Outcome.NEUTRAL)
            raise
        finally:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def pump(self) -> None:
        """Capacity may have come free: lease it out in order of arrival."""
        passed_by: list[_Ticket] = []
        while self._waiting:
            ticket = self._waiting.popleft()
            if ticket.granted.done():
                continue
            lease = ticket.attempt()
            if lease is not None:
                ticket.granted.set_result(lease)
                continue
            passed_by.append(ticket)
            if not ticket.selective:
                break  # what it does not get, nobody behind it gets
        self._waiting.extendleft(reversed(passed_by))

    def _hint(self) -> float:
        return float(ceil(self._retry_after_s))


def _is_granted(ticket: _Ticket) -> bool:
    return ticket.granted.done() and not ticket.granted.cancelled()
