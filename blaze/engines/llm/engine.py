"""The LLM engine: requests are checked as they come, and join the running batch at its next step."""

from __future__ import annotations

import asyncio
import logging
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from blaze.clock import Clock
from blaze.engine_config import LLMConfig
from blaze.engines.channel import Bell, EventChannel
from blaze.engines.llm.choice import Choice
from blaze.engines.llm.held_prompts import HeldPrompts
from blaze.engines.llm.job import Job
from blaze.engines.llm.loading import ServedModel, load
from blaze.engines.llm.loop import EngineLoop
from blaze.engines.llm.prompts import PromptEncoder
from blaze.engines.llm.scheduler import rank
from blaze.engines.llm.sequence import Sequence
from blaze.engines.threaded import ThreadedEngine
from blaze.errors import BlazeError, EngineFailure, InvalidRequest, OtherVariant, ReplicaStopping
from blaze.models.cache import identity
from blaze.models.sources import ModelSource
from blaze.prompt_chain import prompt_chain
from blaze.reports import EngineStatus, KVCacheStatus
from blaze.types import EngineKind, GenerateRequest, Request, TokenId

logger = logging.getLogger(__name__)

_AGING_S = 10.0  # of waiting, worth as much as one level of priority


@dataclass(frozen=True, slots=True)
class _Loaded:
    served: ServedModel
    encoder: PromptEncoder
    loop: EngineLoop
    variant: str


class LLMEngine(ThreadedEngine[Job, _Loaded]):
    """Continuous batching: see :mod:`blaze.engines.llm.loop`."""

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
        self._serial = count()
        self._bell = Bell()
        self._held_prompts = HeldPrompts()
        # One thread for all encoding: a fast tokenizer is not safe on several.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def _load(self) -> _Loaded:
        served = load(self._source, self._options, self._threads, self._cache)
        model = served.model
        encoder = PromptEncoder(
            model.tokenizer, vocabulary_size=model.vocabulary_size, max_model_len=model.max_model_len
        )
        loop = EngineLoop(
            served.runner,
            served.cache,
            self._clock,
            max_batch_size=self._options.max_batch_size,
            max_batch_tokens=self._options.max_batch_tokens,
            prefill_chunk=self._options.prefill_chunk_on(model.model.device.type),
            on_step=self._progress.step,
            launching=self._bell.ring,
        )
        parts = (
            identity(self._source, self._cache, commit=model.commit),
            str(model.model.dtype),
            self._options.quantization,
            served.runner.name,
        )
        return _Loaded(served, encoder, loop, "/".join(parts))

    async def stop(self) -> None:
        await super().stop()
        self._encoding.shutdown(wait=False)

    async def get_health_status(self) -> EngineStatus:
        status = await super().get_health_status()
        if self._loaded is None:
            return status
        cache, scheduler = self._loaded.served.cache, self._loaded.loop.scheduler
        return replace(
            status,
            prefixes=self._held_prompts.digest(cache.held),
            kv_cache=KVCacheStatus(
                total_tokens=cache.total_tokens,
                free_tokens=cache.free_tokens,
                kept_tokens=cache.kept_tokens,
                prefix_queries=cache.counters.queries,
                prefix_hits=cache.counters.hits,
                preemptions=scheduler.preemptions,
            ),
        )

    async def _admit(self, loaded: _Loaded, request: Request) -> Job:
        if not isinstance(request, GenerateRequest):
            raise InvalidRequest("This model generates text, not images.", param="model")
        if request.variant not in ("", loaded.variant):
            raise OtherVariant("The answer was begun by an engine with other weights or other numbers.")
        sampling = request.sampling
        if sampling.n > self._options.max_batch_size:
            raise InvalidRequest(
                f"n: at most {self._options.max_batch_size} choices for this model.", param="n"
            )
        arrival = self._clock.now()
        prompt_ids = await asyncio.get_running_loop().run_in_executor(
            self._encoding, loaded.encoder.encode, request
        )
        self._ready()  # it may have stopped in the meantime
        if self._options.prefix_caching:
            self._held_prompts.note(prompt_chain(request.prompt), prompt_ids)
        deadline = None if request.timeout_s is None else arrival + request.timeout_s
        choices = self._choices(loaded, request, prompt_ids, arrival)
        return Job(prompt_ids, choices, EventChannel(self._bell), deadline, loaded.variant)

    def _choices(
        self, loaded: _Loaded, request: GenerateRequest, prompt_ids: tuple[TokenId, ...], arrival: float
    ) -> tuple[Choice, ...]:
        model, sampling = loaded.served.model, request.sampling
        room = model.max_model_len - len(prompt_ids)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        serial = next(self._serial)
        choices: list[Choice] = []
        for index in range(sampling.n):
            sequence = Sequence(
                prompt_ids,
                rank(arrival, request.priority, serial, index, aging_s=_AGING_S),
                generated=request.generated[index] if request.generated else (),
                leader=choices[0].sequence if choices else None,
                needs_all_logits=sampling.echo and sampling.logprobs is not None,
            )
            choices.append(Choice(index, sequence, sampling, limit, model.vocabulary))
        return tuple(choices)

    # --- The compute thread ------------------------------------------------------------------------

    def _work(self, loaded: _Loaded) -> None:
        """News of a step is announced while the next one is computed: an event loop that woke up earlier
        would take the interpreter away from its preparation."""
        with self._bell.held():
            self._serve_jobs(loaded.loop)

    def _serve_jobs(self, loop: EngineLoop) -> None:
        loop.settle()
        end: BlazeError = ReplicaStopping("The replica is shutting down.")
        try:
            while not self._stopping.is_set():
                self._take_new(loop)
                step = loop.schedule()
                self._progress.set_running(loop.num_running_jobs)
                loop.execute(step)
                self._progress.set_running(loop.num_running_jobs)
        except Exception:
            logger.exception("the engine gives up")  # its status says failed from here on
            end = EngineFailure("The engine has failed.")
        finally:
            loop.end(end)

    def _take_new(self, loop: EngineLoop) -> None:
        """All that wait; when there is nothing else to do, wait for one."""
        idle = loop.num_jobs == 0
        if idle:
            self._bell.ring()
        try:
            job = self._waiting.get(block=idle)
            while job is not None:
                loop.add(job)
                job = self._waiting.get_nowait()
        except queue.Empty:
            pass
