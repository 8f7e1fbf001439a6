"""Drains in the middle of anything lose no answer and leave nothing behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from blaze.control import NO_CHANGES, Change, SetAllDraining, SetDraining
from blaze.errors import Overloaded
from blaze.routing.draining import draining_error
from blaze.types import Events, Failed, GenerateRequest, ReplicaId, Request
from tests.breaking_pool import BreakingPool, asked, flat, whole
from tests.fakes import FakeCall
from tests.routing_bench import RoutingBench
from tests.samples import collect
from tests.waiting import until

REPLICAS = ("a", "b", "c")
LENGTH = 4
WHOLE = flat(whole(asked(), (LENGTH,)))


class StepwisePool(BreakingPool):
    """Each call gives out a batch when it is told to."""

    def call(self, replica_id: ReplicaId, request: Request) -> FakeCall:
        assert isinstance(request, GenerateRequest)
        script: list[Events | Exception] = [*whole(request, (LENGTH,))]
        self.calls.append((replica_id, request))
        self.open_calls.append(FakeCall(script, held=True))
        return self.open_calls[-1]


@dataclass(frozen=True)
class Ask:
    """A request comes in."""


@dataclass(frozen=True)
class Step:
    """A replica gives out its next batch."""

    call: int


@dataclass(frozen=True)
class Leave:
    """A caller leaves."""

    caller: int


@dataclass(frozen=True)
class Wait:
    seconds: float


Action = Ask | Step | Leave | Wait | SetDraining | SetAllDraining
ANY = st.integers(0, 20)
TIMEOUTS = st.sampled_from([None, 0.0, 1.0])
SOME_REPLICA = st.sampled_from(REPLICAS)
ACTIONS: st.SearchStrategy[Action] = st.one_of(
    *[st.builds(Step, ANY)] * 3,
    st.just(Ask()),
    st.builds(Leave, ANY),
    st.builds(Wait, st.sampled_from([0.5, 1.0])),
    st.builds(SetDraining, SOME_REPLICA, st.just(True), TIMEOUTS),
    st.builds(SetDraining, SOME_REPLICA, st.booleans(), TIMEOUTS),
    st.builds(SetAllDraining, st.booleans(), TIMEOUTS),
)
BEGUN = [*[Ask()] * 4, *[Step(number) for number in range(8)]]  # in the middle of their answers


class World:
    def __init__(self) -> None:
        self.pool = StepwisePool(REPLICAS)
        self.bench = RoutingBench(self.pool, max_in_flight=2, max_queued=3, drain_timeout_s=2.0)
        self.callers: list[asyncio.Task[object]] = []
        self._control = NO_CHANGES

    def change(self, change: Change) -> None:
        self._control = self._control.after(change)
        self.bench.dispatcher.follow(self._control)

    def do(self, action: Action) -> None:
        if isinstance(action, Ask):
            self.callers.append(asyncio.create_task(self._ask()))
        elif isinstance(action, Step):
            if open_calls := [call for call in self.pool.open_calls if call.is_held and not call.cancelled]:
                self.step(open_calls[action.call % len(open_calls)])
        elif isinstance(action, Leave):
            if self.callers:
                self.callers[action.caller % len(self.callers)].cancel()
        elif isinstance(action, Wait):
            self.bench.clock.advance(action.seconds)
        else:
            self.change(action)

    async def _ask(self) -> None:
        async with await self.bench.dispatcher.open(asked()) as stream:
            events = await collect(stream)
        # All of it; or, at the end of maintenance, as much of it as there was and why there is no more.
        if isinstance(events[-1], Failed):
            assert events[-1].error == draining_error().info
            assert events[:-1] == WHOLE[: len(events) - 1]
        else:
            assert events == WHOLE

    def step(self, call: FakeCall) -> None:
        call.hold_after(1)
        call.release()

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    async def finish(self) -> None:
        self.change(SetAllDraining(False))
        for replica_id in REPLICAS:
            self.change(SetDraining(replica_id, False))

        def step_all() -> bool:
            for call in self.pool.open_calls:
                self.step(call)
            return all(caller.done() for caller in self.callers)

        await until(step_all)


async def run(actions: list[Action]) -> None:
    world = World()
    for action in BEGUN + actions:
        world.do(action)
        await world.settle()
        assert world.bench.waiting <= 3
    await world.finish()
    for caller in world.callers:
        if not caller.cancelled():
            error = caller.exception()
            assert error is None or isinstance(error, Overloaded), error
    assert world.bench.in_flight == dict.fromkeys(REPLICAS, 0)
    assert world.bench.waiting == world.bench.dispatcher.counters()[0].open == 0
    outcomes = world.bench.outcomes
    assert outcomes["failure"] == 0
    assert sum(outcomes.values()) == len(world.pool.open_calls), "every attempt has exactly one outcome"


@settings(max_examples=200)
@given(st.lists(ACTIONS, min_size=5, max_size=40))
def test_answers_are_whole_whatever_is_drained_and_nothing_is_left(actions: list[Action]) -> None:
    asyncio.run(run(actions))
