from __future__ import annotations

import asyncio
from typing import Any

import pytest

from blaze.engine_config import SimulatorConfig
from blaze.engines.simulator import SimulatorEngine
from blaze.types import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    Request,
    Started,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from tests.fakes import FakeClock
from tests.samples import collect, image_request, terminals, text_of, text_request
from tests.waiting import until_status

HOUR_MS = 3_600_000.0


def simulator(*, rank: int = 0, clock: FakeClock | None = None, **options: Any) -> SimulatorEngine:
    return SimulatorEngine(
        SimulatorConfig(**{"ttft_ms": 0, "inter_token_ms": 0, **options}), rank=rank, clock=clock
    )


async def ask(engine: SimulatorEngine, request: Request) -> list[Event]:
    return await collect(engine.run(request))


async def test_the_same_request_gets_the_same_answer_on_every_replica() -> None:
    first = await ask(simulator(rank=0), text_request(seed=7))
    assert await ask(simulator(rank=5, slowdown={5: 3.0}), text_request(seed=7)) == first
    assert await ask(simulator(), text_request(seed=8)) != first
    assert await ask(simulator(seed=1), text_request(seed=7)) != first


async def test_an_answer_has_all_its_parts_in_order() -> None:
    events = await ask(simulator(tokens=3), text_request(TextPrompt("12345678"), max_tokens=4, n=2))
    assert isinstance(events[0], Started)
    assert events[0].prompt_token_ids == (0, 1)
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert [delta.index for delta in deltas] == [0, 1] * 3
    assert events[-3:] == [
        ChoiceFinished(0, "stop"),
        ChoiceFinished(1, "stop"),
        Finished(Usage(prompt_tokens=2, completion_tokens=6)),
    ]


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (3, 3), (4, 4), (9, 4), (None, 4)])
async def test_max_tokens_limits_the_answer(asked: int | None, made: int) -> None:
    events = await ask(simulator(tokens=4), text_request(max_tokens=asked))
    assert len(text_of(events).split()) == made


async def test_an_answer_cut_by_max_tokens_ends_with_length() -> None:
    cut = await ask(simulator(tokens=4), text_request(max_tokens=2))
    assert ChoiceFinished(0, "length") in cut
    whole = await ask(simulator(tokens=4), text_request(max_tokens=9))
    assert ChoiceFinished(0, "stop") in whole


async def test_token_prompts_are_counted_as_they_are() -> None:
    events = await ask(simulator(), text_request(TokenPrompt((5, 6, 7))))
    assert isinstance(events[0], Started)
    assert events[0].prompt_token_ids == (5, 6, 7)


async def test_only_the_named_rank_fails_and_its_failure_is_the_engines() -> None:
    failed = await ask(simulator(rank=2, fail_rate={2: 1.0}), text_request())
    assert [type(event) for event in failed] == [Failed]
    assert isinstance(failed[0], Failed)
    assert (failed[0].error.http_status, failed[0].error.is_failure) == (500, True)
    assert isinstance((await ask(simulator(rank=1, fail_rate={2: 1.0}), text_request()))[-1], Finished)


async def test_a_fail_rate_fails_that_share_and_leaves_the_other_answers_alone() -> None:
    engine, healthy = simulator(fail_rate={0: 0.3}), simulator()
    failures = 0
    for seed in range(200):
        events = await ask(engine, text_request(seed=seed))
        if isinstance(events[-1], Failed):
            failures += 1
        else:
            assert events == await ask(healthy, text_request(seed=seed))
    assert 40 <= failures <= 80


async def test_case_28_a_retry_on_another_replica_is_a_new_draw() -> None:
    rates = {rank: 0.5 for rank in range(8)}
    same_request = text_request(seed=7)
    ends = [type((await ask(simulator(rank=rank, fail_rate=rates), same_request))[-1]) for rank in range(8)]
    assert set(ends) == {Failed, Finished}
    again = [type((await ask(simulator(rank=rank, fail_rate=rates), same_request))[-1]) for rank in range(8)]
    assert again == ends, "the n-th call to a replica fares the same in every run"


async def test_requests_beyond_the_slots_queue_and_follow() -> None:
    engine = simulator(slots=1, hang={0: 1.0})
    tasks = [asyncio.create_task(ask(engine, text_request(seed=seed))) for seed in range(3)]
    await until_status(engine, running=1, queued=2)
    found = await engine.get_health_status()
    assert (found.running, found.queued, found.state, found.work_pending) == (1, 2, "busy", 3)
    await engine.stop()
    for events in await asyncio.gather(*tasks):
        assert len(terminals(events)) == 1
    assert (await engine.get_health_status()).work_pending == 0


async def test_a_queued_request_whose_deadline_passes_is_dropped_not_run() -> None:
    engine = simulator(slots=1, hang={0: 1.0})
    holder = asyncio.create_task(ask(engine, text_request()))
    await until_status(engine, running=1)
    events = await ask(engine, text_request(timeout_s=0.0))
    assert [e.error.code for e in events if isinstance(e, Failed)] == ["deadline_exceeded"]
    found = await engine.get_health_status()
    assert (found.running, found.queued) == (1, 0)
    await engine.stop()
    await holder


async def test_a_deadline_during_the_answer_ends_it_with_one_terminal_event() -> None:
    engine = simulator(ttft_ms=HOUR_MS)
    events = await ask(engine, text_request(timeout_s=1e-6))
    assert len(terminals(events)) == 1
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.is_failure) == (504, False)
    assert (await engine.get_health_status()).running == 0


async def test_case_15_closing_early_frees_the_slot() -> None:
    engine = simulator(slots=1, inter_token_ms=HOUR_MS)
    answer = engine.run(text_request())
    await anext(answer)
    assert (await engine.get_health_status()).running == 1
    await answer.aclose()
    assert (await engine.get_health_status()).work_pending == 0
    other = engine.run(text_request())
    assert isinstance((await anext(other))[0], Started)
    await other.aclose()


async def test_case_15_cancelling_a_queued_request_takes_it_out_of_the_queue() -> None:
    engine = simulator(slots=1, hang={0: 1.0})
    holder, waiter = (asyncio.create_task(ask(engine, text_request())) for _ in range(2))
    await until_status(engine, queued=1)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    assert (await engine.get_health_status()).queued == 0
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)
    assert (await engine.get_health_status()).work_pending == 0


async def test_stopping_ends_requests_that_hang() -> None:
    engine = simulator(hang={0: 1.0})
    task = asyncio.create_task(ask(engine, text_request()))
    await until_status(engine, running=1)
    await engine.stop()
    (event,) = await task
    assert isinstance(event, Failed)
    assert event.error.retryable, "the request belongs to another replica"
    assert not event.error.is_failure


async def test_an_image_request_is_refused() -> None:
    (event,) = await ask(simulator(), image_request())
    assert isinstance(event, Failed)
    assert (event.error.http_status, event.error.param) == (400, "model")


async def test_steps_and_their_age_are_told() -> None:
    clock = FakeClock()
    engine = simulator(tokens=4, clock=clock)
    assert (await engine.get_health_status()).last_step_age_s is None
    await ask(engine, text_request())
    clock.advance(3.0)
    found = await engine.get_health_status()
    assert (found.steps_done, found.last_step_age_s, found.state) == (4, 3.0, "idle")


async def test_pending_events_leave_before_a_wait() -> None:
    engine = simulator(tokens=2, ttft_ms=0, inter_token_ms=HOUR_MS)
    answer = engine.run(text_request())
    batch = await anext(answer)
    assert [type(event) for event in batch] == [Started, TextDelta]
    await answer.aclose()
