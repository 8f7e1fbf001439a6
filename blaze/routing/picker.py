"""Whose turn it is, and where the request goes."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable

from blaze.clock import Clock
from blaze.errors import BlazeError, Overloaded
from blaze.routing.admission import WaitingRoom
from blaze.routing.affinity import SessionTable
from blaze.routing.columns import Places
from blaze.routing.least import LeastConnections
from blaze.routing.prefix_credit import PrefixCredit
from blaze.routing.rendezvous import IPHash
from blaze.routing.replica import Lease
from blaze.routing.replicas import ReplicaTable
from blaze.routing.route import Route
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategy import Ask, Pick, Strategy
from blaze.types import GenerateRequest, ReplicaId, Request

logger = logging.getLogger(__name__)

_COMPLAINT_EVERY_S = 60.0


class Picker:
    """Leases places on the replicas of one model: at once, or in turn. Lives on one event loop."""

    def __init__(
        self,
        model: str,
        strategy: Strategy,
        table: ReplicaTable,
        *,
        clock: Clock,
        rng: random.Random,
        settings: DispatchSettings,
        typical_cost: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        """``wake`` is called while requests wait and there is no replica at all."""
        self.model = model
        self.strategy = strategy  # may be replaced at any time: a pick is one call
        self.table = table
        self.prefixes = PrefixCredit()
        self._clock = clock
        self._settings = settings
        self._typical_cost = typical_cost
        self._wake = wake
        self._room = WaitingRoom(clock, max_queued=settings.max_queued)
        table.on_capacity.append(self._room.pump)
        self._sessions = SessionTable(clock, timeout_s=settings.sticky_session_timeout_s)
        self._fallback = LeastConnections(rng)
        self._complained_at = -math.inf
        self._rechecking: asyncio.TimerHandle | None = None
        self._over: BlazeError | None = None

    def refuse(self, error: BlazeError, *, for_good: bool) -> None:
        """Whoever waits gets the error; ``for_good``: whoever comes, too."""
        if for_good:
            self._over = error
        self._room.fail(error)

    def reopen(self) -> None:
        """Whoever comes is sent on again."""
        self._over = None

    @property
    def is_over(self) -> bool:
        return self._over is not None

    @property
    def num_waiting(self) -> int:
        return len(self._room)

    @property
    def num_active(self) -> int:
        return self.table.in_flight + len(self._room)

    async def lease(self, route: Route) -> Lease:
        """A place on a replica. Raises :class:`Overloaded` when there is none before the deadline."""
        if not self._room:  # whoever waits already comes first
            lease = self._try(route)
            if lease is not None:
                return lease
        self._recheck_soon()
        request = route.request
        return await self._room.wait(
            lambda: self._try(route),
            max(0.0, route.deadline - self._clock.now()),
            selective=bool(route.tried),
            admitted=bool(route.tried),
            came_at=route.came_at,
            priority=request.priority if isinstance(request, GenerateRequest) else 0,
            size=route.cost / self._typical_cost(),
            retry_after_s=self._retry_after_s,
        )

    def lease_elsewhere(self, route: Route) -> Lease | None:
        """A place for an answer that may as well stay where it is: where it has failed nobody tries again."""
        if self._over is not None:
            return None
        return self._lease_of(route, self.table.eligible(route.tried, idle=self.strategy.binds_late))

    def _try(self, route: Route) -> Lease | None:
        """None: not now."""
        if self._over is not None:
            raise self._over
        kept = self._kept(route)
        if kept is not None:
            return self.table.lease(kept, cost=route.cost, expires_at=route.deadline)
        return self._lease_of(route, self._eligible(route))

    def _lease_of(self, route: Route, eligible: Places) -> Lease | None:
        """A place on one of them, if there are any."""
        if not len(eligible):
            return None
        now = self._clock.now()
        if self._settings.routers > 1:
            self.table.columns.peers_age_s = now - self.table.peers_known_at
        credit = self.prefixes.of(route.chain, self.table.columns, now) if route.chain else None
        pick = self._pick(route.request, eligible, Ask(now, route.cost, route.key, credit))
        return self.table.lease(pick.replica_id, cost=route.cost, expires_at=route.deadline)

    def _eligible(self, route: Route) -> Places:
        idle = self.strategy.binds_late
        eligible = self.table.eligible(route.tried, idle=idle)
        if not len(eligible) and not len(self.table.available(route.tried)):
            eligible = self.table.eligible(route.unfit, idle=idle)  # nowhere else: where it has failed
        if not len(eligible):
            if self.table.all_weights_are_zero:
                raise Overloaded("All replicas of the model have weight 0.", retry_after_s=1)
            if route.unfit and self._none_fits(route):
                raise Overloaded("The replicas that could go on with the answer are gone.")
        return eligible

    def _none_fits(self, route: Route) -> bool:
        """Nobody that is here to stay can go on with it. Who is only out for a moment (suspended, suspect,
        refused by its breaker) may be back before the deadline; where nobody is, somebody may come."""
        staying = [r.replica_id for r in self.table.counters(self.model) if r.weight > 0 and not r.draining]
        return bool(staying) and set(staying) <= set(route.unfit)

    def _kept(self, route: Route) -> ReplicaId | None:
        """Where the request's session is kept, if it can go there, be it only to wait."""
        session = self._session_of(route.request)
        kept = None if session is None else self._sessions.replica_of(session)
        if kept is None or not self._is_among(kept, self.table.eligible(route.tried)):
            return None
        return kept

    def _session_of(self, request: Request) -> str | None:
        return request.caller.session_id if self._settings.sticky_sessions else None

    def _pick(self, request: Request, eligible: Places, ask: Ask) -> Pick:
        pick = self._probe(eligible) or self._choose(eligible, ask)
        session = self._session_of(request)
        if session is not None:
            self._sessions.keep(session, pick.replica_id)
        return pick

    def _probe(self, eligible: Places) -> Pick | None:
        """Whatever the strategy thinks of it: a breaker can only close by requests. Those of a key's own
        replica come by themselves."""
        if isinstance(self.strategy, IPHash):
            return None
        for replica_id in self.table.probes:
            if self._is_among(replica_id, eligible):
                return Pick(replica_id)
        return None

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
            self._wake()

    def _recheck(self) -> None:
        self._rechecking = None
        self._room.pump()
        if self._room:
            self.table.needed()
        if self._room:
            self._recheck_soon()
