"""The router's own account of a model's replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from blaze.clock import Clock
from blaze.reports import PeerLoad, ReplicaCounters
from blaze.routing.breaker import BreakerBoard, Permit
from blaze.routing.columns import Columns, Places
from blaze.routing.eligibility import Eligibility
from blaze.routing.least import peak_ewma
from blaze.routing.members import Members
from blaze.routing.orders import Orders
from blaze.routing.outcome import Outcome
from blaze.routing.replica import Lease, Replica, ReplicaInfo, counters_of
from blaze.types import ReplicaId

_LONGEST_SUSPENSION_S = 30.0
_LEAST_RAMP = 0.1
_RAMP_STEP_S = 0.25
_SUCCESS_EWMA = 0.1
_FAILURE_S = 5.0  # a failure counts as slow, so that fast errors attract nothing


class ReplicaTable:
    """The replicas of one model, sorted by id, kept in step with the pool's live set."""

    def __init__(
        self,
        *,
        cap: int,
        clock: Clock,
        breakers: BreakerBoard,
        at_once: int | None = None,
        routers: int = 1,
        slow_start_s: float = 30.0,
        drain_timeout_s: float = 30.0,
    ) -> None:
        self.columns = Columns()
        self.breakers = breakers
        self.on_capacity: list[Callable[[], None]] = []
        self.panic = False
        self.probes: list[ReplicaId] = []  # half open, and nobody is trying them
        self._clock = clock
        self._slow_start_s = slow_start_s
        self._members = Members(drain_timeout_s)
        self._by_id = self._members.by_id
        self._orders = Orders()
        self.peers_known_at = -math.inf
        self._eligibility = Eligibility(cap=cap, at_once=at_once or cap, routers=routers)
        self._look_again_at = -math.inf

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def in_flight(self) -> int:
        """Of this router, on all replicas, those too that have left."""
        return self._members.in_flight

    @property
    def nodes(self) -> set[str]:
        return {replica.node for replica in self._by_id.values()}

    # --- Who there is --------------------------------------------------------------------------------

    def sync(self, live: Iterable[ReplicaInfo]) -> None:
        """Take over a new live set: those that stay keep their counters, as do those that come back to what
        runs there; of all others that leave nothing stays behind."""
        infos, now = {info.id: info for info in live}, self._clock.now()
        self._members.sync(infos, now)
        self.breakers.sync(infos.keys(), forced_open=self._orders.forced_open)
        self.columns.resize(infos)
        for replica_id, info in infos.items():
            replica, weight = self._by_id[replica_id], self._orders.weights.get(replica_id, info.weight)
            self.columns.weight[self.columns.place[replica_id]] = weight
            replica.ready = info.ready
            replica.drained_until = self._orders.drained_until(replica_id, replica.node)
        self._eligibility.resize(len(infos))
        for replica_id in infos:
            self._write(self._by_id[replica_id])
        self.changed()

    def changed(self) -> None:
        """Whoever may be picked now: look again."""
        self._look_again_at = -math.inf
        self._notify()

    def suspend(self, replica_id: ReplicaId, seconds: float) -> None:
        """A call to it was lost: do not pick it for a while, for twice as long after each loss in a row."""
        replica, now = self._by_id.get(replica_id), self._clock.now()
        if replica is not None and replica.suspended_until <= now:  # calls lost together are one loss
            pause = min(_LONGEST_SUSPENSION_S, seconds * 2.0 ** min(replica.lost_calls, 32))
            replica.lost_calls += 1
            replica.suspended_until = now + pause
            self._look_again_at = -math.inf

    def follow(self, orders: Orders) -> None:
        self._orders = orders
        for replica_id, place in self.columns.place.items():
            replica = self._by_id[replica_id]
            replica.drained_until = orders.drained_until(replica_id, replica.node)
            if replica_id in orders.weights:
                self.columns.weight[place] = orders.weights[replica_id]
        self.changed()

    def set_suspects(
        self, suspects: Collection[ReplicaId], condemned: Collection[ReplicaId] = ()
    ) -> set[ReplicaId]:
        """Who should not be picked, see :meth:`Members.doubtful`; returns new ones."""
        doubtful = self._members.doubtful(suspects, condemned)
        before = {replica.id for replica in self._by_id.values() if replica.suspect}
        if doubtful != before:
            for replica in self._by_id.values():
                replica.suspect = replica.id in doubtful
            for replica_id in before - set(suspects):
                self.breakers.health_passed(replica_id)
            self.changed()
        return doubtful - before

    def set_peers(self, loads: Mapping[ReplicaId, PeerLoad] | None) -> None:
        """What the other Routers have in flight; None: nobody tells of them any more."""
        if loads is not None:
            self.peers_known_at = self._clock.now()
        for replica in self._by_id.values():
            replica.peers = (loads or {}).get(replica.id, PeerLoad())
            self._write(replica)
        self._notify()

    def _place_of(self, replica: Replica) -> int | None:
        """None of one that is gone."""
        return self.columns.place.get(replica.id)

    # --- Who may be picked ---------------------------------------------------------------------------

    def eligible(self, excluded: Collection[ReplicaId] = (), *, idle: bool = False) -> Places:
        """Replicas that may take one more request: their places, ascending. ``idle``: and begin with it."""
        self._look()
        places = self._eligibility.idle() if idle else self._eligibility.with_room()
        return self._without(places, excluded)

    def available(self, excluded: Collection[ReplicaId] = ()) -> Places:
        """Replicas that could take a request, full or not."""
        self._look()
        return self._without(self._eligibility.usable(), excluded)

    def needed(self) -> None:
        """Requests wait for which nobody has room: breakers that are open may be tried early."""
        before = self.breakers.version
        self.breakers.needed()
        if self.breakers.version != before:
            self.changed()

    def back_in_s(self, default_s: float) -> float:
        """When a replica that is out now may be back, by time alone."""
        now = self._clock.now()
        times = [r.suspended_until for r in self._by_id.values() if r.suspended_until > now]
        return min([*times, *self.breakers.open_ends()], default=now + default_s) - now

    @property
    def all_weights_are_zero(self) -> bool:
        return len(self.columns) > 0 and not self.columns.weight.any()

    def _without(self, places: Places, excluded: Collection[ReplicaId]) -> Places:
        if not excluded:
            return places
        ids = self.columns.ids
        return np.array([place for place in places.tolist() if ids[place] not in excluded], np.int64)

    def _look(self) -> None:
        """Breakers, suspensions and slow starts change by time alone."""
        now = self._clock.now()
        if now < self._look_again_at:
            return
        replicas = [self._by_id[id] for id in self.columns.ids]
        again = min(
            [self.breakers.next_change(), *(r.suspended_until for r in replicas if r.suspended_until > now)]
        )
        if self._slow_start_s > 0:
            ages = np.array([now - replica.joined_at for replica in replicas]) / self._slow_start_s
            self.columns.ramp[:] = np.minimum(1.0, _LEAST_RAMP + (1 - _LEAST_RAMP) * ages)
            if (ages < 1).any():
                again = min(again, now + _RAMP_STEP_S)
        weighed = zip(replicas, self.columns.weight, strict=True)
        ready = [r for r, weight in weighed if weight > 0 and r.is_wanted]
        self.panic = 2 * self.breakers.refusing([r.id for r in ready]) > len(ready)
        here = [r.id for r in ready if r.suspended_until <= now]
        admitted = {id for id in here if self.panic or self.breakers.admits(id)}
        self.probes = [id for id in here if self.breakers.wants_probe(id)]
        self._eligibility.admit(np.array([id in admitted for id in self.columns.ids], bool))
        self._look_again_at = again

    # --- Requests ------------------------------------------------------------------------------------

    def lease(self, replica_id: ReplicaId, *, cost: float = 1.0, expires_at: float = math.inf) -> Lease:
        """One request more. ``expires_at``: its deadline, when a probe's leave ends too."""
        replica, now = self._by_id[replica_id], self._clock.now()
        permit = self.breakers.take(replica_id, expires_at)
        if permit.probe:
            self._look_again_at = -math.inf
        lease = Lease(self, replica, permit, cost, now)
        replica.in_flight += 1
        replica.requests += 1
        replica.cost += cost
        replica.waiting[lease] = now
        replica.speed.began(now)
        self._write(replica)
        return lease

    def recost(self, lease: Lease, cost: float) -> None:
        replica, place = lease.replica, self._place_of(lease.replica)
        replica.cost += cost - lease.cost
        lease.cost = cost
        if place is not None:
            self.columns.cost[place] = replica.cost + replica.peers.cost

    def first_content(self, lease: Lease, response_s: float | None) -> None:
        lease.replica.waiting.pop(lease, None)
        if response_s is not None:
            self._observe(lease.replica, response_s)
        place = self._place_of(lease.replica)
        if place is not None:
            self.columns.waiting_since[place] = lease.replica.waiting_since

    def released(self, lease: Lease, permit: Permit, outcome: Outcome, response_s: float | None) -> None:
        replica, now = lease.replica, self._clock.now()
        replica.in_flight -= 1
        replica.cost = replica.cost - lease.cost if replica.in_flight else 0.0  # no rounding errors add up
        if not replica.in_flight:
            self._members.is_idle(replica)
        silent = replica.waiting.pop(lease, None) is not None
        replica.speed.ended(
            now, lease.cost if outcome is Outcome.SUCCESS else 0.0, idle=not replica.in_flight
        )
        place = self._place_of(replica)
        if outcome is Outcome.FAILURE:
            replica.failures += 1
            waited_s = now - lease.started_at if silent else 0.0  # how long a stream ran says nothing
            self._observe(replica, max(waited_s, _FAILURE_S, response_s or 0.0))
        elif outcome is Outcome.SUCCESS:
            replica.lost_calls = 0
            if response_s is not None:
                self._observe(replica, response_s)
        if place is not None:
            if outcome is not Outcome.NEUTRAL:
                success = self.columns.success
                success[place] += _SUCCESS_EWMA * ((outcome is Outcome.SUCCESS) - success[place])
                self.columns.judged_at[place] = now
            self.columns.drain[place] = replica.speed.drain
        self._write(replica)
        before = self.breakers.version
        self.breakers.settle(permit, outcome)
        if self.breakers.version != before:
            self._look_again_at = -math.inf
        self._notify()

    def closed(self, replica_id: ReplicaId) -> None:
        """Its breaker has closed: it starts slowly again."""
        if replica_id in self._by_id:
            self._by_id[replica_id].joined_at = self._clock.now()
            self.columns.success[self.columns.place[replica_id]] = 1.0  # or it would not be given a chance

    def _observe(self, replica: Replica, seconds: float) -> None:
        place = self._place_of(replica)
        if place is None or not math.isfinite(seconds):
            return
        now, columns = self._clock.now(), self.columns
        age_s = now - columns.measured_at[place]
        columns.response[place] = peak_ewma(columns.response[place], age_s, seconds)
        columns.measured_at[place] = now

    def _write(self, replica: Replica) -> None:
        """Its counters into the columns; a replica that is gone has none."""
        place = self._place_of(replica)
        if place is None:
            return
        columns = self.columns
        columns.in_flight_here[place] = replica.in_flight
        columns.in_flight[place] = replica.in_flight + replica.peers.in_flight
        columns.cost[place] = replica.cost + replica.peers.cost
        columns.waiting_since[place] = replica.waiting_since
        self._eligibility.note(place, here=replica.in_flight, peers=replica.peers.in_flight)

    def _notify(self) -> None:
        for listener in self.on_capacity:
            listener()

    # --- For reports ---------------------------------------------------------------------------------

    def counters(self, model: str) -> tuple[ReplicaCounters, ...]:
        self._look()
        return tuple(
            counters_of(model, self._by_id[id], self.columns, place, self.breakers.state(id).value)
            for place, id in enumerate(self.columns.ids)
        )
