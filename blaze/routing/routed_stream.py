"""One request's answer on its way through the router, whichever replicas it comes from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeAlias

from blaze.errors import ErrorInfo
from blaze.routing.attempt import Attempt
from blaze.routing.transcript import Transcript
from blaze.types import Events, Failed, Finished, ReplicaId, Request

Resume: TypeAlias = Callable[[Request, ErrorInfo], Awaitable["Attempt | ErrorInfo"]]


class RoutedStream:
    """Batches of events that end with exactly one terminal event.

    An attempt that breaks in the middle is gone on with on another replica: the reader sees one answer, in
    which nothing is missing and nothing comes twice.
    """

    def __init__(
        self, replica_id: ReplicaId, attempt: Attempt | ErrorInfo, transcript: Transcript, resume: Resume
    ) -> None:
        self.replica_id = replica_id  # the first to answer; of an error, the last that was tried
        self.error = attempt if isinstance(attempt, ErrorInfo) else None  # when that is all of the answer
        self._attempt = None if isinstance(attempt, ErrorInfo) else attempt
        self._transcript = transcript
        self._resume = resume
        self._broken = self.error  # what is to be got past, or told
        self._told = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        while True:
            if self._told:
                raise StopAsyncIteration
            if self._broken is not None or self._attempt is None:
                assert self._broken is not None
                end = await self._go_on(self._broken)
                if end is not None:
                    return end
                continue
            events = await anext(self._attempt)
            last = events[-1]
            if isinstance(last, Failed):
                self._broken = last.error
                events = events[:-1]
            events = self._transcript.take(events)
            self._told = isinstance(last, Finished)
            if events:
                return events

    async def _go_on(self, error: ErrorInfo) -> Events | None:
        """None: somebody has taken over. Else this is how the answer ends."""
        if self.error is None and error.retryable:
            rest = self._transcript.rest()
            if isinstance(rest, Finished):
                self._told = True
                return (rest,)
            found = await self._resume(rest, error)
            if isinstance(found, Attempt):
                self._attempt, self._broken = found, None
                return None
            error = found
        self._told = True
        return (Failed(error),)

    async def aclose(self) -> None:
        """Give everything back. An answer that was not read to its end counts as cancelled: neutral."""
        if self._attempt is not None:
            await self._attempt.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
