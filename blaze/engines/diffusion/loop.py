"""The loop of the compute thread: begin what fits, run the denoiser for all that wait, end what is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.adapters import activate
from blaze.engines.diffusion.batching import WaitingLine
from blaze.engines.diffusion.counter import NonFiniteCounter
from blaze.engines.diffusion.drawing import Drawing, Studio
from blaze.engines.diffusion.hub import Hub
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.lanes import Lanes
from blaze.engines.diffusion.merger import Denoiser, Merger
from blaze.engines.diffusion.pipelines import LoadedPipeline
from blaze.engines.diffusion.writer import ImageWriter
from blaze.engines.progress import StepCounter
from blaze.errors import BlazeError
from blaze.types import Failed


class DiffusionLoop:
    """Jobs come and go between steps; at most ``max_batch_size`` images are drawn at once.

    Belongs to the thread that makes it. ``launching``: called before each forward of the denoiser.
    """

    def __init__(
        self,
        loaded: LoadedPipeline,
        options: DiffusionConfig,
        *,
        writer: ImageWriter,
        progress: StepCounter,
        counter: NonFiniteCounter,
        stopping: threading.Event,
        launching: Callable[[], None] = lambda: None,
        lanes: Lanes | None = None,
    ) -> None:
        self._max_images = options.max_batch_size
        self._line = WaitingLine(grouped=not options.deterministic)
        self._drawings: list[Drawing] = []
        self._progress = progress
        self._launching = launching
        self._writer = writer
        self._activate = partial(activate, loaded)
        self._hub: Hub | None = None
        stand_in = None
        if loaded.whole_because is None and loaded.denoiser is not None:
            merger = Merger(
                max_images=options.max_batch_size,
                fixed_rows=_fixed_rows(options) if options.deterministic else None,
                on_step=progress.step,
                activate=self._activate,
                lanes=lanes,
            )
            self._hub = Hub(merger)
            stand_in = partial(self._hub.stand_in, Denoiser(getattr(loaded.pipeline, loaded.denoiser)))
        self._studio = Studio(loaded, writer, stopping, counter, stand_in, progress.step)

    @property
    def merges(self) -> bool:
        """Whether requests meet at the denoiser; else they run whole, one after another."""
        return self._hub is not None

    @property
    def is_idle(self) -> bool:
        return not self._drawings and not len(self._line)

    def add(self, job: Job) -> None:
        self._line.add(job)

    def step(self) -> None:
        """At most one forward of the denoiser for each call; where calls run whole, one of them."""
        for job, error in self._line.remove_unwanted():
            job.put(Failed(error.info))
        self._begin()
        self._report()
        if self._hub is not None:
            self._launching()
            self._hub.step()
        self._settle()
        self._report()

    def end(self, error: BlazeError) -> None:
        """End everything with this error."""
        if self._hub is not None:
            self._hub.end(error)
        for drawing in self._drawings:
            drawing.fail(error)
        for job in self._line.clear():
            job.put(Failed(error.info))
        self._drawings.clear()
        self._report()

    def _begin(self) -> None:
        """Let in those who waited longest, as far as there is room."""
        room = self._max_images - sum(len(drawing.wanted) for drawing in self._drawings)
        for jobs in self._line.take(room, most_calls=None if self._hub is not None else 1):
            drawing = Drawing(jobs, self._studio)
            self._drawings.append(drawing)
            self._report()
            self._activate(drawing.adapters)
            if self._hub is not None:
                self._hub.start(drawing)
            else:
                drawing.run()

    def _settle(self) -> None:
        for drawing in self._drawings:
            self._line.put_back(drawing.to_retry)
        self._drawings = [drawing for drawing in self._drawings if not drawing.is_over]

    def _report(self) -> None:
        drawn = sum(drawing.num_live for drawing in self._drawings)
        self._progress.set_running(drawn + self._writer.num_unfinished)


def _fixed_rows(options: DiffusionConfig) -> int:
    """A power of two: other numbers of rows are more often cut into blocks of different kinds."""
    return max(2, 1 << (options.max_batch_size - 1).bit_length())
