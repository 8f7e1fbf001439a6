"""A diffusion engine over a pipeline that draws what it is told."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion import engine as engine_module
from blaze.engines.diffusion.engine import DiffusionEngine
from blaze.models.sources import HubSource
from blaze.types import Event, ImageReady, ImageRequest, PartialImage
from tests.fake_pipeline import FakePipeline, fake_pipeline
from tests.fakes import FakeClock
from tests.samples import collect, image_request
from tests.waiting import until, until_status


class DrawingBench:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, whole_because: str | None = None, **options: Any
    ) -> None:
        self.pipeline = FakePipeline()
        self.clock = FakeClock()
        self.loaded = fake_pipeline(self.pipeline, whole_because=whole_because)
        monkeypatch.setattr(engine_module, "load_pipeline", lambda *_args: self.loaded)
        limits = {"max_batch_size": 4, "max_steps": 20, "max_pixels": 64 * 64}
        self.engine = DiffusionEngine(
            HubSource("org/model"),
            DiffusionConfig(**(limits | options)),
            threads=1,
            cache=Path("/nonexistent"),
            clock=self.clock,
        )

    @property
    def script(self) -> Any:
        return self.pipeline.script

    @property
    def batches(self) -> list[str]:
        """Of each forward of the denoiser, the first letters of its rows' prompts."""
        return self.pipeline.unet.batches

    async def draw(self, request: ImageRequest) -> list[Event]:
        return await collect(self.engine.run(request))

    def begin(self, prompt: str, **options: Any) -> asyncio.Task[list[Event]]:
        return asyncio.create_task(self.draw(image_request(prompt, **options)))

    @contextmanager
    def held_at(self, prompt: str, step: int = 0) -> Iterator[Held]:
        """The compute thread stops where this prompt is about to take this step, until it is released."""
        held = Held()

        def hold(reached: str, at: int) -> None:
            if (reached, at) == (prompt, step) and not held.released.is_set():
                held.reached.set()
                assert held.released.wait(30)

        self.script.before_step = hold
        try:
            yield held
        finally:
            held.released.set()

    async def queued(self, number: int) -> None:
        await until_status(self.engine, queued=number)


class Held:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()

    async def until_reached(self) -> None:
        await until(self.reached.is_set)

    def release(self) -> None:
        self.released.set()


def level(event: Event) -> int:
    """The grey level of an image, which is its seed."""
    assert isinstance(event, ImageReady | PartialImage)
    pixels = np.asarray(Image.open(io.BytesIO(event.data)))
    assert pixels.min() == pixels.max()
    return int(pixels.max())


def levels(events: list[Event]) -> list[int]:
    return [level(event) for event in events if isinstance(event, ImageReady)]
