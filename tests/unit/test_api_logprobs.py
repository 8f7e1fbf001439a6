from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from blaze.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from blaze.types import ChoiceFinished, Events, Finished, Started, TextDelta, TokenLogprob, Usage
from tests.api_bench import MESSAGES, ApiBench, chunks_of
from tests.fakes import FakePool
from tests.samples import scored

ENDED = (ChoiceFinished(0, "stop"), Finished(Usage(2, 3)))


def delta(text: str, *tokens: TokenLogprob, index: int = 0, echo: bool = False) -> TextDelta:
    return TextDelta(index, text, tuple(token.token_id for token in tokens), tokens, echo)


def answering(*batches: Events) -> ApiBench:
    return ApiBench(FakePool(("a",), scripts={"a": [list(batches), list(batches)]}))


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Objects of lists, put together as a client does it."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            whole[name] = whole.get(name, []) + value if isinstance(value, list) else value
    return whole


def logprobs_of(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return [choice["logprobs"] for choice in choices if choice.get("logprobs")]


def offsets_of(*deltas: TextDelta) -> list[int]:
    offsets: list[int] = completion_logprobs(deltas, TextOffsets())["text_offset"]
    return offsets


# --- Chat --------------------------------------------------------------------------------------------

# The end of the sequence has no text: its log probability is not lost.
CHAT: tuple[Events, ...] = (
    (Started((1, 2)), delta("Hé", scored("Hé", -0.25, Hé=-0.25, Ha=-1.5))),
    (delta("", scored("<end>", -2.0, ho=-0.5, hu=-0.75)), *ENDED),
)


async def test_a_chat_answer_with_log_probabilities_in_openais_shape() -> None:
    async with answering(*CHAT) as api:
        choice = (await api.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    assert choice["message"]["content"] == "Hé"
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "Hé",
                "logprob": -0.25,
                "bytes": [72, 195, 169],
                "top_logprobs": [
                    {"token": "Hé", "logprob": -0.25, "bytes": [72, 195, 169]},
                    {"token": "Ha", "logprob": -1.5, "bytes": [72, 97]},
                ],
            },
            {
                "token": "<end>",
                "logprob": -2.0,
                "bytes": list(b"<end>"),
                "top_logprobs": [
                    {"token": "ho", "logprob": -0.5, "bytes": list(b"ho")},
                    {"token": "hu", "logprob": -0.75, "bytes": list(b"hu")},
                ],
            },
        ],
        "refusal": None,
    }


async def test_a_chat_stream_has_the_same_log_probabilities_as_the_whole_answer() -> None:
    async with answering(*CHAT) as api:
        whole = (await api.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
        chunks = chunks_of(await api.chat(logprobs=True, top_logprobs=2, stream=True))
    assert joined(logprobs_of(chunks)) == whole["logprobs"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hé"}, {"content": ""}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


async def test_the_openai_client_reads_log_probabilities() -> None:
    async with answering(*CHAT) as api:
        client = openai.AsyncOpenAI(base_url="http://blaze/v1", api_key="unused", http_client=api.http)
        whole = await client.chat.completions.create(
            model="m",
            messages=MESSAGES,  # type: ignore[arg-type]
            logprobs=True,
            top_logprobs=2,
        )
        stream = await client.chat.completions.create(
            model="m",
            messages=MESSAGES,  # type: ignore[arg-type]
            logprobs=True,
            top_logprobs=2,
            stream=True,
        )
        chunks = [chunk async for chunk in stream]
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [one.token for one in logprobs.content] == ["Hé", "<end>"]
    assert [one.top_logprobs[0].logprob for one in logprobs.content] == [-0.25, -0.5]
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [one for part in streamed for one in part.content or ()] == logprobs.content
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_nothing_is_said_of_log_probabilities_that_the_engine_does_not_send(path: str) -> None:
    async with answering((Started((1,)), TextDelta(0, "a", (1,)), *ENDED)) as api:
        assert (await getattr(api, path)()).json()["choices"][0]["logprobs"] is None
        assert logprobs_of(chunks_of(await getattr(api, path)(stream=True))) == []


# --- Completions -------------------------------------------------------------------------------------

ECHO = delta("Once", scored("On", None), scored("ce", -1.0, ce=-1.0, ly=-3.0), echo=True)
COMPLETION: tuple[Events, ...] = (
    (Started((1, 2)), ECHO, delta(" upon", scored(" upon", -2.0, there=-0.5, was=-1.5))),
    (delta(" a", scored(" a", -0.1)), delta("", scored("<end>", -4.0)), *ENDED),
)


async def test_a_completion_with_log_probabilities_in_openais_shape() -> None:
    async with answering(*COMPLETION) as api:
        choice = (await api.complete(logprobs=2, echo=True)).json()["choices"][0]
    assert choice["text"] == "Once upon a"
    assert choice["logprobs"] == {
        "tokens": ["On", "ce", " upon", " a", "<end>"],
        "token_logprobs": [None, -1.0, -2.0, -0.1, -4.0],
        "top_logprobs": [
            None,
            {"ce": -1.0, "ly": -3.0},
            {"there": -0.5, "was": -1.5, " upon": -2.0},
            {" a": -0.1},
            {"<end>": -4.0},
        ],
        "text_offset": [0, 2, 4, 9, 11],
    }


async def test_a_completion_stream_has_the_same_log_probabilities_and_offsets_that_go_on() -> None:
    async with answering(*COMPLETION) as api:
        whole = (await api.complete(logprobs=2, echo=True)).json()["choices"][0]
        chunks = chunks_of(await api.complete(logprobs=2, echo=True, stream=True))
    assert joined(logprobs_of(chunks)) == whole["logprobs"]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Once", " upon", " a", "", ""]


async def test_every_choice_counts_its_own_text() -> None:
    events = (
        delta("ab", scored("ab")),
        delta("x", scored("x"), index=1),
        delta("c", scored("c")),
        delta("yz", scored("yz"), index=1),
    )
    ends = (ChoiceFinished(0, "stop"), ChoiceFinished(1, "stop"), Finished(Usage(1, 4)))
    async with answering((Started((1,)), *events, *ends)) as api:
        chunks = chunks_of(await api.complete(logprobs=0, n=2, stream=True))
        whole = (await api.complete(logprobs=0, n=2)).json()["choices"]
    for index, offsets in ((0, [0, 2]), (1, [0, 1])):
        assert joined(logprobs_of(chunks, index))["text_offset"] == offsets
        assert whole[index]["logprobs"]["text_offset"] == offsets


async def test_the_openai_client_reads_a_scored_prompt() -> None:
    async with answering((Started((1, 2)), ECHO, ChoiceFinished(0, "length"), Finished(Usage(2)))) as api:
        client = openai.AsyncOpenAI(base_url="http://blaze/v1", api_key="unused", http_client=api.http)
        whole = await client.completions.create(model="m", prompt="Once", echo=True, max_tokens=0, logprobs=1)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["On", "ce"]
    assert logprobs.token_logprobs == [None, -1.0]
    assert logprobs.top_logprobs == [None, {"ce": -1.0, "ly": -3.0}]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 0


# --- Tokens that are not text ------------------------------------------------------------------------


def fragments(*pieces: bytes) -> tuple[TokenLogprob, ...]:
    """Tokens as engines give them, whose bytes need not be whole characters."""
    return tuple(scored(piece.decode("utf-8", "surrogateescape")) for piece in pieces)


def test_parts_of_a_character_keep_their_bytes() -> None:
    rocket = fragments(b" \xf0\x9f", b"\x9a", b"\x80!")
    content = chat_logprobs(rocket)["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == " 🚀!"
    assert [one["token"] for one in content] == [" \\xf0\\x9f", "\\x9a", "\\x80!"]
    tokens = completion_logprobs((delta(" 🚀!", *rocket),), TextOffsets())["tokens"]
    assert tokens == [" \\xf0\\x9f", "\\x9a", "\\x80!"]


@pytest.mark.parametrize("echo", [False, True])
def test_parts_of_a_character_begin_where_the_character_does(echo: bool) -> None:
    pieces = fragments(b"a", b" \xf0\x9f", b"\x9a", b"\x80!", "é".encode(), b"z")
    assert offsets_of(delta("a 🚀!éz", *pieces, echo=echo)) == [0, 1, 2, 2, 4, 5]


def test_text_that_lags_behind_its_tokens_moves_no_offset() -> None:
    deltas = (delta("", scored("ST")), delta("", scored("OP")), delta("STOPS", scored("S")))
    assert offsets_of(*deltas) == [0, 2, 4]


def test_a_token_that_the_prompts_text_leaves_out_moves_no_offset() -> None:
    echo = delta("ab", scored("<begin>", None), scored("a"), scored("b"), echo=True)
    assert offsets_of(echo, delta("c", scored("c"))) == [0, 0, 1, 2]


def test_a_prompt_that_comes_in_pieces_is_counted_on() -> None:
    first = delta("<b>a", scored("<b>", None), scored("a"), echo=True)
    second = delta("<b>c", scored("<b>"), scored("c"), echo=True)
    assert offsets_of(first, second, delta("d", scored("d"))) == [0, 3, 4, 7, 8]


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e9])
def test_what_json_cannot_say_is_openais_least(logprob: float) -> None:
    token = scored("a", logprob, b=logprob)
    assert chat_logprobs((token,))["content"][0]["logprob"] == -9999.0
    completion = completion_logprobs((delta("a", token),), TextOffsets())
    assert completion["token_logprobs"] == [-9999.0]
    assert completion["top_logprobs"] == [{"b": -9999.0, "a": -9999.0}]


def test_of_tokens_that_read_the_same_the_likeliest_counts() -> None:
    token = scored("a", -5.0, a=-1.0, b=-2.0)
    top = completion_logprobs((delta("a", token),), TextOffsets())["top_logprobs"]
    assert top == [{"a": -1.0, "b": -2.0}]
