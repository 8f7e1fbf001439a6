"""Prompts: messages, tools, texts and token ids."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blaze.types import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from tests.api_bench import MESSAGES
from tests.api_requests import CHAT, COMPLETION, assert_param_refused, sent_text

# --- Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ({}, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ([5], "messages[0]"),
        ([{"role": "banana", "content": "x"}], "messages[0].role"),
        ([*MESSAGES, {"role": "user"}], "messages[1]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content"),
    ],
)
async def test_case_08_messages_of_a_wrong_shape_are_refused(messages: Any, param: str) -> None:
    await assert_param_refused(CHAT, param, messages=messages)


async def test_case_08_every_role_and_an_empty_assistant_turn_are_accepted() -> None:
    roles = ["system", "developer", "user", "assistant", "tool"]
    messages: list[dict[str, Any]] = [{"role": role, "content": "", "name": "bob"} for role in roles]
    messages.append({"role": "assistant", "content": None})
    request = await sent_text(CHAT, messages=messages)
    assert isinstance(request.prompt, ChatPrompt)
    assert [message.role for message in request.prompt.messages] == [*roles, "assistant"]
    assert [message.content for message in request.prompt.messages] == [*[""] * 5, None]
    assert request.prompt.messages[0].name == "bob"


async def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
    request = await sent_text(CHAT, messages=[{"role": "user", "content": parts}])
    assert isinstance(request.prompt, ChatPrompt)
    assert request.prompt.messages[0].content == "Hello, world"


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("a", TextPrompt("a")),
        (["a"], TextPrompt("a")),
        ([1, 2], TokenPrompt((1, 2))),
        ([[1, 2]], TokenPrompt((1, 2))),
    ],
)
async def test_a_prompt_may_be_text_or_tokens_also_in_a_list_of_one(prompt: Any, meant: Any) -> None:
    assert (await sent_text(COMPLETION, prompt=prompt)).prompt == meant


@pytest.mark.parametrize(
    "prompt", [["a", [1]], [1, "a"], [1.5], [True], 5, None, ["x"] * 129, ["x"] * 100_000, [[["a"]]]]
)
async def test_case_04_what_is_neither_prompt_nor_prompts_is_refused(prompt: Any) -> None:
    await assert_param_refused(COMPLETION, "prompt", prompt=prompt)


@pytest.mark.parametrize(("num_prompts", "n"), [(2, 65), (128, 2)])
async def test_case_04_choices_of_all_prompts_together_are_bounded(num_prompts: int, n: int) -> None:
    await assert_param_refused(COMPLETION, "n", prompt=["x"] * num_prompts, n=n)


async def test_an_answer_of_no_tokens_is_only_for_prompts_that_are_given_back() -> None:
    request = await sent_text(COMPLETION, echo=True, max_tokens=0, logprobs=1)
    assert (request.sampling.echo, request.sampling.max_tokens) == (True, 0)
    await assert_param_refused(COMPLETION, "max_tokens", echo=False, max_tokens=0)


# --- Tools -------------------------------------------------------------------------------------------

LOOK = {"type": "function", "function": {"strict": True, "name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "c-1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}, "x": 1}


async def chat_prompt(**fields: Any) -> ChatPrompt:
    request = await sent_text(CHAT, **fields)
    assert isinstance(request.prompt, ChatPrompt)
    return request.prompt


async def test_tools_reach_the_engine_as_they_were_sent() -> None:
    for choice in (None, "auto"):
        prompt = await chat_prompt(tools=[LOOK], tool_choice=choice)
        assert prompt.tools == json.dumps([LOOK])
    assert (await chat_prompt(tools=[LOOK], tool_choice="none")).tools is None
    assert (await chat_prompt()).tools is None


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"type": "function"},
        {"type": "custom", "custom": {"name": "x"}},
        {"type": "function", "function": {"description": "nameless"}},
        {"type": "function", "function": "look"},
        {"type": "function", "function": {"name": 5}},
        "look",
    ],
)
async def test_tools_that_name_no_function_are_refused(wrong: Any) -> None:
    await assert_param_refused(CHAT, "tools[1]", tools=[LOOK, wrong])
    message = {"role": "assistant", "tool_calls": [wrong]}
    await assert_param_refused(CHAT, "messages[1].tool_calls[0]", messages=[*MESSAGES, message])


async def test_a_conversation_with_tools_reaches_the_engine_whole() -> None:
    prompt = await chat_prompt(
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "dark", "tool_call_id": "c-1"},
            {"role": "assistant", "content": "It is dark.", "tool_calls": []},
        ]
    )
    assert prompt.messages[1:] == (
        ChatMessage("assistant", None, tool_calls=json.dumps([CALL])),
        ChatMessage("tool", "dark", tool_call_id="c-1"),
        ChatMessage("assistant", "It is dark."),
    )


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0]"),
        ({"role": "tool", "tool_call_id": "c-1"}, "messages[0]"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages[0].tool_call_id"),
        ({"role": "assistant", "tool_calls": "look"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [LOOK]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "function_call": {"name": "look", "arguments": ""}}, "messages[0]"),
    ],
)
async def test_tool_messages_of_a_wrong_shape_are_refused(message: dict[str, Any], param: str) -> None:
    await assert_param_refused(CHAT, param, messages=[message])
