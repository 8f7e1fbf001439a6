"""Answers that are charged: what each has used, once, however it ends.

An answer that ends is charged its usage; one that breaks or is given up, its prompt and the output until
then. An error instead of an answer costs nothing. A client that leaves before an answer has begun has had
an engine at work all the same, and pays for the prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from blaze.api.meter import Meter
from blaze.api.service import AnswerStream, Opener
from blaze.errors import ErrorInfo
from blaze.types import Events, Failed, Finished, ReplicaId, Request


class ChargedAnswers:
    """Opens the answers to one HTTP request: one for each prompt, so that each is charged for itself."""

    def __init__(self, opener: Opener, charge: Callable[[int], None]) -> None:
        """``charge`` is told the tokens of an answer, once at the most."""
        self._opener = opener
        self._charge = charge
        self._given_up: list[Request] = []

    async def open(self, request: Request) -> AnswerStream:
        try:
            stream = await self._opener.open(request)
        except asyncio.CancelledError:
            # By the client, or because another prompt of the same request was refused: not known here.
            self._given_up.append(request)
            raise
        return stream if stream.error is not None else _ChargedStream(stream, Meter.of(request), self._charge)

    def charge_given_up(self) -> None:
        """The client has left: what it asked for and what had not begun is charged too.

        Whether such a prompt had reached a replica or still waited for one is not known either.
        """
        for request in self._given_up:
            self._charge(Meter.of(request).tokens)
        self._given_up.clear()


class _ChargedStream:
    """An answer that has begun."""

    def __init__(self, stream: AnswerStream, meter: Meter, charge: Callable[[int], None]) -> None:
        self._stream = stream
        self._batches = aiter(stream)
        self._meter = meter
        self._charge = charge
        self._charged = False

    @property
    def replica_id(self) -> ReplicaId | None:
        return self._stream.replica_id

    @property
    def error(self) -> ErrorInfo | None:
        return self._stream.error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        events = await anext(self._batches)
        self._meter.count(events)
        if isinstance(events[-1], Finished | Failed):
            self._settle()
        return events

    async def aclose(self) -> None:
        self._settle()
        await self._stream.aclose()

    def _settle(self) -> None:
        if not self._charged:
            self._charged = True
            self._charge(self._meter.tokens)
