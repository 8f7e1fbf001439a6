from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from blaze.engines.operations import answer_all, translate
from blaze.errors import ErrorInfo, InvalidRequest, RemoteError, UnsupportedOperation
from blaze.results import Answer, Batch, Generation, Images, whole
from blaze.sampling_params import SamplingParams
from blaze.types import (
    ChatMessage,
    ChatPrompt,
    EngineKind,
    GenerateRequest,
    ImageRequest,
    Request,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from tests.fake_engine import FakeEngine
from tests.fakes import FakeCall, answer
from tests.samples import image_answer, image_request, text_request
from tests.waiting import until, until_status

LLM, DIFFUSION, SIMULATOR = EngineKind.LLM, EngineKind.DIFFUSION, EngineKind.SIMULATOR


def one_request(kind: EngineKind, operation: str, **params: Any) -> Request:
    (request,) = translate(kind, operation, params, model="m").requests
    return request


def text(**params: Any) -> GenerateRequest:
    request = one_request(LLM, "generate", **{"prompt": "hi"} | params)
    assert isinstance(request, GenerateRequest)
    return request


def image(**params: Any) -> ImageRequest:
    request = one_request(DIFFUSION, "generate", **{"prompt": "seven"} | params)
    assert isinstance(request, ImageRequest)
    return request


def refused(kind: EngineKind, operation: str, **params: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        translate(kind, operation, params, model="m")
    return caught.value


# --- Parameters to requests ------------------------------------------------------------------------


def test_parameters_become_the_fields_of_a_text_request() -> None:
    request = text(temperature=0.5, max_tokens=3, n=2, timeout_s=4, priority=-1)
    assert request.sampling == SamplingParams(temperature=0.5, max_tokens=3, n=2)
    assert (request.model, request.timeout_s, request.priority) == ("m", 4, -1)


def test_parameters_become_the_fields_of_an_image_request() -> None:
    request = image(negative_prompt="eight", n=2, seed=3, width=8, output_format="webp", timeout_s=1.5)
    assert (request.prompt, request.negative_prompt, request.n, request.seed) == ("seven", "eight", 2, 3)
    assert (request.model, request.width, request.output_format, request.timeout_s) == ("m", 8, "webp", 1.5)


def test_diffusers_parameters_become_fields_too() -> None:
    given: dict[str, Any] = {
        "strength": 0.5,
        "scheduler": "euler",
        "eta": 1,
        "clip_skip": 2,
        "partial_images": 2,
        "progress": True,
        "output_format": "jpeg",
        "output_compression": 50,
        "mask": b"mask",
    }
    request = image(**given, image=bytearray(b"file"), adapters={"ink": 0.5})
    assert {name: getattr(request, name) for name in given} == given
    assert (request.image, request.adapters) == (b"file", (("ink", 0.5),))
    assert image(adapters=[["ink", 0.5]]).adapters == (("ink", 0.5),)
    nothing = image(adapters=None, image=None, output_compression=None)
    assert nothing == replace(image(), request_id=nothing.request_id)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        *(({"image": value}, "image") for value in ("file", b"", 5, ["file"])),
        ({"mask": "file", "image": b"file"}, "mask"),
        ({"mask": b"file"}, "mask"),
        *(
            ({"strength": value, "image": b"file"}, "strength")
            for value in (1.1, -1, "much", True, float("nan"))
        ),
        ({"strength": 0.5}, "strength"),
        ({"scheduler": 5}, "scheduler"),
        ({"eta": 2}, "eta"),
        ({"clip_skip": 0}, "clip_skip"),
        *(
            ({"adapters": value}, "adapters")
            for value in ("ink", 5, {"ink": "x"}, {5: 1}, [["ink"]], {"ink": 11})
        ),
        *(({"partial_images": value}, "partial_images") for value in (4, -1, True, None)),
        *(({"progress": value}, "progress") for value in (1, "yes", None)),
        *(
            ({"output_compression": value, "output_format": "webp"}, "output_compression")
            for value in (101, -1, 0.5)
        ),
        ({"output_compression": 50}, "output_compression"),
        ({"caller": None}, "caller"),
        ({"request_id": "x"}, "request_id"),
    ],
)
def test_a_wrong_parameter_of_an_image_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    assert refused(DIFFUSION, "generate", prompt="seven", **given).param == param


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("hi", ChatPrompt((ChatMessage("user", "hi"),))),
        ([1, 2], TokenPrompt((1, 2))),
        (TextPrompt("once"), TextPrompt("once")),
        ([{"role": "system", "content": "be brief"}], ChatPrompt((ChatMessage("system", "be brief"),))),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}],
            ChatPrompt((ChatMessage("assistant", None, tool_calls='[{"id": "a"}]'),)),
        ),
    ],
)
def test_a_prompt_has_one_of_several_shapes(given: object, prompt: object) -> None:
    assert text(prompt=given).prompt == prompt


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"stop": "."}, {"stop": (".",)}),
        ({"stop": [".", "!"]}, {"stop": (".", "!")}),
        ({"stop_token_ids": [1, 2]}, {"stop_token_ids": (1, 2)}),
        ({"logit_bias": {7: 1.5}}, {"logit_bias": ((7, 1.5),)}),
        ({"logit_bias": [[7, 1.5]]}, {"logit_bias": ((7, 1.5),)}),
        ({"seed": None, "max_tokens": None}, {}),
    ],
)
def test_lists_and_mappings_stand_for_tuples(given: dict[str, Any], field: dict[str, Any]) -> None:
    assert text(**given).sampling == SamplingParams(**field)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"max_tokens": 0},
        {"top_k": 1.5},
        {"n": True},
        {"stop": 5},
        {"stop": [5]},
        {"stop_token_ids": 5},
        {"logit_bias": 5},
        {"logit_bias": [5]},
        {"logit_bias": [[1, 2, 3]]},
        {"logit_bias": {"a": 1}},
        {"echo": "yes"},
        {"ignore_eos": 1},
        {"seed": 2**63},
        {"priority": "high"},
        {"timeout_s": "soon"},
        {"timeout_s": True},
        {"timeout_s": -1},
        {"prompt": 5},
        {"prompt": []},
        {"prompt": b"bytes"},
        {"prompt": ["hi"]},
        {"prompt": [{"role": "user"}]},
        {"prompt": [{"role": "nobody", "content": "hi"}]},
        {"prompt": [{"role": "user", "content": 5}]},
        {"prompt": [{"role": "user", "content": "hi", "tool_calls": [object()]}]},
        {"num_inference_steps": 5},
        {"prompts": ["hi"]},
        {"model": "other"},
    ],
)
def test_a_wrong_parameter_of_text_is_named(given: dict[str, Any]) -> None:
    error = refused(LLM, "generate", **{"prompt": "hi"} | given)
    assert [error.param] == list(given)
    assert error.message.startswith(f"{error.param}: ")


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": 5},
        {"prompt": TextPrompt("seven")},
        {"negative_prompt": 5},
        {"n": 0},
        {"width": "wide"},
        {"guidance_scale": -1},
        {"output_format": "bmp"},
        {"timeout_s": float("nan")},
        {"max_tokens": 5},
        {"strength": 0.8},
    ],
)
def test_a_wrong_parameter_of_images_is_named(given: dict[str, Any]) -> None:
    assert [refused(DIFFUSION, "generate", **{"prompt": "seven"} | given).param] == list(given)


def test_every_prompt_of_a_batch_becomes_a_request_of_its_own() -> None:
    call = translate(LLM, "batch_generate", {"prompts": ["a", [1, 2]], "max_tokens": 3}, model="m")
    assert call.is_batch
    first, second = call.requests
    assert isinstance(first, GenerateRequest)
    assert isinstance(second, GenerateRequest)
    assert (first.prompt, second.prompt) == (ChatPrompt((ChatMessage("user", "a"),)), TokenPrompt((1, 2)))
    assert first.sampling == second.sampling == SamplingParams(max_tokens=3)
    assert first.request_id != second.request_id


def test_images_come_in_batches_too() -> None:
    call = translate(DIFFUSION, "generate_batch", {"prompts": ["a", "b"], "seed": 3}, model="m")
    assert [(r.prompt, r.seed) for r in call.requests if isinstance(r, ImageRequest)] == [("a", 3), ("b", 3)]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "hi"}, "prompts"),
        ({"prompts": ["hi", 5]}, "prompts[1]"),
        ({"prompts": ["hi"], "prompt": "hi"}, "prompt"),
        ({"prompts": ["hi"], "n": 0}, "n"),
    ],
)
def test_what_is_wrong_with_a_batch_is_named(params: dict[str, Any], param: str) -> None:
    assert refused(LLM, "batch_generate", **params).param == param


# --- Operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(EngineKind))
def test_an_unknown_operation_is_answered_with_the_known_ones(kind: EngineKind) -> None:
    error = refused(kind, "translate", prompt="hi")
    assert (error.http_status, error.param) == (400, "operation")
    assert "generate" in error.message
    assert refused(kind, "generate").param == "prompt"


@pytest.mark.parametrize("kind", [LLM, SIMULATOR])
def test_streams_are_not_whole_results(kind: EngineKind) -> None:
    error = refused(kind, "generate_stream", prompt="hi")
    assert isinstance(error, UnsupportedOperation)
    assert error.param == "operation"
    assert "`run`" in error.message


@pytest.mark.parametrize(
    ("operation", "given", "missing"),
    [
        ("img2img", {"image": b"file"}, None),
        ("img2img", {}, "image"),
        ("img2img", {"image": None}, "image"),
        ("inpaint", {"image": b"file", "mask": b"file"}, None),
        ("inpaint", {"image": b"file"}, "mask"),
        ("inpaint", {"mask": b"file"}, "image"),
    ],
)
def test_an_image_is_begun_with_or_edited_by_the_name_of_that(
    operation: str, given: dict[str, Any], missing: str | None
) -> None:
    if missing is not None:
        assert refused(DIFFUSION, operation, prompt="seven", **given).param == missing
        return
    request = one_request(DIFFUSION, operation, prompt="seven", strength=0.5, **given)
    assert isinstance(request, ImageRequest)
    assert (request.image, request.mask, request.strength) == (b"file", given.get("mask"), 0.5)


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        (LLM, "embed"),
        (SIMULATOR, "embed"),
        (DIFFUSION, "upscale"),
    ],
)
def test_what_is_known_and_not_offered_says_so(kind: EngineKind, operation: str) -> None:
    error = refused(kind, operation, prompt="hi")
    assert isinstance(error, UnsupportedOperation)
    assert (error.http_status, error.param) == (501, "operation")


async def test_generate_gives_the_whole_answer() -> None:
    engine = FakeEngine(tokens=3)
    made = await engine.execute("generate", {"prompt": "hi", "n": 2, "max_tokens": 2, "seed": 1})
    assert isinstance(made, Generation)
    assert [len(tokens) for tokens in made.token_ids] == [2, 2]
    assert made.finish_reasons == ("length", "length")
    assert made.usage == Usage(prompt_tokens=1, completion_tokens=4)


async def test_an_error_of_the_engine_is_raised() -> None:
    engine = FakeEngine(fail_rate={0: 1.0})
    with pytest.raises(RemoteError) as caught:
        await engine.execute("generate", {"prompt": "hi"})
    assert caught.value.code == "engine_error"


async def test_one_prompt_of_a_batch_that_fails_leaves_the_others_alone() -> None:
    class Picky(FakeEngine):
        async def run(self, request: Request) -> Any:  # type: ignore[override]
            given = request.prompt
            self.run_raises = InvalidRequest("no") if given == TokenPrompt((2,)) else None
            async for events in super().run(request):
                yield events

    made = await Picky().execute("batch_generate", {"prompts": [[1], [2], [3]]})
    assert isinstance(made, Batch)
    assert [type(entry) for entry in made.answers] == [Generation, ErrorInfo, Generation]
    assert [error.message for error in made.errors] == ["no"]


async def test_a_cancelled_operation_leaves_nothing_running() -> None:
    engine = FakeEngine(ttft_ms=3_600_000, slots=2)
    task = asyncio.create_task(engine.execute("batch_generate", {"prompts": ["a", "b", "c"]}))
    await until_status(engine, running=2, queued=1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until_status(engine, running=0, queued=0)


async def test_a_batch_is_answered_in_order_and_only_so_many_at_once() -> None:
    doors = [asyncio.Event() for _ in range(5)]
    inside: list[int] = []
    most = 0

    async def answer_one(request: Request) -> Answer:
        nonlocal most
        number = int(request.request_id)
        inside.append(number)
        most = max(most, len(inside))
        await doors[number].wait()
        inside.remove(number)
        return Images((), Usage(images=number))

    requests = [ImageRequest(str(number), "m", "seven") for number in range(5)]
    task = asyncio.create_task(answer_all(requests, answer_one, at_once=asyncio.Semaphore(2)))
    await until(lambda: len(inside) == 2)
    for number in (1, 0, 3, 2, 4):
        await until(lambda number=number: number in inside)
        doors[number].set()
    made = await task
    assert [entry.usage.images for entry in made.answers if isinstance(entry, Images)] == [0, 1, 2, 3, 4]
    assert most == 2


# --- Events to results -----------------------------------------------------------------------------


async def test_a_whole_text_is_put_together_from_its_parts() -> None:
    made = await whole(text_request(), FakeCall(answer("ok")))
    assert isinstance(made, Generation)
    assert (made.text, made.token_ids, made.finish_reasons) == ("ok", ((7,),), ("stop",))


async def test_images_are_sorted_by_index() -> None:
    ((started, first, second, finished),) = image_answer(4, 5)  # type: ignore[misc]
    made = await whole(image_request(), FakeCall([(started, second), (first, finished)]))
    assert isinstance(made, Images)
    assert [ready.seed for ready in made.images] == [4, 5]
    assert made.usage.images == 2


async def test_an_answer_without_an_end_is_a_failure() -> None:
    (events,) = answer()
    assert not isinstance(events, Exception)
    for script in ([], [events[:-1]]):
        with pytest.raises(Exception, match="without a result"):
            await whole(text_request(), FakeCall(script))
