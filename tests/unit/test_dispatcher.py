from __future__ import annotations

import asyncio

import pytest

from blaze.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NonFiniteOutput,
    Overloaded,
    ReplicaLost,
)
from blaze.types import ChoiceFinished, Failed, Finished, Started, TextDelta, Usage
from tests.fakes import FakeCall, FakePool, Script, answer
from tests.routing_bench import RoutingBench
from tests.samples import collect, image_answer, image_request, terminals, text_of, text_request
from tests.waiting import until

BEGINNING = (Started((1, 2)), TextDelta(0, "be", (5,)))


async def test_a_request_is_answered_by_the_replica_that_was_picked() -> None:
    bench = RoutingBench(FakePool())
    async with await bench.dispatcher.open(text_request()) as stream:
        assert [stream.replica_id] == bench.called
        events = await collect(stream)
    assert text_of(events) == "ok"
    assert terminals(events) == [events[-1]]


async def test_success_is_counted_once_with_its_usage() -> None:
    bench = RoutingBench(FakePool(("a",)))
    await bench.ask(text_request())
    assert bench.outcomes == {"success": 1, "failure": 0, "neutral": 0}
    assert bench.usage == Usage(prompt_tokens=3, completion_tokens=1)
    assert (bench.in_flight, bench.requests, bench.failures) == ({"a": 0}, {"a": 1}, {"a": 0})


async def test_images_are_counted() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [image_answer(1, 2)]}))
    await bench.ask(image_request(n=2, seed=1))
    assert bench.usage.images == 2


async def test_case_17_a_stream_is_in_flight_until_it_ends_not_until_it_is_opened() -> None:
    batches = answer()
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[BEGINNING, *batches]]}))
    stream = await bench.dispatcher.open(text_request())
    await anext(stream)
    assert bench.in_flight == {"a": 1}
    await collect(stream)
    assert bench.in_flight == {"a": 0}  # at the terminal event, before the stream is closed
    await stream.aclose()
    assert bench.outcomes == {"success": 1, "failure": 0, "neutral": 0}


async def test_case_17_thirty_streams_leave_no_count_behind() -> None:
    class StubbornCall(FakeCall):
        def cancel(self) -> None:
            raise RuntimeError("close failed")

    class Pool(FakePool):
        def call(self, replica_id: str, request: object) -> FakeCall:
            number = len(self.open_calls)
            endings: list[Script] = [answer(), [NonFiniteOutput("broke in the middle")], []]
            ends = endings[number // 10]
            call = StubbornCall([BEGINNING, *ends])
            self.open_calls.append(call)
            return call

    bench = RoutingBench(Pool(("a", "b", "c")), strategy="least_connections")
    streams = [await bench.dispatcher.open(text_request()) for _ in range(30)]
    assert bench.in_flight == {"a": 10, "b": 10, "c": 10}
    for stream in streams[:20]:
        await collect(stream)
        await stream.aclose()
    for stream in streams[20:]:
        with pytest.raises(RuntimeError, match="close failed"):
            await stream.aclose()
        await stream.aclose()
    assert bench.in_flight == {"a": 0, "b": 0, "c": 0}
    assert bench.outcomes == {"success": 10, "failure": 10, "neutral": 10}


async def test_case_17_traffic_is_even_after_a_replica_was_replaced() -> None:
    bench = RoutingBench(FakePool(("a", "b", "c")), strategy="least_connections")
    for _ in range(30):
        await bench.ask(text_request())
    bench.pool.set_live("b", "c", "d")
    before = bench.requests
    held = [await bench.dispatcher.open(text_request()) for _ in range(30)]
    taken = {id: count - before.get(id, 0) for id, count in bench.requests.items()}
    assert sum(taken.values()) == 30
    assert set(taken) == {"b", "c", "d"}
    for stream in held:
        await stream.aclose()


async def test_a_caller_that_leaves_early_is_neutral_and_stops_the_work() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[BEGINNING, *answer()]]}))
    async with await bench.dispatcher.open(text_request()) as stream:
        await anext(stream)
    assert bench.pool.open_calls[0].cancelled
    assert (bench.in_flight, bench.failures) == ({"a": 0}, {"a": 0})
    assert bench.outcomes == {"success": 0, "failure": 0, "neutral": 1}


async def test_a_caller_cancelled_before_the_first_event_gives_everything_back() -> None:
    bench = RoutingBench(FakePool(("a",), held=True))
    opening = asyncio.create_task(bench.dispatcher.open(text_request()))
    await until(lambda: bench.pool.open_calls)
    assert bench.in_flight == {"a": 1}
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    assert bench.pool.open_calls[0].cancelled
    assert (bench.in_flight, bench.outcomes["neutral"]) == ({"a": 0}, 1)


async def test_an_error_in_mid_stream_that_nobody_could_mend_is_its_one_terminal_event() -> None:
    script: Script = [BEGINNING, NonFiniteOutput("broke in the middle")]
    bench = RoutingBench(FakePool(next_scripts=[script]))
    events = await bench.ask(text_request())
    assert events[:2] == list(BEGINNING)
    assert [e.error.message for e in events if isinstance(e, Failed)] == ["broke in the middle"]
    assert len(bench.called) == 1
    assert sum(bench.failures.values()) == 1
    assert sum(bench.in_flight.values()) == 0


async def test_an_answer_that_ends_without_a_result_is_a_failure() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[BEGINNING]]}), max_lost=0)
    events = await bench.ask(text_request())
    assert isinstance(events[-1], Failed)
    assert events[-1].error.is_failure
    assert bench.failures == {"a": 1}


async def test_a_stream_that_ended_gives_nothing_more() -> None:
    bench = RoutingBench(FakePool(("a",)))
    stream = await bench.dispatcher.open(text_request())
    await collect(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_whatever_a_call_raises_the_place_is_given_back() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[RuntimeError("not one of ours")]]}))
    with pytest.raises(RuntimeError):
        await bench.dispatcher.open(text_request())
    assert bench.in_flight == {"a": 0}


async def test_case_23_a_replica_lost_in_mid_stream_is_not_picked_again() -> None:
    bench = RoutingBench(FakePool(next_scripts=[[BEGINNING, ReplicaLost("died")]]))
    await bench.ask(text_request())
    dead = bench.called[0]
    for _ in range(4):
        await bench.dispatcher.open(text_request())
    assert set(bench.called[1:]) == {"a", "b"} - {dead}


# --- Waiting for a replica ---------------------------------------------------------------------------


async def test_requests_beyond_the_cap_wait_and_follow_in_order() -> None:
    bench = RoutingBench(FakePool(("a",), held=True), max_in_flight=1)
    tasks = [asyncio.create_task(bench.ask(text_request(f"number {n}"))) for n in range(3)]
    for served in range(1, 4):
        await until(lambda served=served: len(bench.pool.open_calls) == served)  # type: ignore[misc]
        assert (bench.in_flight, bench.waiting) == ({"a": 1}, 3 - served)
        bench.pool.open_calls[-1].release()
    await asyncio.gather(*tasks)
    prompts = [request.prompt.messages[0].content for _, request in bench.pool.calls]  # type: ignore[union-attr]
    assert prompts == ["number 0", "number 1", "number 2"]
    assert (bench.in_flight, bench.waiting) == ({"a": 0}, 0)


async def test_a_full_queue_is_overloaded_at_once() -> None:
    bench = RoutingBench(FakePool(("a",), held=True), max_in_flight=1, max_queued=0)
    first = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: bench.pool.open_calls)
    with pytest.raises(Overloaded):
        await bench.dispatcher.open(text_request())
    bench.pool.open_calls[0].release()
    await first


async def test_case_25_an_empty_pool_waits_until_the_deadline_then_503() -> None:
    bench = RoutingBench(FakePool(()))
    with pytest.raises(Overloaded) as caught:
        await bench.dispatcher.open(text_request(timeout_s=1e-6))
    assert caught.value.http_status == 503
    assert caught.value.retry_after_s
    assert bench.waiting == 0


async def test_case_25_a_request_that_waits_for_the_first_replica_gets_it() -> None:
    bench = RoutingBench(FakePool(()))
    asking = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: bench.waiting == 1)
    assert bench.pool.wakes >= 1, "whoever scales the pool must hear that there is work"
    bench.pool.set_live("a")
    assert isinstance((await asking)[-1], Finished)


async def test_a_replica_that_was_out_of_reach_for_a_moment_serves_those_who_waited() -> None:
    bench = RoutingBench(FakePool(("a",), next_scripts=[[ReplicaLost("no answer")]]))
    asking = asyncio.create_task(bench.ask(text_request()))
    await until(lambda: bench.waiting == 1)
    assert bench.called == ["a"]
    bench.clock.advance(2.0)
    assert text_of(await asking) == "ok"
    assert bench.called == ["a", "a"]
    assert bench.in_flight == {"a": 0}


async def test_a_full_pool_is_not_woken() -> None:
    bench = RoutingBench(FakePool(("a",), held=True), max_in_flight=1)
    tasks = [asyncio.create_task(bench.ask(text_request())) for _ in range(2)]
    await until(lambda: bench.waiting == 1)
    assert bench.pool.wakes == 0
    for number in range(2):
        await until(lambda number=number: len(bench.pool.open_calls) > number)  # type: ignore[misc]
        bench.pool.open_calls[number].release()
    await asyncio.gather(*tasks)


# --- Deadlines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("timeout_s", "outcome"), [(0.0, "neutral"), (1e-6, "failure")])
async def test_a_replica_that_does_not_answer_by_the_deadline_is_cancelled(
    timeout_s: float, outcome: str
) -> None:
    """Nobody is blamed where there was no time; who had some did not even say so."""
    bench = RoutingBench(FakePool(held=True))
    stream = await bench.dispatcher.open(text_request(timeout_s=timeout_s))
    assert stream.error == DeadlineExceeded("The request's deadline passed before it was finished.").info
    assert len(terminals(await collect(stream))) == 1
    assert bench.pool.open_calls[0].cancelled
    assert len(bench.called) == 1
    assert bench.outcomes == {"success": 0, "failure": 0, "neutral": 0} | {outcome: 1}


async def test_a_deadline_that_the_replica_tells_of_itself_is_not_held_against_it() -> None:
    bench = RoutingBench(FakePool(("a",), next_scripts=[[DeadlineExceeded("too late")]]))
    (event,) = await bench.ask(text_request(timeout_s=60.0))
    assert isinstance(event, Failed)
    assert (event.error.http_status, bench.failures) == (504, {"a": 0})


async def test_a_deadline_that_passes_in_mid_stream_ends_it() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[BEGINNING, *answer()]]}))
    stream = await bench.dispatcher.open(text_request(timeout_s=60.0))
    call = bench.pool.open_calls[0]
    call.hold()
    bench.clock.advance(61.0)
    events = await collect(stream)
    assert isinstance(events[-1], Failed)
    assert events[-1].error.http_status == 504
    assert call.cancelled
    assert bench.in_flight == {"a": 0}


async def test_a_replica_is_told_what_is_left_of_the_deadline() -> None:
    bench = RoutingBench(FakePool(("a",)), request_timeout_s=90.0)
    await bench.ask(text_request(timeout_s=7.0))
    await bench.ask(text_request())
    assert [request.timeout_s for _, request in bench.pool.calls] == [7.0, 90.0]


async def test_case_16_a_refused_request_leaves_others_on_the_replica_alone() -> None:
    pool = FakePool(
        ("a",), held=True, scripts={"a": [answer("one"), [InvalidRequest("no")], answer("three")]}
    )
    bench = RoutingBench(pool)
    tasks = [asyncio.create_task(bench.ask(text_request())) for _ in range(3)]
    await until(lambda: len(pool.open_calls) == 3)
    for call in pool.open_calls:
        call.release()
    first, second, third = await asyncio.gather(*tasks)
    assert (text_of(first), text_of(third)) == ("one", "three")
    assert isinstance(second[-1], Failed)
    assert ChoiceFinished(0, "stop") in third
