"""Forms with files: POST /v1/images/edits."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator
from typing import Any, get_args

import httpx
import openai
import pytest

from blaze.api.image_schemas import ImageEditRequest
from blaze.engines.diffusion.inputs import OWN_MASK_PIXELS
from blaze.key_config import ApiKeyConfig
from blaze.types import ImageRequest
from tests.api_bench import ApiBench, assert_refused, error_of
from tests.fakes import FakePool
from tests.image_files import picture, raw_png, with_hole
from tests.samples import image_answer

EDITS = "/v1/images/edits"
MASK = with_hole()
BOUNDARY = "multipart/form-data; boundary=BB"


def bench(**options: Any) -> ApiBench:
    return ApiBench(images=FakePool(("x",), scripts={"x": [image_answer(1), image_answer(1)]}), **options)


def form(*parts: tuple[str, str | bytes], end: str = "--BB--\r\n") -> bytes:
    """Parts by hand: what is bytes is a file."""
    made = b""
    for name, value in parts:
        file = '; filename="f.png"' if isinstance(value, bytes) else ""
        head = f'--BB\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        made += head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return made + end.encode()


REQUIRED = (("model", "d"), ("prompt", "seven"), ("image", picture()))


async def post(api: ApiBench, body: bytes, content_type: str = BOUNDARY) -> httpx.Response:
    return await api.http.post(EDITS, content=body, headers={"content-type": content_type})


async def edited(image: bytes = picture(), *, mask: bytes | None = None, **fields: Any) -> ImageRequest:
    """What reaches a replica for a form that is accepted."""
    async with bench() as api:
        response = await api.edit(image, mask=mask, fields=fields)
        assert response.status_code == 200, response.text
        (request,) = api.sent
        assert isinstance(request, ImageRequest)
        return request


async def assert_form_refused(param: str | None, body: bytes) -> str:
    async with bench() as api:
        response = await post(api, body)
        assert_refused(response, param)
        assert api.sent == [], "a refused request must not reach an engine"
        return str(error_of(response)["message"])


# --- Files -------------------------------------------------------------------------------------------


async def test_the_files_reach_the_engine_as_they_were_sent() -> None:
    request = await edited(picture(), mask=MASK)
    assert (request.image, request.mask) == (picture(), MASK)
    assert (request.model, request.prompt, request.n, request.strength) == ("d", "seven", 1, None)


async def test_without_a_mask_the_transparent_part_of_the_image_is_edited() -> None:
    request = await edited(with_hole())
    assert request.mask == with_hole()
    assert request.mask is request.image, "one object, which is sent once"


@pytest.mark.parametrize("image", [picture(), picture(colour=(9, 9, 9, 255), mode="RGBA")])
async def test_an_image_without_a_mask_or_a_transparent_part_is_edited_as_a_whole(image: bytes) -> None:
    assert (await edited(image)).mask is None


async def test_a_mask_that_was_sent_wins_over_the_images_own_transparency() -> None:
    other = picture(colour=(0, 0, 0, 0), mode="RGBA")
    assert (await edited(with_hole(), mask=other)).mask == other


async def test_the_answer_is_that_of_generations() -> None:
    async with bench() as api:
        response = await api.edit(picture(), mask=MASK, fields={"output_format": "png"})
    assert response.headers["x-blaze-replica"] == "x"
    assert response.headers["x-request-id"]
    body = response.json()
    assert base64.b64decode(body["data"][0]["b64_json"]) == b"pixels-0"
    assert (body["data"][0]["seed"], body["size"], body["output_format"]) == (1, "32x16", "png")


async def test_a_list_of_one_image_is_that_image() -> None:
    async with bench() as api:
        response = await post(api, form(*REQUIRED[:2], ("image[]", picture())))
        assert response.status_code == 200, response.text
        assert isinstance(api.sent[0], ImageRequest)
        assert api.sent[0].image == picture()


@pytest.mark.parametrize(
    "names", [("image", "image"), ("image[]", "image[]"), ("image", "image[]"), ("image[]",) * 16]
)
async def test_several_images_are_refused_and_counted(names: tuple[str, ...]) -> None:
    message = await assert_form_refused("image", form(*REQUIRED[:2], *((name, picture()) for name in names)))
    assert str(len(names)) in message


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ((), "image"),
        ((("mask", MASK),), "image"),
        ((("image", b""),), "image"),
        ((("image", b"no picture"),), "image"),
        ((("image", MASK[:60]),), "image"),
        ((("image", "text"),), "image"),
        ((("image[]", "text"),), "image"),
        ((("image", picture()), ("mask", "text")), "mask"),
        ((("image", picture()), ("mask", b"")), "mask"),
        ((("image", picture()), ("mask", MASK), ("mask", MASK)), "mask"),
        ((("image", picture()), ("markup", MASK)), "markup"),
        ((("image", picture()), ("image[0]", MASK)), None),
        ((("image", picture()), ("x" * 99, MASK)), None),
    ],
)
async def test_files_that_are_wrong_are_refused_by_name(
    parts: tuple[tuple[str, str | bytes], ...], param: str | None
) -> None:
    await assert_form_refused(param, form(*REQUIRED[:2], *parts))


async def test_an_image_that_is_too_large_to_look_for_its_transparency_is_refused() -> None:
    side = int(OWN_MASK_PIXELS**0.5) + 1
    await assert_form_refused(
        "image", form(*REQUIRED[:2], ("image", raw_png(side, side, depth=8, colour_type=6, rows=b"")))
    )


# --- Fields ------------------------------------------------------------------------------------------


def test_every_field_that_is_no_text_is_read_as_json() -> None:
    """A field that somebody adds to the schema must not be forgotten."""

    def takes_text(annotation: Any) -> bool:
        inner = get_args(annotation)
        return annotation is str or any(isinstance(a, str) or takes_text(a) for a in inner if a is not dict)

    texts = {
        name
        for name, field in ImageEditRequest.model_fields.items()
        if takes_text(field.annotation) and "dict" not in str(field.annotation)
    }
    assert set(ImageEditRequest.model_fields) - texts == ImageEditRequest.JSON_FIELDS


async def test_every_field_reaches_the_engine_under_its_name() -> None:
    request = await edited(
        mask=MASK,
        n="2",
        size="64x32",
        output_format="webp",
        output_compression="70",
        num_inference_steps="7",
        guidance_scale="3",
        strength="0.5",
        scheduler="euler",
        eta="1",
        clip_skip="2",
        negative_prompt="5",
        adapters='{"ink": 0.5}',
        seed="-9223372036854775808",
        user="ann",
        quality="auto",
        background="opaque",
        response_format="b64_json",
        input_fidelity="low",
    )
    assert request == ImageRequest(
        request_id=request.request_id,
        model="d",
        prompt="seven",
        negative_prompt="5",
        n=2,
        width=64,
        height=32,
        num_inference_steps=7,
        guidance_scale=3.0,
        seed=-(2**63),
        output_format="webp",
        output_compression=70,
        image=picture(),
        mask=MASK,
        strength=0.5,
        scheduler="euler",
        eta=1.0,
        clip_skip=2,
        adapters=(("ink", 0.5),),
        timeout_s=request.timeout_s,
        caller=request.caller,
    )
    assert request.caller.user == "ann"


async def test_adapters_may_come_in_brackets_as_clients_write_objects() -> None:
    request = await edited(**{"adapters[ink]": "0.5", "adapters[oil]": "-1"})
    assert request.adapters == (("ink", 0.5), ("oil", -1.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in ("0", "17", "two", "1.5", "", "[1]", "true", "9" * 5000)),
        *(("size", value) for value in ("0x8", "8", "axb", "")),
        *(("seed", value) for value in ("9223372036854775808", "0.5", "NaN", '"7"')),
        *(("num_inference_steps", value) for value in ("0", "-1", "many")),
        *(("guidance_scale", value) for value in ("-1", "NaN", "Infinity", "1e999", "[" * 50_000)),
        *(("strength", value) for value in ("-0.1", "1.1", "NaN", "half")),
        *(("eta", value) for value in ("-0.1", "1.1")),
        *(("clip_skip", value) for value in ("0", "1.5")),
        *(("stream", value) for value in ("yes", "1", "True")),
        *(("partial_images", value) for value in ("4", "-1", "1")),
        *(("progress", value) for value in ("1", "true")),
        *(("output_format", value) for value in ("gif", "")),
        *(("output_compression", value) for value in ("101", "-1", "50", "0")),
        *(("adapters", value) for value in ("ink", "[]", '{"ink": "much"}', '{"ink": 11}', '{"ink": NaN}')),
        ("adapters[ink]", "much"),
        ("scheduler", "x" * 129),
        ("prompt", "x" * 32_001),
        ("negative_prompt", "x" * 300_000),
        ("quality", "high"),
        ("background", "transparent"),
        ("input_fidelity", "high"),
        ("style", "vivid"),
        ("response_format", "url"),
    ],
)
async def test_a_wrong_field_is_refused_by_name(name: str, value: str) -> None:
    message = await assert_form_refused(name.partition("[")[0], form(*REQUIRED, (name, value)))
    assert len(value) < 20 or value not in message


@pytest.mark.parametrize("name", ["model", "prompt"])
async def test_a_missing_field_is_named(name: str) -> None:
    await assert_form_refused(name, form(*(part for part in REQUIRED if part[0] != name)))


async def test_unknown_fields_are_ignored() -> None:
    assert (await edited(moderation="low", trust_remote_code="true", custom_pipeline="x")).n == 1


async def test_a_model_that_there_is_not_is_404() -> None:
    async with bench() as api:
        response = await api.edit(picture(), fields={"model": "../../etc/passwd"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


# --- Forms that are none -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", ["application/json", "", "text/plain", "multipart/mixed; boundary=BB"]
)
async def test_another_content_type_is_refused(content_type: str) -> None:
    async with bench() as api:
        assert_refused(await post(api, form(*REQUIRED), content_type), None)


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
async def test_a_form_of_a_charset_that_is_none_is_refused(charset: str) -> None:
    async with bench() as api:
        assert_refused(await post(api, form(*REQUIRED), f"{BOUNDARY}; charset={charset}"), None)


async def test_a_form_without_a_boundary_is_refused() -> None:
    async with bench() as api:
        assert_refused(await post(api, form(*REQUIRED), "multipart/form-data"), None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"junk",
        b"{}",
        b"--BB",
        b"--BB--",
        b"--BB\r\nContent-Disposition: form-data\r\n\r\nx\r\n--BB--\r\n",
        b"--BB\r\n\r\nx\r\n--BB--\r\n",
        b"--BB\r\n" + b"X-Y: z\r\n" * 10_000,
        b"--BB\r\nX: " + b"y" * 100_000,
        form(*REQUIRED, end=""),
        form(*REQUIRED)[:-30],
        form(*(("x", "y") for _ in range(200))),
        form(*(("image", picture()) for _ in range(50))),
    ],
)
async def test_case_09_a_form_that_is_broken_is_refused(
    body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "python_multipart")  # which says so itself
    await assert_form_refused({b"--BB--": "model"}.get(body), body)


async def test_case_09_a_form_that_is_too_large_is_413_as_soon_as_that_is_known() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        yield (
            form(*REQUIRED[:2], end="")
            + b'--BB\r\nContent-Disposition: form-data; name="image"; filename="f"\r\n\r\n'
        )
        for _ in range(1000):
            taken += 1000
            yield b"x" * 1000

    async with bench(max_body_bytes=10_000) as api:
        declared = await post(api, form(*REQUIRED, ("mask", b"x" * 10_000)))
        undeclared = await api.http.post(EDITS, content=endless(), headers={"content-type": BOUNDARY})
        assert taken <= 12_000
        taken = 0
        length = {"content-type": BOUNDARY, "content-length": "1000000"}
        unread = await api.http.post(EDITS, content=endless(), headers=length)
        assert taken == 0
        assert (await post(api, form(*REQUIRED))).status_code == 200
    for response in (declared, undeclared, unread):
        assert response.status_code == 413
        assert error_of(response)["code"] == "payload_too_large"


async def test_a_wrong_method_is_405() -> None:
    async with bench() as api:
        assert (await api.http.get(EDITS)).status_code == 405


# --- Keys and limits ---------------------------------------------------------------------------------


async def test_edits_ask_for_the_key_before_they_read_the_form_and_count_against_its_limit() -> None:
    keys = [ApiKeyConfig.model_validate({"name": "one", "key": "sk-one", "requests_per_minute": 1})]
    async with bench(keys=keys) as api:
        nobody = await post(api, b"junk")
        assert nobody.status_code == 401
        api.http.headers["authorization"] = "Bearer sk-one"
        assert (await api.edit(picture())).status_code == 200
        assert (await api.edit(picture())).status_code == 429


# --- The official client -----------------------------------------------------------------------------


async def test_the_openai_client_edits() -> None:
    async with bench() as api:
        client = openai.AsyncOpenAI(
            base_url="http://blaze/v1",
            api_key="unused",
            http_client=api.http,
            max_retries=0,  # type: ignore[arg-type]
        )
        answer = await client.images.edit(
            model="d",
            image=("image.png", picture()),
            mask=MASK,
            prompt="seven",
            n=1,
            size="512x512",
            extra_body={"seed": 5, "adapters": {"ink": 0.5}, "strength": 0.5},
        )
        again = await client.images.edit(model="d", image=[picture()], prompt="seven")
        with pytest.raises(openai.BadRequestError) as refused:
            await client.images.edit(model="d", image=[picture(), picture()], prompt="seven")
        first, second = api.sent
    assert refused.value.param == "image"
    assert answer.data is not None and base64.b64decode(answer.data[0].b64_json or "") == b"pixels-0"
    assert answer.usage is not None and answer.usage.total_tokens == 0
    assert again.data is not None
    assert isinstance(first, ImageRequest) and isinstance(second, ImageRequest)
    assert (first.image, first.mask, first.width, first.seed) == (picture(), MASK, 512, 5)
    assert (first.adapters, first.strength) == ((("ink", 0.5),), 0.5)
    assert (second.image, second.mask) == (picture(), None)
