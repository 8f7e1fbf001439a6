"""Requests of every kind for the small pipelines: those that meet at the denoiser."""

from __future__ import annotations

import io
from itertools import cycle, islice
from typing import Any

from PIL import Image

from blaze.engines.diffusion.pipelines import LoadedPipeline, Task
from blaze.engines.diffusion.schedulers import SCHEDULERS, make_scheduler
from blaze.errors import InvalidRequest
from blaze.types import ImageRequest
from tests.golden.pipeline_folders import left_half, picture
from tests.golden.tiny_pipelines import FOR_MASKS, PIPELINES, UNCONDITIONAL

REQUESTS = 12
SIDE = {"flux": 32}  # its own default is the training size, whatever the VAE's factor

Case = tuple[str, Task]
CASES: list[Case] = [
    *((name, Task.TEXT) for name in (*PIPELINES, *UNCONDITIONAL)),
    *((name, Task.IMAGE) for name in ("sd", "sdxl", "sd3", "flux")),
    *((name, Task.INPAINT) for name in ("sd", "sdxl", "sd3", "flux", *FOR_MASKS)),
]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def various(name: str, task: Task, loaded: LoadedPipeline) -> list[ImageRequest]:
    """Different steps, guidance and schedulers, with what the task needs."""
    schedulers: list[str | None] = [None]
    for scheduler in SCHEDULERS:
        try:
            make_scheduler(loaded, task, scheduler)
            schedulers.append(scheduler)
        except InvalidRequest:
            continue
    fields: dict[str, Any] = {"width": SIDE[name], "height": SIDE[name]} if name in SIDE else {}
    if task is not Task.TEXT:
        fields = {"image": png(picture()), "strength": 0.7}
    if task is Task.INPAINT:
        fields["mask"] = png(left_half())
    prompts = cycle(["a red seven", "two dogs on the grass", "", "night"])
    requests = []
    for index, (prompt, scheduler) in enumerate(islice(zip(prompts, cycle(schedulers)), REQUESTS)):
        request = ImageRequest(
            f"{name}-{index}",
            name,
            "" if name in UNCONDITIONAL else prompt,
            num_inference_steps=4 + index % 7,
            guidance_scale=None if name in UNCONDITIONAL else (1.0, 3.5, 7.5)[index % 3],
            scheduler=scheduler,
            seed=100 + index,
            progress=True,
            timeout_s=120,
            **fields,
        )
        requests.append(request)
    return requests
