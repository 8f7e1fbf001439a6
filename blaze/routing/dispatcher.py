"""The dispatcher: the only place of the router with effects.

A request becomes a pick, the pick a lease, the lease a call; the outcome is recorded on the lease
exactly once, when the stream ends, however it ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import random
from collections import deque

from blaze.clock import Clock
from blaze.errors import Overloaded
from blaze.prompt_chain import PromptChain, prompt_chain
from blaze.reports import BreakerEvent, ModelCounters, ReplicaCounters
from blaze.routing.accounting import ModelAccount
from blaze.routing.admission import WaitingRoom
from blaze.routing.affinity import SessionTable
from blaze.routing.breaker import BreakerBoard, BreakerState, Transition
from blaze.routing.columns import Places
from blaze.routing.cost import CostModel
from blaze.routing.least import LeastConnections
from blaze.routing.outcome import Outcome
from blaze.routing.pool import ReplicaPool
from blaze.routing.prefix_credit import PrefixCredit
from blaze.routing.rendezvous import IPHash
from blaze.routing.replica import Lease
from blaze.routing.replicas import ReplicaTable
from blaze.routing.retries import RetryBudget, pause_s
from blaze.routing.route import Route, affinity_key, with_seed
from blaze.routing.routed_stream import RoutedStream, RoutingState
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategy import Ask, Pick, Strategy
from blaze.types import GenerateRequest, ReplicaId, Request

logger = logging.getLogger(__name__)

_COMPLAINT_EVERY_S = 60.0
_EVENTS = 64  # of breakers, kept for whoever asks


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
        self.strategy = strategy  # may be replaced at any time: a pick is one call
        self._pool = pool
        self._clock = clock
        self._rng = rng
        self._settings = settings
        self._events: deque[tuple[float, Transition]] = deque(maxlen=_EVENTS)  # and when they were
        self._transitions = dict.fromkeys(BreakerState, 0)
        self.table = ReplicaTable(
            cap=settings.max_in_flight,
            at_once=settings.at_once,
            routers=settings.routers,
            clock=clock,
            breakers=BreakerBoard(settings.breaker, clock, rng, self._on_transition),
            slow_start_s=settings.slow_start_s,
        )
        self._costs = CostModel()
        self._account = ModelAccount(model)
        self._state = RoutingState(
            table=self.table,
            account=self._account,
            costs=self._costs,
            clock=clock,
            suspend_s=settings.suspend_s,
            deadline_grace_s=settings.deadline_grace_s,
        )
        self._room = WaitingRoom(clock, max_queued=settings.max_queued)
        self.table.on_capacity.append(self._room.pump)
        self._sessions = SessionTable(clock, timeout_s=settings.sticky_session_timeout_s)
        self.prefixes = PrefixCredit()
        self._retries = RetryBudget()
        self._fallback = LeastConnections(rng)
        self._complained_at = -math.inf
        self._rechecking: asyncio.TimerHandle | None = None
        pool.subscribe(self.table.sync)  # first: what is published from now on is not missed
        self.table.sync(pool.live())

    async def open(self, request: Request) -> RoutedStream:
        """Send the request to a replica and wait for the first content of its answer.

        A replica that fails before its first content costs an attempt on another one, up to
        ``max_retries`` and as far as the budget for retries goes, or ``max_lost`` where the replica went
        away. An error that no attempt got past is the stream's only event, ``Failed``. Raises
        :class:`Overloaded` when no replica can take the request before its deadline.
        The caller owns the stream and must close it (it is an async context manager).
        """
        timeout_s = self._settings.request_timeout_s if request.timeout_s is None else request.timeout_s
        deadline = self._clock.now() + timeout_s
        request = with_seed(request, self._rng)
        route = Route(request, self._costs.of(request), affinity_key(request), self._chain(request), deadline)
        retries = lost = 0
        reserved = False
        try:
            while True:
                stream = await self._attempt(route)
                error = stream.error
                if error is None or not error.retryable:
                    return stream
                # A replica that goes away is not the request's fault: it does not use up its retries.
                lost += error.replica_gone
                retries += not error.replica_gone
                pause = (
                    0.0 if error.replica_gone else self._settings.retry_pause * pause_s(retries, self._rng)
                )
                if retries > self._settings.max_retries or lost > self._settings.max_lost:
                    return stream
                if self._clock.now() + pause >= deadline:
                    return stream
                if not error.replica_gone and not reserved:
                    reserved = self._retries.reserve(self._active)
                    if not reserved:
                        return stream
                self._retries.total += 1
                await stream.aclose()
                route.tried.append(stream.replica_id)
                if pause > 0:
                    await asyncio.sleep(pause)
        finally:
            if reserved:
                self._retries.give_back()

    async def _attempt(self, route: Route) -> RoutedStream:
        stream = self._start(route.request, await self._acquire(route), route.deadline)
        try:
            await stream.begin()
        except BaseException:
            await stream.aclose()
            raise
        if route.chain:
            self.prefixes.sent(route.chain, stream.replica_id, self._clock.now())
        return stream

    def counters(self) -> tuple[ModelCounters, tuple[ReplicaCounters, ...]]:
        now = self._clock.now()
        replicas = self.table.counters(self.model)  # first: breakers that are looked at may half open
        counters = self._account.counters(strategy=self.strategy.name, waiting=len(self._room))
        counters = dataclasses.replace(
            counters,
            retries=self._retries.total,
            panic=self.table.panic,
            transitions=tuple((state.value, count) for state, count in self._transitions.items()),
            events=tuple(self._event(change, now - at) for at, change in self._events),
        )
        return counters, replicas

    def _event(self, change: Transition, age_s: float) -> BreakerEvent:
        before, after = change.before.value, change.after.value
        return BreakerEvent(self.model, change.replica_id, before, after, change.reason, age_s)

    @property
    def available_replicas(self) -> int:
        return len(self.table.available())

    def _chain(self, request: Request) -> PromptChain:
        if self.strategy.wants_credit and isinstance(request, GenerateRequest):
            return prompt_chain(request.prompt)
        return ()

    @property
    def _active(self) -> int:
        return self.table.in_flight + len(self._room)

    # --- Whose turn it is, and where ------------------------------------------------------------------

    async def _acquire(self, route: Route) -> Lease:
        def attempt() -> Lease | None:
            now = self._clock.now()
            if self._settings.routers > 1:
                self.table.columns.peers_age_s = now - self.table.peers_known_at
            idle = self.strategy.binds_late
            eligible = self.table.eligible(route.tried, idle=idle)
            if not len(eligible) and not len(self.table.available(route.tried)):
                eligible = self.table.eligible(idle=idle)  # nowhere else to go: where it has just failed
            if not len(eligible):
                if self.table.all_weights_are_zero:
                    raise Overloaded("All replicas of the model have weight 0.", retry_after_s=1)
                return None
            credit = self.prefixes.of(route.chain, self.table.columns, now) if route.chain else None
            pick = self._pick(route.request, eligible, Ask(now, route.cost, route.key, credit))
            return self.table.lease(pick.replica_id, cost=route.cost, expires_at=route.deadline)

        if not self._room:  # whoever waits already comes first
            lease = attempt()
            if lease is not None:
                return lease
        self._recheck_soon()
        request = route.request
        return await self._room.wait(
            attempt,
            max(0.0, route.deadline - self._clock.now()),
            selective=bool(route.tried),
            priority=request.priority if isinstance(request, GenerateRequest) else 0,
            size=route.cost / self._costs.typical,
            retry_after_s=self._retry_after_s,
        )

    def _pick(self, request: Request, eligible: Places, ask: Ask) -> Pick:
        if self.table.probes and not isinstance(self.strategy, IPHash):
            # Whatever the strategy thinks of it: a breaker can only close by requests. Those of a key's own
            # replica come by themselves.
            return Pick(self.table.probes[0])
        session = request.caller.session_id if self._settings.sticky_sessions else None
        if session is None:
            return self._choose(eligible, ask)
        kept = self._sessions.replica_of(session)
        if kept is not None and self._is_among(kept, eligible):
            return Pick(kept)
        pick = self._choose(eligible, ask)
        self._sessions.keep(session, pick.replica_id)
        return pick

    def _choose(self, eligible: Places, ask: Ask) -> Pick:
        """A strategy that fails loses no request: least connections takes its place."""
        try:
            pick = self.strategy.choose(self.table.columns, eligible, ask)
            if pick is not None and self._is_among(pick.replica_id, eligible):
                return pick
            self._complain(f"picked {pick}", None)
        except Exception as error:
            self._complain(f"raised {type(error).__name__}", error)
        pick = self._fallback.choose(self.table.columns, eligible, ask)
        assert pick is not None, "somebody is eligible"
        return pick

    def _is_among(self, replica_id: ReplicaId, eligible: Places) -> bool:
        place = self.table.columns.place.get(replica_id)
        return place is not None and bool((eligible == place).any())

    def _complain(self, what: str, error: Exception | None) -> None:
        now = self._clock.now()
        if now - self._complained_at >= _COMPLAINT_EVERY_S:
            self._complained_at = now
            logger.error("%s: strategy %s %s", self.model, self.strategy.name, what, exc_info=error)

    def _retry_after_s(self) -> float:
        """When somebody may take a request again, as far as can be told."""
        if len(self.table.available()):
            return self._room.expected_wait_s()
        return self.table.back_in_s(self._settings.recheck_s)

    def _recheck_soon(self) -> None:
        """While requests wait: suspensions end by time alone, and an empty pool has to be woken."""
        if self._rechecking is None:
            self._rechecking = asyncio.get_running_loop().call_later(self._settings.recheck_s, self._recheck)
        if not len(self.table.available()):
            self._pool.wake()

    def _recheck(self) -> None:
        self._rechecking = None
        self._room.pump()
        if self._room:
            self.table.needed()
        if self._room:
            self._recheck_soon()

    def _start(self, request: Request, lease: Lease, deadline: float) -> RoutedStream:
        self._costs.started(lease.cost)
        self.table.columns.cost_cap = max(1e-9, self._settings.max_in_flight * self._costs.typical)
        remaining = max(0.0, deadline - self._clock.now())
        try:
            call = self._pool.call(lease.replica.id, dataclasses.replace(request, timeout_s=remaining))
        except BaseException:
            lease.release(Outcome.NEUTRAL)
            raise
        return RoutedStream(request, call, lease, self._state, deadline)

    def _on_transition(self, change: Transition) -> None:
        logger.warning(
            "%s: breaker of %s: %s: %s", self.model, change.replica_id, change.after, change.reason
        )
        self._transitions[change.after] += 1
        self._events.append((self._clock.now(), change))
        if change.after is BreakerState.CLOSED:
            self.table.closed(change.replica_id)
