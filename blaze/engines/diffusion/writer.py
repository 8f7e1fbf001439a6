"""Pixels become encoded images on threads of their own: the denoiser does not wait for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from blaze.engines.channel import Bell
from blaze.engines.diffusion.counter import NonFiniteCounter
from blaze.engines.diffusion.images import Pixels, encode, to_image
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.parameters import seeds
from blaze.engines.progress import StepCounter
from blaze.errors import BlazeError, EngineFailure
from blaze.types import Event, Failed, Finished, ImageReady, PartialImage, Usage

logger = logging.getLogger(__name__)


class ImageWriter:
    """Puts the images of jobs into their channels, those of one job in order."""

    def __init__(
        self, bell: Bell, counter: NonFiniteCounter, progress: StepCounter, *, threads: int = 2
    ) -> None:
        self._bell = bell
        self._counter = counter
        # A drawn image is work that is pending while it is encoded, and nothing else may be to do.
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="image-writer", initializer=progress.time_this_thread
        )
        self._lock = threading.Lock()
        self._unfinished = 0

    @property
    def num_unfinished(self) -> int:
        """Jobs that are drawn and not yet answered."""
        with self._lock:
            return self._unfinished

    def preview(self, job: Job, number: int, images: Sequence[Pixels]) -> None:
        """``images``: all of the job's, as they are so far."""
        self._submit(job, lambda: _previews(job, number, images))

    def finish(self, job: Job, images: Sequence[Pixels]) -> None:
        """``images``: all of the job's. Its last event follows."""
        with self._lock:
            self._unfinished += 1
        self._submit(job, lambda: _answer(job, images)).add_done_callback(self._finished)

    def close(self) -> None:
        """Wait until everything is written."""
        self._pool.shutdown()

    def _submit(self, job: Job, make: Callable[[], Sequence[Event]]) -> Future[None]:
        # Threads take work in the order in which it came: what is waited for is always under way.
        job.written = self._pool.submit(self._write, job, make, job.written)
        return job.written

    def _write(self, job: Job, make: Callable[[], Sequence[Event]], before: Future[None] | None) -> None:
        try:
            events = () if job.channel.abandoned else make()
        except BlazeError as error:
            self._counter.failed(error)
            events = (Failed(error.info),)
        except Exception as error:
            logger.exception("the images of request %s cannot be written", job.request.request_id)
            failure = EngineFailure(f"The images cannot be encoded: {type(error).__name__}.")
            events = (Failed(failure.info),)
        if before is not None:
            wait([before])
        if events:
            job.put(*events)
        self._bell.ring()

    def _finished(self, _written: Future[None]) -> None:
        with self._lock:
            self._unfinished -= 1


def _previews(job: Job, number: int, images: Sequence[Pixels]) -> Sequence[Event]:
    request = job.request
    events: list[Event] = []
    for index, pixels in enumerate(images):
        image = to_image(pixels)
        data = encode(image, request.output_format, request.output_compression)
        events.append(PartialImage(index, number, data, request.output_format, image.width, image.height))
    return events


def _answer(job: Job, images: Sequence[Pixels]) -> Sequence[Event]:
    request = job.request
    events: list[Event] = []
    for index, (pixels, seed) in enumerate(zip(images, seeds(request), strict=True)):
        image = to_image(pixels)
        data = encode(image, request.output_format, request.output_compression)
        events.append(ImageReady(index, data, request.output_format, image.width, image.height, seed))
    return (*events, Finished(Usage(images=len(images))))
