"""The LLM engine: requests wait, a compute thread takes as many as fit and generates them as one batch."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from blaze.clock import Clock, SystemClock
from blaze.config import LLMConfig
from blaze.engines.channel import EventChannel
from blaze.engines.llm.model import LoadedModel, load_model
from blaze.engines.llm.prompts import PromptEncoder
from blaze.engines.llm.runner import StaticBatchRunner
from blaze.engines.llm.sampling import sample, uniform
from blaze.engines.llm.sequence import Sequence
from blaze.engines.progress import StepCounter
from blaze.errors import BlazeError, DeadlineExceeded, EngineFailure, InvalidRequest, ReplicaStopping
from blaze.models.sources import ModelSource
from blaze.reports import EngineStatus
from blaze.types import EngineKind, Events, Failed, Finished, GenerateRequest, Request, Started, Usage

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """One request on its way through the engine."""

    prompt_ids: tuple[int, ...]
    sequences: list[Sequence]
    channel: EventChannel
    deadline: float | None
    open: bool = field(default=True)

    def fail(self, error: BlazeError) -> None:
        self.channel.put(Failed(error.info))
        self.open = False

    def close_if_over(self, now: float) -> None:
        """End a job whose reader left, whose time is up, or whose choices are all finished."""
        if self.channel.abandoned:
            self.open = False
        elif self.deadline is not None and now >= self.deadline:
            self.fail(DeadlineExceeded("The deadline passed before the answer was complete."))
        elif all(sequence.finish_reason for sequence in self.sequences):
            generated = sum(sequence.num_generated for sequence in self.sequences)
            self.channel.put(Finished(Usage(prompt_tokens=len(self.prompt_ids), completion_tokens=generated)))
            self.open = False


class LLMEngine:
    """Static batches: requests that arrive while a batch runs wait for its end."""

    def __init__(
        self,
        source: ModelSource,
        options: LLMConfig,
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
        self._held: _Job | None = None  # taken from the queue, but too large for the batch at hand
        self._stopping = threading.Event()
        # One thread for all encoding: a fast tokenizer is not safe on several.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._compute: threading.Thread | None = None
        self._model: LoadedModel | None = None
        self._encoder: PromptEncoder | None = None

    async def start(self) -> None:
        self._model = await asyncio.to_thread(
            load_model, self._source, self._options, self._threads, self._cache
        )
        self._encoder = PromptEncoder(
            self._model.tokenizer,
            vocabulary_size=self._model.vocabulary_size,
            max_model_len=self._model.max_model_len,
        )
        self._compute = threading.Thread(target=self._serve, name="llm-compute", daemon=True)
        self._compute.start()

    async def stop(self) -> None:
        self._stopping.set()
        self._waiting.put(None)
        if self._compute is not None:
            await asyncio.to_thread(self._compute.join)
        self._encoding.shutdown(wait=False)
        self._model = None

    async def get_health_status(self) -> EngineStatus:
        alive = self._compute is not None and self._compute.is_alive()
        return self._progress.status(
            EngineKind.LLM,
            loaded=self._model is not None,
            failed=None if alive or self._model is None else "the compute thread has ended",
        )

    async def run(self, request: Request) -> AsyncGenerator[Events]:
        try:
            job = await self._admit(request)
        except BlazeError as error:
            yield (Failed(error.info),)
            return
        with self._progress.queued():
            self._waiting.put(job)
            async with aclosing(job.channel.read()) as batches:
                async for events in batches:
                    yield events

    async def _admit(self, request: Request) -> _Job:
        """Everything that can be wrong with a request is found here, before it touches the batch."""
        if not isinstance(request, GenerateRequest):
            raise InvalidRequest("This model generates text, not images.", param="model")
        sampling = request.sampling
        if sampling.n > self._options.max_batch_size:
            raise InvalidRequest(
                f"n: at most {self._options.max_batch_size} choices for this model.", param="n"
            )
        deadline = None if request.timeout_s is None else self._clock.now() + request.timeout_s
        model, encoder = self._model, self._encoder
        if model is None or encoder is None or not self._is_serving():
            raise ReplicaStopping("The engine is not running.")
        encoding = asyncio.get_running_loop().run_in_executor(self._encoding, encoder.encode, request)
        prompt_ids = await encoding
        if not self._is_serving():  # it may have stopped in the meantime
            raise ReplicaStopping("The engine is not running.")
        room = model.max_model_len - len(prompt_ids)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        sequences = [
            Sequence(index, prompt_ids, sampling, limit, model.vocabulary) for index in range(sampling.n)
        ]
        return _Job(prompt_ids, sequences, EventChannel(), deadline)

    def _is_serving(self) -> bool:
        return not self._stopping.is_set() and self._compute is not None and self._compute.is_alive()

    # --- The compute thread ------------------------------------------------------------------------

    def _serve(self) -> None:
        assert self._model is not None
        try:
            while not self._stopping.is_set():
                jobs = self._next_batch()
                if jobs:
                    self._run_batch(self._model, jobs)
        finally:
            self._stopping.set()  # nothing is admitted any more, and nobody is left waiting
            self._fail_waiting()

    def _next_batch(self) -> list[_Job]:
        """Wait for a request, then take all that wait and fit. Empty when there is nothing left to do."""
        jobs: list[_Job] = []
        rows = 0
        job = self._held or self._waiting.get()
        self._held = None
        while job is not None:
            job.close_if_over(self._clock.now())
            if job.open:
                rows += len(job.sequences)
                if jobs and rows > self._options.max_batch_size:
                    self._held = job
                    break
                jobs.append(job)
            try:
                job = self._waiting.get_nowait()
            except queue.Empty:
                break
        return jobs

    def _run_batch(self, model: LoadedModel, jobs: list[_Job]) -> None:
        try:
            with self._progress.running(len(jobs)):
                self._generate(StaticBatchRunner(model.model), jobs)
        except Exception as error:
            logger.exception("a batch of %d requests failed", len(jobs))
            for job in jobs:
                if job.open:
                    job.fail(EngineFailure(f"The engine failed in this batch: {type(error).__name__}."))

    def _generate(self, runner: StaticBatchRunner, jobs: list[_Job]) -> None:
        rows = [(job, sequence) for job in jobs for sequence in job.sequences]
        logits = runner.prefill([sequence.prompt_ids for _, sequence in rows])
        for job in jobs:
            job.channel.put(Started(job.prompt_ids))
        while True:
            tokens = sample(
                logits,
                [sequence.sampling for _, sequence in rows],
                [uniform(s.sampling.seed or 0, s.index, s.num_generated) for _, s in rows],
            )
            for (job, sequence), token in zip(rows, tokens, strict=True):
                self._append(job, sequence, token)
            self._progress.step()
            now = self._clock.now()
            for job in jobs:
                if job.open:
                    job.close_if_over(now)
                if job.open and self._stopping.is_set():
                    job.fail(ReplicaStopping("The replica is shutting down."))
            going = [
                row for row, (job, sequence) in enumerate(rows) if job.open and not sequence.finish_reason
            ]
            if not going:
                return
            if len(going) < len(rows):
                runner.keep(going)
                rows = [rows[row] for row in going]
                tokens = [tokens[row] for row in going]
            logits = runner.decode(tokens)

    def _append(self, job: _Job, sequence: Sequence, token: int) -> None:
        """What goes wrong with one request's text is that request's failure, not the batch's."""
        try:
            job.channel.put(*sequence.append(token))
        except Exception as error:
            logger.exception("a request failed in the middle of its batch")
            job.fail(EngineFailure(f"The engine failed on this request: {type(error).__name__}."))

    def _fail_waiting(self) -> None:
        left = [self._held]
        while not self._waiting.empty():
            left.append(self._waiting.get())
        for job in left:
            if job is not None:
                job.fail(ReplicaStopping("The replica is shutting down."))
