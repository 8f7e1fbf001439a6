"""An engine without a model: it answers at a set pace, for tests, drills and benchmarks.

Words and jitter come from a generator keyed by the configured seed and the request's own, so that the same
request gets the same answer on every replica and in every run. Failures and hangs come from a generator
keyed by the configured seed and the replica's rank: the n-th call to a replica fares the same in every run.
:meth:`SimulatorEngine.set_faults` changes while it runs how it behaves, and never what it answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

from blaze.clock import Clock, SystemClock
from blaze.engine_config import SimulatorConfig
from blaze.engines.faults import Fate, Faults, FaultSwitch, misbehave
from blaze.engines.operations import RunsOperations
from blaze.errors import DeadlineExceeded, EngineFailure, InvalidRequest, OtherVariant, ReplicaStopping
from blaze.reports import EngineStatus
from blaze.types import (
    ChatPrompt,
    ChoiceFinished,
    EngineKind,
    Event,
    Events,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Prompt,
    Request,
    Started,
    TextDelta,
    TextPrompt,
    Usage,
)

_WORDS = ("blaze", "keeps", "every", "stream", "alive", "while", "replicas", "come", "and", "go")


class SimulatorEngine(RunsOperations):
    kind = EngineKind.SIMULATOR

    def __init__(self, options: SimulatorConfig, *, rank: int = 0, clock: Clock | None = None) -> None:
        self._options = options
        self._slowdown = options.slowdown.get(rank, 1.0)
        self._fail_rate = options.fail_rate.get(rank, 0.0)
        self._hang = options.hang.get(rank, 0.0)
        self._variant = f"simulator/{options.seed}/{options.tokens}/{options.jitter}"
        self._fail_for_s = options.fail_for_s.get(rank, 0.0)
        self._first_request_at: float | None = None
        # Per replica and call, not per request: a retry elsewhere is a new draw.
        self._faults = random.Random(f"{options.seed}/{rank}")
        self._switch = FaultSwitch(random.Random(f"{options.seed}/{rank}/switch"))
        self._clock = clock or SystemClock()
        self._slots = asyncio.Semaphore(options.slots)
        self._running = 0
        self._queued = 0
        self._steps = 0
        self._last_step_at: float | None = None
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """There is nothing to load. Raises :class:`EngineFailure` when it is told to."""
        if self._options.fail_load:
            raise EngineFailure("The simulator was told to fail to load.")

    async def stop(self) -> None:
        self._stopping.set()
        self._switch.release()

    def set_faults(self, faults: Faults) -> None:
        """From now on; what runs is slowed down and wedged, too."""
        self._switch.set(faults)

    async def get_health_status(self) -> EngineStatus:
        last = self._last_step_at
        return EngineStatus(
            kind=self.kind,
            state="busy" if self._running else "idle",
            running=self._running,
            queued=self._queued,
            steps_done=self._steps,
            last_step_age_s=None if last is None else self._clock.now() - last,
        )

    async def run(self, request: Request) -> AsyncGenerator[Events]:
        deadline = (
            None if request.timeout_s is None else asyncio.get_running_loop().time() + request.timeout_s
        )
        try:
            async with aclosing(self._answer(request, deadline)) as answer:
                async for events in answer:
                    yield events
        except TimeoutError:
            yield (Failed(DeadlineExceeded("The deadline passed before the answer was complete.").info),)
        except (InvalidRequest, EngineFailure, OtherVariant, ReplicaStopping) as error:
            yield (Failed(error.info),)

    async def _answer(self, request: Request, deadline: float | None) -> AsyncGenerator[Events]:
        if not isinstance(request, GenerateRequest):
            raise InvalidRequest("This model generates text, not images.", param="model")
        if request.variant not in ("", self._variant):
            raise OtherVariant("The answer was begun by a simulator with other settings.")
        rng = self._rng(request)
        self._queued += 1
        try:
            if self._slots.locked():
                async with asyncio.timeout_at(deadline):
                    await self._slots.acquire()
            else:
                await self._slots.acquire()  # does not wait
        finally:
            self._queued -= 1
        self._running += 1
        try:
            await self._misbehave(deadline)
            fate = self._switch.draw()
            if garbage := misbehave(fate):
                yield garbage
                return
            async for events in self._tokens(request, rng, deadline, fate):
                yield events
        finally:
            self._running -= 1
            self._slots.release()

    async def _misbehave(self, deadline: float | None) -> None:
        """As it was configured to."""
        await self._while_wedged(deadline)
        # Both are drawn whatever the rates are: changing a rate does not change the answers of the others.
        fails, hangs = self._faults.random() < self._fail_rate, self._faults.random() < self._hang
        if self._first_request_at is None:
            self._first_request_at = self._clock.now()
        if fails or self._clock.now() < self._first_request_at + self._fail_for_s:
            raise EngineFailure("The simulator was told to fail this request.")
        if hangs:
            async with asyncio.timeout_at(deadline):
                await self._stopping.wait()
            raise ReplicaStopping("The replica is shutting down.")

    async def _tokens(
        self, request: GenerateRequest, rng: random.Random, deadline: float | None, fate: Fate
    ) -> AsyncGenerator[Events]:
        """Pending events leave before every wait; without waits the whole answer is one batch."""
        sampling = request.sampling
        count, reason = self._end(sampling.max_tokens)
        prompt_ids = _prompt_ids(request.prompt)
        pending: list[Event] = [Started(prompt_ids, self._variant)]
        wait_ms, due_at = self._options.ttft_ms, asyncio.get_running_loop().time()
        done = min(map(len, request.generated), default=0)
        breaks_at = fate.breaks_at(done, count)
        for position in range(count):
            if position == breaks_at:
                yield tuple(pending)
                raise EngineFailure("The simulator was told to break this answer.")
            # Drawn whether there is a wait or not: the words are the same at any pace, wherever it goes on.
            stretch = self._stretch(rng)
            if position >= done and wait_ms > 0:
                if len(pending) > (position == 0):  # Started waits for the first token
                    yield tuple(pending)
                    pending = []
                due_at = await self._pause(due_at, wait_ms * stretch, deadline)
                self._switch.check_running(fate)
            for index in range(sampling.n):
                token = rng.randrange(len(_WORDS))
                if not request.generated or position >= len(request.generated[index]):
                    pending.append(TextDelta(index, _WORDS[token] + " ", (token,)))
            if position >= done:
                self._step()
                wait_ms = self._options.inter_token_ms
        pending.extend(ChoiceFinished(index, reason) for index in range(sampling.n))
        pending.append(Finished(Usage(prompt_tokens=len(prompt_ids), completion_tokens=count * sampling.n)))
        yield tuple(pending)

    def _end(self, max_tokens: int | None) -> tuple[int, FinishReason]:
        """How many tokens there will be, and why there are no more."""
        if max_tokens is None or max_tokens > self._options.tokens:
            return self._options.tokens, "stop"
        return max_tokens, "length"

    async def _pause(self, since: float, milliseconds: float, deadline: float | None) -> float:
        """Returns when it was to end: the next one counts from there.

        So late timers do not add up, and slots do what their pace says; who is behind by a whole pause, as
        after a hang, does not hurry.
        """
        loop = asyncio.get_running_loop()
        due_at = since + milliseconds / 1000.0 * self._slowdown * self._switch.slowdown
        async with asyncio.timeout_at(deadline):
            await asyncio.sleep(due_at - loop.time())
        await self._while_wedged(deadline)
        return due_at if loop.time() - due_at < due_at - since else loop.time()

    async def _while_wedged(self, deadline: float | None) -> None:
        await self._switch.while_wedged(deadline)
        if self._stopping.is_set():
            raise ReplicaStopping("The replica is shutting down.")

    def _stretch(self, rng: random.Random) -> float:
        return 1.0 + rng.uniform(-self._options.jitter, self._options.jitter)

    def _step(self) -> None:
        self._steps += 1
        self._last_step_at = self._clock.now()

    def _rng(self, request: GenerateRequest) -> random.Random:
        key = f"{self._options.seed}/{request.sampling.seed}/{request.prompt!r}"
        return random.Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))


def _prompt_ids(prompt: Prompt) -> tuple[int, ...]:
    """Four bytes of text count as one token."""
    if isinstance(prompt, ChatPrompt):
        size = sum(len((message.content or "").encode()) for message in prompt.messages)
    elif isinstance(prompt, TextPrompt):
        size = len(prompt.text.encode())
    else:
        return prompt.token_ids
    return tuple(range(max(1, size // 4)))
