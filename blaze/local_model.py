"""One model whose engines live in this process: its replicas, and the requests that callers have open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from blaze.errors import ReplicaLost, ReplicaStopping
from blaze.local_replica import EngineMaker, LocalReplica, Surroundings
from blaze.reports import ReplicaState
from blaze.routing.dispatcher import Dispatcher
from blaze.routing.replica import ReplicaInfo
from blaze.types import EngineKind, Events, ReplicaId, Request


class LocalModel:
    """The engines of one name behind a dispatcher."""

    def __init__(
        self, name: str, kind: EngineKind, dispatcher: Dispatcher, surroundings: Surroundings
    ) -> None:
        self.name = name
        self.kind = kind
        self.dispatcher = dispatcher
        self.replicas: dict[str, LocalReplica] = {}
        self._around = surroundings
        self._open = 0  # requests, from their arrival to the end of their answers
        self._idle = asyncio.Event()
        self._idle.set()

    # --- Replicas ------------------------------------------------------------------------------------

    def place(self, make: EngineMaker | None, *, weight: float = 1.0) -> LocalReplica:
        """A replica of the lowest free rank, without an engine yet."""
        taken = {replica.rank for replica in self.replicas.values()}
        rank = next(rank for rank in range(len(taken) + 1) if rank not in taken)
        info = ReplicaInfo(f"{self.name}#{rank}", node="local", weight=weight)
        replica = self.replicas[info.id] = LocalReplica(info, rank, self.kind, make, self._around)
        return replica

    def find(self, replica_id: ReplicaId) -> LocalReplica | None:
        """By the id of its engine, or that of its first one."""
        by_id = {replica.info.id: replica for replica in self.replicas.values()}
        return self.replicas.get(replica_id) or by_id.get(replica_id)

    async def watch(self) -> None:
        """Check all engines at once; when none is left that could come back, nobody waits any longer."""
        await asyncio.gather(*(replica.watch() for replica in tuple(self.replicas.values())))
        if self._is_lost:
            self.dispatcher.refuse(_all_lost(), for_good=False)

    async def remove(self, replica: LocalReplica, *, drain: bool = True) -> None:
        """``drain``: let what runs on it come to an end first."""
        try:
            await replica.leave(drain=drain)
        finally:
            if self.replicas.get(replica.name) is replica:
                del self.replicas[replica.name]

    async def close(self) -> None:
        """Nobody sends new requests any more: let the open ones come to an end, then stop all engines."""
        try:
            if self._ready():  # somebody works on them
                async with asyncio.timeout(self._around.drain_timeout_s):
                    await self._idle.wait()
        except TimeoutError:
            pass
        finally:
            self.dispatcher.refuse(ReplicaStopping("The model was unregistered."), for_good=True)
            replicas = tuple(self.replicas.values())
            await asyncio.gather(*(self.remove(replica, drain=False) for replica in replicas))

    @property
    def _is_lost(self) -> bool:
        states = [replica.state for replica in self.replicas.values()]
        return bool(states) and all(state is ReplicaState.DEAD for state in states)

    # --- Choosing among models -----------------------------------------------------------------------

    def offers(self, operation: str) -> bool:
        engines = [replica.engine for replica in self._ready()]
        return any(engine is not None and operation in engine.operations for engine in engines)

    @property
    def load(self) -> float:
        """Requests that run or wait, for each replica that is ready."""
        model, replicas = self.dispatcher.counters()
        running = sum(replica.in_flight for replica in replicas)
        return (running + model.waiting) / max(1, len(self._ready()))

    def _ready(self) -> list[LocalReplica]:
        return [replica for replica in self.replicas.values() if replica.state is ReplicaState.READY]

    # --- Requests ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def answer(self, request: Request) -> AsyncIterator[AsyncIterator[Events]]:
        """The answer's batches; leaving early gives the request up."""
        with self._counted():
            if self._is_lost:
                raise _all_lost()
            async with await self.dispatcher.open(request) as stream:
                yield stream

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if self._open == 0:
                self._idle.set()


def _all_lost() -> ReplicaLost:
    return ReplicaLost("All engines of this model have failed for good.")
