from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from pydantic import BaseModel

from blaze.api.schemas import ChatCompletionRequest, CompletionRequest, ImageGenerationRequest
from blaze.types import ChatPrompt, GenerateRequest, ImageRequest, Request, TextPrompt, TokenPrompt
from tests.api_bench import MESSAGES, ApiBench, assert_refused
from tests.fakes import FakePool
from tests.samples import image_answer

CHAT, COMPLETION, IMAGE = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
REQUIRED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": MESSAGES},
    COMPLETION: {"model": "m", "prompt": "hi"},
    IMAGE: {"model": "d", "prompt": "seven"},
}
SCHEMAS: dict[str, type[BaseModel]] = {
    CHAT: ChatCompletionRequest,
    COMPLETION: CompletionRequest,
    IMAGE: ImageGenerationRequest,
}
OPTIONAL = [
    (path, name)
    for path, schema in SCHEMAS.items()
    for name in schema.model_fields
    if name not in REQUIRED[path]
]


def bench() -> ApiBench:
    return ApiBench(FakePool(("a",)), images=FakePool(("x",), scripts={"x": [image_answer(1)]}))


def comparable(request: Request) -> Request:
    return dataclasses.replace(request, request_id="")


async def sent_for(path: str, **fields: Any) -> Request:
    """What reaches a replica for a request that is accepted."""
    async with bench() as api:
        response = await api.post(path, {**REQUIRED[path], **fields})
        assert response.status_code == 200, response.text
        (request,) = api.sent
        return comparable(request)


async def sent_text(path: str, **fields: Any) -> GenerateRequest:
    request = await sent_for(path, **fields)
    assert isinstance(request, GenerateRequest)
    return request


async def assert_param_refused(path: str, param: str, **fields: Any) -> None:
    async with bench() as api:
        assert_refused(await api.post(path, {**REQUIRED[path], **fields}), param)
        assert api.sent == [], "a refused request must not reach an engine"
        assert (await api.post(path, REQUIRED[path])).status_code == 200


@pytest.mark.parametrize(("path", "name"), OPTIONAL)
async def test_case_01_null_means_the_same_as_leaving_the_field_out(path: str, name: str) -> None:
    assert await sent_for(path, **{name: None}) == await sent_for(path)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("value", [0, -1, 1.5, "5", True, [], {}, math.nan, 1e400, 2**31])
async def test_case_01_max_tokens_of_a_wrong_kind_is_refused(path: str, value: Any) -> None:
    await assert_param_refused(path, "max_tokens", max_tokens=value)


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (CHAT, {"foo": 1, "metadata": {}, "store": True, "user": "u", "stream_otpions": {}}),
        (CHAT, {"messages": [{**MESSAGES[0], "id": 7, "opts": {}}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "x": 1}]}]}),
        (COMPLETION, {"foo": 1, "bar": math.nan}),
        (IMAGE, {"foo": 1, "moderation": "low"}),
    ],
)
async def test_case_02_unknown_extra_fields_change_nothing(path: str, extra: dict[str, Any]) -> None:
    assert await sent_for(path, **extra) == await sent_for(path)


@pytest.mark.parametrize("field", ["trust_remote_code", "custom_pipeline", "revision", "source", "variant"])
@pytest.mark.parametrize("path", [CHAT, COMPLETION, IMAGE])
async def test_case_45_fields_of_loaders_are_never_passed_on(path: str, field: str) -> None:
    assert await sent_for(path, **{field: "x"}) == await sent_for(path)


@pytest.mark.parametrize("path", [CHAT, COMPLETION, IMAGE])
@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 0, -1])
async def test_case_04_seeds_within_64_bits_are_kept(path: str, seed: int) -> None:
    request = await sent_for(path, seed=seed)
    assert (request.sampling.seed if isinstance(request, GenerateRequest) else request.seed) == seed


@pytest.mark.parametrize("path", [CHAT, COMPLETION, IMAGE])
@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**63) - 1, 1e400, 1.5, "7", True])
async def test_case_04_seeds_outside_are_refused(path: str, seed: Any) -> None:
    await assert_param_refused(path, "seed", seed=seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, 2.1, math.nan, math.inf, "1", True)),
        *(("top_p", value) for value in (0, 1.1, -1, math.nan, math.inf)),
        *(("top_k", value) for value in (-1, 1.5, 2**31)),
        *(("n", value) for value in (0, -1, 129, 5_000_000, 1.5)),
        *(("frequency_penalty", value) for value in (2.1, math.nan)),
        *(("presence_penalty", value) for value in (-2.1, math.inf)),
        *(("logit_bias", value) for value in ({"5": 101}, {"999999999": 5}, 5)),
        *(("stream", value) for value in ("true", 1)),
        *(("ignore_eos", value) for value in ("no", 0)),
        ("user", 5),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_case_04_numbers_and_types_out_of_range_are_refused(path: str, name: str, value: Any) -> None:
    await assert_param_refused(path, name, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_logprobs", -1), ("top_logprobs", 21), ("top_logprobs", 10**9), ("logprobs", True)],
)
async def test_case_04_log_probabilities_out_of_range_are_refused(name: str, value: Any) -> None:
    await assert_param_refused(CHAT, name, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (0, 17, "2")),
        *(("size", value) for value in ("0x8", "8x0", "8", "axb", "8x8x8", "100000x1", 8, "")),
        *(("num_inference_steps", value) for value in (0, -1, 2.5)),
        *(("guidance_scale", value) for value in (-1, math.nan, math.inf, 1001)),
        *(("output_format", value) for value in ("gif", 5)),
        *(("response_format", value) for value in ("url", "png")),
        ("negative_prompt", 5),
        ("stream", True),
    ],
)
async def test_case_04_image_options_out_of_range_are_refused(name: str, value: Any) -> None:
    await assert_param_refused(IMAGE, name, **{name: value})


@pytest.mark.parametrize(("temperature", "top_p"), [(0, 1), (2, 0.01), (1.0, 0.5)])
async def test_values_at_the_edges_are_kept(temperature: float, top_p: float) -> None:
    request = await sent_text(CHAT, temperature=temperature, top_p=top_p, n=128, top_k=0, max_tokens=1)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.max_tokens) == (
        temperature,
        top_p,
        128,
        1,
    )


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
async def test_what_this_version_cannot_do_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    await assert_param_refused(CHAT, name, **{name: 0.5})
    assert await sent_for(CHAT, **{name: 0}) == await sent_for(CHAT)


@pytest.mark.parametrize("name", ["tools", "logit_bias"])
async def test_empty_collections_ask_for_nothing(name: str) -> None:
    empty: Any = [] if name == "tools" else {}
    assert await sent_for(CHAT, **{name: empty}) == await sent_for(CHAT)


# --- Stop strings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        ([], ()),
        ("END", ("END",)),
        (["a", "b"], ("a", "b")),
        ("x" * 4096, ("x" * 4096,)),
        (["a"] * 16, ("a",) * 16),
    ],
)
async def test_case_10_stop_may_be_one_string_or_several(path: str, stop: Any, kept: tuple[str, ...]) -> None:
    assert (await sent_text(path, stop=stop)).sampling.stop == kept


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("stop", ["", [""], ["a", ""], ["a"] * 17, "x" * 10_000, 5, [5], {"a": 1}])
async def test_case_10_stop_strings_that_cannot_be_are_refused(path: str, stop: Any) -> None:
    await assert_param_refused(path, "stop", stop=stop)


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
    assert {message.content for message in request.prompt.messages} == {""}
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
    "prompt", [["a", "b"], [[1], [2]], [1, "a"], [1.5], [True], 5, None, ["x"] * 100_000, [[["a"]]]]
)
async def test_case_04_prompts_that_are_not_one_prompt_are_refused(prompt: Any) -> None:
    await assert_param_refused(COMPLETION, "prompt", prompt=prompt)


async def test_the_limit_is_16_tokens_for_completions_and_open_for_chat() -> None:
    assert (await sent_text(COMPLETION)).sampling.max_tokens == 16
    assert (await sent_text(CHAT)).sampling.max_tokens is None
    assert (await sent_text(CHAT, max_tokens=5, max_completion_tokens=7)).sampling.max_tokens == 7


async def test_image_options_reach_the_engine_under_their_names() -> None:
    request = await sent_for(
        IMAGE,
        n=2,
        size="64x32",
        seed=5,
        num_inference_steps=7,
        guidance_scale=3,
        negative_prompt="blurry",
        output_format="webp",
    )
    assert request == ImageRequest(
        "", "d", "seven", "blurry", 2, 64, 32, 7, 3.0, 5, "webp", timeout_s=request.timeout_s
    )


@pytest.mark.parametrize("size", [None, "auto"])
async def test_no_size_leaves_the_size_to_the_model(size: str | None) -> None:
    request = await sent_for(IMAGE, size=size)
    assert isinstance(request, ImageRequest)
    assert (request.width, request.height, request.output_format, request.n) == (None, None, "png", 1)
