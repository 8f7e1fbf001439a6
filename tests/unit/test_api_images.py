"""Images over JSON: POST /v1/images/generations, and what both image endpoints answer."""

from __future__ import annotations

import base64
import math
from typing import Any

import pytest

from blaze.types import ImageRequest
from tests.api_bench import ApiBench
from tests.api_requests import IMAGE, assert_param_refused, sent_for
from tests.fakes import FakePool
from tests.image_files import picture, with_hole
from tests.samples import image_answer


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


PICTURE = base64_of(picture())


async def sent_image(**fields: Any) -> ImageRequest:
    request = await sent_for(IMAGE, **fields)
    assert isinstance(request, ImageRequest)
    return request


# --- Parameters --------------------------------------------------------------------------------------


async def test_diffusers_parameters_reach_the_engine_under_their_names() -> None:
    given: dict[str, Any] = {
        "strength": 0.5,
        "scheduler": "euler_a",
        "eta": 1.0,
        "clip_skip": 2,
        "output_format": "jpeg",
        "output_compression": 70,
        "negative_prompt": "blurry",
    }
    request = await sent_image(**given, image=PICTURE, adapters={"ink": 1, "oil": -0.5})
    assert {name: getattr(request, name) for name in given} == given
    assert request.adapters == (("ink", 1.0), ("oil", -0.5))
    assert (request.image, request.mask) == (picture(), None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("strength", value) for value in (-0.1, 1.1, math.nan, "0.5", True)),
        *(("eta", value) for value in (-0.1, 1.1, math.inf, "0")),
        *(("clip_skip", value) for value in (0, -1, 1.5, "1", True, 2**31)),
        *(("scheduler", value) for value in (5, ["euler"], "x" * 129)),
        *(("output_compression", value) for value in (-1, 101, 50.5, "50")),
        *(("adapters", value) for value in ([], "ink", [["ink", 1]], {"ink": "much"}, {"ink": None})),
        *(("adapters", {"ink": value}) for value in (10.1, -10.1, math.nan, math.inf, True, {})),
        *(("adapters", value) for value in ({"x" * 129: 1}, {str(number): 1 for number in range(17)})),
        *(("stream", value) for value in ("true", 1)),
        *(("partial_images", value) for value in (-1, 4, 1.5, "2", True)),
        *(("progress", value) for value in ("true", 1)),
        *(("prompt", value) for value in (["a", "b"], [], None, 5)),
        *(("negative_prompt", value) for value in (["a"], 5)),
        ("input_fidelity", "high"),
    ],
)
async def test_case_04_values_out_of_range_are_refused(name: str, value: Any) -> None:
    more = {"image": PICTURE, "output_format": "jpeg", "stream": True}
    await assert_param_refused(IMAGE, name, **more | {name: value})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"strength": 0.5}, "strength"),
        ({"mask": PICTURE}, "mask"),
        ({"partial_images": 1}, "partial_images"),
        ({"partial_images": 1, "stream": False}, "partial_images"),
        ({"progress": True}, "progress"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 50, "output_format": "png"}, "output_compression"),
    ],
)
async def test_parameters_that_mean_nothing_without_another_are_refused(
    fields: dict[str, Any], param: str
) -> None:
    await assert_param_refused(IMAGE, param, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_images": 0, "progress": False, "stream": False},
        {"adapters": {}, "input_fidelity": "low"},
        {"quality": "standard", "background": "opaque"},
    ],
)
async def test_values_that_ask_for_nothing_change_nothing(fields: dict[str, Any]) -> None:
    assert await sent_for(IMAGE, **fields) == await sent_for(IMAGE)


async def test_an_adapters_name_is_never_echoed() -> None:
    async with ApiBench() as api:
        assert "secret" not in (await api.draw(adapters={"secret": "x"})).text


# --- Images in the JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        PICTURE,
        f"data:image/png;base64,{PICTURE}",
        f"DATA:image/png;charset=x;base64,{PICTURE}",
        f"data:;base64,{PICTURE}",
        "\n".join(PICTURE[at : at + 20] for at in range(0, len(PICTURE), 20)) + "\n",
    ],
)
async def test_an_image_is_base64_or_a_data_url(given: str) -> None:
    request = await sent_image(image=given, mask=base64_of(with_hole()))
    assert (request.image, request.mask) == (picture(), with_hole())


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "data:image/png;base64,",
        "not base64!",
        PICTURE[:-1],
        PICTURE[:5] + "*" + PICTURE[5:],
        PICTURE.replace("/", "_").replace("+", "-") + "_A==",
        "é" * 8,
        "data:image/png," + PICTURE,
        f"data:{'x' * 200};base64,{PICTURE}",
        "https://example.com/a.png",
        "file:///etc/passwd",
        5,
        [PICTURE],
        {"url": PICTURE},
    ],
)
async def test_bad_base64_is_refused_by_name(name: str, value: Any) -> None:
    await assert_param_refused(IMAGE, name, **{"image": PICTURE, name: value})


async def test_an_image_of_generations_is_never_its_own_mask() -> None:
    assert (await sent_image(image=base64_of(with_hole()))).mask is None


# --- Answers -----------------------------------------------------------------------------------------


async def test_an_answer_has_openais_usage_and_counts_its_images() -> None:
    async with ApiBench(images=FakePool(("x",), scripts={"x": [image_answer(1, 2)]})) as api:
        body = (await api.draw(n=2)).json()
    assert body["usage"] == {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
        "images": 2,
    }
    assert body["background"] == "opaque"
