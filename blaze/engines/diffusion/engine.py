"""The diffusion engine: requests are checked as they come, and join the others at the next step."""

from __future__ import annotations

import asyncio
import logging
import queue
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from blaze.clock import Clock
from blaze.engine_config import DiffusionConfig
from blaze.engines.channel import Bell, EventChannel
from blaze.engines.diffusion.counter import NonFiniteCounter
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.lanes import lanes_for
from blaze.engines.diffusion.loop import DiffusionLoop
from blaze.engines.diffusion.parameters import check_request
from blaze.engines.diffusion.pipelines import LoadedPipeline, load_pipeline
from blaze.engines.diffusion.sizing import Inputs, read_inputs
from blaze.engines.diffusion.writer import ImageWriter
from blaze.engines.threaded import ThreadedEngine
from blaze.errors import BlazeError, EngineFailure, InvalidRequest, ReplicaStopping
from blaze.models.sources import ModelSource
from blaze.reports import EngineStatus
from blaze.types import EngineKind, ImageRequest, Request

logger = logging.getLogger(__name__)


class DiffusionEngine(ThreadedEngine[Job, LoadedPipeline]):
    """Batches requests at the denoiser: see :mod:`blaze.engines.diffusion.loop`."""

    kind = EngineKind.DIFFUSION

    def __init__(
        self,
        source: ModelSource,
        options: DiffusionConfig,
        *,
        threads: int,
        cache: Path,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(clock)
        self._source = source
        self._options = options
        self._threads = threads
        self._cache = cache
        self._bell = Bell()
        self._counter = NonFiniteCounter()
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="image-reader")  # one at a time: for memory

    def _load(self) -> LoadedPipeline:
        return load_pipeline(self._source, self._options, self._threads, self._cache)

    async def stop(self) -> None:
        await super().stop()
        self._reading.shutdown(wait=False)

    async def get_health_status(self) -> EngineStatus:
        status = replace(await super().get_health_status(), diffusion=self._counter.status())
        reason = None if self._loaded is None else self._loaded.whole_because
        if reason is None or status.detail is not None:
            return status
        return replace(status, detail=f"requests run whole, one after another: {reason}")

    async def _admit(self, loaded: LoadedPipeline, request: Request) -> Job:
        if not isinstance(request, ImageRequest):
            raise InvalidRequest("This model generates images, not text.", param="model")
        arrival = self._clock.now()
        check_request(request, loaded, self._options)
        inputs = Inputs(request)
        if request.image is not None:
            read = partial(read_inputs, size_factor=loaded.size_factor, max_pixels=self._options.max_pixels)
            inputs = await asyncio.get_running_loop().run_in_executor(self._reading, read, request)
            self._ready()  # it may have stopped in the meantime
        return Job(
            inputs.request,
            EventChannel(self._bell),
            self._clock,
            deadline=None if request.timeout_s is None else arrival + request.timeout_s,
            image=inputs.image,
            mask=inputs.mask,
        )

    # --- The compute thread ------------------------------------------------------------------------

    def _work(self, loaded: LoadedPipeline) -> None:
        writer = ImageWriter(self._bell, self._counter, self._progress)
        lanes = lanes_for(loaded, self._options, self._threads)
        loop = DiffusionLoop(
            loaded,
            self._options,
            writer=writer,
            progress=self._progress,
            counter=self._counter,
            stopping=self._stopping,
            launching=self._bell.ring,
            lanes=lanes,
        )
        end: BlazeError = ReplicaStopping("The replica is shutting down.")
        try:
            # News of a step leaves while the next one is computed; a request that runs whole has no next one.
            quiet = self._bell.held() if loop.merges else nullcontext()
            with torch.inference_mode(), quiet:
                while not self._stopping.is_set():
                    self._take_new(loop)
                    loop.step()
        except Exception:
            logger.exception("the engine gives up")  # its status says failed from here on
            end = EngineFailure("The engine has failed.")
        finally:
            loop.end(end)
            writer.close()
            if lanes is not None:
                lanes.close()

    def _take_new(self, loop: DiffusionLoop) -> None:
        """All that wait; when there is nothing else to do, wait for one."""
        idle = loop.is_idle
        if idle:
            self._bell.ring()
        try:
            job = self._waiting.get(block=idle)
            while job is not None:
                loop.add(job)
                job = self._waiting.get_nowait()
        except queue.Empty:
            pass
