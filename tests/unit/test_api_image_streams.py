"""Images that are shown while they are drawn: server-sent events of both image endpoints."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
)

from blaze.errors import EngineFailure, InvalidRequest, ReplicaLost
from blaze.routing.settings import DispatchSettings
from blaze.types import Events, Finished, ImageReady, ImageRequest, Progress, Started, Usage
from tests.api_bench import ApiBench, error_of, events_of
from tests.fakes import FakePool, Script
from tests.image_files import picture
from tests.samples import image_answer, partial_image
from tests.waiting import until

NO_RETRIES = DispatchSettings(max_retries=0, max_lost=0)
STEPS: Events = (Started(), Progress(1, 3), Progress(2, 3))
IMAGE = ImageReady(0, b"pixels", "png", 32, 16, 7)
DONE = Finished(Usage(prompt_tokens=5, images=1))


def answering(*script: Events | Exception, **options: Any) -> ApiBench:
    return ApiBench(images=FakePool(("x",), scripts={"x": [list(script), list(script)]}), **options)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


async def test_previews_and_the_image_are_openais_events() -> None:
    async with answering(STEPS, (partial_image(0, 0),), (partial_image(0, 1), IMAGE, DONE)) as api:
        before = int(time.time())
        events = events_of(await api.draw(stream=True, partial_images=2))
        (request,) = api.sent
    assert isinstance(request, ImageRequest)
    assert (request.partial_images, request.progress) == (2, False)
    for event, typed in zip(
        events, (ImageGenPartialImageEvent, ImageGenPartialImageEvent, ImageGenCompletedEvent), strict=True
    ):
        assert before <= typed.model_validate(event).created_at <= time.time()
    assert [event.get("partial_image_index") for event in events] == [0, 1, None]
    assert [base64.b64decode(e["b64_json"]) for e in events] == [b"preview-0-0", b"preview-0-1", b"pixels"]
    assert {(e["size"], e["output_format"], e["quality"], e["background"]) for e in events} == {
        ("32x16", "png", "auto", "opaque")
    }
    assert (events[-1]["seed"], events[-1]["index"]) == (7, 0)
    assert events[-1]["usage"] == {
        "input_tokens": 5,
        "output_tokens": 0,
        "total_tokens": 5,
        "input_tokens_details": {"text_tokens": 5, "image_tokens": 0},
        "images": 1,
    }


async def test_events_of_an_edit_have_names_of_their_own() -> None:
    async with answering((Started(), partial_image(), IMAGE, DONE)) as api:
        response = await api.edit(picture(), fields={"stream": "true", "partial_images": "1"})
        preview, image = events_of(response)
    assert response.headers["x-blaze-replica"] == "x"
    assert response.headers["cache-control"] == "no-cache"
    assert ImageEditPartialImageEvent.model_validate(preview).type == "image_edit.partial_image"
    assert ImageEditCompletedEvent.model_validate(image).type == "image_edit.completed"


async def test_steps_are_told_only_when_asked_for() -> None:
    script = (STEPS, (Progress(3, 3), IMAGE, DONE))
    async with answering(*script) as api:
        assert kinds(events_of(await api.draw(stream=True))) == ["image_generation.completed"]
    async with answering(*script) as api:
        events = events_of(await api.draw(stream=True, progress=True))
    assert kinds(events) == ["blaze.progress"] * 3 + ["image_generation.completed"]
    assert events[:3] == [{"type": "blaze.progress", "step": step, "total": 3} for step in (1, 2, 3)]


async def test_several_images_are_one_event_each_with_their_seeds_and_usage_adds_up() -> None:
    script: Script = [
        (Started(), ImageReady(1, b"second", "png", 32, 16, 8)),
        (ImageReady(0, b"first", "png", 32, 16, 7),),
        (Finished(Usage(prompt_tokens=6, images=2)),),
    ]
    async with answering(*script) as api:
        events = events_of(await api.draw(stream=True, n=2))
    assert [(event["index"], event["seed"]) for event in events] == [(1, 8), (0, 7)]
    assert sum(event["usage"]["input_tokens"] for event in events) == 6
    assert sum(event["usage"]["images"] for event in events) == 2


async def test_an_image_leaves_as_soon_as_it_is_there() -> None:
    pool = FakePool(("x",), held=True, scripts={"x": [[(partial_image(),), (IMAGE,), (DONE,)]]})
    async with ApiBench(images=pool) as api:
        sent: list[bytes] = []
        body = b'{"model": "d", "prompt": "seven", "stream": true, "partial_images": 1}'
        scope = {
            **{"type": "http", "method": "POST", "path": "/v1/images/generations", "query_string": b""},
            **{"headers": [], "http_version": "1.1", "scheme": "http", "server": ("blaze", 80)},
        }

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        task = asyncio.ensure_future(api.app(scope, receive, send))
        await until(lambda: pool.open_calls)
        (call,) = pool.open_calls
        assert sent == [], "nothing is promised before there is something to show"
        call.release()
        call.hold_after(1)
        await until(lambda: b"partial_image" in b"".join(sent))
        assert b"completed" not in b"".join(sent)
        call.release()
        await task
        assert b"completed" in sent[-1]


# --- When it goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [None, True])
async def test_an_error_before_the_first_event_is_a_plain_response(progress: bool | None) -> None:
    async with answering(InvalidRequest("no", param="size"), settings=NO_RETRIES) as api:
        response = await api.draw(stream=True, progress=progress)
    assert response.status_code == 400
    assert error_of(response)["param"] == "size"


@pytest.mark.parametrize("broken", [[EngineFailure("broke")], [], [RuntimeError("unforeseen")]])
async def test_an_error_after_a_preview_is_one_event_in_openais_shape(broken: Script) -> None:
    async with answering((Started(), partial_image()), *broken, settings=NO_RETRIES) as api:
        preview, error = events_of(await api.draw(stream=True, partial_images=1))
        assert api.service.in_flight == 0
    assert preview["type"] == "image_generation.partial_image"
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}


async def test_images_that_are_done_are_sent_before_the_error_that_follows_them() -> None:
    async with answering((Started(), IMAGE), EngineFailure("broke"), settings=NO_RETRIES) as api:
        image, error = events_of(await api.draw(stream=True, n=2))
    assert base64.b64decode(image["b64_json"]) == b"pixels"
    assert error["error"]["code"] == "engine_error"


@pytest.mark.parametrize("progress", [True, None], ids=["steps are shown", "steps are not"])
async def test_an_image_is_drawn_anew_elsewhere_and_nothing_is_shown_twice(progress: bool | None) -> None:
    lost: Script = [STEPS, ReplicaLost("died")]
    pool = FakePool(("x", "y"), next_scripts=[lost, image_answer(7)])
    async with ApiBench(images=pool) as api:
        events = events_of(await api.draw(stream=True, progress=progress))
    assert len(pool.calls) == 2
    steps = [event["step"] for event in events if event["type"] == "blaze.progress"]
    assert steps == ([1, 2] if progress else [])
    assert events[-1]["type"] == "image_generation.completed"


# --- The official client -----------------------------------------------------------------------------


async def test_the_openai_client_reads_the_stream() -> None:
    script = (STEPS, (partial_image(0, 0),), (partial_image(0, 1),), (IMAGE, DONE))
    async with answering(*script) as api:
        client = openai.AsyncOpenAI(
            base_url="http://blaze/v1",
            api_key="unused",
            http_client=api.http,
            max_retries=0,  # type: ignore[arg-type]
        )
        drawn = await client.images.generate(model="d", prompt="seven", stream=True, partial_images=2)
        generated = [event async for event in drawn]
        changed = await client.images.edit(
            model="d", image=picture(), prompt="seven", stream=True, partial_images=2
        )
        edited = [event async for event in changed]
    assert [type(event) for event in generated] == [
        ImageGenPartialImageEvent,
        ImageGenPartialImageEvent,
        ImageGenCompletedEvent,
    ]
    assert [type(event) for event in edited] == [
        ImageEditPartialImageEvent,
        ImageEditPartialImageEvent,
        ImageEditCompletedEvent,
    ]
    assert generated[-1].b64_json == base64.b64encode(b"pixels").decode()


async def test_the_openai_client_reads_the_steps_that_it_does_not_know() -> None:
    async with answering(STEPS, (IMAGE, DONE)) as api:
        client = openai.AsyncOpenAI(
            base_url="http://blaze/v1",
            api_key="unused",
            http_client=api.http,  # type: ignore[arg-type]
            max_retries=0,
        )
        stream = await client.images.generate(
            model="d", prompt="seven", stream=True, extra_body={"progress": True}
        )
        events = [event.to_dict() async for event in stream]
    assert [event.get("step") for event in events] == [1, 2, None]


async def test_the_openai_client_raises_the_error_of_a_stream() -> None:
    script = ((Started(), partial_image()), EngineFailure("broke"))
    async with answering(*script, settings=NO_RETRIES) as api:
        client = openai.AsyncOpenAI(
            base_url="http://blaze/v1",
            api_key="unused",
            http_client=api.http,
            max_retries=0,  # type: ignore[arg-type]
        )
        stream = await client.images.generate(model="d", prompt="seven", stream=True, partial_images=1)
        assert (await anext(aiter(stream))).type == "image_generation.partial_image"
        with pytest.raises(openai.APIError, match="broke"):
            await anext(aiter(stream))
