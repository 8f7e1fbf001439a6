"""Heartbeats and reports in, one picture of the cluster out, and what is to be done about it."""

from __future__ import annotations

from collections.abc import Mapping

from blaze.clock import Clock
from blaze.control import Change, Control
from blaze.health.conditions import DeploymentFacts, condition_of
from blaze.health.controls import ControlKeeper
from blaze.health.crash_loops import CrashLoops
from blaze.health.journal import Journal
from blaze.health.restarts import Kill, Restarts
from blaze.health.router_reports import RouterReports
from blaze.health.settings import HealthSettings
from blaze.health.slots import Vacancies, slot_of
from blaze.health.unheard import Unheard
from blaze.health.view import ClusterView, ReplicaHealth
from blaze.health.vitals import AilmentKind, Vitals
from blaze.reports import Heartbeat, ModelCondition, News, ReplicaState, RouterReport
from blaze.types import ReplicaId

_LATE_S = 5.0  # a heartbeat may come so long after its replica has ended
_UNWELL = (ReplicaState.SUSPECT, ReplicaState.RESTARTING, ReplicaState.DEAD)  # nobody is sent there


class Supervisor:
    """Collects heartbeats of replicas and reports of Routers. Who falls silent is suspect; who stays silent,
    or does not get on with its work, is restarted; who has ended is forgotten."""

    def __init__(self, settings: HealthSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._journal = Journal(clock)
        self._restarts = Restarts(settings, clock, self._journal)
        self._crash_loops = CrashLoops(settings, clock)
        self._vacancies = Vacancies(settings.forgive_after_s, clock)
        self._vitals: dict[ReplicaId, Vitals] = {}
        self._unheard = Unheard()  # of them, those that Routers alone speak of
        self._shown: dict[ReplicaId, ReplicaState] = {}
        self._ended: dict[ReplicaId, float] = {}  # and when that was found
        self._out_of_reach: set[ReplicaId] = set()  # they could not be ended
        self._reports = RouterReports(settings)
        self._control = ControlKeeper()
        self._facts: Mapping[str, DeploymentFacts] = {}  # by model
        self._conditions: dict[str, ModelCondition] = {}
        self._heard_at = self._awake_at = clock.now()

    # --- What comes in -------------------------------------------------------------------------------

    def awake(self) -> None:
        """Called often. Where that did not happen for long, this actor has itself stood still, and then
        everybody seems to have been silent."""
        now = self._clock.now()
        since, self._awake_at = now - self._awake_at, now
        if since > self._settings.absent_after_s:
            for vitals in self._vitals.values():
                vitals.excuse(since, now)

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        self.awake()
        replica_id, now = heartbeat.replica_id, self._clock.now()
        self._heard_at = now
        if replica_id in self._ended:
            if now - self._ended[replica_id] < _LATE_S:
                return  # its last one was still on the way
            del self._ended[replica_id]  # whoever said so was wrong
        self._unheard.discard(replica_id)
        if replica_id in self._vitals:
            self._vitals[replica_id].hear(heartbeat, now)
        else:
            self._vitals[replica_id] = Vitals(heartbeat, now, self._settings)

    def report(self, report: RouterReport) -> News:
        """Take a Router's account, and tell it what it should know."""
        self.awake()
        now = self._heard_at = self._clock.now()
        self._reports.take(report, now)
        self._control.learn(report.control)
        self._forget_the_gone(now)
        self._notice_unheard(now)
        return News(
            self._control.latest,
            self._reports.loads_beside(report.router_id, now),
            self._suspects(now),
            tuple(
                (id, vitals.heartbeat.engine.prefixes)
                for id, vitals in self._vitals.items()
                if vitals.heartbeat.engine.prefixes
            ),
            self._conditions_now(now),
            self._condemned(now),
        )

    def _notice_unheard(self, now: float) -> None:
        found = self._unheard.find(self._reports.fresh(now), self._vitals.keys() | self._ended.keys())
        for replica_id in [id for id in self._vitals if id in self._unheard and id not in found]:
            self._forget(replica_id)
        for replica_id, counters in found.items():
            if replica_id not in self._vitals:
                self._vitals[replica_id] = Vitals(self._unheard.stand_in(counters), now, self._settings)
            if counters.suspect:
                self._vitals[replica_id].doubt()

    def change(self, change: Change, known: Control) -> Control:
        """An operator's; every Router hears of it with its next report. ``known``: to who brings it."""
        return self._control.change(change, known)

    def _suspects(self, now: float) -> tuple[ReplicaId, ...]:
        """Also those that have ended, for as long as Routers may pick them."""
        unwell = (id for id, vitals in self._vitals.items() if self._health(vitals, now).state in _UNWELL)
        return (*unwell, *self._ended)

    def _condemned(self, now: float) -> tuple[ReplicaId, ...]:
        """Of those, the ones that are known to serve nobody. Of who is only silent that is not known: it may
        be this actor that is cut off."""
        found = (id for id, vitals in self._vitals.items() if self._is_condemned(id, vitals, now))
        return (*found, *self._ended)

    def _is_condemned(self, replica_id: ReplicaId, vitals: Vitals, now: float) -> bool:
        state, ailment = self._health(vitals, now).state, vitals.ailment(now)
        if state is ReplicaState.DEAD and replica_id not in self._out_of_reach:
            return True  # it has failed, or was given up
        if state in _UNWELL and ailment is not None and ailment.kind is not AilmentKind.SILENT:
            return True
        return state is ReplicaState.RESTARTING and not vitals.is_silent(now)

    def goodbye(self, replica_id: ReplicaId) -> None:
        """The replica is stopping in good order."""
        self._forget(replica_id)

    def load_in_s(self, model: str, rank: int) -> float:
        """How long a replica should wait before it loads: those before it may have died of it."""
        return self._crash_loops.wait_s((model, rank))

    def not_loaded(self, replica_id: ReplicaId, model: str, rank: int, why: str) -> None:
        """It could not load, and is about to end."""
        self._journal.note(model, replica_id, ReplicaState.STARTING, "gone", f"it could not load: {why}")
        self._crash_loops.died((model, rank), why, at_work=False)
        self._forget(replica_id)

    def learn(self, facts: Mapping[str, DeploymentFacts]) -> None:
        """What is said of the models' deployments, by model."""
        self._facts = facts
        for model, first_rank in self._vacancies.learn(facts):
            self._crash_loops.forget(model, first_rank)
            self._restarts.forget(model, first_rank)

    # --- What is done about it -----------------------------------------------------------------------

    def decide(self) -> tuple[Kill, ...]:
        """Called once a period: the replicas that are to be ended now."""
        self.awake()
        now = self._clock.now()
        # When nothing at all is heard, neither of replicas nor of Routers, it is this actor that is cut off.
        cut_off = now - self._heard_at > self._settings.suspect_after_s
        kills = () if cut_off else self._restarts.decide(self._vitals)
        self._crash_loops.look(self._vitals, now)
        for replica_id, vitals in self._vitals.items():
            health = self._health(vitals, now)
            before = self._shown.get(replica_id)
            if before is not None and before is not health.state:
                self._journal.note(
                    vitals.heartbeat.model, replica_id, before, health.state, health.reason or "heartbeats"
                )
            self._shown[replica_id] = health.state
        self._conditions_now(now)
        return kills

    def to_ask_after(self) -> tuple[Heartbeat, ...]:
        """The last heartbeats of replicas that may have ended: whoever knows says so by :meth:`ended`."""
        now = self._clock.now()
        return tuple(
            vitals.heartbeat
            for vitals in self._vitals.values()
            if vitals.heartbeat.actor
            and (vitals.is_silent(now) or self._health(vitals, now).state is ReplicaState.RESTARTING)
        )

    def ended(self, replica_id: ReplicaId) -> None:
        """Its process is gone."""
        vitals = self._vitals.get(replica_id)
        if vitals is not None:
            beat, before = vitals.heartbeat, self._health(vitals, self._clock.now()).state
            self._journal.note(beat.model, replica_id, before, "gone", "its process has ended")
            if before is not ReplicaState.RESTARTING and replica_id not in self._unheard:
                at_work = beat.engine.work_pending > 0 or self._reports.had_requests_on(replica_id)
                self._crash_loops.died(slot_of(beat), "the process has ended by itself", at_work=at_work)
            self._ended[replica_id] = self._clock.now()
            self._forget(replica_id)

    def not_ended(self, replica_id: ReplicaId, why: str) -> None:
        """What :meth:`decide` wanted could not be done."""
        vitals = self._vitals.get(replica_id)
        if vitals is not None:
            self._restarts.not_ended(replica_id)
            self._out_of_reach.add(replica_id)
            state = self._health(vitals, self._clock.now()).state
            reason = f"could not be ended: {why}"
            self._journal.note(vitals.heartbeat.model, replica_id, ReplicaState.RESTARTING, state, reason)
            self._shown[replica_id] = state

    def _forget(self, replica_id: ReplicaId) -> None:
        self._vitals.pop(replica_id, None)
        self._unheard.discard(replica_id)
        self._shown.pop(replica_id, None)
        self._out_of_reach.discard(replica_id)
        self._restarts.gone(replica_id)

    # --- What is shown -------------------------------------------------------------------------------

    def view(self) -> ClusterView:
        now = self._clock.now()
        self._forget_the_gone(now)
        heard = [vitals for id, vitals in self._vitals.items() if id not in self._unheard]
        replicas = [self._health(vitals, now) for vitals in heard]
        replicas.sort(key=lambda replica: (replica.heartbeat.model, replica.heartbeat.rank))
        return ClusterView(
            replicas=tuple(replicas),
            reports=self._reports.fresh(now),
            silent=self._reports.silent(now),
            events=self._journal.events(),
            restarts=self._journal.restarts(),
            conditions=self._conditions_now(now),
        )

    def _health(self, vitals: Vitals, now: float) -> ReplicaHealth:
        verdict = self._restarts.verdict(vitals.heartbeat.replica_id)
        silent_s = now - vitals.heard_at
        if verdict is not None:
            return ReplicaHealth(vitals.heartbeat, verdict.state, silent_s, verdict.reason)
        state, reason = vitals.state(now), vitals.slow_load(now)
        wait_s = self._crash_loops.wait_s(slot_of(vitals.heartbeat))
        if vitals.is_silent(now):
            reason = f"no heartbeat for {silent_s:.1f} s"
        elif state is ReplicaState.STARTING and wait_s > 0:
            reason = f"waits for {wait_s:.0f} s before it loads, for the ones before it have died"
        return ReplicaHealth(vitals.heartbeat, state, silent_s, reason)

    def _conditions_now(self, now: float) -> tuple[ModelCondition, ...]:
        """Of the models that are known. A new one that fails is an event."""
        found = [self._health(vitals, now) for vitals in self._vitals.values()]
        conditions: dict[str, ModelCondition] = {}
        for model in sorted(self._facts.keys() | {health.heartbeat.model for health in found}):
            ours = [health for health in found if health.heartbeat.model == model]
            given_up = [h.reason for h in ours if h.state is ReplicaState.DEAD and h.reason]
            slow = (v.slow_load(now) for v in self._vitals.values() if v.heartbeat.model == model)
            condition = condition_of(
                model,
                (h.state for h in ours),
                self._facts.get(model),
                given_up=given_up,
                crash_loops=self._crash_loops.failing(model),
                slow_loads=tuple(filter(None, slow)),
            )
            before, after = self._conditions.get(model, condition).state, condition.state
            if before != after and "failing" in (before, after):
                self._journal.note(model, "", before, after, condition.detail or "replicas are there")
            conditions[model] = condition
        self._conditions = conditions
        return tuple(conditions.values())

    # --- What is forgotten ---------------------------------------------------------------------------

    def _forget_the_gone(self, now: float) -> None:
        limit, routed_to = self._settings.stall_after_s, self._reports.routed_to()
        # Who can be ended is, before that. Who is silent is suspect for as long as Routers may pick it.
        silent = [id for id, vitals in self._vitals.items() if now - vitals.heard_at > 2 * limit]
        for replica_id in silent:
            if replica_id not in routed_to:
                self._forget(replica_id)
        for replica_id in [id for id, at in self._ended.items() if now - at > limit]:
            if replica_id not in routed_to:
                del self._ended[replica_id]
        self._reports.forget_silent(now)
        self._control.forget_unseen(self._vitals.keys() | self._reports.routed_to(), now)
