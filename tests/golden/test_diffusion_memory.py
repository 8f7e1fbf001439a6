"""Requests leave nothing behind in memory."""

from __future__ import annotations

import asyncio
import os

import psutil
import pytest

from blaze.config import cache_dir
from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.engine import DiffusionEngine
from blaze.models.sources import FolderSource, package_path
from blaze.types import Finished, ImageRequest

pytestmark = pytest.mark.models

WARM_UP, REQUESTS, AT_ONCE = 100, 500, 16
MOST_GROWTH = 50 * 2**20  # bytes


async def test_five_hundred_requests_leave_memory_flat() -> None:
    folder = FolderSource(package_path("blaze/assets/digits"))
    engine = DiffusionEngine(folder, DiffusionConfig(max_batch_size=AT_ONCE), threads=1, cache=cache_dir())
    await engine.start()
    places = asyncio.Semaphore(2 * AT_ONCE)

    async def draw(number: int) -> None:
        request = ImageRequest(
            str(number),
            "digits",
            f"a {number}",
            seed=number,
            num_inference_steps=1 + number % 3,
            guidance_scale=(1.0, 3.0)[number % 2],
            partial_images=number % 2,
            timeout_s=120,
        )
        async with places:
            events = [event async for batch in engine.run(request) for event in batch]
        assert isinstance(events[-1], Finished)

    async def draw_all(count: int) -> int:
        await asyncio.gather(*map(draw, range(count)))
        return psutil.Process(os.getpid()).memory_info().rss

    try:
        before = await draw_all(WARM_UP)
        after = await draw_all(REQUESTS)
    finally:
        await engine.stop()
    assert after - before < MOST_GROWTH
