"""What answers are charged to the limit of a key, however they end: each test says how many tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import httpx
import pytest
from pydantic import SecretStr

from blaze.errors import BlazeError, EngineFailure, InvalidRequest, Overloaded
from blaze.key_config import ApiKeyConfig
from blaze.routing.settings import DispatchSettings
from blaze.types import ChoiceFinished, Events, Finished, Started, TextDelta, Usage
from tests.api_bench import ApiBench, chunks_of
from tests.fakes import FakePool, Script
from tests.samples import image_answer
from tests.waiting import until

Scenario: TypeAlias = Callable[[ApiBench], Awaitable[None]]

ONE_TRY = DispatchSettings(max_retries=0, max_lost=0)
STREAM_OR_WHOLE = pytest.mark.parametrize("stream", [False, True])


def begun(prompt: int, *outputs: int) -> Events:
    """The first batch of an answer: tokens of the prompt, and of the choices until now."""
    deltas = (TextDelta(index, "x", tuple(range(count))) for index, count in enumerate(outputs))
    return (Started(tuple(range(prompt))), *deltas)


def ended(prompt: int, output: int) -> Events:
    """The last one. Its usage need not be what the deltas add up to: then it is seen which one counts."""
    return (ChoiceFinished(0, "stop"), Finished(Usage(prompt_tokens=prompt, completion_tokens=output)))


async def assert_charged(
    tokens: int,
    scenario: Scenario,
    *scripts: Script,
    held: bool = False,
    settings: DispatchSettings = ONE_TRY,
) -> None:
    """The scenario uses up a limit of exactly so many tokens, and not one more."""
    for limit, status in ((tokens, 429), (tokens + 1, 200)):
        if limit == 0:
            continue
        key = ApiKeyConfig(name="ann", key=SecretStr("sk-ann"), tokens_per_minute=limit)
        pool = FakePool(("a",), held=held, next_scripts=[list(script) for script in scripts])
        async with ApiBench(pool, keys=(key,), settings=settings) as bench:
            bench.http.headers["authorization"] = "Bearer sk-ann"
            await scenario(bench)
            assert bench.service.in_flight == 0
            pool.held = False
            pool.next_scripts.clear()
            assert (await bench.chat()).status_code == status, f"{tokens} tokens, limit {limit}"


def leaving(
    *, prompts: list[list[int]], batches: list[int], stream: bool = True, n: int = 1
) -> Callable[[ApiBench], Awaitable[None]]:
    """Ask, get so many batches of the answer to each prompt, and leave."""

    async def scenario(bench: ApiBench) -> None:
        prompt = prompts if len(prompts) > 1 else prompts[0]
        task = asyncio.create_task(bench.complete(prompt=prompt, stream=stream, n=n))
        calls = bench.pool.open_calls
        await until(lambda: len(calls) == len(prompts))
        for call, count in zip(list(calls), batches, strict=True):
            if count:
                call.hold_after(count)
                call.release()
                await until(lambda call=call: call.is_held)  # type: ignore[misc]
        await settled()
        await leave(task)

    return scenario


async def settled() -> None:
    """Whoever has something to do has done it."""
    for _ in range(20):
        await asyncio.sleep(0)


async def leave(task: asyncio.Task[httpx.Response]) -> None:
    """What the server does when the client is gone."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


def asking(status: int, *, stream: bool = False, **fields: object) -> Scenario:
    """Ask, and stay to the end."""

    async def scenario(bench: ApiBench) -> None:
        response = await bench.complete(stream=stream, **fields)
        assert response.status_code == status

    return scenario


# --- Who leaves before anything came -----------------------------------------------------------------


@STREAM_OR_WHOLE
@pytest.mark.parametrize("batches", [0, 1])
async def test_who_leaves_before_the_first_content_pays_for_the_prompt(stream: bool, batches: int) -> None:
    scenario = leaving(prompts=[[1] * 7], batches=[batches], stream=stream)
    await assert_charged(7, scenario, [(Started((1,) * 7),), begun(7, 1)], held=True)


async def test_a_prompt_that_only_its_text_is_known_of_is_estimated() -> None:
    async def scenario(bench: ApiBench) -> None:
        task = asyncio.create_task(bench.chat(messages=[{"role": "user", "content": "x" * 41}]))
        await until(lambda: bench.pool.open_calls)
        await leave(task)

    await assert_charged(11, scenario, held=True)  # four bytes a token, rounded up


@STREAM_OR_WHOLE
async def test_who_leaves_before_any_of_several_answers_pays_for_all_prompts(stream: bool) -> None:
    scenario = leaving(prompts=[[1] * 7, [1] * 5], batches=[0, 0], stream=stream)
    await assert_charged(12, scenario, held=True)


@STREAM_OR_WHOLE
async def test_of_answers_that_have_begun_what_is_known_is_paid_and_of_others_the_prompt(
    stream: bool,
) -> None:
    scripts: list[Script] = [
        [begun(9, 2, 3), ended(9, 100)],  # begun
        [begun(4, 1, 1), ended(4, 6)],  # ended
        [begun(5)],  # taken up
        [],  # nothing known
    ]
    scenario = leaving(prompts=[[1], [2], [3] * 30, [4] * 40], batches=[1, 2, 1, 0], stream=stream, n=2)
    await assert_charged((9 + 2 + 3) + (4 + 6) + 30 + 40, scenario, *scripts, held=True)


async def test_who_leaves_when_the_answer_is_there_but_unread_pays_for_the_prompt() -> None:
    async def scenario(bench: ApiBench) -> None:
        starting = asyncio.Event()

        async def receive() -> dict[str, object]:
            body = b'{"model": "m", "prompt": [1, 2, 3, 4, 5], "stream": true}'
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(_message: object) -> None:
            starting.set()
            await asyncio.Event().wait()  # a client that reads nothing

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        scope["headers"] = [(b"authorization", b"Bearer sk-ann")]
        task = asyncio.ensure_future(bench.app(scope, receive, send))
        await starting.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await assert_charged(5, scenario, [begun(5, 3), ended(5, 3)])


# --- Who leaves in the middle ------------------------------------------------------------------------


@STREAM_OR_WHOLE
async def test_who_leaves_in_the_middle_pays_for_what_came(stream: bool) -> None:
    script: Script = [begun(6, 2, 3), (TextDelta(1, "y", (1, 2)),), (TextDelta(0, "z", (1,)),), ended(6, 50)]
    scenario = leaving(prompts=[[1]], batches=[2], stream=stream, n=2)
    await assert_charged(6 + 2 + 3 + 2, scenario, script, held=True)


@STREAM_OR_WHOLE
async def test_a_prompt_given_back_is_not_charged_as_output_too(stream: bool) -> None:
    echo = TextDelta(0, "abc", (1, 2, 3), echo=True)
    script: Script = [(Started((1, 2, 3)), echo, TextDelta(0, "d", (4,))), ended(3, 50)]
    await assert_charged(4, leaving(prompts=[[1]], batches=[1], stream=stream), script, held=True)


@STREAM_OR_WHOLE
async def test_who_leaves_in_the_middle_of_several_answers_pays_for_what_came_of_all(stream: bool) -> None:
    scripts: list[Script] = [
        [begun(9, 2, 3), ended(9, 100)],
        [begun(4, 1, 1), (TextDelta(0, "y", (7, 8)),), ended(4, 100)],
        [begun(20, 1, 1), ended(20, 6)],  # to its end: its usage counts
    ]
    scenario = leaving(prompts=[[1], [2], [3]], batches=[1, 1, 2], stream=stream, n=2)
    await assert_charged((9 + 5) + (4 + 2) + (20 + 6), scenario, *scripts, held=True)


# --- Who stays ---------------------------------------------------------------------------------------


@STREAM_OR_WHOLE
async def test_a_whole_answer_is_charged_its_usage(stream: bool) -> None:
    await assert_charged(3 + 8, asking(200, stream=stream), [begun(3, 5), ended(3, 8)])


@STREAM_OR_WHOLE
async def test_answers_to_several_prompts_are_charged_the_usage_of_all(stream: bool) -> None:
    scripts: list[Script] = [[begun(3, 5, 5), ended(3, 8)], [begun(2, 1, 1), ended(2, 4)]]
    await assert_charged(17, asking(200, stream=stream, prompt=["a", "b"], n=2), *scripts)


@STREAM_OR_WHOLE
async def test_an_attempt_that_failed_is_not_charged(stream: bool) -> None:
    scripts: list[Script] = [[begun(50), EngineFailure("broke")], [begun(3, 5), ended(3, 8)]]
    await assert_charged(11, asking(200, stream=stream), *scripts, settings=DispatchSettings(retry_pause=0))


async def test_images_cost_no_tokens() -> None:
    async def scenario(bench: ApiBench) -> None:
        bench.images.next_scripts = [image_answer(1)]
        assert (await bench.draw()).status_code == 200
        bench.images.held = True
        task = asyncio.create_task(bench.draw(prompt="x" * 400))
        await until(lambda: len(bench.images.open_calls) == 2)
        await leave(task)

    await assert_charged(0, scenario)


# --- Errors ------------------------------------------------------------------------------------------


@STREAM_OR_WHOLE
@pytest.mark.parametrize(
    "error",
    [InvalidRequest("no", param="prompt"), Overloaded("full", retry_after_s=1), EngineFailure("broke")],
)
@pytest.mark.parametrize("prompt", ["x" * 100, ["x" * 100, "y"]], ids=["one", "several"])
async def test_an_error_instead_of_an_answer_costs_nothing(
    stream: bool, error: BlazeError, prompt: object
) -> None:
    scenario = asking(error.http_status, stream=stream, prompt=prompt)
    await assert_charged(0, scenario, [error], [error])


@STREAM_OR_WHOLE
async def test_what_is_refused_at_the_door_costs_nothing(stream: bool) -> None:
    await assert_charged(0, asking(400, stream=stream, n=-1))
    await assert_charged(0, asking(404, stream=stream, model="nobody"))
    await assert_charged(0, asking(404, stream=stream, model="nobody", prompt=["a", "b"]))
    await assert_charged(
        0,
        asking(503, stream=stream, prompt=["a" * 100] * 3),
        held=True,
        settings=DispatchSettings(max_in_flight=2, max_queued=0),
    )


@STREAM_OR_WHOLE
async def test_an_answer_that_breaks_is_charged_what_came(stream: bool) -> None:
    scenario = asking(200 if stream else 500, stream=stream)
    await assert_charged(3 + 5, scenario, [begun(3, 5), EngineFailure("broke")])


@STREAM_OR_WHOLE
async def test_several_answers_of_which_one_breaks_are_charged_what_came_of_all(stream: bool) -> None:
    async def scenario(bench: ApiBench) -> None:
        asked = asyncio.create_task(bench.complete(prompt=["a", "b", "c"], stream=stream))
        await until(lambda: len(bench.pool.open_calls) == 3)
        for call in bench.pool.open_calls:
            call.hold_after(1)
            call.release()
        await settled()
        bench.pool.open_calls[1].release()
        response = await asked
        assert response.status_code == (200 if stream else 500)
        assert not stream or "error" in chunks_of(response)[-1]

    scripts: list[Script] = [
        [begun(9, 2), ended(9, 100)],
        [begun(4, 1), EngineFailure("broke")],
        [begun(5, 7), ended(5, 7)],
    ]
    await assert_charged(11 + 5 + 12, scenario, *scripts, held=True)


@STREAM_OR_WHOLE
async def test_a_refused_prompt_among_others_does_not_make_their_answers_free(stream: bool) -> None:
    """What has not begun is given up by the Router, not by the client: nothing is known, nothing charged."""

    async def scenario(bench: ApiBench) -> None:
        asked = asyncio.create_task(bench.complete(prompt=["a", "", "c" * 400], stream=stream))
        await until(lambda: len(bench.pool.open_calls) == 3)
        begins, refuses, _waits = bench.pool.open_calls
        begins.hold_after(1)
        begins.release()
        await settled()
        refuses.release()
        assert (await asked).status_code == 400

    scripts: list[Script] = [[begun(9, 2)], [InvalidRequest("empty", param="prompt")], [begun(100, 1)]]
    await assert_charged(11, scenario, *scripts, held=True)
