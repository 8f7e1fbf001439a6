from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel

from blaze.api.image_schemas import ImageGenerationRequest
from blaze.api.schemas import ChatCompletionRequest, CompletionRequest
from blaze.types import GenerateRequest, ImageRequest
from tests.api_bench import MESSAGES
from tests.api_requests import (
    CHAT,
    COMPLETION,
    IMAGE,
    REQUIRED,
    assert_param_refused,
    sent_for,
    sent_text,
)

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
        (CHAT, {"foo": 1, "metadata": {}, "store": True, "stream_otpions": {}}),
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
        *(("min_p", value) for value in (-0.1, 1.1, math.nan, "0")),
        *(("repetition_penalty", value) for value in (0, -1, 10.1, math.inf)),
        *(("min_tokens", value) for value in (-1, 1.5, 2**31, 17)),
        *(("stop_token_ids", value) for value in (5, {}, [1] * 129)),
        *(("stop_token_ids[1]", [0, value]) for value in (-1, 1.5, "5", True, 2**31)),
        *(("priority", value) for value in (1001, -1001, 0.5, "high")),
        *(("n", value) for value in (0, -1, 129, 5_000_000, 1.5)),
        *(("frequency_penalty", value) for value in (2.1, math.nan)),
        *(("presence_penalty", value) for value in (-2.1, math.inf)),
        *(("logit_bias", value) for value in ({"5": 101}, {"5": "x"}, {"5": math.nan}, 5, [[5, 1]])),
        *(("logit_bias", {key: 1}) for key in ("abc", "-1", "1.5", "", " 5", "05", "٥", "99999999999")),
        *(("stream", value) for value in ("true", 1)),
        *(("ignore_eos", value) for value in ("no", 0)),
        ("user", 5),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_case_04_numbers_and_types_out_of_range_are_refused(path: str, name: str, value: Any) -> None:
    await assert_param_refused(path, name, **{name.partition("[")[0]: value, "max_tokens": 16})


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_logprobs", -1), ("top_logprobs", 21), ("top_logprobs", 10**9), ("logprobs", 1)],
)
async def test_case_04_log_probabilities_out_of_range_are_refused(name: str, value: Any) -> None:
    await assert_param_refused(CHAT, name, **{"logprobs": True, name: value})


@pytest.mark.parametrize("value", [-1, 21, 10**9, True, 1.5])
async def test_case_04_log_probabilities_of_completions_are_a_number_up_to_20(value: Any) -> None:
    await assert_param_refused(COMPLETION, "logprobs", logprobs=value)


@pytest.mark.parametrize("logprobs", [None, False])
async def test_top_logprobs_need_logprobs(logprobs: bool | None) -> None:
    await assert_param_refused(CHAT, "top_logprobs", logprobs=logprobs, top_logprobs=2)
    assert await sent_for(CHAT, logprobs=logprobs, top_logprobs=0) == await sent_for(CHAT)


@pytest.mark.parametrize(
    ("path", "fields", "wanted"),
    [
        (CHAT, {}, None),
        (CHAT, {"logprobs": False}, None),
        (CHAT, {"logprobs": True}, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20),
        (COMPLETION, {}, None),
        (COMPLETION, {"logprobs": 0}, 0),
        (COMPLETION, {"logprobs": 20}, 20),
    ],
)
async def test_log_probabilities_that_were_asked_for_reach_the_engine(
    path: str, fields: dict[str, Any], wanted: int | None
) -> None:
    assert (await sent_text(path, **fields)).sampling.logprobs == wanted


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


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
async def test_sampling_parameters_reach_the_engine_under_their_names(path: str) -> None:
    given: dict[str, Any] = {
        "max_tokens": 9,
        "top_k": 5,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "min_tokens": 9,
        "ignore_eos": True,
    }
    request = await sent_text(
        path, **given, stop_token_ids=[7, 0], logit_bias={"7": -100, "0": 0.5}, priority=-1000
    )
    assert {name: getattr(request.sampling, name) for name in given} == given
    assert request.sampling.stop_token_ids == (7, 0)
    assert request.sampling.logit_bias == ((7, -100.0), (0, 0.5))
    assert request.priority == -1000


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (CHAT, "tool_choice", "required"),
        (CHAT, "tool_choice", {"type": "function", "function": {"name": "look"}}),
        (CHAT, "functions", [{"name": "look"}]),
        (CHAT, "response_format", {"type": "json_object"}),
        (COMPLETION, "best_of", 2),
        (COMPLETION, "suffix", "end"),
    ],
)
async def test_what_this_version_cannot_do_is_refused(path: str, name: str, value: Any) -> None:
    await assert_param_refused(path, name, **{name: value})


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"tools": [], "tool_choice": "auto", "functions": [], "response_format": {"type": "text"}}),
        (CHAT, {"tool_choice": "none", "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0}),
        (COMPLETION, {"best_of": 1, "suffix": "", "echo": False, "stop_token_ids": [], "priority": 0}),
    ],
)
async def test_values_that_ask_for_nothing_change_nothing(path: str, fields: dict[str, Any]) -> None:
    assert await sent_for(path, **fields) == await sent_for(path)


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


# --- Limits and images -----------------------------------------------------------------------------


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
        request_id="",
        model="d",
        prompt="seven",
        negative_prompt="blurry",
        n=2,
        width=64,
        height=32,
        num_inference_steps=7,
        guidance_scale=3.0,
        seed=5,
        output_format="webp",
        timeout_s=request.timeout_s,
        caller=request.caller,
    )


@pytest.mark.parametrize("size", [None, "auto"])
async def test_no_size_leaves_the_size_to_the_model(size: str | None) -> None:
    request = await sent_for(IMAGE, size=size)
    assert isinstance(request, ImageRequest)
    assert (request.width, request.height, request.output_format, request.n) == (None, None, "png", 1)
