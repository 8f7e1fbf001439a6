from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion import engine as engine_module
from blaze.engines.diffusion.engine import DiffusionEngine
from blaze.engines.diffusion.images import encode, to_image
from blaze.engines.diffusion.pipelines import seeds
from blaze.errors import NonFiniteOutput
from blaze.models.sources import HubSource
from blaze.types import Event, Failed, Finished, ImageReady, ImageRequest, Progress, Started, Usage
from tests.fake_models import FakePipeline, fake_pipeline
from tests.fakes import FakeClock
from tests.samples import collect, image_request, terminals, text_request
from tests.waiting import until, until_status


class DrawingBench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipeline = FakePipeline()
        self.clock = FakeClock()
        monkeypatch.setattr(engine_module, "load_pipeline", lambda *_args: fake_pipeline(self.pipeline))
        self.engine = DiffusionEngine(
            HubSource("org/model"),
            DiffusionConfig(max_batch_size=4, max_steps=20, max_pixels=64 * 64),
            threads=1,
            cache=Path("/nonexistent"),
            clock=self.clock,
        )

    async def draw(self, request: ImageRequest) -> list[Event]:
        return await collect(self.engine.run(request))


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DrawingBench]:
    made = DrawingBench(monkeypatch)
    await made.engine.start()
    yield made
    await made.engine.stop()


def level(event: Event) -> int:
    """The grey level of an image, which is its seed."""
    assert isinstance(event, ImageReady)
    pixels = np.asarray(Image.open(io.BytesIO(event.data)))
    assert pixels.min() == pixels.max()
    return int(pixels.max())


async def test_an_image_comes_with_its_progress_and_usage(bench: DrawingBench) -> None:
    events = await bench.draw(image_request(seed=9, num_inference_steps=3, width=16, height=8))
    assert events[:4] == [Started(), Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    image = events[4]
    assert isinstance(image, ImageReady)
    assert (image.width, image.height, image.format, image.seed, level(image)) == (16, 8, "png", 9, 9)
    assert events[5:] == [Finished(Usage(images=1))]


async def test_case_37_image_i_is_drawn_with_seed_plus_i_whatever_is_beside_it(bench: DrawingBench) -> None:
    together = [e for e in await bench.draw(image_request(seed=7, n=3)) if isinstance(e, ImageReady)]
    assert [(image.index, image.seed, level(image)) for image in together] == [
        (0, 7, 7),
        (1, 8, 8),
        (2, 9, 9),
    ]
    (alone,) = (e for e in await bench.draw(image_request(seed=9)) if isinstance(e, ImageReady))
    assert alone.data == together[2].data


def test_seeds_stay_within_63_bits() -> None:
    assert seeds(image_request(seed=2**63 - 1, n=2)) == (2**63 - 1, 0)


async def test_case_38_calls_do_not_share_a_schedulers_state(bench: DrawingBench) -> None:
    for steps in (4, 2, 7):  # the fake pipeline fails when its scheduler was left in the middle
        assert isinstance((await bench.draw(image_request(num_inference_steps=steps)))[-1], Finished)
    assert bench.pipeline.scheduler.step_index == 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 5}, "n"),
        ({"num_inference_steps": 21}, "num_inference_steps"),
        ({"width": 7}, "size"),
        ({"height": 12}, "size"),
        ({"width": 128, "height": 64}, "size"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"negative_prompt": "x"}, "negative_prompt"),
    ],
)
async def test_what_the_pipeline_cannot_do_is_refused_before_it_is_called(
    bench: DrawingBench, options: dict[str, Any], param: str
) -> None:
    (event,) = await bench.draw(image_request(**options))
    assert isinstance(event, Failed)
    assert (event.error.http_status, event.error.param) == (400, param)
    assert bench.pipeline.calls == []


async def test_case_16_bad_and_cancelled_requests_do_not_touch_the_others(bench: DrawingBench) -> None:
    loop = asyncio.get_running_loop()
    started, go_on = asyncio.Event(), threading.Event()

    def hold_the_first(prompt: str, step: int) -> None:
        if prompt == "A" and step == 0:
            loop.call_soon_threadsafe(started.set)
            assert go_on.wait(30)

    bench.pipeline.before_step = hold_the_first
    first = asyncio.create_task(bench.draw(image_request("A", seed=1)))
    await started.wait()
    bad = asyncio.create_task(bench.draw(image_request("B", width=7)))
    cancelled = asyncio.create_task(bench.draw(image_request("C", seed=3)))
    last = asyncio.create_task(bench.draw(image_request("D", seed=4)))
    await until_status(bench.engine, running=1, queued=2)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    go_on.set()
    assert level((await first)[-2]) == 1
    assert level((await last)[-2]) == 4
    assert [type(event) for event in await bad] == [Failed]
    assert bench.pipeline.calls == ["A", "D"], "no compute for what was refused or given up"
    assert (await bench.engine.get_health_status()).work_pending == 0


async def test_case_16_a_failing_pipeline_fails_its_request_and_the_next_is_served(
    bench: DrawingBench,
) -> None:
    def explode(prompt: str, _step: int) -> None:
        if prompt == "bad":
            raise RuntimeError("out of memory")

    bench.pipeline.before_step = explode
    events = await bench.draw(image_request("bad"))
    assert len(terminals(events)) == 1
    assert isinstance(events[-1], Failed)
    assert events[-1].error.is_failure
    for seed in range(4):
        assert level((await bench.draw(image_request("good", seed=seed)))[-2]) == seed
    assert (await bench.engine.get_health_status()).state == "idle"


async def test_case_41_pixels_that_are_no_numbers_are_an_error_not_a_black_picture(
    bench: DrawingBench,
) -> None:
    events = await bench.draw(image_request("nan"))
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.code) == (500, "non_finite_output")
    assert level((await bench.draw(image_request("black", seed=0)))[-2]) == 0


async def test_case_43_a_reader_that_leaves_ends_the_drawing_within_a_step(bench: DrawingBench) -> None:
    steps: list[int] = []
    go_on = threading.Event()

    def hold(_prompt: str, step: int) -> None:
        steps.append(step)
        assert go_on.wait(30)

    bench.pipeline.before_step = hold
    leaving = bench.engine.run(image_request(num_inference_steps=20))
    await anext(leaving)
    await until(lambda: steps)
    await leaving.aclose()
    go_on.set()
    bench.pipeline.before_step = lambda _prompt, _step: None
    assert isinstance((await bench.draw(image_request(seed=5)))[-1], Finished)
    assert steps == [0]


async def test_a_deadline_in_mid_drawing_ends_it_with_504(bench: DrawingBench) -> None:
    bench.pipeline.before_step = lambda _prompt, step: bench.clock.advance(2.0)
    events = await bench.draw(image_request(num_inference_steps=20, timeout_s=5.0))
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.is_failure) == (504, False)
    assert (await bench.engine.get_health_status()).steps_done == 3


async def test_stopping_ends_what_runs_and_refuses_what_comes(bench: DrawingBench) -> None:
    running = asyncio.create_task(bench.draw(image_request(num_inference_steps=20)))
    go_on = threading.Event()

    def hold(_prompt: str, _step: int) -> None:
        assert go_on.wait(30)

    bench.pipeline.before_step = hold
    await until_status(bench.engine, running=1)
    stopping = asyncio.create_task(bench.engine.stop())
    await asyncio.sleep(0)
    go_on.set()
    await stopping
    for events in (await running, await bench.draw(image_request())):
        assert len(terminals(events)) == 1
        assert isinstance(events[-1], Failed)
        assert events[-1].error.retryable


async def test_a_text_request_is_refused(bench: DrawingBench) -> None:
    (event,) = await collect(bench.engine.run(text_request()))
    assert isinstance(event, Failed)
    assert event.error.http_status == 400


# --- Pixels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_case_41_one_pixel_that_is_no_number_is_enough(bad: float) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.float32)
    pixels[2, 1, 0] = bad
    with pytest.raises(NonFiniteOutput):
        to_image(pixels)


def test_pixels_are_rounded_and_clipped_to_8_bits() -> None:
    row = np.array([[[-0.5], [0.0], [0.499 / 255], [0.501 / 255], [1.0], [1.5]]], dtype=np.float32)
    assert list(np.asarray(to_image(row))[0]) == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_images_are_encoded_in_the_asked_format(image_format: str) -> None:
    data = encode(to_image(np.zeros((8, 16, 3), dtype=np.float32)), image_format)  # type: ignore[arg-type]
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == (image_format.upper(), (16, 8))
