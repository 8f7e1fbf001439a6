"""The diffusion engine: requests wait their turn, a compute thread draws one after another."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from blaze.clock import Clock
from blaze.engine_config import DiffusionConfig
from blaze.engines.channel import EventChannel
from blaze.engines.diffusion.images import encode, to_image
from blaze.engines.diffusion.pipelines import (
    LoadedPipeline,
    call_pipeline,
    check_request,
    load_pipeline,
    seeds,
)
from blaze.engines.threaded import ThreadedEngine
from blaze.errors import (
    BlazeError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    ReplicaStopping,
)
from blaze.models.sources import ModelSource
from blaze.types import (
    EngineKind,
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


class DiffusionEngine(ThreadedEngine[_Job, LoadedPipeline]):
    """One request after another: a request that arrives while one is drawn waits for its end."""

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

    def _load(self) -> LoadedPipeline:
        return load_pipeline(self._source, self._options, self._threads, self._cache)

    async def _admit(self, loaded: LoadedPipeline, request: Request) -> _Job:
        if not isinstance(request, ImageRequest):
            raise InvalidRequest("This model generates images, not text.", param="model")
        check_request(request, loaded, self._options)
        deadline = None if request.timeout_s is None else self._clock.now() + request.timeout_s
        return _Job(request, EventChannel(), deadline)

    # --- The compute thread ------------------------------------------------------------------------

    def _work(self, loaded: LoadedPipeline) -> None:
        while (job := self._waiting.get()) is not None:
            self._run(loaded, job)  # which ends at once when the engine is stopping

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
