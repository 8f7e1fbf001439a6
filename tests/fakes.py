"""Fakes that stand in for the real thing in unit tests; contract tests hold them to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blaze.errors import BlazeError, ReplicaLost
from blaze.routing.replicas import ReplicaInfo
from blaze.types import (
    ChoiceFinished,
    Event,
    Events,
    Finished,
    ReplicaId,
    Request,
    Started,
    TextDelta,
    Usage,
)


class FakeClock:
    """Time that moves when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True)
class FakeView:
    id: str
    in_flight: int = 0
    weight: float = 1.0


def answer(text: str = "ok") -> list[Events | BlazeError]:
    """A complete answer of one token."""
    events: tuple[Event, ...] = (
        Started((1, 2, 3)),
        TextDelta(0, text, (7,)),
        ChoiceFinished(0, "stop"),
        Finished(Usage(prompt_tokens=3, completion_tokens=1)),
    )
    return [events]


class FakeCall:
    """Plays a script: batches are given out, errors raised; a held call waits for ``release``."""

    def __init__(self, script: Sequence[Events | BlazeError], *, held: bool = False) -> None:
        self._script = list(script)
        self._go = asyncio.Event()
        if not held:
            self._go.set()
        self.cancelled = False

    def release(self) -> None:
        self._go.set()

    def __aiter__(self) -> FakeCall:
        return self

    async def __anext__(self) -> Events:
        await self._go.wait()
        if not self._script:
            raise StopAsyncIteration
        step = self._script.pop(0)
        if isinstance(step, BlazeError):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakePool:
    """Replicas by id, each with the scripts of its next calls; without one it answers "ok"."""

    ids: Sequence[ReplicaId] = ("a", "b")
    scripts: dict[ReplicaId, list[list[Events | BlazeError]]] = field(default_factory=dict)
    held: bool = False
    calls: list[tuple[ReplicaId, Request]] = field(default_factory=list)
    open_calls: list[FakeCall] = field(default_factory=list)
    _listeners: list[Callable[[tuple[ReplicaInfo, ...]], None]] = field(default_factory=list)

    def live(self) -> tuple[ReplicaInfo, ...]:
        return tuple(ReplicaInfo(replica_id) for replica_id in self.ids)

    def subscribe(self, listener: Callable[[tuple[ReplicaInfo, ...]], None]) -> None:
        self._listeners.append(listener)

    def set_live(self, *ids: ReplicaId) -> None:
        self.ids = ids
        for listener in self._listeners:
            listener(self.live())

    def call(self, replica_id: ReplicaId, request: Request) -> FakeCall:
        self.calls.append((replica_id, request))
        if replica_id not in self.ids:
            return FakeCall([ReplicaLost(f"Replica {replica_id} is gone.")])
        queued = self.scripts.get(replica_id)
        call = FakeCall(queued.pop(0) if queued else answer(), held=self.held)
        self.open_calls.append(call)
        return call
