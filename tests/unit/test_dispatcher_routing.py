"""Where the dispatcher sends requests: strategies that fail or change, sessions, breakers, the budget."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from blaze.errors import EngineFailure, InvalidRequest, Overloaded, ReplicaLost
from blaze.routing.columns import Columns, Places
from blaze.routing.orders import Orders
from blaze.routing.outcome import Outcome
from blaze.routing.retries import RetryBudget
from blaze.routing.route import affinity_key
from blaze.routing.strategies import STRATEGY_NAMES
from blaze.routing.strategy import Ask, Pick
from blaze.types import Caller, Failed, GenerateRequest, Started, TextDelta
from tests.fakes import FakePool, answer
from tests.routing_bench import RoutingBench
from tests.samples import collect, image_answer, image_request, terminals, text_of, text_request
from tests.waiting import until

BEGINNING = (Started((1, 2)), TextDelta(0, "be", (5,)))


class Broken:
    """A strategy that raises, or picks what it may not."""

    name = "broken"
    wants_credit = False
    binds_late = False

    def __init__(self, pick: Pick | None = None) -> None:
        self.pick = pick

    def choose(self, columns: Columns, eligible: Places, ask: Ask) -> Pick | None:
        if self.pick is None:
            raise ZeroDivisionError("a bug")
        return self.pick


def of_session(session: str | None) -> GenerateRequest:
    return text_request(caller=Caller(session_id=session))


@pytest.mark.parametrize("broken", [Broken(), Broken(Pick("nobody"))])
async def test_a_strategy_that_fails_loses_no_request(
    broken: Broken, caplog: pytest.LogCaptureFixture
) -> None:
    bench = RoutingBench(FakePool(("a", "b", "c")))
    bench.dispatcher.strategy = broken
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            assert text_of(await bench.ask(text_request())) == "ok"
        assert len(caplog.records) == 1
        bench.clock.advance(60.0)
        await bench.ask(text_request())
        assert len(caplog.records) == 2


@pytest.mark.parametrize("name", STRATEGY_NAMES)
async def test_every_strategy_serves_text_and_images(name: str) -> None:
    pool = FakePool(("a", "b", "c"), next_scripts=[answer(), image_answer(1)] * 6)
    bench = RoutingBench(pool, strategy=name)
    for _ in range(6):
        assert text_of(await bench.ask(text_request(caller=Caller(address="10.0.0.1")))) == "ok"
        assert await bench.ask(image_request())
    assert set(bench.in_flight.values()) == {0}
    assert bench.outcomes == {"success": 12, "failure": 0, "neutral": 0}


async def test_a_strategy_is_replaced_while_requests_run() -> None:
    bench = RoutingBench(FakePool(("a", "b"), held=True))
    running = [asyncio.create_task(bench.ask(text_request())) for _ in range(4)]
    await until(lambda: len(bench.called) == 4)
    bench.dispatcher.strategy = Broken(Pick("a"))
    running += [asyncio.create_task(bench.ask(text_request())) for _ in range(2)]
    await until(lambda: len(bench.called) == 6)
    for call in bench.pool.open_calls:
        call.release()
    assert [text_of(await task) for task in running] == ["ok"] * 6
    assert bench.called[4:] == ["a", "a"]


async def test_a_session_stays_where_it_began() -> None:
    bench = RoutingBench(FakePool(("a", "b", "c")), sticky_sessions=True)
    for _ in range(4):
        await bench.ask(of_session("s"))
        await bench.ask(of_session(None))
    assert len({bench.called[i] for i in range(0, 8, 2)}) == 1
    assert len({bench.called[i] for i in range(1, 8, 2)}) > 1


async def test_a_session_whose_replica_is_gone_moves_and_stays() -> None:
    bench = RoutingBench(FakePool(("a", "b", "c")), sticky_sessions=True)
    await bench.ask(of_session("s"))
    (first,) = bench.called
    bench.pool.set_live(*({"a", "b", "c"} - {first}))
    for _ in range(3):
        await bench.ask(of_session("s"))
    bench.pool.set_live("a", "b", "c")
    await bench.ask(of_session("s"))
    assert len(set(bench.called[1:])) == 1
    assert first not in bench.called[1:]


async def test_a_session_is_forgotten_in_time() -> None:
    bench = RoutingBench(FakePool(("a", "b")), sticky_sessions=True, sticky_session_timeout_s=10.0)
    await bench.ask(of_session("s"))
    bench.clock.advance(10.5)
    await bench.ask(of_session("s"))
    assert set(bench.called) == {"a", "b"}  # round robin goes on


async def test_without_sticky_sessions_an_id_changes_nothing() -> None:
    bench = RoutingBench(FakePool(("a", "b")))
    for _ in range(2):
        await bench.ask(of_session("s"))
    assert set(bench.called) == {"a", "b"}


def test_the_key_is_the_session_then_the_user_then_the_address() -> None:
    everything = Caller("s", "u", "10.0.0.1")
    keys = [
        affinity_key(text_request(caller=caller))
        for caller in (everything, Caller(None, "u", "10.0.0.1"), Caller(address="10.0.0.1"), Caller())
    ]
    assert len(set(keys)) == 4
    assert keys[-1] is None
    assert affinity_key(text_request(caller=Caller("s", "another", "10.0.0.2"))) == keys[0]
    assert affinity_key(text_request(caller=Caller(user="s"))) != keys[0]


async def test_five_failures_in_a_row_take_a_replica_out_of_turn() -> None:
    failing = FakePool(("a", "b"), scripts={"a": [[EngineFailure("raised")] for _ in range(9)]})
    bench = RoutingBench(failing, max_retries=0)
    for _ in range(10):
        await bench.ask(text_request())
    before = bench.called.count("a")
    assert bench.failures == {"a": 5, "b": 0}
    for _ in range(10):
        await bench.ask(text_request())
    assert bench.called.count("a") == before
    counters, replicas = bench.dispatcher.counters()
    assert {replica.replica_id: replica.breaker for replica in replicas} == {"a": "open", "b": "closed"}
    assert [(event.replica_id, event.after) for event in counters.events] == [("a", "open")]


async def test_a_replica_that_has_recovered_is_back_after_two_probes() -> None:
    pool = FakePool(("a", "b"), scripts={"a": [[EngineFailure("raised")] for _ in range(5)]})
    bench = RoutingBench(pool, max_retries=0)
    for _ in range(10):
        await bench.ask(text_request())
    bench.clock.advance(1.5)  # open for 1 to 1.5 s
    for _ in range(4):
        await bench.ask(text_request())
    _, replicas = bench.dispatcher.counters()
    assert {replica.replica_id: replica.breaker for replica in replicas} == {"a": "closed", "b": "closed"}
    assert bench.called[-4:-2] == ["a", "a"]  # the probes, whoever's turn it was


@pytest.mark.parametrize("error", [InvalidRequest("no"), Overloaded("full")])
async def test_neutral_errors_never_open_a_breaker(error: Exception) -> None:
    bench = RoutingBench(FakePool(("a", "b"), next_scripts=[[error] for _ in range(60)]), max_retries=0)
    for _ in range(60):
        await bench.ask(text_request())
    assert {replica.breaker for replica in bench.dispatcher.counters()[1]} == {"closed"}


async def test_cancels_never_open_a_breaker_and_leave_nothing_behind() -> None:
    bench = RoutingBench(FakePool(("a", "b"), held=True))
    for _ in range(30):
        task = asyncio.create_task(bench.ask(text_request()))
        await until(lambda: sum(bench.in_flight.values()) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert set(bench.in_flight.values()) == {0}
    assert all(replica.cost == 0 for replica in bench.dispatcher.counters()[1])
    assert {replica.breaker for replica in bench.dispatcher.counters()[1]} == {"closed"}


async def test_only_so_many_requests_are_repeated_at_a_time() -> None:
    """All eight fail at first: three retries are under way, and the others are told of their failure."""
    pool = FakePool(tuple("abcdefgh"), next_scripts=[[EngineFailure("first")] for _ in range(8)], held=True)
    bench = RoutingBench(pool, max_retries=1)
    tasks = [asyncio.create_task(bench.ask(text_request())) for _ in range(8)]
    await until(lambda: len(pool.open_calls) == 8)
    for call in tuple(pool.open_calls):
        call.release()
    await until(lambda: len(pool.open_calls) == 11 and sum(task.done() for task in tasks) == 5)
    for call in pool.open_calls:
        call.release()
    answers = [await task for task in tasks]
    assert sum(text_of(events) == "ok" for events in answers) == 3
    assert bench.dispatcher.counters()[0].retries == 3


async def test_all_weights_zero_is_a_503_at_once() -> None:
    bench = RoutingBench(FakePool(("a", "b")))
    bench.dispatcher.table.follow(Orders({"a": 0.0, "b": 0.0}))
    with pytest.raises(Overloaded) as caught:
        await bench.dispatcher.open(text_request())
    assert caught.value.http_status == 503
    assert caught.value.retry_after_s


async def test_whoever_is_more_urgent_waits_less() -> None:
    bench = RoutingBench(FakePool(("a",), held=True), max_in_flight=1)
    order: list[int] = []

    async def ask(priority: int) -> None:
        await bench.ask(text_request(priority=priority))
        order.append(priority)

    first = asyncio.create_task(ask(0))
    await until(lambda: len(bench.called) == 1)
    waiting = []
    for priority in (5, 1, 3):
        waiting.append(asyncio.create_task(ask(priority)))
        await until(lambda: bench.waiting == len(waiting))
    bench.pool.held = False
    bench.pool.open_calls[0].release()
    await asyncio.gather(first, *waiting)
    assert order == [0, 1, 3, 5]


async def test_the_budget_holds_while_retries_pause_and_wait() -> None:
    pool = FakePool(tuple("abcdefgh"), next_scripts=[[EngineFailure("first")] for _ in range(60)], held=True)
    bench = RoutingBench(pool, max_retries=1, retry_pause=1.0, max_in_flight=64, retry_wait_s=0.0)
    tasks = [asyncio.create_task(bench.ask(text_request())) for _ in range(60)]
    await until(lambda: len(pool.open_calls) == 60)
    pool.held = False
    for call in tuple(pool.open_calls):
        call.release()
    await asyncio.gather(*tasks)
    assert 0 < bench.dispatcher.counters()[0].retries <= 12  # 20 % of 60


async def test_whoever_finds_no_leave_to_try_again_waits_for_it() -> None:
    """Many that fail at once are all answered, and few of them are repeated at a time."""
    pool = FakePool(tuple("abcdefgh"), next_scripts=[[EngineFailure("first")] for _ in range(60)], held=True)
    bench = RoutingBench(pool, max_retries=1, max_in_flight=64)
    tasks = [asyncio.create_task(bench.ask(text_request())) for _ in range(60)]
    await until(lambda: len(pool.open_calls) == 60)
    for call in tuple(pool.open_calls):
        call.release()
    answered = 60
    while answered < 120:
        await until(lambda so_far=answered: len(pool.open_calls) > so_far)
        for _ in range(20):  # whoever has leave has used it
            await asyncio.sleep(0)
        assert sum(bench.in_flight.values()) <= 12  # 20 % of 60
        for call in pool.open_calls[answered:]:
            answered += 1
            call.release()
    assert [text_of(events) for events in await asyncio.gather(*tasks)] == ["ok"] * 60


async def test_waiting_for_leave_ends_with_the_deadline() -> None:
    pool = FakePool(("a",), next_scripts=[[EngineFailure("first")] for _ in range(4)], held=True)
    bench = RoutingBench(pool, max_retries=1)
    deadlines = (None, None, None, 0.05)
    tasks = [asyncio.create_task(bench.ask(text_request(timeout_s=timeout_s))) for timeout_s in deadlines]
    await until(lambda: len(pool.open_calls) == 4)
    for call in tuple(pool.open_calls):
        call.release()
    await until(lambda: len(pool.open_calls) == 7)
    (late,) = await tasks[3]
    assert isinstance(late, Failed)
    assert late.error.message == "first"
    for call in tuple(pool.open_calls):
        call.release()
    assert [text_of(events) for events in await asyncio.gather(*tasks[:3])] == ["ok"] * 3


async def test_whoever_leaves_gives_the_leave_back() -> None:
    budget = RetryBudget()
    assert [await budget.reserve(0, 0.0) for _ in range(4)] == [True, True, True, False]
    waiting = [asyncio.create_task(budget.reserve(0, 60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    budget.give_back()  # before the first has seen that it is cancelled
    assert await waiting[1]
    waiting[2].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for _ in range(3):
        budget.give_back()
    assert [await budget.reserve(0, 0.0) for _ in range(4)] == [True, True, True, False]


async def test_moves_off_a_replica_that_is_gone_use_none_of_the_budget() -> None:
    lost = [[ReplicaLost("died")] for _ in range(7)]
    pool = FakePool(tuple("abcdefgh"), next_scripts=lost, held=True)
    bench = RoutingBench(pool, max_retries=1)
    moving = [asyncio.create_task(bench.ask(text_request())) for _ in range(7)]
    await until(lambda: len(pool.open_calls) == 7)
    for call in tuple(pool.open_calls):
        call.release()
    await until(lambda: len(pool.open_calls) == 14)  # seven attempts after the first are under way
    pool.next_scripts, pool.held = [[EngineFailure("once")]], False
    assert text_of(await bench.ask(text_request())) == "ok"
    for call in pool.open_calls:
        call.release()
    assert [text_of(await task) for task in moving] == ["ok"] * 7


@pytest.mark.parametrize("name", STRATEGY_NAMES)
async def test_whoever_has_recovered_is_tried_whatever_the_strategy_thinks_of_it(name: str) -> None:
    bench = RoutingBench(FakePool(("a", "b", "c", "d")), strategy=name)
    for _ in range(5):
        bench.dispatcher.table.lease("a").release(Outcome.FAILURE)
    assert bench.dispatcher.counters()[1][0].breaker == "open"
    bench.clock.advance(1.6)
    for number in range(40):
        await bench.ask(text_request(caller=Caller(user=str(number))))
    assert {replica.breaker for replica in bench.dispatcher.counters()[1]} == {"closed"}


async def test_a_reader_that_comes_too_late_is_not_held_against_the_replica() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[BEGINNING, *answer()]]}))
    stream = await bench.dispatcher.open(text_request(timeout_s=5.0))
    bench.clock.advance(6.0)
    events = await collect(stream)
    assert isinstance(events[-1], Failed)
    assert events[-1].error.http_status == 504
    assert bench.outcomes == {"success": 0, "failure": 0, "neutral": 1}


async def test_a_stream_that_nobody_reads_gives_its_place_back() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[BEGINNING, *answer()]]}))
    stream = await bench.dispatcher.open(text_request(timeout_s=0.02))
    await until(lambda: bench.in_flight == {"a": 0})
    events = await collect(stream)
    assert len(terminals(events)) == 1


async def test_what_goes_wrong_with_a_waiting_request_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = RoutingBench(FakePool(("a",), held=True), max_in_flight=1)
    first = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: len(bench.called) == 1)
    waiting = [asyncio.create_task(bench.ask(text_request())) for _ in range(2)]
    await until(lambda: bench.waiting == 2)
    picker, fine = bench.dispatcher._picker, [False, True]
    picked = picker._pick

    def pick(*arguments: Any) -> Pick:
        if not fine.pop(0):
            raise ZeroDivisionError("a bug")
        return picked(*arguments)

    monkeypatch.setattr(picker, "_pick", pick)
    bench.pool.held = False
    bench.pool.open_calls[0].release()
    assert text_of(await first) == "ok"
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], ZeroDivisionError)
    assert not isinstance(found[1], BaseException) and text_of(found[1]) == "ok"
    assert bench.in_flight == {"a": 0}


async def test_retry_after_is_when_the_first_one_may_be_back() -> None:
    bench = RoutingBench(FakePool(("a", "b")), max_queued=0)
    for replica_id in ("a", "b"):
        bench.dispatcher.table.suspend(replica_id, 7.0)
    with pytest.raises(Overloaded) as caught:
        await bench.dispatcher.open(text_request())
    assert caught.value.retry_after_s == 7.0


async def test_adaptive_lets_requests_wait_in_the_router_and_not_on_a_busy_replica() -> None:
    called = {}
    for name in ("adaptive", "round_robin"):
        bench = RoutingBench(FakePool(("a", "b"), held=True), strategy=name, max_in_flight=4, at_once=2)
        asked = [asyncio.create_task(bench.ask(text_request())) for _ in range(6)]
        await until(lambda bench=bench: len(bench.called) + bench.waiting == 6)
        called[name] = len(bench.called)
        bench.pool.held = False
        for call in bench.pool.open_calls:
            call.release()
        assert [text_of(await task) for task in asked] == ["ok"] * 6
    assert called == {"adaptive": 4, "round_robin": 6}


async def test_weights_that_are_all_set_to_zero_end_the_wait() -> None:
    bench = RoutingBench(FakePool(("a",), held=True), max_in_flight=1)
    running = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: len(bench.called) == 1)
    waiting = asyncio.create_task(bench.dispatcher.open(text_request()))
    await until(lambda: bench.waiting == 1)
    bench.dispatcher.table.follow(Orders({"a": 0.0}))
    with pytest.raises(Overloaded):
        await waiting
    bench.pool.open_calls[0].release()
    assert text_of(await running) == "ok"


async def test_who_is_out_is_tried_early_when_requests_wait() -> None:
    bench = RoutingBench(FakePool(("a", "b", "c"), held=True), max_in_flight=1, recheck_s=0.001)
    table = bench.dispatcher.table
    for _ in range(5):
        for _ in range(5):
            table.lease("a").release(Outcome.FAILURE)
        table.breakers.act("a", "close")
    for _ in range(5):
        table.lease("a").release(Outcome.FAILURE)
    asked = [asyncio.create_task(bench.ask(text_request())) for _ in range(3)]
    await until(lambda: len(bench.called) + bench.waiting == 3)
    assert sorted(bench.called) == ["b", "c"]
    bench.clock.advance(1.6)
    await until(lambda: len(bench.called) == 3)
    assert bench.called[2] == "a"
    for call in bench.pool.open_calls:
        call.release()
    assert [text_of(await task) for task in asked] == ["ok"] * 3


async def test_a_second_attempt_keeps_its_place_in_the_line() -> None:
    bench = RoutingBench(FakePool(("a",), held=True), max_in_flight=1, retry_pause=0.0)
    order: list[str] = []

    async def ask(name: str) -> None:
        await bench.ask(text_request())
        order.append(name)

    bench.pool.next_scripts = [[EngineFailure("once")]]
    asking = []
    for number, name in enumerate(["first", "second", "third"]):
        asking.append(asyncio.create_task(ask(name)))
        await until(lambda number=number: len(bench.called) + bench.waiting == number + 1)
        bench.clock.advance(1.0)
    bench.pool.open_calls[0].release()  # fails: "second" has its place by the time that it is back
    await until(lambda: len(bench.called) == 2 and bench.waiting == 2)
    bench.pool.held = False
    bench.pool.open_calls[1].release()
    await asyncio.gather(*asking)
    assert order == ["second", "first", "third"]


async def test_a_probe_that_fails_uses_up_no_retries() -> None:
    bench = RoutingBench(FakePool(("a", "b")), max_retries=0)
    table = bench.dispatcher.table
    for _ in range(5):
        table.lease("a").release(Outcome.FAILURE)
    bench.clock.advance(1.6)
    bench.pool.scripts = {"a": [[EngineFailure("still")]]}
    assert text_of(await bench.ask(text_request())) == "ok"
    assert bench.called == ["a", "b"]


async def test_nobody_is_sent_back_to_where_it_failed_to_find_out_whether_that_has_recovered() -> None:
    bench = RoutingBench(FakePool(("a", "b", "c")), strategy="least_connections", max_in_flight=1)
    table = bench.dispatcher.table
    bench.pool.scripts = {"a": [[EngineFailure("fifth")]]}
    for _ in range(4):
        table.lease("a").release(Outcome.FAILURE)
    busy = [table.lease(replica_id) for replica_id in "bc"]
    asking = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: bench.waiting == 1)
    assert bench.called == ["a"]
    bench.clock.advance(1.6)  # now its breaker lets a request through, but not this one again
    busy[0].release(Outcome.SUCCESS)
    assert text_of(await asking) == "ok"
    assert bench.called == ["a", "b"]
    busy[1].release(Outcome.SUCCESS)


async def test_a_session_rather_waits_where_it_is_kept_than_goes_elsewhere() -> None:
    pool = FakePool(("a", "b"), held=True)
    bench = RoutingBench(pool, strategy="adaptive", sticky_sessions=True, max_in_flight=4, at_once=1)
    asked = [asyncio.create_task(bench.ask(of_session("s"))) for _ in range(3)]
    await until(lambda: len(bench.called) == 3)
    assert len(set(bench.called)) == 1
    for call in pool.open_calls:
        call.release()
    await asyncio.gather(*asked)
