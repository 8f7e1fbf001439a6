"""What requests for `digits` do to each other: nothing, whatever they are and whatever the options."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blaze.engines.diffusion.engine import DiffusionEngine
from blaze.types import Event, Failed, Finished, ImageReady, ImageRequest, PartialImage
from tests.golden.diffusion import Levels, engine_of, events_of, levels_of
from tests.golden.pipeline_folders import DIGITS, digits, draw, with_safety_checker
from tests.golden.tiny_loras import write_lora
from tests.golden.tiny_pipelines import tiny_pipeline

pytestmark = pytest.mark.models

PROMPTS = ["a red seven on white", "a blue two on yellow", "a green nine on black", "a white one on blue"]


def request(prompt: str = PROMPTS[0], **fields: Any) -> ImageRequest:
    usual: dict[str, Any] = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 3.0, "timeout_s": 200}
    return ImageRequest("r", "digits", prompt, **(usual | fields))


async def draw_at_once(engine: DiffusionEngine, *requests: ImageRequest) -> list[list[Event]]:
    answers = await asyncio.gather(*(events_of(engine, each) for each in requests))
    for events in answers:
        assert isinstance(events[-1], Finished), events
    return answers


def pictures(events: list[Event], kind: type[ImageReady | PartialImage] = ImageReady) -> list[Levels]:
    images = (event for event in events if isinstance(event, kind))
    return [np.asarray(Image.open(io.BytesIO(each.data))).astype(np.int64) for each in images]


def furthest(one: Levels, other: Levels) -> int:
    return int(np.abs(one - other).max())


async def test_requests_alike_are_one_call_and_each_gets_its_own_images() -> None:
    async with engine_of(DIGITS, max_batch_size=16) as engine:
        requests = [request(prompt, seed=10 * i, n=1 + i % 2) for i, prompt in enumerate(PROMPTS * 2)]
        answers = await draw_at_once(engine, *requests)
        steps = (await engine.get_health_status()).steps_done
    pipeline = digits()
    for each, events in zip(requests, answers, strict=True):
        assert len(pictures(events)) == each.n
        for index, picture in enumerate(pictures(events)):
            alone = draw(pipeline, prompt=each.prompt, seed=(each.seed or 0) + index)
            assert furthest(picture, levels_of(alone)) <= 1
    assert steps < 3 * 6


async def test_previews_show_the_image_more_and_more_and_do_not_change_it() -> None:
    many = {"num_inference_steps": 20}
    async with engine_of(DIGITS) as engine:
        (plain,) = await draw_at_once(engine, request(**many))
        (shown,) = await draw_at_once(engine, request(partial_images=3, **many))
    assert [event for event in shown if isinstance(event, ImageReady)] == [
        event for event in plain if isinstance(event, ImageReady)
    ]
    (final,) = pictures(plain)
    previews = pictures(shown, PartialImage)
    assert len(previews) == 3
    apart = [float(np.abs(preview - final).mean()) for preview in previews]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < apart[0] / 2
    assert apart[-1] < 15  # levels, of 255: it can be read


async def test_adapters_of_one_request_do_not_touch_another(tmp_path: Path) -> None:
    names = ("ink", "chalk")
    loras = {
        name: str(write_lora(tmp_path, f"{name}.safetensors", seed=seed, text_encoder=True))
        for seed, name in enumerate(names)
    }
    choices: list[tuple[tuple[str, float], ...]] = [
        (),
        (("ink", 1.0),),
        (("chalk", 0.7),),
        (("ink", 0.3), ("chalk", 0.5)),
    ]
    requests = [
        request(prompt, adapters=adapters, num_inference_steps=steps)
        for steps, prompt in ((6, PROMPTS[0]), (9, PROMPTS[1]))
        for adapters in choices
    ]
    async with engine_of(DIGITS, loras=loras, max_batch_size=16) as engine:
        together = await draw_at_once(engine, *requests)
        alone = [(await draw_at_once(engine, each))[0] for each in requests]
    for one, other in zip(together, alone, strict=True):
        assert furthest(pictures(one)[0], pictures(other)[0]) <= 1
    assert furthest(pictures(alone[0])[0], pictures(alone[1])[0]) > 20, "adapters show"
    assert furthest(pictures(alone[1])[0], pictures(alone[2])[0]) > 20
    bare = draw(digits(), prompt=PROMPTS[0], steps=6)
    assert furthest(pictures(together[0])[0], levels_of(bare)) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"attention_slicing": True, "vae_slicing": True, "channels_last": True},
        {"layerwise_casting": "bfloat16"},
        {"offload": "group"},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_options_of_the_memory_go_with_requests_at_once(options: dict[str, Any]) -> None:
    requests = [request(prompt, num_inference_steps=4 + i) for i, prompt in enumerate(PROMPTS)]
    async with engine_of(DIGITS, **options) as engine:
        alone = [(await draw_at_once(engine, each))[0] for each in requests]
        before = (await engine.get_health_status()).steps_done
        together = await draw_at_once(engine, *requests)
        status = await engine.get_health_status()
    for one, other in zip(together, alone, strict=True):
        assert furthest(pictures(one)[0], pictures(other)[0]) <= 1
    if options.get("offload") == "group":
        assert status.detail is not None and "offload" in status.detail
        assert status.steps_done - before == 4 + 5 + 6 + 7
    else:
        assert status.detail is None
        assert status.steps_done - before < 4 + 5 + 6 + 7


async def test_a_compiled_denoiser_takes_requests_at_once(tmp_path: Path) -> None:
    folder = tiny_pipeline("ddim", tmp_path)
    requests = [
        ImageRequest("r", "ddim", "", seed=i, num_inference_steps=3 + i, timeout_s=200) for i in range(3)
    ]
    async with engine_of(folder) as engine:
        alone = [(await draw_at_once(engine, each))[0] for each in requests]
    async with engine_of(folder, compile=True) as engine:
        together = await draw_at_once(engine, *requests)
        steps = (await engine.get_health_status()).steps_done
    for one, other in zip(together, alone, strict=True):
        assert furthest(pictures(one)[0], pictures(other)[0]) <= 1
    assert steps < 3 + 4 + 5


@pytest.mark.parametrize(("threshold", "flagged"), [(-2.0, True), (2.0, False)])
async def test_what_the_safety_checker_flags_is_refused_previews_included(
    threshold: float, flagged: bool, tmp_path: Path
) -> None:
    folder = with_safety_checker(tmp_path, threshold=threshold)
    async with engine_of(folder, safety_checker=True) as engine:
        events = await events_of(engine, request(partial_images=2))
    if flagged:
        assert isinstance(events[-1], Failed)
        assert (events[-1].error.http_status, events[-1].error.code) == (400, "content_policy_violation")
        assert not any(isinstance(event, ImageReady | PartialImage) for event in events)
    else:
        assert isinstance(events[-1], Finished)
        assert len(pictures(events, PartialImage)) == 2
