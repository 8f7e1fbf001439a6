"""Fakes that stand in for the real thing in unit tests; contract tests hold them to it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from blaze.api.report import metrics_text, status_object
from blaze.api.service import ModelCard, Readiness
from blaze.control import Change
from blaze.errors import ModelNotFound, ReplicaLost
from blaze.health.settings import HealthSettings
from blaze.health.supervisor import Supervisor
from blaze.reports import Heartbeat, ReplicaCounters, RouterReport
from blaze.routing.dispatcher import Dispatcher
from blaze.routing.replica import ReplicaInfo
from blaze.routing.routed_stream import RoutedStream
from blaze.routing.settings import DispatchSettings
from blaze.routing.strategies import make_strategy
from blaze.types import (
    ChoiceFinished,
    EngineKind,
    Event,
    Events,
    Finished,
    ReplicaId,
    Request,
    Started,
    TextDelta,
    Usage,
)

Script: TypeAlias = list[Events | Exception]  # of one call: batches given out, errors raised


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


class ByteDecoder:
    """A byte-level vocabulary: token ``i`` stands for ``pieces[i]``, which may be part of a character."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self._pieces[token] for token in token_ids).decode("utf-8", errors="replace")


def answer(text: str = "ok") -> Script:
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

    def __init__(self, script: Sequence[Events | Exception], *, held: bool = False) -> None:
        self._script = list(script)
        self._go = asyncio.Event()
        if not held:
            self._go.set()
        self._hold_after: int | None = None
        self.cancelled = False

    def play(self, script: Sequence[Events | Exception]) -> None:
        """Another script from here on."""
        self._script = list(script)

    def release(self) -> None:
        self._go.set()

    def hold(self) -> None:
        """The next batch waits for ``release`` again."""
        self._go.clear()

    @property
    def is_held(self) -> bool:
        return not self._go.is_set()

    def hold_after(self, batches: int) -> None:
        """Give out so many batches more, then wait for ``release`` again."""
        self._hold_after = batches

    def __aiter__(self) -> FakeCall:
        return self

    async def __anext__(self) -> Events:
        await self._go.wait()
        if not self._script:
            raise StopAsyncIteration
        if self._hold_after is not None:
            self._hold_after -= 1
            if self._hold_after == 0:
                self._hold_after = None
                self._go.clear()
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakePool:
    """Replicas by id, each with the scripts of its next calls; without one it answers "ok".

    ``next_scripts`` are for the next calls whichever replica they go to.
    """

    ids: Sequence[ReplicaId] = ("a", "b")
    scripts: dict[ReplicaId, list[Script]] = field(default_factory=dict)
    next_scripts: list[Script] = field(default_factory=list)
    held: bool = False
    calls: list[tuple[ReplicaId, Request]] = field(default_factory=list)
    open_calls: list[FakeCall] = field(default_factory=list)
    wakes: int = 0
    _listeners: list[Callable[[tuple[ReplicaInfo, ...]], None]] = field(default_factory=list)

    def live(self) -> tuple[ReplicaInfo, ...]:
        return tuple(ReplicaInfo(replica_id) for replica_id in self.ids)

    def subscribe(self, listener: Callable[[tuple[ReplicaInfo, ...]], None]) -> None:
        self._listeners.append(listener)

    def set_live(self, *ids: ReplicaId) -> None:
        self.ids = ids
        for listener in self._listeners:
            listener(self.live())

    def lose(self, replica_id: ReplicaId) -> None:
        """The replica dies: its calls break, and then the live set says so."""
        self.set_live(*(id for id in self.ids if id != replica_id))
        for call, (called, _) in zip(self.open_calls, self.calls, strict=True):
            if called == replica_id:
                call.play([ReplicaLost(f"Replica {replica_id} died.")])
                call.release()

    def wake(self) -> None:
        self.wakes += 1

    def call(self, replica_id: ReplicaId, request: Request) -> FakeCall:
        queued = self.next_scripts or self.scripts.get(replica_id)
        if replica_id not in self.ids:
            call = FakeCall([ReplicaLost(f"Replica {replica_id} is gone.")])
        else:
            call = FakeCall(queued.pop(0) if queued else answer(), held=self.held)
        self.calls.append((replica_id, request))
        self.open_calls.append(call)
        return call


class FakeService:
    """One Router without Ray: a real dispatcher per model over a fake pool, and a real supervisor."""

    def __init__(
        self,
        pools: Mapping[str, FakePool],
        *,
        kinds: Mapping[str, EngineKind] | None = None,
        settings: DispatchSettings | None = None,
        clock: FakeClock | None = None,
        seed: int = 0,
    ) -> None:
        kinds = kinds or {}
        self.clock = clock or FakeClock()
        self.supervisor = Supervisor(HealthSettings(), self.clock)
        self.changes: list[Change] = []
        self._cards = tuple(ModelCard(name, kinds.get(name, EngineKind.LLM), 1_700_000_000) for name in pools)
        self.dispatchers = {
            name: Dispatcher(
                name,
                pool,
                make_strategy("round_robin", rng=random.Random(seed)),
                clock=self.clock,
                rng=random.Random(seed),
                settings=settings or DispatchSettings(),
            )
            for name, pool in pools.items()
        }

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    def readiness(self) -> Readiness:
        return Readiness(tuple(name for name, d in self.dispatchers.items() if d.available_replicas == 0))

    async def open(self, request: Request) -> RoutedStream:
        dispatcher = self.dispatchers.get(request.model)
        if dispatcher is None:
            raise ModelNotFound(request.model)
        return await dispatcher.open(request)

    async def status(self) -> dict[str, Any]:
        self._report()
        return status_object(self._cards, self.supervisor.view(), self.readiness())

    async def change(self, change: Change) -> None:
        self.changes.append(change)

    async def metrics(self) -> bytes:
        self._report()
        return metrics_text(self.supervisor.view())

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        self.supervisor.heartbeat(heartbeat)

    @property
    def in_flight(self) -> int:
        counters = (dispatcher.counters() for dispatcher in self.dispatchers.values())
        return sum(replica.in_flight for _, replicas in counters for replica in replicas)

    def _report(self) -> None:
        counters = [dispatcher.counters() for dispatcher in self.dispatchers.values()]
        replicas: tuple[ReplicaCounters, ...] = sum((part for _, part in counters), ())
        self.supervisor.report(RouterReport("router-1", tuple(model for model, _ in counters), replicas))
