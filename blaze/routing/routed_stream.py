"""One request's answer on its way through the router."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blaze.clock import Clock
from blaze.errors import BlazeError, DeadlineExceeded, EngineFailure, ErrorInfo
from blaze.routing.accounting import ModelAccount
from blaze.routing.pool import ReplicaCall
from blaze.routing.replicas import Lease, Outcome, ReplicaTable
from blaze.types import Event, Events, Failed, Finished, Progress, Started


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    max_retries: int = 2  # further attempts after an error
    max_lost: int = 8  # further attempts after a replica went away
    request_timeout_s: float = 600.0
    max_queued: int = 256
    max_in_flight: int = 64  # per replica, from this dispatcher
    suspend_s: float = 2.0  # after a lost call; longer than a dead replica takes to leave the live set
    recheck_s: float = 0.5  # how often waiting requests look again without being told to
    deadline_grace_s: float = 1.0  # for the engine to say itself that the deadline has passed


class RoutedStream:
    """One request's answer: batches of events that end with exactly one terminal event."""

    def __init__(
        self,
        call: ReplicaCall,
        lease: Lease,
        account: ModelAccount,
        clock: Clock,
        deadline: float,
        table: ReplicaTable,
        settings: DispatchSettings,
    ) -> None:
        self._settings = settings
        self.replica_id = lease.replica.id
        self.error: ErrorInfo | None = None  # when the answer is nothing but an error
        self._call = call
        self._lease = lease
        self._account = account
        self._clock = clock
        self._opened_at = clock.now()
        self._table = table
        self._first: Events = ()
        self._ended = False
        # The engine keeps the deadline itself and says so; who says nothing for a while longer has failed.
        # One timer for all of the answer: one per batch would be a good part of what a batch costs.
        self._patience_ends = deadline + settings.deadline_grace_s
        self._reader: asyncio.Task[object] | None = None
        self._gave_up = False
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, self._patience_ends - clock.now()), self._give_up
        )

    async def begin(self) -> None:
        """Wait for the first content. What comes before it (``Started``, ``Progress``) commits to nothing:
        until content arrives, the request can begin anew on another replica."""
        events: Events = ()
        while True:
            events += await self._next()
            last = events[-1]
            if isinstance(last, Failed) and not any(map(_is_content, events)):
                self.error = last.error
                self._first = (last,)
                return
            if any(map(_is_content, events)):
                self._account.first_content(self._clock.now() - self._opened_at)
                self._first = events
                return

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        if self._first:
            first, self._first = self._first, ()
            return first
        if self._ended:
            raise StopAsyncIteration
        return await self._next()

    async def _next(self) -> Events:
        events = await self._receive()
        last = events[-1]
        if isinstance(last, Finished):
            self._end(Outcome.SUCCESS)
            self._account.finished(last.usage)
        elif isinstance(last, Failed):
            if last.error.replica_gone:
                self._table.suspend(self.replica_id, self._settings.suspend_s)
            self._end(Outcome.FAILURE if last.error.is_failure or self._gave_up else Outcome.NEUTRAL)
        return events

    async def _receive(self) -> Events:
        """The next batch; whatever goes wrong is a terminal event."""
        if self._clock.now() >= self._patience_ends:
            self._give_up()
            return _TOO_LATE
        reader = self._reader = asyncio.current_task()
        assert reader is not None
        before = reader.cancelling()
        try:
            return await anext(self._call)
        except StopAsyncIteration:
            return _failed(EngineFailure("The replica ended its answer without a result."))
        except asyncio.CancelledError:
            # As asyncio.timeout tells them apart: when others have cancelled it too, it stays cancelled.
            if not self._gave_up or reader.uncancel() > before:
                raise
            return _TOO_LATE
        except BlazeError as error:
            return _failed(error)
        finally:
            self._reader = None

    def _give_up(self) -> None:
        self._gave_up = True
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()

    def _end(self, outcome: Outcome) -> None:
        self._ended = True
        self._timer.cancel()
        if self._lease.release(outcome):
            self._account.outcome(outcome)

    async def aclose(self) -> None:
        """Give everything back. An answer that was not read to its end counts as cancelled: neutral."""
        if not self._ended:
            self._end(Outcome.NEUTRAL)
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _is_content(event: Event) -> bool:
    return not isinstance(event, Started | Progress | Failed)


def _failed(error: BlazeError) -> Events:
    return (Failed(error.info),)


_TOO_LATE = _failed(DeadlineExceeded("The request's deadline passed before it was finished."))
