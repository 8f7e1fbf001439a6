"""Requests made in Python are held to the bounds that HTTP requests are held to."""

from __future__ import annotations

from typing import Any

import pytest

from blaze.errors import InvalidRequest
from blaze.types import SEED_BOUND, ImageRequest, SamplingParams

NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(({"max_tokens": value}, "max_tokens") for value in (0, -1, 1.5, "5", True)),
        *(({"temperature": value}, "temperature") for value in (-0.1, 2.1, NAN, "1", None, True)),
        *(({"top_p": value}, "top_p") for value in (0, 1.1, NAN, "1")),
        *(({"top_k": value}, "top_k") for value in (-1, 1.5, "1")),
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
        *(({"n": value}, "n") for value in (0, 1.5)),
        *(({"width": value}, "width") for value in (0, -8, 1.5)),
        *(({"num_inference_steps": value}, "num_inference_steps") for value in (0, "5")),
        *(({"guidance_scale": value}, "guidance_scale") for value in (-1, NAN, "5")),
        *(({"seed": value}, "seed") for value in (SEED_BOUND, 0.5)),
    ],
)
def test_a_wrong_image_parameter_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ImageRequest("r", "m", "a prompt", **fields)
    assert refused.value.param == named


def test_the_bounds_themselves_are_fine() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_p=1, top_k=0, n=1, stop=("a",), seed=SEED_BOUND - 1)
    SamplingParams(temperature=2, top_p=1e-9, seed=-SEED_BOUND)
    ImageRequest("r", "m", "a prompt", guidance_scale=0, seed=-SEED_BOUND, width=1, height=1)
