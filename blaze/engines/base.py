"""What every engine is to the rest of Blaze."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from blaze.reports import EngineStatus
from blaze.types import Events, Request


class HealthCheckable(Protocol):
    async def get_health_status(self) -> EngineStatus:
        """The engine's own account of itself; answers at once, whatever the engine is doing."""
        ...


class Engine(HealthCheckable, Protocol):
    """Takes requests, gives events. All methods are called on one event loop and never block it."""

    async def start(self) -> None:
        """Load the model. Raises :class:`blaze.errors.ModelSourceError` when it cannot be loaded."""
        ...

    def run(self, request: Request) -> AsyncGenerator[Events]:
        """Batches of events that end with exactly one terminal event.

        Never raises for what happens to the request: a failure is a ``Failed`` event. Closing the
        iterator early aborts the request within one engine step.
        """
        ...

    async def stop(self) -> None:
        """End all running requests with ``Failed`` and free the model. The engine is not used again."""
        ...
