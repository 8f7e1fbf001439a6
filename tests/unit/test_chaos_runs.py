"""A chaos run is good only if enough happened, the health actor did its work, and every answer was right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import pytest

from blaze.engine_config import SimulatorConfig
from blaze.engines.faults import Faults
from blaze.engines.simulator import SimulatorEngine
from tests.api_bench import ApiBench
from tests.chaos.effects import Effects, pauses_of
from tests.chaos.injector import Injector
from tests.chaos.models import SimulatedModel
from tests.chaos.peace import Settled, settle
from tests.chaos.replacement import Replacement
from tests.chaos.runner import Result
from tests.chaos.schedule import Kind, PlannedFault, SeenReplica
from tests.chaos.score import score
from tests.unit.test_chaos_scores import WELL, EnginePool
from tests.waiting import until

A, B, C = (SeenReplica(name, "m", healthy=True) for name in "abc")
STALL_AFTER_S, WITHIN_S = 5.0, 10.0


def replacement(*, only_with_work: bool = False) -> Replacement:
    return Replacement(
        A,
        {"a", "b"},
        now=100.0,
        only_with_work=only_with_work,
        stall_after_s=STALL_AFTER_S,
        within_s=WITHIN_S,
    )


def test_a_replica_is_replaced_when_its_process_has_ended_and_a_new_one_is_ready() -> None:
    found = replacement()
    found.look(104, [A, B], has_ended=False)
    found.look(106, [B], has_ended=True)
    found.look(107, [B, replace(C, healthy=False)], has_ended=True)
    found.look(108, [B, replace(C, model="other")], has_ended=True)
    assert not found.is_there
    found.look(109, [B, C], has_ended=True)
    assert (found.is_there, found.is_overdue, found.replaced_s) == (True, False, 4.0)
    assert found.told == "ended 1.0 s, replaced 4.0 s after stall_after_s"


def test_who_is_replaced_too_late_is_overdue_too() -> None:
    found = replacement()
    found.look(101 + STALL_AFTER_S + WITHIN_S, [B, C], has_ended=True)
    assert (found.is_there, found.is_overdue) == (True, True)


@pytest.mark.parametrize(
    ("seen", "has_ended"),
    [([A, B], False), ([A, B, C], False), ([B], False), ([B], True), ([], True)],
    ids=["it is left", "another one came", "it is only forgotten", "nobody came", "no status"],
)
def test_who_is_not_replaced_in_time_is_overdue(seen: Sequence[SeenReplica], has_ended: bool) -> None:
    found = replacement()
    found.look(100 + STALL_AFTER_S + WITHIN_S, seen, has_ended=has_ended)
    assert not found.is_overdue
    found.look(101 + STALL_AFTER_S + WITHIN_S, seen, has_ended=has_ended)
    assert (found.is_overdue, found.is_there) == (True, False)
    assert "not replaced within 10 s" in found.told


def test_the_time_of_a_wedged_replica_begins_when_it_has_had_work_for_long_enough() -> None:
    found, at_work = replacement(only_with_work=True), [replace(A, working=True), B]
    found.look(150, [A, B], has_ended=False)
    assert (found.is_idle, found.is_overdue) == (True, False)
    assert found.told == "had too little work to be found out"
    found.look(154, at_work, has_ended=False)
    assert not found.is_idle
    found.look(160, [A, B], has_ended=False)
    assert found.is_idle
    found.look(161, at_work, has_ended=False)
    assert not found.is_idle
    # It is taken off the work that it does not get on with; that does not stop the time.
    found.look(171, [A, B], has_ended=False)
    assert not found.is_overdue
    found.look(171.5, [A, B], has_ended=False)
    assert found.is_overdue


class FakeProcess(psutil.Process):
    def __init__(self, pid: int) -> None:
        self.number, self.frozen, self.ended = pid, False, False

    @property
    def pid(self) -> int:
        return self.number

    def is_running(self) -> bool:
        return not self.ended

    def status(self) -> Any:
        return psutil.STATUS_STOPPED if self.frozen else psutil.STATUS_SLEEPING

    def suspend(self) -> None:
        self.frozen = True

    def kill(self) -> None:
        self.ended = True


class FakeEffects(Effects):
    """Three replicas of one model, and no health actor but the test."""

    def __init__(self) -> None:
        self.processes = {name: FakeProcess(number) for number, name in enumerate("abc")}
        self.faults: dict[str, Faults] = {}
        self.working = True
        self.pauses: dict[str, float] = {}

    def seen(self) -> list[SeenReplica]:
        return [
            SeenReplica(
                name,
                "m",
                healthy=not process.frozen,
                working=self.working,
                pause_s=self.pauses.get(name, 0.0),
            )
            for name, process in self.processes.items()
            if not process.ended
        ]

    def process(self, replica_id: str) -> FakeProcess:
        return self.processes[replica_id]

    def told_of(self, model: str) -> list[str]:
        return ["nothing was decided"]

    async def set_faults(self, model: str, replica_id: str, faults: Faults) -> None:
        self.faults[replica_id] = faults


@pytest.fixture
def effects() -> FakeEffects:
    return FakeEffects()


def injector_of(effects: FakeEffects, *, within_s: float = 0.05) -> Injector:
    return Injector(
        effects,
        [SimulatedModel("m")],
        stall_after_s=0.02,
        replaced_within_s=within_s,
        look_every_s=0.001,
        say=lambda text: None,
    )


def fault(kind: Kind) -> PlannedFault:
    return PlannedFault(at_s=1.0, kind=kind, model="m", draw=0.0, lasts_s=0.01)


UNHEALTHY = pytest.mark.parametrize("kind", [Kind.STOP, Kind.HANG])


@UNHEALTHY
async def test_nobody_but_the_health_actor_ends_who_is_frozen_or_wedged_and_that_it_does_not_is_counted(
    effects: FakeEffects, kind: Kind
) -> None:
    injector = injector_of(effects)
    await injector.inject(fault(kind))
    await injector.undo_all()
    assert injector.not_replaced == 1
    process = effects.processes["a"]
    assert (process.frozen, "a" in effects.faults) == (kind is Kind.STOP, kind is Kind.HANG)
    assert effects.faults.get("a", Faults(wedged=True)) == Faults(wedged=True)  # and nobody has healed it
    assert not process.ended
    injector.clean_up()
    assert process.ended
    assert [effects.processes[name].ended for name in "bc"] == [False, False]


@UNHEALTHY
async def test_who_is_replaced_is_waited_for_and_not_counted(effects: FakeEffects, kind: Kind) -> None:
    injector = injector_of(effects, within_s=30.0)
    await injector.inject(fault(kind))
    undone = asyncio.create_task(injector.undo_all())
    effects.processes["a"].kill()
    await until(lambda: effects.seen()[0].id != "a")
    assert not undone.done()
    effects.processes["d"] = FakeProcess(7)
    await undone
    assert injector.not_replaced == 0


async def test_a_wedged_replica_that_nobody_sends_anything_is_no_fault_of_the_health_actor(
    effects: FakeEffects,
) -> None:
    injector = injector_of(effects)
    effects.working = False
    await injector.inject(fault(Kind.HANG))
    await injector.undo_all()
    assert injector.not_replaced == 0
    injector.clean_up()
    assert effects.processes["a"].ended


@UNHEALTHY
async def test_nobody_is_made_unhealthy_whom_the_health_actor_has_said_it_will_not_restart_yet(
    effects: FakeEffects, kind: Kind
) -> None:
    injector = injector_of(effects)
    effects.pauses = {"a": 10.0, "b": 10.0, "c": 0.01}
    await injector.inject(fault(kind))
    assert [name for name in "abc" if effects.processes[name].frozen or name in effects.faults] == ["c"]
    await injector.inject(fault(kind))
    assert (sum(injector.done.values()), injector.skipped) == (1, 1)
    await injector.inject(fault(Kind.KILL))  # that has nothing to do with it
    assert effects.processes["a"].ended
    await injector.undo_all()
    injector.clean_up()


def test_for_how_long_nobody_is_restarted_in_a_place_is_what_the_health_actor_says() -> None:
    reason = "no heartbeat for 5.1 s (restart {} of 6, no other for {} s)"
    replaced = "the replacement is ready, 3.0 s after the restart"
    events = [
        {"replica_id": "a", "after": "restarting", "reason": reason.format(1, 5), "age_s": 40.0},
        {"replica_id": "a", "after": "gone", "reason": "its process has ended", "age_s": 39.0},
        {"replica_id": "c", "after": "restarting", "reason": reason.format(1, 5), "age_s": 7.0},
        {"replica_id": "b", "after": "restarting", "reason": reason.format(2, 10), "age_s": 2.5},
        {"replica_id": "b", "after": "replaced", "reason": replaced, "age_s": 1.0},
        {"replica_id": "b", "after": "open", "reason": None, "age_s": 0.5},
    ]
    places = {"a": ("m", 0), "b": ("m", 0), "c": ("m", 1)}
    assert pauses_of(events, places) == {("m", 0): 7.5, ("m", 1): 0.0}


async def test_faults_that_pass_are_undone(effects: FakeEffects) -> None:
    injector = injector_of(effects)
    await injector.inject(fault(Kind.SLOW))
    assert effects.faults["a"].slowdown > 1
    await injector.undo_all()
    assert effects.faults["a"] == Faults()
    injector.clean_up()
    assert not effects.processes["a"].ended


GOOD = Result(
    seed=1,
    score=score([], began_at=0),
    faults={"kill": 6},
    skipped=5,
    not_replaced=0,
    longest_restart_s=3.0,
    right=96,
    least_right=96.0,
    resumed=3,
    settled_s=1.0,
    unsettled=(),
)


def test_a_run_is_good_when_enough_happened_and_nothing_came_of_it() -> None:
    assert (GOOD.is_good, GOOD.shortfalls) == (True, ())


@pytest.mark.parametrize(
    "change",
    [
        {"not_replaced": 1},
        {"unsettled": ("a is dead",)},
        {"right": 95},
        {"right": 0, "least_right": 0.0},
        {"skipped": 6},
        {"faults": {}, "skipped": 0},
    ],
)
def test_a_run_that_shows_nothing_or_in_which_nobody_was_replaced_is_not_good(change: dict[str, Any]) -> None:
    assert not replace(GOOD, **change).is_good


class SettlingEffects(Effects):
    """Unwell once, and well from then on."""

    def __init__(self) -> None:
        before: dict[str, Any] = {"replicas": [], "models": []}
        self.statuses = iter([before, WELL])

    def status(self) -> dict[str, Any]:
        return next(self.statuses)

    def is_deployed(self) -> bool:
        return True


async def settled(model: SimulatedModel, engine: SimulatorEngine) -> Settled:
    async with ApiBench(EnginePool(a=engine, b=engine)) as bench:
        return await settle(SettlingEffects(), [model], bench.http, "", within_s=30, every_s=0.0)


async def test_answers_are_checked_in_peace_too() -> None:
    model = SimulatedModel("m", replicas=2, tokens=4, inter_token_ms=0)
    right = await settled(model, SimulatorEngine(SimulatorConfig(**model.options)))
    assert right.unwell == ()
    assert [record.is_right for record in right.records] == [True] * len(right.records)
    wrong = await settled(model, SimulatorEngine(SimulatorConfig(**{**model.options, "seed": 99})))
    assert len(wrong.records) == len(right.records) > 0
    assert [record.wrong is not None for record in wrong.records] == [True] * len(wrong.records)
