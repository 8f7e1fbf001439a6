"""Who leaves a call for several is computed no further, and the others get what they would alone."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blaze.clock import SystemClock
from blaze.engine_config import DiffusionConfig
from blaze.engines.channel import Bell, EventChannel
from blaze.engines.diffusion.counter import NonFiniteCounter
from blaze.engines.diffusion.images import Pixels
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.loop import DiffusionLoop
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task
from blaze.engines.diffusion.sizing import Inputs, read_inputs
from blaze.engines.diffusion.writer import ImageWriter
from blaze.engines.progress import StepCounter
from blaze.types import ImageRequest
from tests.golden.crowd import CASES, various
from tests.golden.diffusion import Alone, levels_of
from tests.golden.pipeline_folders import left_half, load, picture

pytestmark = pytest.mark.models

MOST_APART = 1e-4  # of pixels and latents, relative


class Keeper(ImageWriter):
    """Keeps the pixels of images instead of encoding them."""

    def __init__(self, bell: Bell, progress: StepCounter) -> None:
        super().__init__(bell, NonFiniteCounter(), progress)
        self.kept: dict[str, Sequence[Pixels]] = {}

    def finish(self, job: Job, images: Sequence[Pixels]) -> None:
        self.kept[job.request.request_id] = images


class Easel:
    """The loop of an engine, step by step. ``rows``: of each forward of the denoiser; ``decoded``: what went
    into the VAE."""

    def __init__(self, loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.decoded: list[torch.Tensor] = []
        self._loaded = loaded
        self._watch(monkeypatch)
        self._bell, self._clock = Bell(), SystemClock()
        progress = StepCounter(self._clock)
        self.writer = Keeper(self._bell, progress)
        self.loop = DiffusionLoop(
            loaded,
            DiffusionConfig(max_batch_size=8),
            writer=self.writer,
            progress=progress,
            counter=NonFiniteCounter(),
            stopping=threading.Event(),
        )

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self._loaded.denoiser is not None
        denoiser = getattr(self._loaded.pipeline, self._loaded.denoiser)
        forward = denoiser.forward
        first = next(iter(inspect.signature(forward).parameters))

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.rows.append(len(args[0] if args else kwargs[first]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(denoiser, "forward", watched)
        if (vae := self._loaded.pipeline.components.get("vae")) is not None:
            decode = vae.decode

            def decoding(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.decoded.append(z)
                return decode(z, *args, **kwargs)

            monkeypatch.setattr(vae, "decode", decoding)

    def add(self, request: ImageRequest) -> Job:
        inputs = Inputs(request)
        if request.image is not None:
            inputs = read_inputs(request, size_factor=self._loaded.size_factor, max_pixels=2**20)
        job = Job(inputs.request, EventChannel(self._bell), self._clock, image=inputs.image, mask=inputs.mask)
        self.loop.add(job)
        return job

    def step(self, times: int = 1) -> None:
        with torch.inference_mode():
            for _ in range(times):
                self.loop.step()

    def finish(self) -> None:
        while not self.loop.is_idle:
            self.step()


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


KINDS = [(name, task, 3.0) for name, task in CASES] + [("sd", Task.TEXT, 1.0), ("sd3", Task.TEXT, 1.0)]
BLOCKS = {"flux": 1, "ddpm": 1, "ddim": 1}  # guidance by a second evaluation, but not of these


@pytest.mark.parametrize(
    ("name", "task", "guidance"), KINDS, ids=[f"{name}-{task}-{scale}" for name, task, scale in KINDS]
)
async def test_who_leaves_is_out_of_the_next_forward_and_changes_no_other(
    name: str, task: Task, guidance: float, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(folders[name])
    easel = Easel(loaded, monkeypatch)
    *group, company = (
        replace(
            request,
            num_inference_steps=10,
            scheduler=None,
            guidance_scale=request.guidance_scale and guidance,
            n=2 if index == 1 else 1,
        )
        for index, request in enumerate(various(name, task, loaded)[:4])
    )
    company = replace(company, num_inference_steps=14)
    jobs = [easel.add(request) for request in (*group, company)]
    easel.step(3)
    blocks = 1 if guidance == 1.0 else BLOCKS.get(name, 2)
    assert easel.rows[-1] == 5 * blocks, "a group of four images, and one more beside it"
    jobs[1].channel.abandon()
    easel.rows.clear()
    easel.step()
    assert easel.rows == [4 * blocks, 2 * blocks, 3 * blocks], "once whole and once without, then without"
    easel.rows.clear()
    easel.finish()
    assert {*easel.rows} == {3 * blocks, blocks}, "then the company alone"
    assert {*easel.writer.kept} == {group[0].request_id, group[2].request_id, company.request_id}
    if loaded.pipeline.components.get("vae") is not None:
        assert [len(latents) for latents in easel.decoded] == [2, 1], "no VAE for them either"
    alone = Alone(folders[name], loaded)
    for request in (group[0], group[2], company):
        image = picture() if task is not Task.TEXT else None
        expected = alone.draw(request, image=image, mask=left_half() if task is Task.INPAINT else None)
        (drawn,) = easel.writer.kept[request.request_id]
        assert distance(drawn, expected.pixels) <= MOST_APART
        assert np.abs(levels_of(drawn) - levels_of(expected.pixels)).max() <= 1
        if easel.decoded:
            latents = torch.cat(easel.decoded)[[group[0], group[2], company].index(request)]
            assert distance(latents.numpy(), expected.latents[0].numpy()) <= MOST_APART
