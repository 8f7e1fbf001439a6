"""The heart of the LLM engine: steps, one after another, for as long as there is work.

Runs on the compute thread and owns all that it touches. It knows nothing of loading, queues or threads, so
that tests drive it step by step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from blaze.clock import Clock
from blaze.engines.llm.choice import Choice, named
from blaze.engines.llm.greedy import Largest
from blaze.engines.llm.job import Job
from blaze.engines.llm.kv_cache import KVCache
from blaze.engines.llm.runner import Runner, StepResult
from blaze.engines.llm.sampling import SampledToken, sample, token_logprobs
from blaze.engines.llm.scheduler import Scheduler, Step, Work
from blaze.engines.llm.sequence import Sequence
from blaze.errors import BlazeError, EngineFailure, NonFiniteOutput
from blaze.types import ChoiceFinished

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3  # in a row: then it is the engine that is broken, not the requests


class EngineBroken(Exception):
    """Step after step has failed."""


class EngineLoop:
    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        clock: Clock,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        prefill_chunk: int | None = None,
        on_step: Callable[[], None] = lambda: None,
        launching: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_step`` is called after each step, before anybody hears of what came of it; ``launching`` when
        the runner is about to be busy with the next one (see :class:`Runner`)."""
        self._runner = runner
        self._cache = cache
        self._clock = clock
        self._on_step = on_step
        self._launching = launching
        self.scheduler = Scheduler(
            cache,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            prefill_chunk=prefill_chunk,
        )
        self._jobs: dict[Job, None] = {}
        self._owners: dict[Sequence, tuple[Job, Choice]] = {}
        self._failed_steps = 0

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def num_running_jobs(self) -> int:
        """Jobs of which something is in the batch."""
        running = {job for sequence, (job, _) in self._owners.items() if sequence.slot is not None}
        return len(running)

    def settle(self) -> None:
        """On the thread that calls everything else from now on."""
        self._runner.settle()

    def add(self, job: Job) -> None:
        self._jobs[job] = None  # first: whatever goes wrong, somebody has to end it
        complete: list[ChoiceFinished] = []  # what they have from elsewhere is all of it
        for choice in job.choices:
            if choice.finish_reason is not None:
                complete.append(ChoiceFinished(choice.index, choice.finish_reason))
            else:
                self._owners[choice.sequence] = (job, choice)
                self.scheduler.add(choice.sequence)
        if complete:
            job.start()
            job.give(tuple(complete))
        if job.over:
            del self._jobs[job]

    def schedule(self) -> Step:
        """Drop what nobody wants any more, then choose what to compute."""
        now = self._clock.now()
        for job in list(self._jobs):
            job.end_if_unwanted(now)
            if job.over:
                self._remove(job)
        return self.scheduler.schedule()

    def execute(self, step: Step) -> None:
        """Compute the step and pass on what came of it.

        Raises :class:`EngineBroken` after several failed steps in a row; the jobs of a failed step have
        failed by then, the others are still there.
        """
        if not step.work:
            self._launching()  # nothing will be busy, and news must not wait for it
            return
        for work in step.work:
            self._owners[work.sequence][0].start()
        try:
            self._carry_out(step)
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(step.work))
            self._fail(step, EngineFailure(f"The engine failed in this step: {type(error).__name__}."))
            self._failed_steps += 1
            if self._failed_steps >= _MAX_FAILED_STEPS:
                raise EngineBroken(f"{self._failed_steps} steps in a row have failed: {error}") from error
            return
        self._failed_steps = 0

    def end(self, error: BlazeError) -> None:
        """Nothing goes on: every job fails with ``error``."""
        for job in list(self._jobs):
            job.fail(error)
            self._remove(job)

    def _carry_out(self, step: Step) -> None:
        result = self._runner.execute(step, self._launching)
        self._on_step()
        self.scheduler.computed(step)
        drawing = [work.sequence for work in step.work if work.yields_token]
        self._note_prompt_logprobs(result)
        # Part of the step, for a GPU tells of its errors when its numbers are looked at.
        self._draw(drawing, result.next_logits, result.largest)

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor, largest: Largest | None) -> None:
        """Draw for each row of ``logits``, but for those whose jobs have failed in this very step."""
        going = [row for row, sequence in enumerate(sequences) if sequence in self._owners]
        if not going:
            return
        if len(going) < len(sequences):
            sequences = [sequences[row] for row in going]
            logits = logits[torch.tensor(going, device=logits.device)]
            largest = None if largest is None else largest.of(going)
        rows = [self._owners[sequence][1].row() for sequence in sequences]
        for sequence, sampled in zip(sequences, sample(logits, rows, largest), strict=True):
            if sequence not in self._owners:  # another choice of its job has just failed
                continue
            job, choice = self._owners[sequence]
            if isinstance(sampled, NonFiniteOutput):
                self._poisoned(job, sampled)
            else:
                self._append(job, choice, sampled)

    def _poisoned(self, job: Job, error: NonFiniteOutput) -> None:
        """Numbers that are no numbers must not outlive their sequences: any choice may have some."""
        for sequence in _unfinished(job.choices):
            if sequence.slot is not None:
                self._runner.store.clear(sequence.slot)
        self._give_up(job, error, keep=False)

    def _append(self, job: Job, choice: Choice, sampled: SampledToken) -> None:
        """What goes wrong with one request's text is that request's failure, not the step's."""
        try:
            events = choice.append(sampled)
        except Exception as error:
            logger.exception("a request failed in the middle of its batch")
            self._give_up(job, EngineFailure(f"The engine failed on this request: {type(error).__name__}."))
            return
        if choice.finish_reason is None:
            choice.sequence.token_ids.append(sampled.token_id)
            job.give(events)
            return
        # The memory is free before anybody hears that the answer has ended.
        del self._owners[choice.sequence]
        self.scheduler.remove(choice.sequence)
        job.give(events)
        if job.over:
            del self._jobs[job]

    def _note_prompt_logprobs(self, result: StepResult) -> None:
        for work, logits in result.all_logits:
            if work.sequence not in self._owners:  # another choice of its job has just failed
                continue
            job, choice = self._owners[work.sequence]
            try:
                self._note(choice, work, logits)
            except NonFiniteOutput as error:
                self._poisoned(job, error)

    def _note(self, choice: Choice, work: Work, logits: torch.Tensor) -> None:
        """Logits at a position are of the token after it."""
        end = min(work.end + 1, work.sequence.prompt_len)
        targets = work.sequence.token_ids[work.start + 1 : end]
        measured = token_logprobs(
            logits[: len(targets)],
            torch.tensor(targets, device=logits.device, dtype=torch.int64),
            choice.sampling.logprobs or 0,
        )
        for position, token in enumerate(measured, start=work.start + 1):
            choice.prompt_logprobs[position] = named(token, choice.names)

    def _fail(self, step: Step, error: BlazeError) -> None:
        concerned = [self._owners[work.sequence][0] for work in step.work if work.sequence in self._owners]
        for job in dict.fromkeys(concerned):
            self._give_up(job, error, keep=False)
        self._cache.evict_all()  # nobody knows which of the step's copies were made

    def _give_up(self, job: Job, error: BlazeError, *, keep: bool = True) -> None:
        job.fail(error)
        self._remove(job, keep=keep)

    def _remove(self, job: Job, *, keep: bool = True) -> None:
        if job not in self._jobs:
            return
        del self._jobs[job]
        for sequence in _unfinished(job.choices):
            del self._owners[sequence]
            self.scheduler.remove(sequence, keep=keep)


def _unfinished(choices: Iterable[Choice]) -> list[Sequence]:
    return [choice.sequence for choice in choices if choice.finish_reason is None]
