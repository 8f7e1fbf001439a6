"""The simulator misbehaves as it is told to while it runs, and what it answers stays the same."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from blaze.engine_config import SimulatorConfig
from blaze.engines.faults import Faults
from blaze.engines.simulator import SimulatorEngine
from blaze.errors import InvalidRequest
from blaze.types import Event, Failed, Finished, Started, TextDelta, is_batch
from tests.samples import collect, text_of, text_request
from tests.waiting import until_status


def simulator(**options: Any) -> SimulatorEngine:
    return SimulatorEngine(SimulatorConfig(**{"ttft_ms": 0, "inter_token_ms": 0, "tokens": 12, **options}))


async def answers(engine: SimulatorEngine, count: int) -> list[list[Event]]:
    return [await collect(engine.run(text_request(seed=seed))) for seed in range(count)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"slowdown": 0},
        {"slowdown": float("nan")},
        {"fail_rate": 1.5},
        {"break_rate": -0.1},
        {"raise_rate": "often"},
        {"garbage_rate": True},
        {"wedged": 1},
        {"fail_running": "yes"},
        {"block_s": -1},
        {"block_s": float("inf")},
    ],
)
def test_a_wrong_fault_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Faults(**wrong)
    assert caught.value.param == next(iter(wrong))


async def test_without_faults_and_after_them_all_is_as_it_was() -> None:
    expected = await answers(simulator(), 8)
    engine = simulator()
    engine.set_faults(Faults(fail_rate=1.0))
    assert all(isinstance(events[-1], Failed) for events in await answers(engine, 8))
    engine.set_faults(Faults())
    assert await answers(engine, 8) == expected


@pytest.mark.parametrize("rate", ["fail_rate", "break_rate"])
async def test_a_rate_hits_that_share_and_leaves_the_other_answers_alone(rate: str) -> None:
    expected = await answers(simulator(), 200)
    engine = simulator()
    engine.set_faults(Faults(**{rate: 0.3}))
    found = await answers(engine, 200)
    hit = [isinstance(events[-1], Failed) for events in found]
    assert 40 <= sum(hit) <= 80
    for events, whole, was_hit in zip(found, expected, hit, strict=True):
        assert was_hit or events == whole


@pytest.mark.parametrize(("ttft_ms", "inter_token_ms"), [(0, 0), (0, 0.01), (0.01, 0), (0.01, 0.01)])
async def test_a_broken_answer_goes_on_elsewhere_to_what_it_would_have_been(
    ttft_ms: float, inter_token_ms: float
) -> None:
    engine, healthy = (simulator(ttft_ms=ttft_ms, inter_token_ms=inter_token_ms) for _ in range(2))
    engine.set_faults(Faults(break_rate=1.0))
    lengths = set()
    for seed in range(12):
        request = text_request(seed=seed)
        broken = await collect(engine.run(request))
        assert isinstance(broken[0], Started)
        assert isinstance(broken[-1], Failed)
        assert (broken[-1].error.http_status, broken[-1].error.retryable) == (500, True)
        ids = tuple(token for event in broken if isinstance(event, TextDelta) for token in event.token_ids)
        lengths.add(len(ids))
        rest = text_request(seed=seed)
        object.__setattr__(rest, "generated", (ids,))
        whole = text_of(await collect(healthy.run(request)))
        assert text_of(broken) + text_of(await collect(healthy.run(rest))) == whole
    assert len(lengths) > 3, "it breaks at many places"


async def test_exceptions_and_garbage_are_what_no_engine_gives() -> None:
    engine = simulator()
    engine.set_faults(Faults(raise_rate=1.0))
    with pytest.raises(RuntimeError):
        await collect(engine.run(text_request()))
    engine.set_faults(Faults(garbage_rate=1.0))
    (batch,) = [batch async for batch in engine.run(text_request())]
    assert not is_batch(batch)
    assert (await engine.get_health_status()).work_pending == 0


async def test_a_wedged_engine_takes_requests_and_makes_no_step_until_it_is_freed() -> None:
    expected = await answers(simulator(), 2)
    engine = simulator(inter_token_ms=1)
    running = engine.run(text_request(seed=0))
    first = await anext(running)
    engine.set_faults(Faults(wedged=True))
    rest = asyncio.create_task(collect(running))
    later = asyncio.create_task(collect(engine.run(text_request(seed=1))))
    await until_status(engine, running=2)
    await asyncio.sleep(0.05)  # many times what the rest would take
    found = await engine.get_health_status()
    assert (found.work_pending, found.steps_done) == (2, 1)
    engine.set_faults(Faults())
    assert [*first, *await rest] == expected[0]
    assert await later == expected[1]


async def test_a_wedged_engine_keeps_deadlines_and_stops() -> None:
    engine = simulator()
    engine.set_faults(Faults(wedged=True))
    (late,) = await collect(engine.run(text_request(timeout_s=0.01)))
    assert isinstance(late, Failed)
    assert late.error.code == "deadline_exceeded"
    held = asyncio.create_task(collect(engine.run(text_request())))
    await until_status(engine, running=1)
    await engine.stop()
    (event,) = await held
    assert isinstance(event, Failed)
    assert event.error.replica_gone


async def test_all_that_runs_fails_together_once() -> None:
    engine = simulator(inter_token_ms=1)
    running = [engine.run(text_request(seed=seed)) for seed in range(3)]
    for answer in running:
        await anext(answer)
    engine.set_faults(Faults(fail_running=True))
    for answer in running:
        events = await collect(answer)
        assert isinstance(events[-1], Failed)
        assert events[-1].error.retryable
    assert isinstance((await collect(engine.run(text_request())))[-1], Finished)


async def test_slowness_stretches_the_waits_of_what_runs_too() -> None:
    engine = simulator(inter_token_ms=1, tokens=3)
    running = engine.run(text_request())
    await anext(running)
    engine.set_faults(Faults(slowdown=100_000.0))
    rest = asyncio.create_task(collect(running))
    others = await answers(simulator(inter_token_ms=1, tokens=3), 5)
    assert all(isinstance(events[-1], Finished) for events in others)
    assert not rest.done()
    rest.cancel()
    await asyncio.gather(rest, return_exceptions=True)


async def test_a_block_holds_the_whole_event_loop_once() -> None:
    engine = simulator()
    engine.set_faults(Faults(block_s=0.3))
    loop_stood_still = 0.0
    at = time.monotonic()
    give_up = at + 10
    while loop_stood_still < 0.25 and at < give_up:
        await asyncio.sleep(0.001)
        now = time.monotonic()
        loop_stood_still, at = max(loop_stood_still, now - at), now
    assert loop_stood_still >= 0.25
