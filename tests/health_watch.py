"""A cluster as the health actor hears of it, second by second, with a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

from blaze.health.restarts import Kill
from blaze.health.settings import HealthSettings
from blaze.health.supervisor import Supervisor
from blaze.health.view import ReplicaHealth
from blaze.reports import ModelCondition, News, ReplicaCounters, ReplicaState, RouterReport
from blaze.types import ReplicaId
from tests.fakes import FakeClock
from tests.samples import heartbeat


@dataclass
class Patient:
    """One replica, and what is wrong with it."""

    id: ReplicaId
    model: str = "m"
    rank: int = 0
    fault: str = ""  # "frozen" | "wedged" | "failed" | "loading"
    steps: int = 0
    was_ready: bool = False


@dataclass
class HealthWatch:
    """``takes_s``: until a replica that was ended has a replacement, with the fault ``comes_back``."""

    settings: HealthSettings = field(default_factory=HealthSettings)
    takes_s: float | None = 2.0
    comes_back: str = ""
    patients: dict[ReplicaId, Patient] = field(default_factory=dict)
    kills: list[tuple[float, Kill]] = field(default_factory=list)
    arrivals: list[tuple[float, str]] = field(default_factory=list)  # of replicas that became ready: model
    router: bool = True

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.supervisor = Supervisor(self.settings, self.clock)
        self._started_at = self.clock.now()
        self._serial = count(1)
        self._suspects: tuple[ReplicaId, ...] = ()  # as the Router knows them: it has moved their work
        self._coming: list[tuple[float, Patient]] = []

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self.clock.now() - self._started_at

    def add(self, *ids: ReplicaId, model: str = "m") -> None:
        ranks = [p.rank for p in self.patients.values() if p.model == model]
        for rank, replica_id in enumerate(ids, start=max(ranks, default=-1) + 1):
            self.patients[replica_id] = Patient(replica_id, model, rank)

    def run(self, seconds: float) -> None:
        """So many rounds of heartbeats, one report and one decision each; kills are carried out."""
        for _ in range(round(seconds / self.settings.probe_period_s)):
            self.clock.advance(self.settings.probe_period_s)
            self._come()
            for patient in self.patients.values():
                self._beat(patient)
            if self.router:
                self._suspects = self.report()
            for kill in self.supervisor.decide():
                self.kills.append((self.now, kill))
                self.end(kill.replica_id)

    def report(self) -> tuple[ReplicaId, ...]:
        """A Router's, which has all of them in its live set. Who is suspect."""
        return self.news().suspects

    def news(self) -> News:
        """The answer to such a report."""
        counters = (
            ReplicaCounters(
                patient.id,
                patient.model,
                in_flight=0,
                weight=1.0,
                requests=0,
                failures=0,
                actor=f"actor-{patient.id}",
                suspect=patient.id in self._suspects,
            )
            for patient in self.patients.values()
        )
        return self.supervisor.report(RouterReport("router", (), tuple(counters)))

    def replace_actor(self) -> None:
        """The health actor dies, and comes back without knowing anything."""
        self.supervisor = Supervisor(self.settings, self.clock)

    def end(self, replica_id: ReplicaId) -> None:
        """Its process ends, and Serve brings another one."""
        gone = self.patients.pop(replica_id)
        self.supervisor.ended(replica_id)
        if self.takes_s is not None:
            new = Patient(f"{gone.model}-{next(self._serial)}", gone.model, gone.rank, self.comes_back)
            self._coming.append((self.now + self.takes_s, new))

    def _come(self) -> None:
        for entry in tuple(self._coming):
            if entry[0] <= self.now:
                self._coming.remove(entry)
                self.patients[entry[1].id] = entry[1]

    def _beat(self, patient: Patient) -> None:
        if patient.fault == "frozen":
            return
        patient.steps += not patient.fault
        if patient.fault in ("", "wedged") and not patient.was_ready:
            patient.was_ready = True
            self.arrivals.append((self.now, patient.model))
        state = patient.fault if patient.fault in ("failed", "loading") else "busy"
        self.supervisor.heartbeat(
            heartbeat(
                patient.id,
                model=patient.model,
                rank=patient.rank,
                state=state,  # type: ignore[arg-type]
                running=int(state == "busy" and patient.id not in self._suspects),
                steps=patient.steps,
                actor=f"actor-{patient.id}",
            )
        )

    # --- What is seen --------------------------------------------------------------------------------

    @property
    def killed(self) -> list[ReplicaId]:
        return [kill.replica_id for _, kill in self.kills]

    def replica(self, replica_id: ReplicaId) -> ReplicaHealth | None:
        found = [r for r in self.supervisor.view().replicas if r.heartbeat.replica_id == replica_id]
        return found[0] if found else None

    def state(self, replica_id: ReplicaId) -> ReplicaState | None:
        replica = self.replica(replica_id)
        return None if replica is None else replica.state

    def events(self, replica_id: ReplicaId) -> list[tuple[str, str]]:
        events = self.supervisor.view().events
        return [(event.before, event.after) for event in events if event.replica_id == replica_id]

    def condition(self, model: str = "m") -> ModelCondition:
        return next(c for c in self.supervisor.view().conditions if c.model == model)
