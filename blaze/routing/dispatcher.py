"""The dispatcher: the only place of the router with effects.

A request becomes a pick, the pick a lease, the lease a call; the outcome is recorded on the lease
exactly once, when the stream ends, however it ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random

from blaze.checks import SEED_BOUND
from blaze.clock import Clock
from blaze.reports import ModelCounters, ReplicaCounters
from blaze.routing.accounting import ModelAccount
from blaze.routing.admission import WaitingRoom
from blaze.routing.pool import ReplicaPool
from blaze.routing.replicas import Lease, Outcome, ReplicaTable
from blaze.routing.routed_stream import DispatchSettings, RoutedStream
from blaze.routing.strategies import Strategy
from blaze.types import GenerateRequest, ReplicaId, Request

__all__ = ["DispatchSettings", "Dispatcher", "RoutedStream"]


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
