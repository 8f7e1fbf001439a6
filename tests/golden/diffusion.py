"""Engines over small pipelines, and diffusers alone, drawing the same requests."""

from __future__ import annotations

import asyncio
import copy
import io
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from blaze.config import DiffusionConfig, cache_dir
from blaze.engines.diffusion import drawing
from blaze.engines.diffusion.engine import DiffusionEngine
from blaze.engines.diffusion.images import Pixels
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task, task_of
from blaze.engines.diffusion.schedulers import make_scheduler
from blaze.engines.diffusion.writer import ImageWriter
from blaze.models.sources import FolderSource
from blaze.types import Event, Finished, ImageReady, ImageRequest
from tests.golden.pipeline_folders import quiet

Levels = npt.NDArray[np.int64]

_AUTO = {
    Task.IMAGE: diffusers.AutoPipelineForImage2Image,
    Task.INPAINT: diffusers.AutoPipelineForInpainting,
}
_PARAMETERS = (
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "strength",
    "eta",
    "clip_skip",
    "width",
    "height",
)


@dataclass
class Drawn:
    """``latents``: as the VAE gets them, or the pixels themselves where there is no VAE."""

    latents: torch.Tensor
    pixels: Pixels
    events: list[Event] = field(default_factory=list)

    @property
    def levels(self) -> Levels:
        """Of the first image, 0 to 255."""
        image = next(event for event in self.events if isinstance(event, ImageReady))
        return np.asarray(Image.open(io.BytesIO(image.data))).astype(np.int64)

    def distance(self, other: Drawn) -> float:
        """Of the latents, relative to the other's."""
        difference = torch.linalg.vector_norm(self.latents - other.latents)
        return float(difference / torch.linalg.vector_norm(other.latents))


class Recorder:
    """Sees the latents on their way to the VAE, and the pixels on theirs to the encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: dict[str, Drawn] = {}
        self._latents: torch.Tensor | None = None
        checked_vae, finish = drawing.checked_vae, ImageWriter.finish

        def recording_vae(vae: Any, *options: Any) -> Any:
            checked = checked_vae(vae, *options)
            decode = checked.decode

            def recorded(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self._latents = z.clone()
                return decode(z, *args, **kwargs)

            checked.decode = recorded
            return checked

        def recording_finish(writer: ImageWriter, job: Job, images: list[Pixels]) -> None:
            latents, self._latents = self._latents, None
            pixels = np.array(images[0])
            kept = torch.from_numpy(pixels) if latents is None else latents
            self.drawn[job.request.request_id] = Drawn(kept, pixels)
            finish(writer, job, images)

        monkeypatch.setattr(drawing, "checked_vae", recording_vae)
        monkeypatch.setattr(ImageWriter, "finish", recording_finish)

    async def draw(self, engine: DiffusionEngine, requests: Iterable[ImageRequest]) -> list[Drawn]:
        """All of them at once; none may be like another, or their latents would be those of a group."""
        answers = {each.request_id: asyncio.create_task(events_of(engine, each)) for each in requests}
        for name, answer in answers.items():
            events = await answer
            assert isinstance(events[-1], Finished), events
            self.drawn[name].events = events
        return [self.drawn.pop(name) for name in answers]


@asynccontextmanager
async def engine_of(folder: Path, *, threads: int = 1, **options: Any) -> AsyncIterator[DiffusionEngine]:
    config = DiffusionConfig.model_validate({"dtype": "float32", "device": "cpu"} | options)
    engine = DiffusionEngine(FolderSource(folder), config, threads=threads, cache=cache_dir())
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def events_of(engine: DiffusionEngine, request: ImageRequest) -> list[Event]:
    return [event async for batch in engine.run(request) for event in batch]


def loaded_by(engine: DiffusionEngine) -> LoadedPipeline:
    assert engine._loaded is not None
    return engine._loaded


class Alone:
    """Diffusers by itself: one call at a time, of pipelines that no engine has touched."""

    def __init__(self, folder: Path, loaded: LoadedPipeline) -> None:
        self._loaded = loaded  # which schedulers there are for a class is tested elsewhere
        pipeline = quiet(diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32))
        self._pipelines = {Task.TEXT: pipeline}

    def draw(
        self, request: ImageRequest, *, image: Image.Image | None = None, mask: Image.Image | None = None
    ) -> Drawn:
        pipeline = copy.copy(self._pipeline(task_of(request)))
        pipeline.scheduler = make_scheduler(self._loaded, task_of(request), request.scheduler)
        given = {name: getattr(request, name) for name in _PARAMETERS}
        if image is not None:
            given |= {"image": image, "mask_image": mask, "width": image.width, "height": image.height}
        given["prompt"] = request.prompt
        accepted = self._loaded.accepts[task_of(request)]
        given = {name: value for name, value in given.items() if value is not None and name in accepted}
        latents: list[torch.Tensor] = []
        vae = pipeline.components.get("vae")
        if vae is not None:
            decode = type(vae).decode

            def recorded(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                latents.append(z.clone())
                return decode(vae, z, *args, **kwargs)

            vae.decode = recorded
        generator = torch.Generator("cpu").manual_seed(request.seed or 0)
        pixels = np.asarray(pipeline(generator=generator, output_type="np", **given).images[0])
        return Drawn(latents[-1] if latents else torch.from_numpy(pixels), pixels)

    def _pipeline(self, task: Task) -> Any:
        if task not in self._pipelines:
            self._pipelines[task] = quiet(_AUTO[task].from_pipe(self._pipelines[Task.TEXT]))
        return self._pipelines[task]


def levels_of(pixels: Pixels) -> Levels:
    return (pixels * 255).round().clip(0, 255).astype(np.int64)
