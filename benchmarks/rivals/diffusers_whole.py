"""diffusers as a server of one thread would use it: whole requests, one call of the pipeline after another.

``alike``: those that wait with the parameters of the one that waits longest go into its call, as a list.
The server loses no time: what comes meanwhile is known from the plan of the turn, not from a queue.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.image_workload import Served, Wanted
from benchmarks.worker import Line
from blaze.engines.openmp import share_cores

Draw = Callable[[list[Wanted]], None]


def serve(requests: list[Wanted], draw: Draw, most: int) -> Served:
    """Each call takes up to ``most`` images."""
    began = time.perf_counter()
    ended = [0.0] * len(requests)
    left = sorted(range(len(requests)), key=lambda index: requests[index].at_s)
    while left:
        now = time.perf_counter() - began
        if (wait := requests[left[0]].at_s - now) > 0:
            time.sleep(wait)
            continue
        first = requests[left[0]]
        chosen = [
            index
            for index in left
            if requests[index].at_s <= now
            and (requests[index].steps, requests[index].guidance) == (first.steps, first.guidance)
        ][:most]
        draw([requests[index] for index in chosen])
        for index in chosen:
            ended[index] = time.perf_counter() - began
            left.remove(index)
    return Served.of(requests, ended)


def loaded(folder: str, threads: int) -> Draw:
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(threads)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)

    def draw(requests: list[Wanted]) -> None:
        with torch.inference_mode():
            images = pipeline(
                [request.prompt for request in requests],
                num_inference_steps=requests[0].steps,
                guidance_scale=requests[0].guidance,
                generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            ).images
        for image in images:
            image.save(io.BytesIO(), format="PNG")

    return draw


def main(folder: str, threads: int, most: int) -> None:
    line = Line()
    share_cores()
    draw = loaded(folder, threads)
    line.send({})
    for command in line.commands():
        line.send(asdict(serve(Wanted.all_of(command), draw, most)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
