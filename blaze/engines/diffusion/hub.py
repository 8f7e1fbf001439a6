"""Pipeline calls on one thread, each in a greenlet: where one needs the denoiser, the others go on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from greenlet import getcurrent, greenlet
from torch import nn

from blaze.engines.diffusion.adapters import Adapters
from blaze.engines.diffusion.merger import Denoiser, DenoiserCall, Merger, Result
from blaze.engines.diffusion.narrowing import Narrower
from blaze.errors import BlazeError


class PipelineCall(Protocol):
    """Something that calls a pipeline whose denoiser is a :meth:`Hub.stand_in`."""

    @property
    def images(self) -> int:
        """How many are drawn."""
        ...

    @property
    def wanted(self) -> Sequence[int]:
        """Which of the images somebody waits for, in order."""
        ...

    @property
    def adapters(self) -> Adapters: ...

    def run(self) -> None:
        """The call, from its beginning to its end. Raises nothing."""
        ...

    def unwanted(self) -> BlazeError | None:
        """Why nobody wants it any more."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    owner: PipelineCall
    greenlet: greenlet
    call: DenoiserCall


class Hub:
    """Runs pipeline calls up to their next denoiser call, and the denoiser for many of them at once.

    Everything happens on the thread that made it. A stock pipeline needs to know nothing of it: a stand-in
    for its denoiser hands the arguments over and lets the thread go on with something else.
    """

    def __init__(self, merger: Merger) -> None:
        self._merger = merger
        self._narrower = Narrower(merger.run)
        self._greenlet = getcurrent()
        self._waiting: deque[_Waiting] = deque()  # the longest first
        self._running: PipelineCall | None = None

    @property
    def num_waiting(self) -> int:
        """Calls that have begun and have not ended."""
        return len(self._waiting)

    def stand_in(self, denoiser: Denoiser) -> nn.Module:
        """A shallow copy of the denoiser: the same weights, but its ``forward`` waits for its turn here."""

        def forward(*args: object, **kwargs: object) -> object:
            return self._submit(denoiser, args, kwargs)

        module = copy.copy(denoiser.module)
        module.forward = forward
        module._compiled_call_impl = None  # which would call the denoiser itself
        return module

    def start(self, call: PipelineCall) -> None:
        """Run the call up to its first denoiser call."""
        with self._as_running(call):
            greenlet(call.run, parent=self._greenlet).switch()

    def step(self) -> None:
        """One forward for the call that waits longest and all that go with it, and on to their next ones.

        Calls that nobody wants any more end first, and images that nobody wants are left out.
        """
        self._end_unwanted()
        if not self._waiting:
            return
        calls = [self._narrower.narrow(waiting.call, waiting.owner.wanted) for waiting in self._waiting]
        chosen = set(self._merger.choose([narrow.call for narrow in calls]))
        batch = [(w, calls[index]) for index, w in enumerate(self._waiting) if index in chosen]
        self._waiting = deque(w for index, w in enumerate(self._waiting) if index not in chosen)
        results = self._merger.run([narrow.call for _waiting, narrow in batch])
        for (waiting, narrow), result in zip(batch, results, strict=True):
            self._go_on(waiting, narrow.widen(result))

    def end(self, error: BlazeError) -> None:
        """End every call with this error."""
        while self._waiting:
            self._go_on(self._waiting.popleft(), Result(error=error))

    def _end_unwanted(self) -> None:
        for waiting in tuple(self._waiting):
            if (error := waiting.owner.unwanted()) is not None:
                self._waiting.remove(waiting)
                self._go_on(waiting, Result(error=error))

    def _go_on(self, waiting: _Waiting, result: Result) -> None:
        """Let a call go on until it waits again, or ends."""
        with self._as_running(waiting.owner):
            if result.error is None:
                waiting.greenlet.switch(result.output)
            else:
                waiting.greenlet.throw(result.error)

    @contextmanager
    def _as_running(self, call: PipelineCall) -> Iterator[None]:
        self._running = call
        try:
            yield
        finally:
            self._running = None

    def _submit(self, denoiser: Denoiser, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """In the greenlet of a pipeline: wait for the result of a denoiser call."""
        owner = self._running
        assert owner is not None, "the stand-in was called outside of its hub"
        call = denoiser.call(args, kwargs, images=owner.images, adapters=owner.adapters)
        self._waiting.append(_Waiting(owner, getcurrent(), call))
        return self._greenlet.switch()
