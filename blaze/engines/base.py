"""What every engine is to the rest of Blaze."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from blaze.reports import EngineStatus
from blaze.results import Result
from blaze.types import EngineKind, Events, Request


class HealthCheckable(Protocol):
    async def get_health_status(self) -> EngineStatus:
        """The engine's own account of itself; answers at once, whatever the engine is doing."""
        ...


class Executable(Protocol):
    @property
    def operations(self) -> tuple[str, ...]:
        """What ``execute`` can do."""
        ...

    async def execute(self, operation: str, params: Mapping[str, object]) -> Result:
        """One operation by name, to its end; of a batch, each answer or what kept it away.

        A request without a seed is not given one: drawing seeds is the dispatcher's part. Cancelling
        aborts the work. Raises :class:`blaze.errors.InvalidRequest` naming the parameter that is wrong
        (``operation`` itself, for an unknown one), and what kept a single request from its answer.
        """
        ...


class Engine(HealthCheckable, Executable, Protocol):
    """Takes requests, gives events. All methods are called on one event loop and never block it."""

    @property
    def kind(self) -> EngineKind: ...

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
