"""The dispatcher under any schedule of requests, answers, failures, cancels and lost replicas."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from blaze.errors import EngineFailure, InvalidRequest, Overloaded, ReplicaLost
from blaze.types import Event, Started, TextDelta
from tests.fakes import FakeCall, FakePool, Script, answer
from tests.routing_bench import RoutingBench
from tests.samples import collect, terminals, text_request

BEGINNING = (Started((1,)), TextDelta(0, "be", (5,)))
SCRIPTS: dict[str, Script] = {
    "success": answer(),
    "long success": [BEGINNING, *answer()],
    "refused": [InvalidRequest("no")],
    "busy": [Overloaded("full")],
    "failed": [EngineFailure("raised")],
    "failed in mid-stream": [BEGINNING, EngineFailure("raised")],
    "lost": [ReplicaLost("died")],
    "lost in mid-stream": [BEGINNING, ReplicaLost("died")],
    "ended without result": [BEGINNING],
    "silent end": [],
}
REPLICAS = ("a", "b", "c")
CAP = 2
MAX_QUEUED = 3


@dataclass(frozen=True)
class Ask:
    """A request comes in."""


@dataclass(frozen=True)
class Answer:
    """A replica answers one of the calls that are open."""

    call: int
    script: str


@dataclass(frozen=True)
class Cancel:
    """One of the callers leaves."""

    caller: int


@dataclass(frozen=True)
class Live:
    """The pool has a new live set."""

    ids: tuple[str, ...]


Action: TypeAlias = Ask | Answer | Cancel | Live
ANY = st.integers(0, 20)
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    st.just(Ask()),
    st.builds(Answer, ANY, st.sampled_from(sorted(SCRIPTS))),
    st.builds(Cancel, ANY),
    st.builds(Live, st.sets(st.sampled_from(REPLICAS)).map(lambda ids: tuple(sorted(ids)))),
)
StrategyName: TypeAlias = Literal["round_robin", "least_connections"]


class World:
    """Callers that read their answers to the end, replicas that answer when the schedule says so."""

    def __init__(self, strategy: StrategyName) -> None:
        self.pool = FakePool(REPLICAS, held=True)
        self.bench = RoutingBench(self.pool, strategy=strategy, max_in_flight=CAP, max_queued=MAX_QUEUED)
        self.callers: list[asyncio.Task[list[Event]]] = []
        self._answered: set[FakeCall] = set()

    @property
    def open_calls(self) -> list[FakeCall]:
        return [call for call in self.pool.open_calls if call not in self._answered and not call.cancelled]

    @property
    def waiting_callers(self) -> list[asyncio.Task[list[Event]]]:
        return [caller for caller in self.callers if not caller.done()]

    def do(self, action: Action) -> None:
        if isinstance(action, Ask):
            self.callers.append(asyncio.create_task(self._ask()))
        elif isinstance(action, Answer) and (calls := self.open_calls):
            self.answer(calls[action.call % len(calls)], action.script)
        elif isinstance(action, Cancel) and (callers := self.waiting_callers):
            callers[action.caller % len(callers)].cancel()
        elif isinstance(action, Live):
            self.pool.set_live(*action.ids)

    async def _ask(self) -> list[Event]:
        async with await self.bench.dispatcher.open(text_request()) as stream:
            return await collect(stream)

    def answer(self, call: FakeCall, script: str) -> None:
        self._answered.add(call)
        call.play(SCRIPTS[script])
        call.release()

    async def settle(self) -> None:
        """Until nothing moves without another action: more turns than any chain of retries takes."""
        for _ in range(30):
            await asyncio.sleep(0)

    def check(self) -> None:
        in_flight = self.bench.in_flight
        assert all(0 <= count <= CAP for count in in_flight.values()), in_flight
        assert self.bench.waiting <= MAX_QUEUED
        # Everybody who is not answered yet has a place on a replica, or waits for one.
        placed = len(self.open_calls)
        assert placed + self.bench.waiting == len(self.waiting_callers)
        assert sum(in_flight.values()) <= placed, "a place is held for nobody"

    async def finish(self) -> None:
        """Answer whatever is still open, with all replicas there."""
        self.pool.set_live()
        self.pool.set_live(*REPLICAS)
        await self.settle()
        while self.waiting_callers:
            calls = self.open_calls
            assert calls, "somebody waits, all replicas are there, and nobody is served"
            for call in calls:
                self.answer(call, "success")
            await self.settle()


async def run(strategy: StrategyName, actions: list[Action]) -> None:
    world = World(strategy)
    for action in actions:
        world.do(action)
        await world.settle()
        world.check()
    await world.finish()
    for caller in world.callers:
        if caller.cancelled():
            continue
        error = caller.exception()
        if error is not None:
            assert isinstance(error, Overloaded)
            continue
        events = caller.result()
        assert len(terminals(events)) == 1
        assert terminals([events[-1]])
    assert world.bench.in_flight == dict.fromkeys(REPLICAS, 0)
    assert world.bench.waiting == 0
    outcomes = world.bench.outcomes
    assert sum(outcomes.values()) == len(world.pool.open_calls), "every attempt has exactly one outcome"


@settings(max_examples=150)
@given(st.sampled_from(["round_robin", "least_connections"]), st.lists(ACTIONS, max_size=40))
def test_counters_return_to_zero_after_any_interleaving(
    strategy: StrategyName, actions: list[Action]
) -> None:
    asyncio.run(run(strategy, actions))


def has_begun(name: str) -> bool:
    return SCRIPTS[name][:1] == [BEGINNING]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(SCRIPTS)), max_size=6), st.integers(0, 3))
def test_attempts_are_bounded_and_an_answer_has_one_terminal_event(
    scripts: list[str], max_retries: int
) -> None:
    async def ask() -> tuple[list[Event], int]:
        pool = FakePool(
            ("a", "b", "c", "d", "e", "f", "g"), next_scripts=[list(SCRIPTS[name]) for name in scripts]
        )
        bench = RoutingBench(pool, max_retries=max_retries)
        events = await bench.ask(text_request())
        assert sum(bench.in_flight.values()) == 0
        return events, len(bench.called)

    events, attempts = asyncio.run(ask())
    # What has begun goes on, with retries of its own; what was lost uses none up.
    free = sum(name.startswith("lost") or has_begun(name) for name in scripts[: attempts - 1])
    begun = sum(map(has_begun, scripts[: attempts - 1]))
    assert attempts <= 1 + free + max_retries * (1 + begun)
    assert len(terminals(events)) == 1
    assert terminals([events[-1]])
    answered = {"refused", "success", "long success"}
    assert not answered & set(scripts[: attempts - 1]), "nothing is tried again that was answered or refused"
