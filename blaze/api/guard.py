"""The door of the HTTP API: who may come in, how often, and what their answers are charged."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request as HTTPRequest

from blaze.api.keys import KeyHolder, KeyRing
from blaze.api.limits import RateLimits
from blaze.api.service import AnswerStream
from blaze.errors import ErrorInfo
from blaze.types import Event, Events, Finished, ReplicaId, Started, TextDelta


class Guard:
    def __init__(self, keys: KeyRing, limits: RateLimits) -> None:
        self._keys = keys
        self._limits = limits

    def admit(self, http: HTTPRequest) -> KeyHolder:
        """A request for an answer. Raises :class:`Unauthorized` and :class:`RateLimited`."""
        holder = self._keys.authorize(http.headers.get("authorization"))
        self._limits.admit(holder)
        return holder

    def look(self, http: HTTPRequest) -> None:
        """A question that costs nothing, such as the list of models."""
        self._keys.authorize(http.headers.get("authorization"))

    def admit_operator(self, http: HTTPRequest) -> None:
        """Raises :class:`Unauthorized` and :class:`Forbidden`."""
        self._keys.authorize(http.headers.get("authorization"), admin=True)

    def charged(self, holder: KeyHolder, stream: AnswerStream) -> AnswerStream:
        """The same answer; what it uses is put down to the key."""
        if holder.limits.tokens_per_minute is None:
            return stream
        return _ChargedStream(stream, holder, self._limits)


class _ChargedStream:
    """Who leaves in the middle pays for what came until then."""

    def __init__(self, stream: AnswerStream, holder: KeyHolder, limits: RateLimits) -> None:
        self._stream = stream
        self._holder = holder
        self._limits = limits
        self._tokens = 0
        self._charged = False

    @property
    def replica_id(self) -> ReplicaId | None:
        return self._stream.replica_id

    @property
    def error(self) -> ErrorInfo | None:
        return self._stream.error

    async def __aiter__(self) -> AsyncIterator[Events]:
        async for events in self._stream:
            for event in events:
                self._count(event)
            yield events

    async def aclose(self) -> None:
        self._charge()
        await self._stream.aclose()

    def _count(self, event: Event) -> None:
        if isinstance(event, Started):
            self._tokens += len(event.prompt_token_ids)
        elif isinstance(event, TextDelta) and not event.echo:
            self._tokens += len(event.token_ids)
        elif isinstance(event, Finished):
            self._tokens = event.usage.prompt_tokens + event.usage.completion_tokens
            self._charge()

    def _charge(self) -> None:
        if not self._charged:
            self._charged = True
            self._limits.charge(self._holder, self._tokens)
