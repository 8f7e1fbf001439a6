"""The answers to several prompts as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Self

from blaze.api.service import Opener
from blaze.errors import ErrorInfo
from blaze.types import (
    ChoiceFinished,
    Event,
    Events,
    Failed,
    Finished,
    GenerateRequest,
    ReplicaId,
    TextDelta,
    Usage,
)


class MergedStream:
    """One answer: the choices of all prompts numbered on, usage summed, exactly one terminal event.

    Every answer is read as soon as it begins, also while others still wait for a replica: a full replica
    takes the next prompt up only when one of the answers that it gives has been read to its end. Once all
    have begun, nobody reads ahead of the client.
    """

    def __init__(self, num_answers: int) -> None:
        self.replica_id: ReplicaId | None = None  # the first to answer; with an error, the one that failed
        self.error: ErrorInfo | None = None  # when the answer is nothing but an error
        self._readers: list[asyncio.Task[None]] = []
        self._num_waiting = num_answers  # answers that have not begun
        self._num_unfinished = num_answers
        self._usage = Usage()
        self._pending: list[Event] = []
        self._ended = False  # the terminal event is pending, or given out
        self._raised: Exception | None = None
        self._news = asyncio.Event()
        self._taken = asyncio.Event()

    @classmethod
    async def open(cls, opener: Opener, requests: Sequence[GenerateRequest]) -> Self:
        """Send all requests and wait for the first content of every answer.

        An error before that is the stream's only event, and the other answers are given up. Raises what
        ``opener.open`` raises. The caller owns the stream and must close it.
        """
        merged = cls(len(requests))
        first_index = 0
        for request in requests:
            merged._readers.append(asyncio.create_task(merged._read(opener, request, first_index)))
            first_index += request.sampling.n
        try:
            while merged._num_waiting and not merged._ended:
                await merged._hear()
        except BaseException:
            await merged.aclose()
            raise
        if merged.error is not None:
            await merged.aclose()
        return merged

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        while not self._pending:
            if self._ended:
                raise StopAsyncIteration
            await self._hear()
        events = tuple(self._pending)
        self._pending.clear()
        self._taken.set()
        return events

    async def aclose(self) -> None:
        """Give everything back. Answers that were not read to their end are cancelled."""
        self._stop_reading()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _hear(self) -> None:
        """Wait until a reader has something to say."""
        await self._news.wait()
        self._news.clear()
        if self._raised is not None:
            raise self._raised

    # --- One task per answer ------------------------------------------------------------------------

    async def _read(self, opener: Opener, request: GenerateRequest, first_index: int) -> None:
        try:
            async with aclosing(await opener.open(request)) as stream:
                self.replica_id = self.replica_id or stream.replica_id
                self._num_waiting -= stream.error is None
                async for events in stream:
                    last = events[-1]
                    if isinstance(last, Failed) and self._num_waiting:
                        self._fail(last, stream.replica_id)
                    else:
                        self._add(self._renumbered(events, first_index))
                    if not self._num_waiting:
                        await self._taken.wait()
        except Exception as error:
            self._raised = error
            self._news.set()

    def _fail(self, failed: Failed, replica_id: ReplicaId | None) -> None:
        """Nothing of the answer has left yet: all of it is this error."""
        self.error = failed.error
        self.replica_id = replica_id
        self._pending.clear()
        self._add((failed,))

    def _add(self, events: Iterable[Event]) -> None:
        self._pending.extend(events)
        if not self._pending:
            return
        self._taken.clear()
        self._news.set()
        if isinstance(self._pending[-1], Finished | Failed):
            self._ended = True
            self._stop_reading()

    def _stop_reading(self) -> None:
        for reader in self._readers:
            reader.cancel()

    def _renumbered(self, events: Events, first_index: int) -> Iterator[Event]:
        """The events of one answer as events of the whole."""
        for event in events:
            if isinstance(event, TextDelta):
                index = first_index + event.index
                yield TextDelta(index, event.text, event.token_ids, event.logprobs, event.echo)
            elif isinstance(event, ChoiceFinished):
                yield ChoiceFinished(first_index + event.index, event.reason)
            elif isinstance(event, Failed):
                yield event
            elif isinstance(event, Finished):
                self._usage = _sum(self._usage, event.usage)
                self._num_unfinished -= 1
                if not self._num_unfinished:
                    yield Finished(self._usage)


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
    )
