"""Blaze's diffusion engine as a worker, by its public interface; set up as a replica sets it up."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.image_workload import Served, Wanted
from benchmarks.worker import Line
from blaze.engines.openmp import share_cores

if TYPE_CHECKING:
    from blaze.engines.diffusion.engine import DiffusionEngine


async def answer(engine: DiffusionEngine, wanted: Wanted, began: float) -> float:
    """When the image was there, in seconds from the beginning of the turn."""
    from blaze.types import Finished, ImageRequest

    await asyncio.sleep(max(0.0, began + wanted.at_s - time.perf_counter()))
    request = ImageRequest(
        "r",
        "m",
        wanted.prompt,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance,
        seed=wanted.seed,
    )
    last = [event async for events in engine.run(request) for event in events][-1]
    if not isinstance(last, Finished):
        raise RuntimeError(str(last))
    return time.perf_counter() - began


async def serve(engine: DiffusionEngine, requests: list[Wanted]) -> Served:
    began = time.perf_counter()
    return Served.of(
        requests, await asyncio.gather(*(answer(engine, request, began) for request in requests))
    )


async def main(folder: str, threads: int, most: int) -> None:
    line = Line()
    share_cores()
    from blaze.config import cache_dir
    from blaze.engine_config import DiffusionConfig
    from blaze.engines.diffusion.engine import DiffusionEngine
    from blaze.models.sources import FolderSource

    options = DiffusionConfig(dtype="float32", device="cpu", max_batch_size=most)
    engine = DiffusionEngine(FolderSource(Path(folder)), options, threads=threads, cache=cache_dir())
    await engine.start()
    line.send({})
    for command in line.commands():  # blocks the event loop, and there is nothing else on it
        line.send(asdict(await serve(engine, Wanted.all_of(command))))
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
