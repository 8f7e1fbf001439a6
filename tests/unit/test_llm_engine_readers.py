from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable

import pytest

from blaze.errors import ReplicaStopping
from blaze.types import (
    Event,
    Failed,
    Started,
    TextPrompt,
)
from tests.llm_bench import EngineBench, failure
from tests.samples import collect, terminals, text_of, text_request
from tests.waiting import until, until_status


async def test_case_16_a_request_cancelled_while_it_waits_is_never_computed(bench: EngineBench) -> None:
    bench.gate.open.clear()
    running = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("e")))))
    await until_status(bench.engine, running=1)
    waiting = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("d")))))
    await until_status(bench.engine, queued=1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    bench.gate.open.set()
    assert text_of(await running) == "AB"
    assert text_of(await collect(bench.engine.run(text_request(TextPrompt("c"))))) == "endings"
    assert sum(bench.runner.batch_sizes) == len("AB") + 1 + len("endings") + 1


async def test_case_15_a_reader_that_leaves_ends_its_rows_within_a_step(bench: EngineBench) -> None:
    steps = itertools.count()
    held = threading.Event()

    def hold_the_second() -> None:
        if next(steps) == 1:
            bench.gate.open.clear()
            held.set()
        bench.gate()

    bench.runner.before_step = hold_the_second
    leaving = bench.engine.run(text_request(TextPrompt("d")))
    assert isinstance((await anext(leaving))[0], Started)
    await until(held.is_set)
    await leaving.aclose()
    assert (await bench.engine.get_health_status()).work_pending == 0
    bench.gate.open.set()
    assert text_of(await collect(bench.engine.run(text_request(TextPrompt("e"))))) == "AB"
    two_of_the_left, three_of_the_next = 2, 3
    assert (await bench.engine.get_health_status()).steps_done == two_of_the_left + three_of_the_next


async def in_mid_answer(bench: EngineBench, then: Callable[[], None]) -> list[Event]:
    """Answer "d" until its third step, do something, and go on."""
    steps = itertools.count()

    def before_step() -> None:
        if next(steps) == 2:
            then()

    bench.runner.before_step = before_step
    return await collect(bench.engine.run(text_request(TextPrompt("d"), timeout_s=60.0)))


async def test_a_deadline_that_passes_ends_the_answer_with_504(bench: EngineBench) -> None:
    events = await in_mid_answer(bench, lambda: bench.clock.advance(61.0))
    assert text_of(events) == "ddd"
    assert len(terminals(events)) == 1
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.is_failure) == (504, False)


async def test_a_request_whose_deadline_passed_in_the_queue_is_dropped_not_run(bench: EngineBench) -> None:
    bench.gate.open.clear()
    running = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("e")))))
    await until_status(bench.engine, running=1)
    late = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("c"), timeout_s=5.0))))
    await until_status(bench.engine, queued=1)
    bench.clock.advance(6.0)
    bench.gate.open.set()
    await running
    assert [type(event) for event in await late] == [Failed]
    assert sum(bench.runner.batch_sizes) == 3


async def test_stopping_ends_what_runs_and_what_waits(bench: EngineBench) -> None:
    bench.gate.open.clear()
    tasks = [asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("d")))))]
    await until_status(bench.engine, running=1)
    tasks.append(asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("c"))))))
    await until_status(bench.engine, queued=1)
    stopping = asyncio.create_task(bench.engine.stop())
    await asyncio.sleep(0)
    bench.gate.open.set()
    await stopping
    for events in await asyncio.gather(*tasks):
        assert len(terminals(events)) == 1
        assert isinstance(events[-1], Failed)
        assert events[-1].error.retryable
    (after,) = await collect(bench.engine.run(text_request(TextPrompt("c"))))
    assert isinstance(after, Failed)


async def test_stopping_tells_that_the_request_belongs_elsewhere(bench: EngineBench) -> None:
    bench.gate.open.clear()
    running = asyncio.create_task(bench.ask(text_request(TextPrompt("d"))))
    await until_status(bench.engine, running=1)
    stopping = asyncio.create_task(bench.engine.stop())
    await asyncio.sleep(0)
    bench.gate.open.set()
    await stopping
    error = failure(await running)
    assert (error.code, error.replica_gone, error.is_failure) == (ReplicaStopping.code, True, False)


async def test_a_slow_reader_stalls_nobody_and_gets_what_piled_up_at_once(bench: EngineBench) -> None:
    slow = bench.engine.run(text_request(TextPrompt("d")))
    first = await anext(slow)
    assert text_of(await bench.ask(text_request(TextPrompt("c")))) == "endings"
    await until_status(bench.engine, running=0)
    (rest,) = [batch async for batch in slow]
    assert text_of([*first, *rest]) == "d" * 60
    assert terminals(rest) == [rest[-1]]


async def test_the_place_of_a_reader_that_leaves_goes_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBench(monkeypatch, max_batch_size=1)
    await bench.engine.start()
    served: list[str] = []
    bench.runner.shape = lambda _logits, work: served.append(chr(work.sequence.token_ids[0]))
    steps, held = itertools.count(), threading.Event()

    def hold_the_third() -> None:
        if next(steps) == 2:
            bench.gate.open.clear()
            held.set()
        bench.gate()

    bench.runner.before_step = hold_the_third
    leaving = bench.engine.run(text_request(TextPrompt("d")))
    await anext(leaving)
    assert await asyncio.to_thread(held.wait, 10)
    waiting = asyncio.create_task(bench.ask(text_request(TextPrompt("e"))))
    await until_status(bench.engine, queued=1)
    await leaving.aclose()
    bench.gate.open.set()
    assert text_of(await waiting) == "AB"
    assert "".join(served) == "dddeee", "the step that was under way, and not one more"
    await bench.engine.stop()
