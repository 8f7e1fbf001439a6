"""The LLM engine: requests wait, a compute thread takes as many as fit and generates them as one batch."""

from __future__ import annotations

import asyncio
import logging
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from blaze.clock import Clock
from blaze.config import LLMConfig
from blaze.engines.channel import EventChannel
from blaze.engines.llm.model import LoadedModel, load_model
from blaze.engines.llm.prompts import PromptEncoder
from blaze.engines.llm.runner import StaticBatchRunner
from blaze.engines.llm.sampling import sample, uniform
from blaze.engines.llm.sequence import Sequence
from blaze.engines.threaded import ThreadedEngine
from blaze.errors import BlazeError, DeadlineExceeded, EngineFailure, InvalidRequest, ReplicaStopping
from blaze.models.sources import ModelSource
from blaze.types import EngineKind, Failed, Finished, GenerateRequest, Request, Started, Usage

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


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: LoadedModel
    encoder: PromptEncoder


class LLMEngine(ThreadedEngine[_Job, _Loaded]):
    """Static batches: requests that arrive while a batch runs wait for its end."""

    kind = EngineKind.LLM

    def __init__(
        self,
        source: ModelSource,
        options: LLMConfig,
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
        self._held: _Job | None = None  # taken from the queue, but too large for the batch at hand
        # One thread for all encoding: a fast tokenizer is not safe on several.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def _load(self) -> _Loaded:
        model = load_model(self._source, self._options, self._threads, self._cache)
        encoder = PromptEncoder(
            model.tokenizer, vocabulary_size=model.vocabulary_size, max_model_len=model.max_model_len
        )
        return _Loaded(model, encoder)

    async def stop(self) -> None:
        await super().stop()
        self._encoding.shutdown(wait=False)

    async def _admit(self, loaded: _Loaded, request: Request) -> _Job:
        if not isinstance(request, GenerateRequest):
            raise InvalidRequest("This model generates text, not images.", param="model")
        sampling = request.sampling
        if sampling.n > self._options.max_batch_size:
            raise InvalidRequest(
                f"n: at most {self._options.max_batch_size} choices for this model.", param="n"
            )
        deadline = None if request.timeout_s is None else self._clock.now() + request.timeout_s
        loop = asyncio.get_running_loop()
        prompt_ids = await loop.run_in_executor(self._encoding, loaded.encoder.encode, request)
        self._ready()  # it may have stopped in the meantime
        room = loaded.model.max_model_len - len(prompt_ids)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        vocabulary = loaded.model.vocabulary
        sequences = [Sequence(index, prompt_ids, sampling, limit, vocabulary) for index in range(sampling.n)]
        return _Job(prompt_ids, sequences, EventChannel(), deadline)

    # --- The compute thread ------------------------------------------------------------------------

    def _work(self, loaded: _Loaded) -> None:
        try:
            while not self._stopping.is_set():
                jobs = self._next_batch()
                if jobs:
                    self._run_batch(loaded.model, jobs)
        finally:
            if self._held is not None:
                self._waiting.put(self._held)

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
