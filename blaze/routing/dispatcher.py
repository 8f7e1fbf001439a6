"""The dispatcher: the only place of the router with effects.

A request becomes a pick, the pick a lease, the lease a call; the outcome is recorded on the lease
exactly once, when the stream ends, however it ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blaze.clock import Clock
from blaze.errors import (
    BlazeError,
    DeadlineExceeded,
    EngineFailure,
    ErrorInfo,
    ReplicaLost,
)
from blaze.routing.accounting import ModelAccount
from blaze.routing.admission import WaitingRoom
from blaze.routing.pool import ReplicaCall, ReplicaPool
from blaze.routing.replicas import Lease, Outcome, ReplicaTable
from blaze.routing.strategies import Strategy
from blaze.types import (
    SEED_BOUND,
    Events,
    Failed,
    Finished,
    GenerateRequest,
    ModelCounters,
    ReplicaCounters,
    ReplicaId,
    Request,
)


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    max_retries: int = 2
    request_timeout_s: float = 600.0
    max_queued: int = 256
    max_in_flight: int = 64  # per replica, from this dispatcher


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
        self._table = ReplicaTable(cap=settings.max_in_flight)
        self._room = WaitingRoom(max_queued=settings.max_queued)
        self._table.on_capacity.append(self._room.pump)
        self._account = ModelAccount(model)
        self._table.sync(pool.live())
        pool.subscribe(self._table.sync)

    async def open(self, request: Request) -> RoutedStream:
        """Send the request to a replica and wait for the first events of its answer.

        A replica that fails before its first event costs an attempt on another one, up to
        ``max_retries``. An error that no attempt got past is the stream's only event, ``Failed``;
        raises :class:`Overloaded` when no replica can take the request before its deadline.
        The caller owns the stream and must close it (it is an async context manager).
        """
        timeout_s = self._settings.request_timeout_s if request.timeout_s is None else request.timeout_s
        deadline = self._clock.now() + timeout_s
        request = self._with_seed(request)
        tried: list[ReplicaId] = []
        while True:
            lease = await self._acquire(request, tried, deadline)
            attempt = self._start(request, lease, deadline)
            try:
                await attempt.begin()
            except BaseException:
                await attempt.aclose()
                raise
            retry = (
                attempt.error is not None
                and attempt.error.retryable
                and len(tried) < self._settings.max_retries
            )
            if not retry or self._clock.now() >= deadline:
                return attempt
            await attempt.aclose()
            tried.append(lease.replica.id)

    def counters(self) -> tuple[ModelCounters, tuple[ReplicaCounters, ...]]:
        return self._account.counters(
            strategy=self._strategy.name, waiting=len(self._room)
        ), self._table.counters(self.model)

    @property
    def replica_count(self) -> int:
        return len(self._table)

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
            # Not where it has just failed; unless there is nowhere else.
            views = self._table.eligible(tried) or self._table.eligible()
            pick = self._strategy.choose(views, request)
            return None if pick is None else self._table.lease(pick.replica_id)

        if not self._room:  # whoever waits already comes first
            lease = attempt()
            if lease is not None:
                return lease
        if not self._table:
            self._pool.wake()
        return await self._room.wait(attempt, max(0.0, deadline - self._clock.now()))

    def _start(self, request: Request, lease: Lease, deadline: float) -> RoutedStream:
        remaining = max(0.0, deadline - self._clock.now())
        call = self._pool.call(lease.replica.id, dataclasses.replace(request, timeout_s=remaining))
        return RoutedStream(call, lease, self._account, self._clock, deadline, self._table.mark_gone)


class RoutedStream:
    """One request's answer: batches of events that end with exactly one terminal event."""

    def __init__(
        self,
        call: ReplicaCall,
        lease: Lease,
        account: ModelAccount,
        clock: Clock,
        deadline: float,
        mark_gone: Callable[[ReplicaId], None],
    ) -> None:
        self.replica_id = lease.replica.id
        self._call = call
        self._lease = lease
        self._account = account
        self._clock = clock
        self._opened_at = clock.now()
        self._deadline = deadline
        self._mark_gone = mark_gone
        self.error: ErrorInfo | None = None  # when the answer is nothing but an error
        self._first: Events | None = None
        self._ended = False

    async def begin(self) -> None:
        """Wait for the first batch."""
        self._first = await self._next()
        head = self._first[0]
        if isinstance(head, Failed):
            self.error = head.error
        else:
            self._account.first_event(self._clock.now() - self._opened_at)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        if self._first is not None:
            first, self._first = self._first, None
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
            self._end(Outcome.FAILURE if last.error.is_failure else Outcome.NEUTRAL)
        return events

    async def _receive(self) -> Events:
        """The next batch; whatever goes wrong on the way is a terminal event."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - self._clock.now())):
                return await anext(self._call)
        except StopAsyncIteration:
            return _failed(EngineFailure("The replica ended its answer without a result."))
        except TimeoutError:
            self._call.cancel()
            return _failed(DeadlineExceeded("The request's deadline passed before it was finished."))
        except ReplicaLost as error:
            self._mark_gone(self.replica_id)
            return _failed(error)
        except BlazeError as error:
            return _failed(error)

    def _end(self, outcome: Outcome) -> None:
        self._ended = True
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


def _failed(error: BlazeError) -> Events:
    return (Failed(error.info),)
