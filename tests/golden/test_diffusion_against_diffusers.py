"""What the diffusion engine draws equals what diffusers alone draws with the same seed (fp32)."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from blaze.config import DiffusionConfig, cache_dir
from blaze.engines.diffusion.engine import DiffusionEngine
from blaze.models.sources import FolderSource, package_path
from blaze.types import Event, Failed, Finished, ImageReady, ImageRequest, Progress

pytestmark = pytest.mark.models

FOLDER = package_path("blaze/assets/digits")


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[DiffusionEngine]:
    options = DiffusionConfig(dtype="float32", max_batch_size=4)
    made = DiffusionEngine(FolderSource(FOLDER), options, threads=1, cache=cache_dir())
    await made.start()
    yield made
    await made.stop()


async def _events(engine: DiffusionEngine, prompt: str, **fields: object) -> list[Event]:
    request = ImageRequest("r", "digits", prompt, timeout_s=120, **fields)  # type: ignore[arg-type]
    return [event async for batch in engine.run(request) for event in batch]


def _images(events: list[Event]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(event.data)) for event in events if isinstance(event, ImageReady)]


def _alone(prompt: str, seed: int, **options: object) -> Image.Image:
    """Diffusers by itself: a fresh pipeline, one prompt, one generator."""
    pipeline = DiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    image: Image.Image = pipeline(
        prompt, generator=torch.Generator("cpu").manual_seed(seed), **options
    ).images[0]
    return image


def _levels_apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


async def test_each_of_n_images_equals_its_own_solo_run(engine: DiffusionEngine) -> None:
    events = await _events(
        engine, "a red seven on white", n=3, seed=5, num_inference_steps=8, guidance_scale=4.0
    )
    for offset, image in enumerate(_images(events)):
        alone = _alone("a red seven on white", 5 + offset, num_inference_steps=8, guidance_scale=4.0)
        assert _levels_apart(image, alone) <= 1


async def test_case_38_requests_at_once_share_no_scheduler_state(engine: DiffusionEngine) -> None:
    steps = (10, 7, 12)
    answers = await asyncio.gather(
        *(
            _events(engine, f"a {word}", seed=1, num_inference_steps=n, progress=True)
            for word, n in zip(("two", "five", "nine"), steps, strict=True)
        )
    )
    for word, n, events in zip(("two", "five", "nine"), steps, answers, strict=True):
        assert [e for e in events if isinstance(e, Progress)] == [Progress(step + 1, n) for step in range(n)]
        assert _levels_apart(_images(events)[0], _alone(f"a {word}", 1, num_inference_steps=n)) <= 1


async def test_the_models_own_defaults_are_used_for_what_is_left_out(engine: DiffusionEngine) -> None:
    image = _images(await _events(engine, "a blue three on yellow", seed=2))[0]
    assert _levels_apart(image, _alone("a blue three on yellow", 2)) <= 1


async def test_case_43_a_caller_that_leaves_stops_the_drawing_within_a_step(engine: DiffusionEngine) -> None:
    request = ImageRequest("r", "digits", "a one", num_inference_steps=200, progress=True, timeout_s=120)
    stream = engine.run(request)
    seen = 0
    async for batch in stream:
        seen += sum(isinstance(event, Progress) for event in batch)
        if seen >= 3:
            break
    await stream.aclose()
    after = await _events(engine, "a one", seed=4, num_inference_steps=6)
    assert _levels_apart(_images(after)[0], _alone("a one", 4, num_inference_steps=6)) <= 1
    status = await engine.get_health_status()
    assert status.steps_done < 200  # the first drawing did not run to its end
    assert (status.running, status.queued) == (0, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 5}, "n"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"width": 33, "height": 32}, "size"),
        ({"width": 4096, "height": 4096}, "size"),
    ],
)
async def test_what_the_pipeline_cannot_do_is_refused_by_name(
    engine: DiffusionEngine, fields: dict[str, object], named: str
) -> None:
    (event,) = await _events(engine, "a one", **fields)
    assert isinstance(event, Failed)
    assert (event.error.http_status, event.error.param) == (400, named)


async def test_formats_are_what_they_say(engine: DiffusionEngine) -> None:
    for image_format in ("png", "jpeg", "webp"):
        events = await _events(engine, "a four", seed=1, num_inference_steps=2, output_format=image_format)
        assert _images(events)[0].format == image_format.upper()
        assert isinstance(events[-1], Finished) and events[-1].usage.images == 1
