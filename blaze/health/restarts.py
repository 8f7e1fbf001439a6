"""Which replica is ended next, and why: pure, with an injected clock.

Only a replica that serves nobody is ever ended: one that is silent, has failed, or has work and does not get
on with it. So the last one that is well is never among them. Serve's controller brings the new one.
"""

from __future__ import annotations

from dataclasses import dataclass

from blaze.backoff import Backoff
from blaze.clock import Clock
from blaze.health.journal import Journal
from blaze.health.settings import HealthSettings
from blaze.health.slots import Pardon, Replicas, Slot, slot_of
from blaze.health.vitals import Ailment, AilmentKind, Vitals
from blaze.reports import ReplicaState
from blaze.types import ReplicaId

_STILL_THERE_S = 10.0  # a heartbeat so long after it was ended: it was not


@dataclass(frozen=True, slots=True)
class Kill:
    """A replica that is to be ended now."""

    replica_id: ReplicaId
    actor: str
    model: str
    ailment: Ailment


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about a replica; it stands above what its heartbeats say."""

    state: ReplicaState
    reason: str


@dataclass(slots=True)
class _Condemned:
    """Unhealthy, and to be ended when its turn comes."""

    slot: Slot
    since: float
    ailment: Ailment


@dataclass(frozen=True, slots=True)
class _Killed:
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class _Running:
    """A restart whose replacement is not ready yet."""

    victim: ReplicaId
    begun_at: float
    known: frozenset[ReplicaId]  # replicas of the model that were there


class Restarts:
    """One restart at a time for each model, and for each slot fewer and fewer of them."""

    def __init__(self, settings: HealthSettings, clock: Clock, journal: Journal) -> None:
        self._settings = settings
        self._clock = clock
        self._journal = journal
        self._condemned: dict[ReplicaId, _Condemned] = {}
        self._killed: dict[ReplicaId, _Killed] = {}
        self._running: dict[str, _Running] = {}  # by model
        self._backoffs: dict[Slot, Backoff] = {}
        self._pardon = Pardon(settings.forgive_after_s, clock)

    def decide(self, replicas: Replicas) -> tuple[Kill, ...]:
        """``replicas``: all that are known now. What is returned is taken to be done, unless
        :meth:`not_ended` says otherwise."""
        now = self._clock.now()
        for replica_id in (self._condemned.keys() | self._killed.keys()) - replicas.keys():
            self.gone(replica_id)
        self._judge(replicas, now)
        self._forgive(replicas, now)
        self._settle(replicas, now)
        in_turn = sorted(self._condemned, key=lambda replica_id: self._condemned[replica_id].since)
        return tuple(self._kill(id, replicas, now) for id in in_turn if self._may_be_ended(id, replicas, now))

    def verdict(self, replica_id: ReplicaId) -> Verdict | None:
        killed, condemned = self._killed.get(replica_id), self._condemned.get(replica_id)
        if killed is not None:
            return Verdict(ReplicaState.RESTARTING, killed.reason)
        if condemned is None:
            return None
        if self._is_given_up(condemned.slot):
            attempts = self._backoffs[condemned.slot].attempts
            return Verdict(
                ReplicaState.DEAD, f"given up after {attempts} restarts: {condemned.ailment.reason}"
            )
        return Verdict(ReplicaState.SUSPECT, condemned.ailment.reason)

    def not_ended(self, replica_id: ReplicaId) -> None:
        """Ending it has failed. That was an attempt, too: the next one comes after a pause."""
        self._killed.pop(replica_id, None)
        self._running = {m: running for m, running in self._running.items() if running.victim != replica_id}

    def gone(self, replica_id: ReplicaId) -> None:
        """It has ended, by this or in another way."""
        self._condemned.pop(replica_id, None)
        self._killed.pop(replica_id, None)

    def forget(self, model: str, first_rank: int) -> None:
        """The model's slots from this rank on are no more, or begin anew."""
        for slot in [slot for slot in self._backoffs if slot[0] == model and slot[1] >= first_rank]:
            del self._backoffs[slot]
            self._pardon.drop(slot)

    # --- A decision, step by step --------------------------------------------------------------------

    def _judge(self, replicas: Replicas, now: float) -> None:
        for replica_id, vitals in replicas.items():
            killed = self._killed.get(replica_id)
            if killed is not None:
                if vitals.heard_at <= killed.at + _STILL_THERE_S:
                    continue
                self.not_ended(replica_id)
            ailment = vitals.ailment(now)
            if ailment is None:
                self._condemned.pop(replica_id, None)  # it goes on after all
            elif replica_id in self._condemned:
                self._condemned[replica_id].ailment = ailment
            else:
                self._condemned[replica_id] = _Condemned(slot_of(vitals.heartbeat), now, ailment)

    def _forgive(self, replicas: Replicas, now: float) -> None:
        """A slot whose replica has been well for long begins anew."""

        def is_well(replica_id: ReplicaId, vitals: Vitals) -> bool:
            return vitals.state(now) is ReplicaState.READY and self.verdict(replica_id) is None

        for slot in self._pardon.due(replicas, is_well):
            del self._backoffs[slot]

    def _settle(self, replicas: Replicas, now: float) -> None:
        """A restart is over when somebody new is ready, or when that takes too long."""
        for model, running in tuple(self._running.items()):
            came = any(
                vitals.heartbeat.model == model
                and replica_id not in running.known
                and vitals.state(now) is ReplicaState.READY
                for replica_id, vitals in replicas.items()
            )
            took_s = now - running.begun_at
            if came:
                del self._running[model]
                reason = f"the replacement is ready, {took_s:.1f} s after the restart"
                self._journal.note(model, running.victim, "restarting", "replaced", reason)
            elif took_s > self._settings.replacement_s:
                del self._running[model]

    def _may_be_ended(self, replica_id: ReplicaId, replicas: Replicas, now: float) -> bool:
        condemned = self._condemned[replica_id]
        heartbeat = replicas[replica_id].heartbeat
        if not heartbeat.actor or heartbeat.model in self._running or self._is_given_up(condemned.slot):
            return False
        backoff = self._backoffs.get(condemned.slot)
        if backoff is not None and backoff.wait_s > 0:
            return False
        # Nothing runs any more on who was silent for so long; of the others Routers have to hear first.
        silent = condemned.ailment.kind is AilmentKind.SILENT
        return silent or now - condemned.since >= self._settings.grace_s

    def _kill(self, replica_id: ReplicaId, replicas: Replicas, now: float) -> Kill:
        condemned = self._condemned.pop(replica_id)
        heartbeat, settings = replicas[replica_id].heartbeat, self._settings
        backoff = self._backoffs.get(condemned.slot)
        if backoff is None:
            backoff = self._backoffs[condemned.slot] = Backoff(
                self._clock,
                first_s=settings.backoff_s,
                most_s=settings.max_backoff_s,
                max_attempts=settings.max_restarts,
            )
        self._pardon.hold(condemned.slot)
        backoff.attempt()
        pause_s = backoff.pause()
        known = frozenset(id for id, vitals in replicas.items() if vitals.heartbeat.model == heartbeat.model)
        self._running[heartbeat.model] = _Running(replica_id, now, known)
        counted = f"restart {backoff.attempts} of {settings.max_restarts}, no other for {pause_s:g} s"
        self._killed[replica_id] = _Killed(now, f"{condemned.ailment.reason} ({counted})")
        self._journal.count_restart(heartbeat.model, condemned.ailment.kind)
        return Kill(replica_id, heartbeat.actor, heartbeat.model, condemned.ailment)

    def _is_given_up(self, slot: Slot) -> bool:
        backoff = self._backoffs.get(slot)
        return backoff is not None and backoff.is_exhausted
