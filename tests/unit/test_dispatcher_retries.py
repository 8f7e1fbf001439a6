from __future__ import annotations

import asyncio
from typing import Any

import pytest

from blaze.checks import SEED_BOUND
from blaze.errors import (
    BlazeError,
    Cancelled,
    EngineFailure,
    InvalidRequest,
    NonFiniteOutput,
    Overloaded,
    ReplicaLost,
    ReplicaStopping,
    ReplicaUnreachable,
)
from blaze.types import (
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ImageReady,
    ImageRequest,
    Progress,
    Request,
    Started,
)
from tests.fakes import FakePool, Script, answer
from tests.routing_bench import RoutingBench
from tests.samples import image_answer, image_request, partial_image, terminals, text_of, text_request
from tests.waiting import until


def fails_first(*errors: BlazeError, then: Script | None = None, held: bool = False) -> FakePool:
    """Whichever replicas are called, the calls end in this order."""
    scripts: list[Script] = [[error] for error in errors]
    return FakePool(("a", "b", "c", "d"), next_scripts=scripts + ([] if then is None else [then]), held=held)


def error_of(events: list[Event]) -> str:
    (failed,) = events
    assert isinstance(failed, Failed)
    return failed.error.message


RETRIED = [
    ReplicaLost("died"),
    ReplicaUnreachable("silence"),
    EngineFailure("raised"),
    ReplicaStopping("bye"),
    Overloaded("full"),
]


@pytest.mark.parametrize("error", RETRIED)
async def test_case_28_a_failure_before_the_first_event_is_retried_elsewhere(error: BlazeError) -> None:
    bench = RoutingBench(fails_first(error))
    events = await bench.ask(text_request())
    assert text_of(events) == "ok"
    assert len(terminals(events)) == 1
    assert len(bench.called) == len(set(bench.called)) == 2


@pytest.mark.parametrize("before", [[(Started((1,)),)], [(Started(),), (Progress(1, 9), Progress(2, 9))]])
async def test_case_28_a_failure_before_the_first_content_is_retried_without_a_seam(before: Script) -> None:
    bench = RoutingBench(FakePool(next_scripts=[[*before, EngineFailure("raised")]]))
    events = await bench.ask(text_request())
    assert text_of(events) == "ok"
    assert sum(isinstance(event, Started) for event in events) == 1
    assert len(terminals(events)) == 1
    assert len(bench.called) == 2


@pytest.mark.parametrize(
    ("shown", "asked"),
    [(Progress(1, 9), {"progress": True}), (partial_image(), {"partial_images": 1})],
    ids=["a step that was asked for", "a preview"],
)
async def test_what_a_reader_was_shown_of_an_image_is_not_shown_again(
    shown: Event, asked: dict[str, Any]
) -> None:
    script: Script = [(Started(),), (shown,), EngineFailure("raised")]
    again: Script = [(Started(), shown), *image_answer(1)]
    bench = RoutingBench(FakePool(next_scripts=[script, again]))
    events = await bench.ask(image_request(**asked))
    assert [type(event) for event in events] == [Started, type(shown), ImageReady, Finished]
    assert len(bench.called) == 2


async def test_steps_that_nobody_asked_for_commit_nothing() -> None:
    script: Script = [(Started(), Progress(1, 9)), EngineFailure("raised")]
    bench = RoutingBench(FakePool(next_scripts=[script, image_answer(1)]))
    assert isinstance((await bench.ask(image_request()))[-1], Finished)
    assert len(bench.called) == 2


@pytest.mark.parametrize("error", [InvalidRequest("bad"), Cancelled("stop"), NonFiniteOutput("NaN")])
async def test_case_28_what_another_replica_would_not_mend_is_not_retried(error: BlazeError) -> None:
    bench = RoutingBench(fails_first(error))
    assert error_of(await bench.ask(text_request())) == error.message
    assert len(bench.called) == 1


async def test_case_28_the_last_error_is_told_not_the_first() -> None:
    bench = RoutingBench(fails_first(Overloaded("full"), InvalidRequest("bad")))
    assert error_of(await bench.ask(text_request())) == "bad"
    assert len(bench.called) == 2


@pytest.mark.parametrize("max_retries", [0, 1, 3])
async def test_case_28_attempts_are_bounded(max_retries: int) -> None:
    errors = [EngineFailure(f"attempt {n}") for n in range(10)]
    bench = RoutingBench(fails_first(*errors), max_retries=max_retries)
    assert error_of(await bench.ask(text_request())) == f"attempt {max_retries}"
    assert len(bench.called) == len(set(bench.called)) == max_retries + 1
    assert bench.outcomes == {"success": 0, "failure": max_retries + 1, "neutral": 0}
    assert sum(bench.in_flight.values()) == 0


async def test_a_single_replica_is_tried_again_when_there_is_no_other() -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[EngineFailure("once")], answer()]}))
    assert text_of(await bench.ask(text_request())) == "ok"
    assert bench.called == ["a", "a"]


async def test_case_28_an_attempt_that_failed_is_charged_to_its_own_replica_only() -> None:
    bench = RoutingBench(fails_first(EngineFailure("raised")))
    await bench.ask(text_request())
    first, second = bench.called
    assert (bench.failures[first], bench.failures[second]) == (1, 0)
    assert bench.outcomes == {"success": 1, "failure": 1, "neutral": 0}


@pytest.mark.parametrize("error", [InvalidRequest("bad"), Overloaded("full"), Cancelled("stop")])
async def test_case_29_client_errors_and_overload_are_neutral(error: BlazeError) -> None:
    bench = RoutingBench(FakePool(("a",), scripts={"a": [[error]]}), max_retries=0)
    await bench.ask(text_request())
    assert bench.outcomes == {"success": 0, "failure": 0, "neutral": 1}
    assert bench.failures == {"a": 0}


async def test_a_replica_that_is_gone_before_the_pool_says_so_costs_one_attempt() -> None:
    bench = RoutingBench(FakePool(("a", "b")))
    bench.pool.ids = ("b",)  # died; nobody was told yet
    for _ in range(6):
        assert text_of(await bench.ask(text_request())) == "ok"
    assert bench.called.count("a") <= 1


async def test_an_answer_without_any_event_is_retried() -> None:
    bench = RoutingBench(fails_first(then=[]))
    assert text_of(await bench.ask(text_request())) == "ok"
    assert len(bench.called) == 2


async def test_a_deadline_passed_during_an_attempt_ends_the_retries() -> None:
    bench = RoutingBench(fails_first(EngineFailure("late"), held=True))
    opening = asyncio.create_task(bench.ask(text_request(timeout_s=60.0)))
    await until(lambda: bench.pool.open_calls)
    bench.clock.advance(60.0)
    bench.pool.open_calls[0].release()
    assert error_of(await opening) == "late"
    assert len(bench.called) == 1


async def test_each_attempt_is_told_what_is_left_of_the_deadline() -> None:
    bench = RoutingBench(fails_first(EngineFailure("once"), held=True))
    asking = asyncio.create_task(bench.ask(text_request(timeout_s=60.0)))
    await until(lambda: bench.pool.open_calls)
    bench.clock.advance(20.0)
    bench.pool.open_calls[0].release()
    await until(lambda: len(bench.pool.open_calls) == 2)
    bench.pool.open_calls[1].release()
    await asking
    assert [request.timeout_s for _, request in bench.pool.calls] == [60.0, 40.0]


# --- The seed ----------------------------------------------------------------------------------------


def seed_of(request: Request) -> int | None:
    return request.sampling.seed if isinstance(request, GenerateRequest) else request.seed


def seeds_sent(bench: RoutingBench) -> list[int | None]:
    return [seed_of(request) for _, request in bench.pool.calls]


async def test_case_28_an_absent_seed_is_drawn_once_and_repeated_by_every_attempt() -> None:
    bench = RoutingBench(fails_first(EngineFailure("1"), EngineFailure("2")))
    await bench.ask(text_request())
    first, second, third = seeds_sent(bench)
    assert first is not None
    assert first == second == third
    assert 0 <= first < SEED_BOUND
    await bench.ask(text_request())
    assert seeds_sent(bench)[-1] != first


async def test_case_28_an_absent_seed_of_an_image_is_drawn_too() -> None:
    bench = RoutingBench(fails_first(EngineFailure("1"), then=image_answer(0)))
    await bench.ask(image_request())
    first, second = seeds_sent(bench)
    assert first is not None
    assert first == second


@pytest.mark.parametrize("request_", [text_request(seed=0), image_request(seed=0), text_request(seed=-5)])
async def test_a_given_seed_is_kept(request_: GenerateRequest | ImageRequest) -> None:
    bench = RoutingBench(FakePool())
    await bench.ask(request_)
    assert seeds_sent(bench) == [seed_of(request_)]


async def test_a_greedy_request_needs_no_seed() -> None:
    bench = RoutingBench(FakePool())
    await bench.ask(text_request(temperature=0.0))
    assert seeds_sent(bench) == [None]


async def test_the_same_generator_draws_the_same_seeds() -> None:
    drawn = []
    for _ in range(2):
        bench = RoutingBench(FakePool(), seed=11)
        await bench.ask(text_request())
        drawn.append(seeds_sent(bench))
    assert drawn[0] == drawn[1]
