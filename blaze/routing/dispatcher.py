"""The dispatcher: the only place of the router with effects.

A request becomes a pick, the pick a lease, the lease a call; the outcome is recorded on the lease
exactly once, when the stream ends, however it ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blaze.checks import SEED_BOUND
from blaze.clock import Clock
from blaze.errors import (
    BlazeError,
    DeadlineExceeded,
    EngineFailure,
    ErrorInfo,
)
from blaze.reports import ModelCounters, ReplicaCounters
from blaze.routing.accounting import ModelAccount
from blaze.routing.admission import WaitingRoom
from blaze.routing.pool import ReplicaCall, ReplicaPool
from blaze.routing.replicas import Lease, Outcome, ReplicaTable
from blaze.routing.strategies import Strategy
from blaze.types import (
    Event,
    Events,
    Failed,
    Finished,
    GenerateRequest,
    Progress,
    ReplicaId,
    Request,
    Started,
)


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


class Dispatcher:
    """Routes the requests of one model. Lives on one event loop."""

    def __init__(
        self,
        model: str,
        pool: ReplicaPool,
        strategy: Strategy,
        *,
        clock: Clock,
        rng: random.Random,
        settings: DispatchSettings,
    ) -> None:
        self.model = model
        self._pool = pool
        self._strategy = strategy
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._table = ReplicaTable(cap=settings.max_in_flight, clock=clock)
        self._room = WaitingRoom(max_queued=settings.max_queued)
        self._table.on_capacity.append(self._room.pump)
        self._account = ModelAccount(model)
        self._rechecking: asyncio.TimerHandle | None = None
        pool.subscribe(self._table.sync)  # first: what is published from now on is not missed
        self._table.sync(pool.live())

    async def open(self, request: Request) -> RoutedStream:
        """Send the request to a replica and wait for the first content of its answer.

        A replica that fails before its first content costs an attempt on another one, up to
        ``max_retries``, or ``max_lost`` where the replica went away. An error that no attempt got past is
        the stream's only event, ``Failed``. Raises :class:`Overloaded` when no replica can take the request
        before its deadline.
        The caller owns the stream and must close it (it is an async context manager).
        """
        timeout_s = self._settings.request_timeout_s if request.timeout_s is None else request.timeout_s
        deadline = self._clock.now() + timeout_s
        request = self._with_seed(request)
        tried: list[ReplicaId] = []
        retries = lost = 0
        while True:
            lease = await self._acquire(request, tried, deadline)
            attempt = self._start(request, lease, deadline)
            try:
                await attempt.begin()
            except BaseException:
                await attempt.aclose()
                raise
            error = attempt.error
            if error is None or not error.retryable or self._clock.now() >= deadline:
                return attempt
            # A replica that goes away is not the request's fault: it does not use up its retries.
            lost += error.replica_gone
            retries += not error.replica_gone
            if retries > self._settings.max_retries or lost > self._settings.max_lost:
                return attempt
            await attempt.aclose()
            tried.append(lease.replica.id)

    def counters(self) -> tuple[ModelCounters, tuple[ReplicaCounters, ...]]:
        return self._account.counters(
            strategy=self._strategy.name, waiting=len(self._room)
        ), self._table.counters(self.model)

    @property
    def available_replicas(self) -> int:
        return len(self._table.available())

    def _with_seed(self, request: Request) -> Request:
        # Drawn once, before the first attempt: a second attempt repeats the draws of the first.
        if isinstance(request, GenerateRequest):
            if request.sampling.seed is not None or request.sampling.temperature == 0:
                return request
            sampling = dataclasses.replace(request.sampling, seed=self._rng.randrange(SEED_BOUND))
            return dataclasses.replace(request, sampling=sampling)
        if request.seed is not None:
            return request
        return dataclasses.replace(request, seed=self._rng.randrange(SEED_BOUND))

    async def _acquire(self, request: Request, tried: list[ReplicaId], deadline: float) -> Lease:
        def attempt() -> Lease | None:
            views = self._table.eligible(tried)
            if not views and not self._table.available(tried):
                views = self._table.eligible()  # nowhere else to go: where it has just failed
            pick = self._strategy.choose(views, request)
            return None if pick is None else self._table.lease(pick.replica_id)

        if not self._room:  # whoever waits already comes first
            lease = attempt()
            if lease is not None:
                return lease
        self._recheck_soon()
        remaining = max(0.0, deadline - self._clock.now())
        return await self._room.wait(attempt, remaining, selective=bool(tried))

    def _recheck_soon(self) -> None:
        """While requests wait: suspensions end by time alone, and an empty pool has to be woken."""
        if self._rechecking is None:
            self._rechecking = asyncio.get_running_loop().call_later(self._settings.recheck_s, self._recheck)
        if not self._table.available():
            self._pool.wake()

    def _recheck(self) -> None:
        self._rechecking = None
        self._room.pump()
        if self._room:
            self._recheck_soon()

    def _start(self, request: Request, lease: Lease, deadline: float) -> RoutedStream:
        remaining = max(0.0, deadline - self._clock.now())
        try:
            call = self._pool.call(lease.replica.id, dataclasses.replace(request, timeout_s=remaining))
        except BaseException:
            lease.release(Outcome.NEUTRAL)
            raise
        return RoutedStream(call, lease, self._account, self._clock, deadline, self._table, self._settings)


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
