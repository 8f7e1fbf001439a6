"""Where the dispatcher sends requests: strategies that fail or change, sessions, breakers, the budget."""

from __future__ import annotations

import asyncio
import logging

import pytest

from blaze.errors import EngineFailure, InvalidRequest, Overloaded
from blaze.routing.columns import Columns, Places
from blaze.routing.dispatcher import _key
from blaze.routing.strategies import STRATEGY_NAMES
from blaze.routing.strategy import Ask, Pick
from blaze.types import Caller, GenerateRequest
from tests.fakes import FakePool, answer
from tests.routing_bench import RoutingBench
from tests.samples import image_answer, image_request, text_of, text_request
from tests.waiting import until


class Broken:
    """A strategy that raises, or picks what it may not."""

    name = "broken"
    wants_credit = False

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
        _key(text_request(caller=caller))
        for caller in (everything, Caller(None, "u", "10.0.0.1"), Caller(address="10.0.0.1"), Caller())
    ]
    assert len(set(keys)) == 4
    assert keys[-1] is None
    assert _key(text_request(caller=Caller("s", "another", "10.0.0.2"))) == keys[0]
    assert _key(text_request(caller=Caller(user="s"))) != keys[0]


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
    assert bench.called[-4:].count("a") == 2


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
    for replica_id in ("a", "b"):
        bench.dispatcher.table.set_weight(replica_id, 0)
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
