"""What the HTTP layer needs from whatever serves the requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from blaze.routing.dispatcher import RoutedStream
from blaze.types import EngineKind, Request


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    engine: EngineKind
    created: int  # seconds since the epoch: when this Router took the model up


@dataclass(frozen=True, slots=True)
class Readiness:
    """``missing``: models that have no ready replica and may not scale to zero."""

    missing: tuple[str, ...]

    @property
    def ready(self) -> bool:
        return not self.missing


class Service(Protocol):
    def models(self) -> Sequence[ModelCard]: ...

    def readiness(self) -> Readiness: ...

    async def open(self, request: Request) -> RoutedStream:
        """Raises :class:`blaze.errors.ModelNotFound` and :class:`blaze.errors.Overloaded`."""
        ...

    async def status(self) -> dict[str, Any]:
        """The cluster as JSON, the same whichever Router answers."""
        ...

    async def metrics(self) -> bytes:
        """The cluster's sums in Prometheus' text format."""
        ...
