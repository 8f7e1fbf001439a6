"""The engines of one model in this process, as the dispatcher sees them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from blaze.engines.base import Engine
from blaze.errors import BlazeError, Cancelled, EngineFailure, ReplicaLost
from blaze.routing.replica import ReplicaInfo
from blaze.types import Event, Events, ReplicaId, Request

logger = logging.getLogger(__name__)


class LocalCall:
    """One request on one engine, read by a task of its own, so that it can be ended at any time."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._ready = asyncio.Event()
        self._ended = False
        self._error: BlazeError | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self, engine: Engine, request: Request) -> None:
        self.task = asyncio.create_task(self._read(engine, request))

    def __aiter__(self) -> LocalCall:
        return self

    async def __anext__(self) -> Events:
        await self._ready.wait()
        if self._events:
            batch = tuple(self._events)
            self._events.clear()
            if not self._ended:
                self._ready.clear()
            return batch
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.end(Cancelled("The call was cancelled."))

    def end(self, error: BlazeError | None) -> None:
        """Stop the work: what has come is still read, then ``error`` is raised. The first call counts."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        self._ready.set()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    async def _read(self, engine: Engine, request: Request) -> None:
        try:
            status = await engine.get_health_status()
            if status.state == "failed":
                raise ReplicaLost(f"The engine has failed: {status.detail}.")
            async with aclosing(engine.run(request)) as batches:
                async for events in batches:
                    self._events.extend(events)
                    self._ready.set()
        except BlazeError as error:
            self.end(error)
        except Exception as error:
            # Its text is for the log, not for the client, as with replicas elsewhere.
            logger.exception("an engine raised")
            self.end(EngineFailure(f"The engine failed: {type(error).__name__}."))
        else:
            self.end(None)
        finally:
            self.end(ReplicaLost("The call was given up."))  # the task was cancelled by somebody else


@dataclass(eq=False, slots=True)
class _Member:
    info: ReplicaInfo
    engine: Engine
    calls: set[LocalCall] = field(default_factory=set)


class LocalPool:
    """A :class:`blaze.routing.pool.ReplicaPool` over engines. Lives on one event loop."""

    def __init__(self) -> None:
        self._members: dict[ReplicaId, _Member] = {}
        self._listeners: list[Callable[[tuple[ReplicaInfo, ...]], None]] = []

    # --- The pool protocol ---------------------------------------------------------------------------

    def live(self) -> tuple[ReplicaInfo, ...]:
        return tuple(member.info for member in self._members.values())

    def subscribe(self, listener: Callable[[tuple[ReplicaInfo, ...]], None]) -> None:
        self._listeners.append(listener)

    def call(self, replica_id: ReplicaId, request: Request) -> LocalCall:
        call = LocalCall()
        member = self._members.get(replica_id)
        if member is None:
            call.end(ReplicaLost(f"There is no engine {replica_id}."))
            return call
        call.start(member.engine, request)
        assert call.task is not None
        member.calls.add(call)
        call.task.add_done_callback(lambda _task: member.calls.discard(call))
        return call

    def wake(self) -> None:
        """Nothing scales the engines of a process: who waits is served when one joins or recovers."""

    # --- Who belongs to it ---------------------------------------------------------------------------

    def add(self, info: ReplicaInfo, engine: Engine) -> None:
        self._members[info.id] = _Member(info, engine)
        self._publish()

    def hide(self, replica_id: ReplicaId) -> None:
        """No new calls for it; those that run go on."""
        self._set_ready(replica_id, False)

    def show(self, replica_id: ReplicaId) -> None:
        self._set_ready(replica_id, True)

    async def drained(self, replica_id: ReplicaId, timeout_s: float) -> None:
        """Until all its calls have ended, or the time has passed."""
        member = self._members.get(replica_id)
        tasks = [call.task for call in member.calls if call.task is not None] if member else []
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    def lose(self, replica_id: ReplicaId, error: BlazeError) -> None:
        """It is gone: its calls break with ``error``. Nothing happens where it is gone already."""
        member = self._members.pop(replica_id, None)
        if member is None:
            return
        self._publish()
        for call in tuple(member.calls):
            call.end(error)

    def _set_ready(self, replica_id: ReplicaId, ready: bool) -> None:
        member = self._members.get(replica_id)
        if member is not None and member.info.ready != ready:
            member.info = replace(member.info, ready=ready)
            self._publish()

    def _publish(self) -> None:
        live = self.live()
        for listener in self._listeners:
            listener(live)
