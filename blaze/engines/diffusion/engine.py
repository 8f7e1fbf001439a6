"""The diffusion engine: requests wait their turn, a compute thread draws one after another."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from blaze.clock import Clock, SystemClock
from blaze.config import DiffusionConfig
from blaze.engines.channel import EventChannel
from blaze.engines.diffusion.images import encode, to_image
from blaze.engines.diffusion.pipelines import (
    LoadedPipeline,
    call_pipeline,
    check_request,
    load_pipeline,
    seeds,
)
from blaze.engines.progress import StepCounter
from blaze.errors import (
    BlazeError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    ReplicaStopping,
)
from blaze.models.sources import ModelSource
from blaze.reports import EngineStatus
from blaze.types import (
    EngineKind,
    Events,
    Failed,
    Finished,
    ImageReady,
    ImageRequest,
    Progress,
    Request,
    Started,
    Usage,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    request: ImageRequest
    channel: EventChannel
    deadline: float | None


class DiffusionEngine:
    def __init__(
        self,
        source: ModelSource,
        options: DiffusionConfig,
        *,
        threads: int,
        cache: Path,
        clock: Clock | None = None,
    ) -> None:
        self._source = source
        self._options = options
        self._threads = threads
        self._cache = cache
        self._clock = clock or SystemClock()
        self._progress = StepCounter(self._clock)
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._compute: threading.Thread | None = None
        self._loaded: LoadedPipeline | None = None

    async def start(self) -> None:
        self._loaded = await asyncio.to_thread(
            load_pipeline, self._source, self._options, self._threads, self._cache
        )
        self._compute = threading.Thread(target=self._serve, name="diffusion-compute", daemon=True)
        self._compute.start()

    async def stop(self) -> None:
        self._stopping.set()
        self._waiting.put(None)
        if self._compute is not None:
            await asyncio.to_thread(self._compute.join)
        self._loaded = None

    async def get_health_status(self) -> EngineStatus:
        alive = self._compute is not None and self._compute.is_alive()
        return self._progress.status(
            EngineKind.DIFFUSION,
            loaded=self._loaded is not None,
            failed=None if alive or self._loaded is None else "the compute thread has ended",
        )

    async def run(self, request: Request) -> AsyncGenerator[Events]:
        try:
            job = self._admit(request)
        except BlazeError as error:
            yield (Failed(error.info),)
            return
        with self._progress.queued():
            self._waiting.put(job)
            async with aclosing(job.channel.read()) as batches:
                async for events in batches:
                    yield events

    def _admit(self, request: Request) -> _Job:
        if not isinstance(request, ImageRequest):
            raise InvalidRequest("This model generates images, not text.", param="model")
        serving = self._compute is not None and self._compute.is_alive() and not self._stopping.is_set()
        if self._loaded is None or not serving:
            raise ReplicaStopping("The engine is not running.")
        check_request(request, self._loaded, self._options)
        deadline = None if request.timeout_s is None else self._clock.now() + request.timeout_s
        return _Job(request, EventChannel(), deadline)

    # --- The compute thread ------------------------------------------------------------------------

    def _serve(self) -> None:
        assert self._loaded is not None
        try:
            while (job := self._waiting.get()) is not None:
                self._run(self._loaded, job)  # which ends at once when the engine is stopping
        finally:
            self._stopping.set()  # nothing is admitted any more, and nobody is left waiting
            while not self._waiting.empty():
                if (left := self._waiting.get()) is not None:
                    left.channel.put(Failed(ReplicaStopping("The replica is shutting down.").info))

    def _run(self, loaded: LoadedPipeline, job: _Job) -> None:
        try:
            with self._progress.running(1):
                self._check_wanted(job)
                self._draw(loaded, job)
        except BlazeError as error:
            job.channel.put(Failed(error.info))
        except Exception as error:
            logger.exception("request %s failed", job.request.request_id)
            job.channel.put(Failed(EngineFailure(f"The pipeline failed: {type(error).__name__}.").info))

    def _draw(self, loaded: LoadedPipeline, job: _Job) -> None:
        request = job.request
        job.channel.put(Started())

        def step_done(step: int, total: int) -> None:
            self._progress.step()
            self._check_wanted(job)
            job.channel.put(Progress(step, total))

        images = [to_image(pixels) for pixels in call_pipeline(loaded, request, step_done)]
        for index, (image, seed) in enumerate(zip(images, seeds(request), strict=True)):
            data = encode(image, request.output_format)
            job.channel.put(ImageReady(index, data, request.output_format, image.width, image.height, seed))
        job.channel.put(Finished(Usage(images=len(images))))

    def _check_wanted(self, job: _Job) -> None:
        """Ends a call whose reader left or whose time is up; called before it and after every step."""
        if job.channel.abandoned:
            raise Cancelled("The caller left.")
        if self._stopping.is_set():
            raise ReplicaStopping("The replica is shutting down.")
        if job.deadline is not None and self._clock.now() >= job.deadline:
            raise DeadlineExceeded("The deadline passed before the image was complete.")
