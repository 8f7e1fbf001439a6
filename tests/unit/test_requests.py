"""Requests made in Python are held to the bounds that HTTP requests are held to."""

from __future__ import annotations

from typing import Any

import pytest

from blaze.checks import SEED_BOUND
from blaze.errors import InvalidRequest
from blaze.sampling_params import SamplingParams
from blaze.types import GenerateRequest, ImageRequest, TextPrompt

NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(({"max_tokens": value}, "max_tokens") for value in (0, -1, 1.5, "5", True)),
        *(({"temperature": value}, "temperature") for value in (-0.1, 2.1, NAN, "1", None, True)),
        *(({"top_p": value}, "top_p") for value in (0, 1.1, NAN, "1")),
        *(({"top_k": value}, "top_k") for value in (-1, 1.5, "1")),
        *(({"min_p": value}, "min_p") for value in (-0.1, 1.1, NAN, "0")),
        *(({"repetition_penalty": value}, "repetition_penalty") for value in (0, 10.1, NAN)),
        *(({"frequency_penalty": value}, "frequency_penalty") for value in (-2.1, NAN, True)),
        *(({"presence_penalty": value}, "presence_penalty") for value in (2.1, None)),
        *(({"logit_bias": value}, "logit_bias") for value in (((-1, 1),), ((1, 101),), ((1, NAN),))),
        *(({"stop_token_ids": value}, "stop_token_ids") for value in ((-1,), (1.5,), ("1",))),
        *(({"min_tokens": value}, "min_tokens") for value in (-1, 1.5, True)),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        *(({"logprobs": value}, "logprobs") for value in (-1, 21, 1.5, True)),
        *(({"n": value}, "n") for value in (0, -1, 1.5, True)),
        *(({"stop": value}, "stop") for value in (("",), ("a", 5), "abc", ["a"])),
        *(({"seed": value}, "seed") for value in (SEED_BOUND, -SEED_BOUND - 1, 1.5, "1", True)),
    ],
)
def test_a_wrong_sampling_parameter_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**fields)
    assert refused.value.param == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(({"priority": value}, "priority") for value in (1001, -1001, 0.5, True)),
        ({"generated": ((1,), (2,))}, "generated"),  # of two choices, where one was asked for
    ],
)
def test_a_wrong_field_of_a_text_request_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        GenerateRequest("r", "m", TextPrompt("a prompt"), **fields)
    assert refused.value.param == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(({"n": value}, "n") for value in (0, 1.5)),
        *(({"width": value}, "width") for value in (0, -8, 1.5)),
        *(({"num_inference_steps": value}, "num_inference_steps") for value in (0, "5")),
        *(({"guidance_scale": value}, "guidance_scale") for value in (-1, NAN, "5")),
        *(({"seed": value}, "seed") for value in (SEED_BOUND, 0.5)),
        *(({"strength": value, "image": b"x"}, "strength") for value in (-0.1, 1.1, NAN, "1", True)),
        *(({"eta": value}, "eta") for value in (-0.1, 1.1, NAN)),
        *(({"clip_skip": value}, "clip_skip") for value in (0, 1.5)),
        *(({"output_compression": value}, "output_compression") for value in (-1, 101, 50.0)),
        *(({"partial_images": value}, "partial_images") for value in (-1, 4, True)),
        *(
            ({"adapters": (value,)}, "adapters")
            for value in (("ink", NAN), ("ink", 11), (5, 1), ("ink", None))
        ),
        ({"mask": b"x"}, "mask"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_a_wrong_image_parameter_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ImageRequest("r", "m", "a prompt", **fields)
    assert refused.value.param == named


def test_the_bounds_themselves_are_fine() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_p=1, top_k=0, n=1, stop=("a",), seed=SEED_BOUND - 1)
    SamplingParams(temperature=2, top_p=1e-9, seed=-SEED_BOUND)
    SamplingParams(min_p=1, repetition_penalty=10, frequency_penalty=-2, presence_penalty=2, logprobs=20)
    SamplingParams(logit_bias=((0, -100), (5, 100)), stop_token_ids=(0,), min_tokens=2, max_tokens=2)
    SamplingParams(max_tokens=0, echo=True, logprobs=0)
    sampling = SamplingParams(n=2)
    GenerateRequest("r", "m", TextPrompt("x"), sampling, priority=-1000, generated=((), (1, 2)))
    ImageRequest("r", "m", "a prompt", guidance_scale=0, seed=-SEED_BOUND, width=1, height=1)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_lone_surrogate_is_no_text_to_draw(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ImageRequest("r", "m", **({"prompt": "p"} | {field: "\ud800"}))
    assert caught.value.param == field
