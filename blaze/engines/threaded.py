"""The shell of an engine whose model works on a thread of its own: load, admit, queue, report, stop."""

from __future__ import annotations

import asyncio
import queue
import threading
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Generic, Protocol, TypeVar

from blaze.clock import Clock, SystemClock
from blaze.engines.channel import EventChannel
from blaze.engines.operations import RunsOperations
from blaze.engines.progress import StepCounter
from blaze.errors import BlazeError, ReplicaStopping
from blaze.reports import EngineStatus
from blaze.types import Events, Failed, Request


class Job(Protocol):
    """One request on its way through an engine."""

    @property
    def channel(self) -> EventChannel: ...


JobT = TypeVar("JobT", bound=Job)
LoadedT = TypeVar("LoadedT")


class ThreadedEngine(RunsOperations, Generic[JobT, LoadedT]):
    """Requests are admitted on the event loop and served on the compute thread, which owns the model."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._progress = StepCounter(self._clock)
        self._waiting: queue.SimpleQueue[JobT | None] = queue.SimpleQueue()  # None: wake up, it is over
        self._stopping = threading.Event()
        self._compute: threading.Thread | None = None
        self._loaded: LoadedT | None = None
        self._jobs: set[JobT] = set()  # whose answers are not read to the end

    # --- What a kind of engine brings ----------------------------------------------------------------

    @abstractmethod
    def _load(self) -> LoadedT:
        """Load the model; blocking, on a thread."""

    @abstractmethod
    async def _admit(self, loaded: LoadedT, request: Request) -> JobT:
        """Find everything that can be wrong with a request, before it is queued. Raises BlazeError."""

    @abstractmethod
    def _work(self, loaded: LoadedT) -> None:
        """The compute thread: serve ``_waiting`` until it gives None, or ``_stopping`` is set."""

    # --- The engine protocol -------------------------------------------------------------------------

    async def start(self) -> None:
        self._loaded = await asyncio.to_thread(self._load)
        self._compute = threading.Thread(
            target=self._serve, args=(self._loaded,), name=f"{self.kind.value}-compute", daemon=True
        )
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
            self.kind,
            loaded=self._loaded is not None,
            failed=None if alive or self._loaded is None else "the compute thread has ended",
            unread=sum(job.channel.is_complete for job in self._jobs),
        )

    async def run(self, request: Request) -> AsyncGenerator[Events]:
        try:
            job = await self._admit(self._ready(), request)
        except BlazeError as error:
            yield (Failed(error.info),)
            return
        with self._progress.queued(), self._registered(job):
            self._waiting.put(job)
            if self._stopping.is_set():  # since it was admitted: the thread may have looked for the last time
                _refuse(job)
            async with aclosing(job.channel.read()) as batches:
                async for events in batches:
                    yield events

    @contextmanager
    def _registered(self, job: JobT) -> Iterator[None]:
        self._jobs.add(job)
        try:
            yield
        finally:
            self._jobs.discard(job)

    def _ready(self) -> LoadedT:
        """The model. Raises :class:`ReplicaStopping` when nobody serves it (any more)."""
        serving = self._compute is not None and self._compute.is_alive() and not self._stopping.is_set()
        if self._loaded is None or not serving:
            raise ReplicaStopping("The engine is not running.")
        return self._loaded

    def _serve(self, loaded: LoadedT) -> None:
        self._progress.time_this_thread()
        try:
            self._work(loaded)
        finally:
            self._stopping.set()  # nothing is admitted any more, and nobody is left waiting
            while not self._waiting.empty():
                if (left := self._waiting.get()) is not None:
                    _refuse(left)


def _refuse(job: Job) -> None:
    job.channel.put(Failed(ReplicaStopping("The replica is shutting down.").info))
