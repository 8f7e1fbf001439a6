"""One request's answer on its way through the router, whichever replicas it comes from."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from blaze.errors import ErrorInfo
from blaze.routing.attempt import Attempt
from blaze.routing.route import Route
from blaze.routing.transcript import Transcript
from blaze.types import Events, Failed, Finished, ReplicaId, Request


class Onward(Protocol):
    """How an answer goes on, on another replica."""

    async def resume(
        self, route: Route, rest: Request, broken: Attempt, error: ErrorInfo, *, advanced: int
    ) -> Attempt | ErrorInfo:
        """The attempt before has broken with ``error``: another one, or why there is none.

        ``advanced``: how much that attempt has added to the answer, in tokens or steps.
        """
        ...

    async def move(self, route: Route, rest: Request) -> Attempt | None:
        """To the place that was found for it, if it can begin there; None: it stays where it is."""
        ...

    def closed(self, route: Route) -> None:
        """It is over, or nobody reads it any more. Called once."""
        ...


class RoutedStream:
    """Batches of events that end with exactly one terminal event.

    An attempt that breaks in the middle is gone on with on another replica: the reader sees one answer, in
    which nothing is missing and nothing comes twice.
    """

    def __init__(
        self, route: Route, attempt: Attempt | ErrorInfo, transcript: Transcript, onward: Onward
    ) -> None:
        # The first to answer; of an error, the last that was tried.
        self.replica_id: ReplicaId = route.tried_last
        self.error = attempt if isinstance(attempt, ErrorInfo) else None  # when that is all of the answer
        self._route = route
        self._attempt = None if isinstance(attempt, ErrorInfo) else attempt
        self._transcript = transcript
        self._had = transcript.amounts  # when the attempt began
        self._onward = onward
        self._broken = self.error  # what is to be got past, or told
        self._told = False
        self._open = True
        if self.error is not None:  # there is nothing to read, nor to close
            self._close()

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
            if self._route.ahead is not None:
                await self._move(self._attempt)
            events = await anext(self._attempt)
            last = events[-1]
            if isinstance(last, Failed):
                self._broken = last.error
                events = events[:-1]
            events = self._transcript.take(events)
            self._told = isinstance(last, Finished)
            if events:
                return events

    async def _move(self, attempt: Attempt) -> None:
        """It waits here unread until it has begun elsewhere: what cannot is read on."""
        rest = self._transcript.rest()
        if isinstance(rest, Finished):
            return
        found = await self._onward.move(self._route, rest)
        if found is not None:
            self._take_over(found)
            await attempt.aclose()

    def _take_over(self, attempt: Attempt) -> None:
        self._attempt, self._broken = attempt, None
        self._had = self._transcript.amounts

    async def _go_on(self, error: ErrorInfo) -> Events | None:
        """None: somebody has taken over. Else this is how the answer ends."""
        if self._attempt is not None and error.retryable:
            rest = self._transcript.rest()
            if isinstance(rest, Finished):
                self._told = True
                return (rest,)
            advanced = max(
                now - before for now, before in zip(self._transcript.amounts, self._had, strict=True)
            )
            found = await self._onward.resume(self._route, rest, self._attempt, error, advanced=advanced)
            if isinstance(found, Attempt):
                self._take_over(found)
                return None
            error = found
        self._told = True
        return (Failed(error),)

    async def aclose(self) -> None:
        """Give everything back. An answer that was not read to its end counts as cancelled: neutral."""
        self._close()
        if self._attempt is not None:
            await self._attempt.aclose()

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._onward.closed(self._route)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
