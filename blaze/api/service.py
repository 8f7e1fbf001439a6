"""What the HTTP layer needs from whatever serves the requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blaze.control import Change
from blaze.errors import ErrorInfo
from blaze.routing.routed_stream import RoutedStream
from blaze.types import EngineKind, Events, ReplicaId, Request


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    engine: EngineKind
    created: int  # seconds since the epoch: when this Router took the model up


@dataclass(frozen=True, slots=True)
class Readiness:
    """``missing``: models that have no ready replica and may not scale to zero. ``draining``: nothing new is
    begun. ``reasons``: (model, why it is missing), as far as that is known."""

    missing: tuple[str, ...]
    draining: bool = False
    reasons: tuple[tuple[str, str], ...] = ()

    @property
    def ready(self) -> bool:
        return not (self.missing or self.draining)


class AnswerStream(Protocol):
    """The answer to one HTTP request: batches of events that end with exactly one terminal event."""

    @property
    def replica_id(self) -> ReplicaId | None:
        """The replica that answered first."""
        ...

    @property
    def error(self) -> ErrorInfo | None:
        """Set when the answer is nothing but an error."""
        ...

    def __aiter__(self) -> AsyncIterator[Events]: ...

    async def aclose(self) -> None: ...


class Opener(Protocol):
    """What requests are answered by: a :class:`Service`, or something around it."""

    async def open(self, request: Request) -> AnswerStream:
        """As :meth:`Service.open`."""
        ...


class Service(Protocol):
    def models(self) -> Sequence[ModelCard]: ...

    def readiness(self) -> Readiness: ...

    async def open(self, request: Request) -> RoutedStream:
        """Raises :class:`blaze.errors.ModelNotFound`, :class:`blaze.errors.Overloaded` and
        :class:`blaze.errors.Draining`."""
        ...

    async def status(self) -> dict[str, Any]:
        """The cluster as JSON, the same whichever Router answers."""
        ...

    async def change(self, change: Change) -> None:
        """Here at once, everywhere within a second. Raises :class:`blaze.errors.NotFound` for a model,
        replica or node that there is not, and :class:`blaze.errors.InvalidRequest`."""
        ...

    async def metrics(self) -> bytes:
        """The cluster's sums in Prometheus' text format."""
        ...
