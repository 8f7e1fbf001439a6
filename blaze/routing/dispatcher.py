"""The dispatcher: the only place of the router with effects.

A request becomes a pick, the pick a lease, the lease a call; the outcome is recorded on the lease
exactly once, when the stream ends, however it ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Collection

from blaze.clock import Clock
from blaze.control import Control
from blaze.errors import BlazeError, ErrorInfo
from blaze.prompt_chain import PromptChain, prompt_chain
from blaze.reports import ModelCounters, ReplicaCounters
from blaze.routing.accounting import ModelAccount
from blaze.routing.attempt import Attempt, RoutingState
from blaze.routing.breaker import BreakerBoard, BreakerState, Transition
from blaze.routing.breaker_log import BreakerLog
from blaze.routing.cost import CostModel
from blaze.routing.draining import Drainage, draining_error
from blaze.routing.outcome import Outcome
from blaze.routing.picker import Picker
from blaze.routing.poison import PoisonJudge
from blaze.routing.pool import ReplicaPool
from blaze.routing.replica import Lease, ReplicaInfo
from blaze.routing.replicas import ReplicaTable
from blaze.routing.retries import RetryBudget
from blaze.routing.retry_policy import RetryPolicy
from blaze.routing.route import Route, affinity_key, with_seed
from blaze.routing.routed_stream import RoutedStream
from blaze.routing.running import Running
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategy import Strategy
from blaze.routing.transcript import transcript_of
from blaze.types import GenerateRequest, ReplicaId, Request


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
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._breaker_log = BreakerLog(model, clock)
        self.table = ReplicaTable(
            cap=settings.max_in_flight,
            at_once=settings.at_once,
            routers=settings.routers,
            clock=clock,
            breakers=BreakerBoard(settings.breaker, clock, rng, self._on_transition),
            slow_start_s=settings.slow_start_s,
            drain_timeout_s=settings.drain_timeout_s,
        )
        self._costs = CostModel()
        self._account = ModelAccount(model)
        self._running = Running()
        self._state = RoutingState(
            table=self.table,
            account=self._account,
            costs=self._costs,
            clock=clock,
            suspend_s=settings.suspend_s,
            deadline_grace_s=settings.deadline_grace_s,
            running=self._running,
        )
        self._picker = Picker(
            model,
            strategy,
            self.table,
            clock=clock,
            rng=rng,
            settings=settings,
            typical_cost=lambda: self._costs.typical,
            wake=pool.wake,
        )
        self.prefixes = self._picker.prefixes
        self._drainage = Drainage(self.table, self._running, self._picker, clock=clock, settings=settings)
        self._control = Control()
        self._num_open = 0
        self._retries = RetryBudget()
        poison = PoisonJudge(self.table, clock=clock, doubt_s=settings.doubt_s)
        self._policy = RetryPolicy(
            self._retries, poison, self._picker, clock=clock, rng=rng, settings=settings
        )
        pool.subscribe(self._sync)  # first: what is published from now on is not missed
        self._sync(pool.live())

    def _sync(self, live: tuple[ReplicaInfo, ...]) -> None:
        self._drainage.expect_changes()  # who leaves may be finishing its work
        self.table.sync(live)

    async def open(self, request: Request) -> RoutedStream:
        """Send the request to a replica and wait for the first content of its answer.

        A replica that fails before its first content costs an attempt on another one, up to
        ``max_retries`` and in turn with others (:class:`RetryBudget`), or ``max_lost`` where the replica went
        away; later than that, the answer goes on elsewhere, by the same limits. An error that no attempt
        got past is the stream's only event, ``Failed``. Raises :class:`Overloaded` when no replica can take
        the request before its deadline, and :class:`Draining` when nothing new is begun.
        The caller owns the stream and must close it (it is an async context manager).
        """
        if self._drainage.refuses:
            raise draining_error()
        timeout_s = self._settings.request_timeout_s if request.timeout_s is None else request.timeout_s
        now = self._clock.now()
        deadline = now + timeout_s
        request = with_seed(request, self._rng)
        route = Route(
            request, self._costs.of(request), affinity_key(request), self._chain(request), deadline, now
        )
        self._num_open += 1
        try:
            attempt = await self._send(route)
        except BaseException:
            self._num_open -= 1
            raise
        return RoutedStream(route, attempt, transcript_of(request), self)

    def closed(self, route: Route) -> None:
        """Nobody reads the answer any more."""
        route.drop_ahead()
        self._num_open -= 1

    async def resume(
        self, route: Route, rest: Request, broken: Attempt, error: ErrorInfo, *, advanced: int
    ) -> Attempt | ErrorInfo:
        """The answer goes on from where it broke. Returns why not, where it cannot."""
        route.request, route.cost, route.has_begun = rest, self._costs.of(rest), True
        route.note_failure(broken.replica_id, error, death=broken.death_by(error), advanced=advanced)
        try:
            resumed = await self._send(route, error)
        except BlazeError as refused:
            return refused.info
        self._account.resumed += isinstance(resumed, Attempt)
        return resumed

    async def move(self, route: Route, rest: Request) -> Attempt | None:
        """The answer goes on at the place that was found for it, if it can begin there soon: until then its
        reader hears nothing, though it runs well enough where it is."""
        lease, route.has_begun = route.take_ahead(), True
        if lease is None:
            return None
        route.request, route.cost = rest, self._costs.of(rest)
        lease.recost(route.cost)
        attempt = await self._begin_soon(route, lease)
        if attempt is None:
            return None
        if attempt.error is not None:
            route.note_failure(attempt.replica_id, attempt.error, death=attempt.death)
            await attempt.aclose()
            return None
        route.tried_last = attempt.replica_id
        route.lost += 1
        route.deaths.clear()  # it ran well enough where it was
        self._account.resumed += 1
        return attempt

    async def _begin_soon(self, route: Route, lease: Lease) -> Attempt | None:
        """None: it has not begun in time, and is not sent there again unless it has to be. Near the deadline
        there is no time to find out."""
        patience_s = self._settings.move_within_s
        if self._clock.now() + patience_s >= route.deadline:
            lease.release(Outcome.NEUTRAL)
            return None
        try:
            async with asyncio.timeout(patience_s):
                return await self._begin(route, lease)
        except TimeoutError:
            route.tried.append(lease.replica.id)
            return None

    async def _send(self, route: Route, error: ErrorInfo | None = None) -> Attempt | ErrorInfo:
        """An attempt that has begun to answer, or the error that none got past. ``error``: of the attempt
        before, which is gone on with."""
        try:
            while True:
                if error is not None:
                    pause = await self._policy.pause_before_another(route, error)
                    if isinstance(pause, ErrorInfo):
                        return pause
                    if pause > 0:
                        await asyncio.sleep(pause)
                attempt = await self._attempt(route)
                error = attempt.error
                if error is None:
                    return attempt
                route.note_failure(attempt.replica_id, error, death=attempt.death)
                await attempt.aclose()
        finally:
            route.drop_ahead()
            self._policy.settled(route)

    async def _attempt(self, route: Route) -> Attempt:
        lease = route.take_ahead() or await self._picker.lease(route)
        route.was_probe = lease.is_probe
        route.tried_last = lease.replica.id
        return await self._begin(route, lease)

    async def _begin(self, route: Route, lease: Lease) -> Attempt:
        attempt = self._start(route, lease)
        try:
            await attempt.begin()
        except BaseException:
            await attempt.aclose()
            raise
        if route.chain:
            self.prefixes.sent(route.chain, attempt.replica_id, self._clock.now())
        return attempt

    def refuse(self, error: BlazeError, *, for_good: bool) -> None:
        """Nobody is there for whoever waits; ``for_good``: nothing is begun or gone on with any more."""
        self._picker.refuse(error, for_good=for_good)

    def set_suspects(self, suspects: Collection[ReplicaId], condemned: Collection[ReplicaId] = ()) -> None:
        """Replicas that do not answer the health actor, or of which it knows worse: nobody is sent there, and
        what runs there goes on elsewhere."""
        for replica_id in self.table.set_suspects(suspects, condemned):
            self._running.lose(replica_id)
        left = suspects if self.available_replicas else condemned  # or it is who asks that is cut off
        for replica_id in set(left) - self.table.columns.place.keys():  # finishing what they have
            self._running.lose(replica_id)

    def follow(self, control: Control) -> None:
        """What operators have changed, but for the strategy."""
        known, self._control = self._control.version, control
        self._drainage.follow(control)
        for version, action in control.breakers:
            if version > known and action.replica_id in self.table.columns.place:
                self.table.breakers.act(action.replica_id, action.action)
                self.table.changed()

    def counters(self) -> tuple[ModelCounters, tuple[ReplicaCounters, ...]]:
        replicas = self.table.counters(self.model)  # first: breakers that are looked at may half open
        counters = self._account.counters(strategy=self.strategy.name, waiting=self._picker.num_waiting)
        counters = dataclasses.replace(
            counters,
            retries=self._retries.total,
            open=self._num_open,
            panic=self.table.panic,
            transitions=self._breaker_log.transitions,
            events=self._breaker_log.events(),
        )
        return counters, replicas

    @property
    def strategy(self) -> Strategy:
        return self._picker.strategy

    @strategy.setter
    def strategy(self, strategy: Strategy) -> None:
        self._picker.strategy = strategy

    @property
    def available_replicas(self) -> int:
        return len(self.table.available())

    def _chain(self, request: Request) -> PromptChain:
        if self.strategy.wants_credit and isinstance(request, GenerateRequest):
            return prompt_chain(request.prompt)
        return ()

    def _start(self, route: Route, lease: Lease) -> Attempt:
        self._costs.started(lease.cost)
        self.table.columns.cost_cap = max(1e-9, self._settings.max_in_flight * self._costs.typical)
        remaining = max(0.0, route.deadline - self._clock.now())
        try:
            call = self._pool.call(lease.replica.id, dataclasses.replace(route.request, timeout_s=remaining))
        except BaseException:
            lease.release(Outcome.NEUTRAL)
            raise
        return Attempt(route, call, lease, self._state)

    def _on_transition(self, change: Transition) -> None:
        self._breaker_log.note(change)
        if change.after is BreakerState.CLOSED:
            self.table.closed(change.replica_id)
