from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from blaze.engines.llm.stopping import StopStrings
from blaze.errors import NonFiniteOutput
from blaze.types import ChoiceFinished, Events, Finished, Progress, Started, TextDelta, Usage
from tests.api_bench import MESSAGES, ApiBench, chunks_of
from tests.fakes import FakePool, Script
from tests.waiting import until

STARTED = Started((1, 2, 3))
FINISHED = Finished(Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1))


def answering(*batches: Events | Exception) -> ApiBench:
    return ApiBench(FakePool(("a",), scripts={"a": [list(batches), list(batches)]}))


def two_tokens(first: str = "Hel", second: str = "lo") -> list[Events | Exception]:
    return [
        (STARTED, TextDelta(0, first, (1,))),
        (TextDelta(0, second, (2,)), ChoiceFinished(0, "stop"), FINISHED),
    ]


def contents(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") for c in choices)


def reasons(chunks: list[dict[str, Any]], index: int = 0) -> list[str]:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return [c["finish_reason"] for c in choices if c["finish_reason"] is not None]


# --- Framing -----------------------------------------------------------------------------------------


async def test_case_12_a_chat_stream_in_openais_framing() -> None:
    async with answering(*two_tokens()) as api:
        response = await api.chat(stream=True)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-cache"
    chunks = chunks_of(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert contents(chunks) == "Hello"
    assert reasons(chunks) == ["stop"]
    assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in chunks)


async def test_case_12_a_completion_stream_in_openais_framing() -> None:
    async with answering(*two_tokens()) as api:
        chunks = chunks_of(await api.complete(stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


@pytest.mark.parametrize("path", ["chat", "complete"])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
async def test_case_12_usage_is_not_sent_unasked(path: str, options: dict[str, Any] | None) -> None:
    async with answering(*two_tokens()) as api:
        chunks = chunks_of(await getattr(api, path)(stream=True, stream_options=options))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_case_12_usage_that_was_asked_for_comes_once_and_last(path: str) -> None:
    async with answering(*two_tokens()) as api:
        chunks = chunks_of(await getattr(api, path)(stream=True, stream_options={"include_usage": True}))
    *others, last = chunks
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, None])
@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_case_12_stream_options_without_a_stream_are_refused(path: str, stream: bool | None) -> None:
    async with answering(*two_tokens()) as api:
        response = await getattr(api, path)(stream=stream, stream_options={"include_usage": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"


async def test_case_12_every_choice_has_its_role_and_one_finish_reason() -> None:
    script: Script = [
        (STARTED, TextDelta(1, "b", (1,)), TextDelta(0, "a", (2,))),
        (ChoiceFinished(1, "length"), TextDelta(0, "A", (3,)), ChoiceFinished(0, "stop"), FINISHED),
    ]
    async with answering(*script) as api:
        chunks = chunks_of(await api.chat(stream=True, n=2))
    assert (contents(chunks, 0), contents(chunks, 1)) == ("aA", "b")
    assert (reasons(chunks, 0), reasons(chunks, 1)) == (["stop"], ["length"])
    for index in (0, 1):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in own[1:])


async def test_case_12_eos_first_is_an_empty_answer_that_is_still_valid() -> None:
    async with answering((STARTED, TextDelta(0, "", (0,)), ChoiceFinished(0, "stop"), FINISHED)) as api:
        chunks = chunks_of(await api.chat(stream=True))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert (contents(chunks), reasons(chunks)) == ("", ["stop"])


@pytest.mark.parametrize(
    "text", ["a\nb", "x\n\ndata: [DONE]\n\n", "\r\n", '"quoted" \\ back', "\u2028\u2029", "é€🚀", "\0"]
)
async def test_case_12_any_text_stays_inside_its_event(text: str) -> None:
    async with answering(*two_tokens(text, "!")) as api:
        assert contents(chunks_of(await api.chat(stream=True))) == text + "!"
        chunks = chunks_of(await api.complete(stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text + "!"


async def test_case_12_deltas_without_text_make_no_chunk() -> None:
    script: Script = [(STARTED,), (TextDelta(0, "", (1,)), Progress(1, 2)), *two_tokens()]
    async with answering(*script) as api:
        chunks = chunks_of(await api.chat(stream=True))
    assert len(chunks) == 4  # role, two pieces, the end


@pytest.mark.parametrize("stop", [["DEFGHIJ"], ["ABX", "EFGH"]])
async def test_case_10_stream_and_whole_answer_are_equal_and_free_of_the_stop(stop: list[str]) -> None:
    stops = StopStrings(stop)
    batches: Script = [(STARTED,)]
    for token, piece in enumerate(("ABC", "DEF", "G", "HI", "J")):
        fed = stops.feed(piece)
        batches.append((TextDelta(0, fed.text, (token,)),))
        if fed.stopped:
            break
    batches.append((ChoiceFinished(0, "stop"), FINISHED))
    async with answering(*batches) as api:
        whole = (await api.chat(stop=stop)).json()["choices"][0]
        chunks = chunks_of(await api.chat(stop=stop, stream=True))
    expected = "ABC" if stop == ["DEFGHIJ"] else "ABCD"
    assert whole["message"]["content"] == contents(chunks) == expected
    assert [whole["finish_reason"]] == reasons(chunks) == ["stop"]


# --- Errors and clients that leave -------------------------------------------------------------------


@pytest.mark.parametrize("path", ["chat", "complete"])
@pytest.mark.parametrize("broken", [[NonFiniteOutput("broke")], [RuntimeError("unforeseen")]])
async def test_case_13_an_error_in_mid_stream_is_one_event_then_done(path: str, broken: Script) -> None:
    async with answering((STARTED, TextDelta(0, "Hel", (1,))), *broken) as api:
        response = await getattr(api, path)(stream=True, stream_options={"include_usage": True})
        assert response.status_code == 200
        *chunks, last = chunks_of(response)
        assert set(last) == {"error"}
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert last["error"]["type"] == "server_error"
        assert chunks, "what was sent before stays sent"
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
        assert api.service.in_flight == 0


class Connection:
    """An HTTP connection that the test holds in its hands."""

    def __init__(self, api: ApiBench, body: dict[str, Any]) -> None:
        self.sent: list[MutableMapping[str, Any]] = []
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("blaze", 80),
        }
        self.task = asyncio.ensure_future(api.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        body, self._body = self._body, b""
        if not body:
            await asyncio.Event().wait()  # the client neither sends more nor leaves
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def leave(self) -> None:
        """What the server does when the client is gone."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_events_leave_as_they_come_and_nothing_before_the_first() -> None:
    async with ApiBench(FakePool(("a",), held=True, scripts={"a": [two_tokens()]})) as api:
        connection = Connection(api, {"model": "m", "messages": MESSAGES, "stream": True})
        await until(lambda: api.pool.open_calls)
        (call,) = api.pool.open_calls
        assert connection.sent == [], "no status is sent before the first event is there"
        call.release()
        call.hold_after(1)
        await until(lambda: '"content": "Hel"' in connection.text)
        assert "lo" not in connection.text
        call.release()
        await connection.task
        assert connection.text.endswith("data: [DONE]\n\n")
        assert [message.get("more_body") for message in connection.sent[1:]][-1] in (False, None)


@pytest.mark.parametrize("begun", [False, True])
async def test_case_15_a_client_that_leaves_stops_the_work_and_leaves_no_count(begun: bool) -> None:
    async with ApiBench(FakePool(("a",), held=True, scripts={"a": [two_tokens()]})) as api:
        connection = Connection(api, {"model": "m", "messages": MESSAGES, "stream": True})
        await until(lambda: api.pool.open_calls)
        (call,) = api.pool.open_calls
        assert api.service.in_flight == 1
        if begun:
            call.release()
            call.hold_after(1)
            await until(lambda: '"content": "Hel"' in connection.text)
        await connection.leave()
        assert call.cancelled
        assert api.service.in_flight == 0
        outcomes = dict(api.service.dispatchers["m"].counters()[0].outcomes)
        assert outcomes == {"success": 0, "failure": 0, "neutral": 1}
