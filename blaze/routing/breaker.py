"""A circuit breaker for each replica, and the board that keeps them from ejecting too many at once.

When to trip and for how long is said in :mod:`blaze.routing.trip`; here is what state that makes
(:class:`Breaker`), and how many may be out at a time (:class:`BreakerBoard`). What counts as a failure is
decided where outcomes are made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum

from blaze.clock import Clock
from blaze.errors import InvalidRequest
from blaze.routing.outcome import Outcome
from blaze.routing.trip import BreakerSettings, TripPolicy, open_for_s
from blaze.types import ReplicaId

_NEEDED_TRIPS = 3  # for as long as after so many in a row a breaker that is needed is open, at the most
_FORGIVENESS_S = 60.0  # of health, for each trip in a row that is forgotten


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Transition:
    replica_id: ReplicaId
    before: BreakerState
    after: BreakerState
    reason: str


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to send one request; given back with its outcome, exactly once."""

    replica_id: ReplicaId
    generation: int
    probe: bool


@dataclass(slots=True)
class Breaker:
    """One replica's. Changed by the board alone."""

    policy: TripPolicy
    state: BreakerState = BreakerState.CLOSED
    generation: int = 0  # a new one with each change of state: outcomes from before do not count
    trips: int = 0  # in a row
    open_until: float = 0.0
    needed_until: float = 0.0  # until then it is open even if nobody else has room
    healthy_since: float = 0.0  # when it closed, or a trip was last forgiven
    forced: bool = False  # opened by hand: it stays open until it is closed by hand
    suspended: str | None = None  # the reason of a trip that is not carried out, for too many are out
    probe: Permit | None = None  # that is out
    probe_until: float | None = None  # its lease ends here
    failed_probes: int = 0  # since anything succeeded: of a dead replica all do, of a flaky one few in a row
    probe_successes: int = 0  # or those in a row while a trip waits


@dataclass(slots=True)
class BreakerBoard:
    """The breakers of one model's replicas, as one router sees them. Pure but for ``on_transition``."""

    settings: BreakerSettings
    clock: Clock
    rng: random.Random
    on_transition: Callable[[Transition], None] = lambda _transition: None
    # Grows whenever an answer of ``admits`` may have changed by more than time. Generations are taken from
    # it: a replica that comes back under its id has none of those that permits of the dead one carry.
    version: int = 0
    _breakers: dict[ReplicaId, Breaker] = field(default_factory=dict)
    _waiting_trips: dict[ReplicaId, None] = field(default_factory=dict)  # the oldest first

    def sync(self, ids: Collection[ReplicaId], *, forced_open: Collection[ReplicaId] = ()) -> None:
        """Those that are gone leave nothing behind. ``forced_open``: by hand, before they were known here."""
        for gone in self._breakers.keys() - set(ids):
            del self._breakers[gone]
            self._waiting_trips.pop(gone, None)
        for replica_id in ids:
            if replica_id not in self._breakers:
                self.version += 1
                self._breakers[replica_id] = Breaker(
                    TripPolicy(self.settings), generation=self.version, healthy_since=self.clock.now()
                )
                if replica_id in forced_open:
                    self.act(replica_id, "open")
        self._carry_out_waiting_trips()

    # --- Questions -----------------------------------------------------------------------------------

    def admits(self, replica_id: ReplicaId) -> bool:
        """Whether it may be sent a request now. Half open is reached here, when the time has come."""
        breaker, now = self._breakers[replica_id], self.clock.now()
        if breaker.state is BreakerState.CLOSED:
            return True
        if breaker.state is BreakerState.OPEN:
            if breaker.forced or now < breaker.open_until:
                return False
            self._half_open(replica_id, breaker, "its time has come")
        return _may_probe(breaker, now)

    def state(self, replica_id: ReplicaId) -> BreakerState:
        self.admits(replica_id)
        return self._breakers[replica_id].state

    def wants_probe(self, replica_id: ReplicaId) -> bool:
        return self.admits(replica_id) and self._breakers[replica_id].state is BreakerState.HALF_OPEN

    def needed(self) -> None:
        """Requests wait for which nobody else has room: try those that are open, each after the time of a
        first trip, or up to that of a third when probes have failed in a row."""
        now = self.clock.now()
        for replica_id, breaker in self._breakers.items():
            if breaker.state is BreakerState.OPEN and not breaker.forced and now >= breaker.needed_until:
                self._half_open(replica_id, breaker, "requests wait, and nobody else has room")

    def open_ends(self) -> list[float]:
        """When the open ones will let a request through."""
        return [breaker.open_until for breaker in self._open() if not breaker.forced]

    def next_change(self) -> float:
        """When an answer of :meth:`admits` may next change by time alone; inf: never."""
        times = [b.open_until for b in self._open() if not b.forced]
        times += [b.probe_until for b in self._breakers.values() if b.probe_until is not None]
        now = self.clock.now()
        return min((time for time in times if time > now), default=float("inf"))

    def refusing(self, ids: Collection[ReplicaId]) -> int:
        return sum(not self.admits(replica_id) and not self._probing(replica_id) for replica_id in ids)

    # --- Requests ------------------------------------------------------------------------------------

    def take(self, replica_id: ReplicaId, expires_at: float) -> Permit:
        """Leave for one request, which has to be there by ``expires_at``."""
        breaker = self._breakers[replica_id]
        probe = breaker.state is BreakerState.HALF_OPEN and _may_probe(breaker, self.clock.now())
        permit = Permit(replica_id, breaker.generation, probe)
        if probe:
            breaker.probe, breaker.probe_until = permit, expires_at
        return permit

    def settle(self, permit: Permit, outcome: Outcome) -> None:
        """What became of it. Outcomes from before the last change of state are ignored."""
        breaker = self._breakers.get(permit.replica_id)
        if breaker is None:
            return
        now = self.clock.now()
        if permit.generation != breaker.generation:
            return
        if permit is breaker.probe:  # and not one whose lease had ended before the next was let out
            breaker.probe = breaker.probe_until = None
            self.version += 1
        if outcome is Outcome.SUCCESS:
            self._succeeded(permit, breaker, now)
        elif outcome is Outcome.FAILURE:
            self._failed(permit.replica_id, breaker, now)

    def health_passed(self, replica_id: ReplicaId) -> None:
        """The replica answers its health check: good enough to try it, not to trust it."""
        breaker = self._breakers.get(replica_id)
        if breaker is not None and breaker.state is BreakerState.OPEN and not breaker.forced:
            self._half_open(replica_id, breaker, "a health check passed")

    # --- By hand -------------------------------------------------------------------------------------

    def act(self, replica_id: ReplicaId, action: str) -> None:
        """``open``, ``close`` or ``reset``. Raises :class:`InvalidRequest` for anything else."""
        breaker = self._breakers[replica_id]
        if action == "open":
            self._withdraw(replica_id, breaker)
            breaker.forced = True  # before anybody who is told of the change asks
            self._change(replica_id, breaker, BreakerState.OPEN, "opened by hand")
        elif action in ("close", "reset"):
            if action == "reset":
                breaker.trips = 0
            self._close(replica_id, breaker, "closed by hand" if action == "close" else "reset by hand")
        else:
            raise InvalidRequest("action: must be open, close or reset", param="action")
        self._carry_out_waiting_trips()

    # --- States --------------------------------------------------------------------------------------

    def _succeeded(self, permit: Permit, breaker: Breaker, now: float) -> None:
        replica_id = permit.replica_id
        breaker.failed_probes = 0
        if breaker.state is BreakerState.HALF_OPEN:
            breaker.probe_successes += permit.probe  # others were sent in spite of it
            if breaker.probe_successes >= self.settings.success_threshold:
                self._close(replica_id, breaker, f"{breaker.probe_successes} probes succeeded")
                self._carry_out_waiting_trips()
            return
        if breaker.state is BreakerState.OPEN:  # sent in spite of it; it closes by probes alone
            return
        breaker.policy.success(now)
        self._forgive(breaker, now)
        if replica_id in self._waiting_trips:
            breaker.probe_successes += 1
            if breaker.probe_successes >= self.settings.success_threshold:  # it has recovered meanwhile
                self._withdraw(replica_id, breaker)

    def _failed(self, replica_id: ReplicaId, breaker: Breaker, now: float) -> None:
        if breaker.state is BreakerState.HALF_OPEN:
            breaker.failed_probes += 1
            self._trip(replica_id, breaker, "a probe failed")
            return
        if breaker.state is BreakerState.OPEN:  # sent in spite of it, and rightly refused: not for less time
            breaker.open_until = max(breaker.open_until, now + self._open_time(breaker))
            self._not_before(breaker, now)
            return
        breaker.probe_successes = 0
        self._forgive(breaker, now)
        reason = breaker.policy.failure(now)
        if reason is None:
            return
        if self._may_eject():
            self._trip(replica_id, breaker, reason)
        elif replica_id not in self._waiting_trips:
            breaker.suspended = reason
            self._waiting_trips[replica_id] = None

    def _may_eject(self) -> bool:
        """Half of them at the most, and never the last one."""
        count = len(self._breakers)
        ejected = sum(b.state is not BreakerState.CLOSED for b in self._breakers.values())
        return ejected < max(1, count // 2) and ejected < count - 1

    def _carry_out_waiting_trips(self) -> None:
        while self._waiting_trips and self._may_eject():
            replica_id = next(iter(self._waiting_trips))
            del self._waiting_trips[replica_id]
            breaker = self._breakers[replica_id]
            reason, breaker.suspended = breaker.suspended, None
            self._trip(replica_id, breaker, f"{reason}, and it was its turn")

    def _withdraw(self, replica_id: ReplicaId, breaker: Breaker) -> None:
        self._waiting_trips.pop(replica_id, None)
        breaker.suspended = None
        breaker.probe_successes = 0

    def _trip(self, replica_id: ReplicaId, breaker: Breaker, reason: str) -> None:
        breaker.trips += 1
        breaker.forced = False
        now = self.clock.now()
        breaker.open_until = now + self._open_time(breaker)
        self._not_before(breaker, now)
        self._change(replica_id, breaker, BreakerState.OPEN, reason)

    def _half_open(self, replica_id: ReplicaId, breaker: Breaker, reason: str) -> None:
        self._change(replica_id, breaker, BreakerState.HALF_OPEN, reason)

    def _close(self, replica_id: ReplicaId, breaker: Breaker, reason: str) -> None:
        breaker.forced = False
        self._withdraw(replica_id, breaker)
        breaker.healthy_since = self.clock.now()
        self._change(replica_id, breaker, BreakerState.CLOSED, reason)

    def _change(self, replica_id: ReplicaId, breaker: Breaker, after: BreakerState, reason: str) -> None:
        before, breaker.state = breaker.state, after
        self.version += 1
        breaker.generation = self.version
        breaker.probe = breaker.probe_until = None
        breaker.probe_successes = 0
        breaker.policy.clear()
        if before is not after:
            self.on_transition(Transition(replica_id, before, after, reason))

    def _not_before(self, breaker: Breaker, now: float) -> None:
        """Even if it is needed."""
        times = max(1, min(breaker.failed_probes, _NEEDED_TRIPS))
        open_s = open_for_s(times, self.settings, self.rng)
        breaker.needed_until = min(breaker.open_until, now + open_s)

    def _open_time(self, breaker: Breaker) -> float:
        return open_for_s(max(1, breaker.trips), self.settings, self.rng)

    def _forgive(self, breaker: Breaker, now: float) -> None:
        forgiven = int((now - breaker.healthy_since) // _FORGIVENESS_S)
        if forgiven > 0:
            breaker.trips = max(0, breaker.trips - forgiven)
            breaker.healthy_since += forgiven * _FORGIVENESS_S

    def _open(self) -> list[Breaker]:
        return [b for b in self._breakers.values() if b.state is BreakerState.OPEN]

    def _probing(self, replica_id: ReplicaId) -> bool:
        return self._breakers[replica_id].state is BreakerState.HALF_OPEN


def _may_probe(breaker: Breaker, now: float) -> bool:
    return breaker.probe_until is None or now >= breaker.probe_until
