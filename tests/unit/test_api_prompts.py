"""Several prompts in one completions request: one answer."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from blaze.api.merged import MergedStream
from blaze.errors import EngineFailure, InvalidRequest
from blaze.routing.settings import DispatchSettings
from blaze.types import (
    ChoiceFinished,
    Events,
    Finished,
    GenerateRequest,
    Started,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from tests.api_bench import ApiBench, chunks_of, error_of
from tests.fakes import FakeCall, FakePool, Script
from tests.samples import collect, scored, terminals, text_of, text_request
from tests.waiting import until

ONE_TRY = DispatchSettings(max_retries=0, max_lost=0)
BEGUN: Events = (Started((1,)), TextDelta(0, "be", (5,)))


def saying(text: str, *, tokens: int = 3, reason: Any = "stop") -> Script:
    """An answer in two pieces, of as many choices as there are words."""
    words = text.split()
    return [
        (Started((1, 2)), *(TextDelta(i, word[:1], (1,)) for i, word in enumerate(words))),
        (
            *(TextDelta(i, word[1:], (2,)) for i, word in enumerate(words)),
            *(ChoiceFinished(i, reason) for i in range(len(words))),
            Finished(Usage(prompt_tokens=2, completion_tokens=tokens, cached_tokens=1)),
        ),
    ]


def answering(*scripts: Script, settings: DispatchSettings | None = None) -> ApiBench:
    """The answers to the prompts of one request, in their order."""
    return ApiBench(FakePool(("a",), next_scripts=list(scripts)), settings=settings)


def holding(*scripts: Script) -> ApiBench:
    """The same, where every answer waits until the test lets it go on."""
    return ApiBench(FakePool(("a",), held=True, next_scripts=list(scripts)), settings=ONE_TRY)


async def calls_of(api: ApiBench, count: int) -> list[FakeCall]:
    await until(lambda: len(api.pool.open_calls) == count)
    return api.pool.open_calls


async def begin(calls: list[FakeCall]) -> None:
    """Each gives its first batch out, and waits again."""
    for call in calls:
        call.release()
        call.hold_after(1)
    await asyncio.sleep(0.01)


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found


# --- Answers -----------------------------------------------------------------------------------------


async def test_choices_are_numbered_over_all_prompts_and_usage_is_summed() -> None:
    async with answering(saying("one two"), saying("three four", tokens=4, reason="length")) as api:
        body = (await api.complete(prompt=["a", "b"], n=2)).json()
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "one", "stop"),
        (1, "two", "stop"),
        (2, "three", "length"),
        (3, "four", "length"),
    ]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 7,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_a_stream_of_several_prompts_has_one_usage_and_one_end() -> None:
    async with answering(saying("one two"), saying("three four")) as api:
        response = await api.complete(
            prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
        )
    *chunks, last = chunks_of(response)
    assert texts(chunks) == {0: "one", 1: "two", 2: "three", 3: "four"}
    reasons = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(reasons) == [0, 1, 2, 3]
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 10)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        (["a", "b"], [TextPrompt("a"), TextPrompt("b")]),
        ([[1, 2], [3]], [TokenPrompt((1, 2)), TokenPrompt((3,))]),
    ],
)
async def test_every_prompt_is_a_request_of_its_own_with_the_same_sampling(prompt: Any, meant: Any) -> None:
    async with ApiBench() as api:
        response = await api.complete(prompt=prompt, seed=7, max_tokens=5, priority=3)
        assert response.status_code == 200
        sent = [request for request in api.sent if isinstance(request, GenerateRequest)]
        assert [request.prompt for request in sent] == meant
        assert [(r.sampling.seed, r.sampling.max_tokens, r.priority) for r in sent] == [(7, 5, 3)] * 2
        assert len({request.request_id for request in sent}) == 2
        assert all(r.request_id.startswith(response.headers["x-request-id"]) for r in sent)
        assert response.headers["x-blaze-replica"] == "a"
        assert api.service.in_flight == 0


async def test_128_prompts_are_answered_in_order() -> None:
    words = [f"w{number}" for number in range(128)]
    settings = DispatchSettings(max_in_flight=3)
    async with answering(*map(saying, words), settings=settings) as api:
        choices = (await api.complete(prompt=words)).json()["choices"]
    assert [choice["text"] for choice in choices] == words


async def test_the_openai_client_sends_several_prompts() -> None:
    async with answering(saying("one"), saying("two")) as api:
        client = openai.AsyncOpenAI(base_url="http://blaze/v1", api_key="unused", http_client=api.http)
        whole = await client.completions.create(model="m", prompt=["a", "b"])
        assert [choice.text for choice in whole.choices] == ["one", "two"]
        api.pool.next_scripts = [saying("one"), saying("two")]
        stream = await client.completions.create(model="m", prompt=["a", "b"], stream=True)
        choices = [choice async for chunk in stream for choice in chunk.choices]
    assert "".join(choice.text for choice in choices if choice.index == 1) == "two"


async def test_log_probabilities_and_given_back_prompts_stay_with_their_choice() -> None:
    def echoing(text: str) -> Script:
        echo = TextDelta(0, text, (1,), (scored(text, None),), echo=True)
        return [(Started((1,)), echo, ChoiceFinished(0, "length"), Finished(Usage(1)))]

    async with answering(echoing("one"), echoing("three")) as api:
        body = (await api.complete(prompt=["one", "three"], echo=True, max_tokens=0, logprobs=1)).json()
    assert [choice["text"] for choice in body["choices"]] == ["one", "three"]
    assert [choice["logprobs"]["tokens"] for choice in body["choices"]] == [["one"], ["three"]]
    assert body["usage"]["completion_tokens"] == 0


# --- Reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_beyond_what_the_replicas_hold_are_taken_up_as_others_end(stream: bool) -> None:
    settings = DispatchSettings(max_in_flight=1, request_timeout_s=5)
    async with answering(saying("one"), saying("two"), saying("three"), settings=settings) as api:
        response = await api.complete(prompt=["a", "b", "c"], stream=stream)
    assert response.status_code == 200
    found = texts(chunks_of(response) if stream else [response.json()])
    assert found == {0: "one", 1: "two", 2: "three"}


async def test_nothing_is_sent_before_every_answer_has_begun() -> None:
    async with ApiBench(FakePool(("a",), held=True, next_scripts=[saying("one"), saying("two")])) as api:
        response = asyncio.ensure_future(api.complete(prompt=["a", "b"], stream=True))
        await until(lambda: len(api.pool.open_calls) == 2)
        api.pool.open_calls[0].release()
        await until(lambda: api.service.in_flight == 1)  # the first is read to its end
        assert not response.done()
        api.pool.open_calls[1].release()
        assert texts(chunks_of(await response)) == {0: "one", 1: "two"}


async def test_once_all_have_begun_nobody_reads_ahead_of_the_client() -> None:
    long: Script = [BEGUN, *((TextDelta(0, "x", (1,)),) for _ in range(100)), *saying("y")[1:]]
    async with holding(list(long), list(long)) as api:
        opening = asyncio.ensure_future(MergedStream.open(api.service, [text_request(), text_request()]))
        await begin(await calls_of(api, 2))
        stream = await opening
        for call in api.pool.open_calls:
            call.release()
        events = [*await anext(stream)]
        for _ in range(3):
            await asyncio.sleep(0.01)  # time enough to read all, for those who would
            events += await anext(stream)
        assert len(events) < 20
        assert api.service.in_flight == 2
        events += await collect(stream)
        assert text_of(events, 0) == text_of(events, 1) == "be" + "x" * 100
        assert terminals(events) == [Finished(Usage(prompt_tokens=4, completion_tokens=6, cached_tokens=2))]
        await stream.aclose()


# --- Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("others_begun", [False, True])
async def test_an_error_before_all_have_begun_is_the_response(stream: bool, others_begun: bool) -> None:
    refusal: Script = [InvalidRequest("The prompt is empty.", param="prompt")]
    async with holding([BEGUN], refusal, [BEGUN]) as api:
        response = asyncio.ensure_future(api.complete(prompt=["a", "", "b"], stream=stream))
        first, refused, last = await calls_of(api, 3)
        if others_begun:
            await begin([first, last])
        refused.release()
        assert (await response).status_code == 400
        assert error_of(await response)["param"] == "prompt"
        assert (await response).headers["x-blaze-replica"] == "a"
        assert first.cancelled
        assert last.cancelled
        assert api.service.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_breaks_while_others_wait_is_the_response(stream: bool) -> None:
    async with holding([BEGUN, EngineFailure("broke")], saying("two")) as api:
        response = asyncio.ensure_future(api.complete(prompt=["a", "b"], stream=stream))
        breaking, waiting = await calls_of(api, 2)
        breaking.release()
        assert (await response).status_code == 500
        assert error_of(await response)["message"] == "broke"
        assert waiting.cancelled
        assert api.service.in_flight == 0


async def test_an_error_after_all_have_begun_is_one_event_then_done() -> None:
    async with holding([BEGUN], [BEGUN, EngineFailure("broke")]) as api:
        response = asyncio.ensure_future(api.complete(prompt=["a", "b"], stream=True))
        going, breaking = await calls_of(api, 2)
        await begin([going, breaking])
        breaking.release()
        assert (await response).status_code == 200
        *chunks, last = chunks_of(await response)
        assert last["error"]["message"] == "broke"
        assert texts(chunks) == {0: "be", 1: "be"}
        assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
        assert going.cancelled
        assert api.service.in_flight == 0


async def test_a_whole_answer_of_which_one_breaks_is_that_error() -> None:
    async with answering([BEGUN, EngineFailure("broke")], saying("two"), settings=ONE_TRY) as api:
        response = await api.complete(prompt=["a", "b"])
        assert response.status_code == 500
        assert error_of(response)["code"] == "engine_error"
        assert api.service.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_overload_by_one_of_the_prompts_gives_all_up(stream: bool) -> None:
    settings = DispatchSettings(max_in_flight=2, max_queued=0)
    async with ApiBench(FakePool(("a",), held=True), settings=settings) as api:
        response = await api.complete(prompt=["a", "b", "c"], stream=stream)
        assert response.status_code == 503
        assert error_of(response)["type"] == "overloaded_error"
        assert all(call.cancelled for call in api.pool.open_calls)
        assert api.service.in_flight == 0


@pytest.mark.parametrize("begun", [False, True])
async def test_what_nobody_foresaw_ends_the_whole_answer(begun: bool) -> None:
    unforeseen = RuntimeError("unforeseen")
    async with holding([BEGUN], [BEGUN, unforeseen] if begun else [unforeseen]) as api:
        response = asyncio.ensure_future(api.complete(prompt=["a", "b"], stream=True))
        going, breaking = await calls_of(api, 2)
        await begin([going, breaking])
        breaking.release()
        assert (await response).status_code == (200 if begun else 500)
        error = chunks_of(await response)[-1]["error"] if begun else error_of(await response)
        assert error["type"] == "server_error"
        assert "unforeseen" not in error["message"]
        assert going.cancelled
        assert api.service.in_flight == 0


@pytest.mark.parametrize("num_begun", [0, 1, 2])
async def test_case_15_a_client_that_leaves_stops_all_prompts(num_begun: int) -> None:
    async with holding([BEGUN], [BEGUN]) as api:
        opening = asyncio.ensure_future(MergedStream.open(api.service, [text_request(), text_request()]))
        await begin((await calls_of(api, 2))[:num_begun])
        if num_begun == 2:
            await (await opening).aclose()
        else:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        assert all(call.cancelled for call in api.pool.open_calls)
        assert api.service.in_flight == 0
