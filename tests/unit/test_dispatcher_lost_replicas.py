"""A replica that goes away is not the request's fault."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from blaze.errors import EngineFailure, ReplicaLost, ReplicaStopping, ReplicaUnreachable
from blaze.routing.accounting import ModelAccount
from blaze.types import Event, Events, Failed, Finished, Progress, Started, TextDelta
from tests.fakes import FakeCall, FakePool
from tests.routing_bench import RoutingBench
from tests.samples import text_request
from tests.waiting import until


async def test_lost_replicas_do_not_use_up_the_retries() -> None:
    lost = [[ReplicaLost("died")], [ReplicaUnreachable("cut off")], [(Failed(ReplicaStopping("bye").info),)]]
    bench = RoutingBench(
        FakePool(("a", "b", "c", "d"), next_scripts=[list(script) for script in lost]), max_retries=0
    )
    events = await bench.ask(text_request())
    assert isinstance(events[-1], Finished)
    assert len(set(bench.called)) == 4


async def test_errors_still_do() -> None:
    failing = [[EngineFailure("broken")], [EngineFailure("broken")]]
    bench = RoutingBench(
        FakePool(("a", "b", "c"), next_scripts=[list(script) for script in failing]), max_retries=1
    )
    events = await bench.ask(text_request())
    assert isinstance(events[-1], Failed) and events[-1].error.code == "engine_error"
    assert len(bench.called) == 2


async def test_replicas_cannot_be_lost_for_ever() -> None:
    names = tuple("abcdef")
    bench = RoutingBench(FakePool(names, next_scripts=[[ReplicaLost("died")] for _ in names]), max_lost=3)
    events = await bench.ask(text_request())
    assert isinstance(events[-1], Failed) and events[-1].error.code == "replica_lost"
    assert len(bench.called) == 4


async def test_what_came_before_the_first_content_is_forgotten_with_its_replica() -> None:
    begun = [(Started((1,)), Progress(1, 4)), ReplicaLost("died in the middle")]
    bench = RoutingBench(FakePool(("a", "b"), next_scripts=[list(begun)]))
    events = await bench.ask(text_request())
    assert isinstance(events[-1], Finished)
    assert sum(isinstance(event, Started) for event in events) == 1
    assert not any(isinstance(event, Progress) for event in events)


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ([(Started((1,)),), ReplicaLost("died")], True),
        ([(Started((1,)), TextDelta(0, "x", (1,))), ReplicaUnreachable("died")], True),
        ([ReplicaLost("had died before")], False),
        ([(Started((1,)),), (Failed(ReplicaStopping("bye").info),)], False),
        ([(Started((1,)),), EngineFailure("broken")], False),
    ],
)
async def test_reports_name_who_died_under_a_request_and_nobody_else(
    script: list[Events | BaseException], named: bool
) -> None:
    bench = RoutingBench(FakePool(("a", "b"), next_scripts=[script]), strategy="round_robin")
    await bench.ask(text_request())
    counters, _ = bench.dispatcher.counters()
    assert counters.died_at_work == tuple(bench.called[:1] if named else ())


async def test_a_replica_that_died_under_many_requests_is_named_once_and_the_last_ones_only() -> None:
    account = ModelAccount("m")
    for number in range(100):
        account.died_at_work(f"r{number}")
        account.died_at_work(f"r{number}")
    told = account.counters(strategy="round_robin", waiting=0).died_at_work
    assert told == tuple(f"r{number}" for number in range(36, 100))


async def test_the_only_replica_is_waited_for_and_asked_again_after_its_suspension() -> None:
    bench = RoutingBench(FakePool(("a",), next_scripts=[[ReplicaUnreachable("cut off")]]), suspend_s=2.0)
    asking = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: bench.dispatcher.counters()[0].waiting == 1)
    bench.clock.advance(1.9)
    await asyncio.sleep(0)
    assert bench.called == ["a"]
    bench.clock.advance(0.2)
    assert isinstance((await asking)[-1], Finished)
    assert bench.called == ["a", "a"]


async def test_a_suspension_doubles_with_every_loss_in_a_row_and_a_success_forgets_them() -> None:
    pool = FakePool(("a",), next_scripts=[[ReplicaUnreachable("cut off")] for _ in range(2)])
    bench = RoutingBench(pool, suspend_s=2.0)
    asking = asyncio.create_task(bench.ask(text_request()))
    for pause in (2.0, 4.0):
        await until(lambda: bench.dispatcher.counters()[0].waiting == 1)
        calls = len(bench.called)
        bench.clock.advance(pause - 0.1)
        await asyncio.sleep(0)
        assert len(bench.called) == calls, "asked before its time"
        bench.clock.advance(0.1)
        await until(lambda seen=calls: len(bench.called) > seen)
    assert isinstance((await asking)[-1], Finished)
    assert bench.dispatcher.available_replicas == 1


async def test_a_stopping_replica_is_waited_for_not_asked_again_at_once() -> None:
    bench = RoutingBench(
        FakePool(("a",), next_scripts=[[(Failed(ReplicaStopping("bye").info),)]]), suspend_s=2.0
    )
    asking = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: bench.dispatcher.counters()[0].waiting == 1)
    assert bench.called == ["a"]
    bench.pool.set_live("b")
    assert isinstance((await asking)[-1], Finished)
    assert bench.called == ["a", "b"]


async def test_a_retry_that_waits_for_another_replica_does_not_hold_up_the_others() -> None:
    pool = FakePool(("a", "b"))
    bench = RoutingBench(pool, max_in_flight=1)
    pool.held = True
    on_a = await _holding(bench)
    on_b = await _holding(bench)
    pool.held = False
    (busy,) = {"a", "b"} - {on_a.replica}
    pool.next_scripts = [[EngineFailure("broken")]]
    retrying = asyncio.create_task(bench.ask(text_request("retried")))
    await until(lambda: bench.dispatcher.counters()[0].waiting == 1)
    on_a.call.release()  # its replica fails the retried request, which then waits for the busy one
    await on_a.task
    await until(lambda: bench.dispatcher.counters()[0].waiting == 1 and len(bench.called) == 3)
    assert isinstance((await bench.ask(text_request("passes by")))[-1], Finished)
    assert not retrying.done()
    on_b.call.release()
    assert isinstance((await retrying)[-1], Finished)
    assert bench.called[-1] == busy


@dataclass(frozen=True)
class Holding:
    """A request in the middle of its answer on a replica."""

    replica: str
    call: FakeCall
    task: asyncio.Task[list[Event]]


async def _holding(bench: RoutingBench) -> Holding:
    calls = len(bench.called)
    task = asyncio.create_task(bench.ask(text_request("held")))
    await until(lambda: len(bench.called) > calls)
    return Holding(bench.called[-1], bench.pool.open_calls[-1], task)
