"""One place for an engine in this process: started, watched, built again when it fails, and stopped."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from blaze.clock import Clock
from blaze.engines.base import Engine
from blaze.errors import ReplicaLost, ReplicaStopping
from blaze.health.view import ReplicaHealth
from blaze.local_pool import LocalPool
from blaze.recovery import Action, Recovery, RecoverySettings
from blaze.reports import EngineStatus, Heartbeat, ReplicaState
from blaze.routing.replica import ReplicaInfo
from blaze.types import EngineKind, ReplicaId

logger = logging.getLogger(__name__)

EngineMaker: TypeAlias = Callable[[int], Engine]  # of a rank
EventKind: TypeAlias = Literal[
    "registered",
    "unregistered",
    "check_failed",
    "recovered",
    "rebuilding",
    "rebuilt",
    "rebuild_failed",
    "given_up",
]


@dataclass(frozen=True, slots=True)
class LocalEvent:
    """Something was found of an engine, or decided about it. ``at``: of the injected clock, seconds."""

    at: float
    replica_id: ReplicaId
    kind: EventKind
    detail: str = ""


class EventLog:
    """The last events, oldest first."""

    def __init__(self, clock: Clock, *, most: int) -> None:
        self._clock = clock
        self._events: deque[LocalEvent] = deque(maxlen=most)

    def add(self, replica_id: ReplicaId, kind: EventKind, detail: str = "") -> None:
        self._events.append(LocalEvent(self._clock.now(), replica_id, kind, detail))
        logger.info("%s: %s %s", replica_id, kind, detail)

    def events(self) -> tuple[LocalEvent, ...]:
        return tuple(self._events)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the replicas of one model share."""

    pool: LocalPool
    log: EventLog
    clock: Clock
    recovery: RecoverySettings
    check_timeout_s: float
    drain_timeout_s: float


class LocalReplica:
    def __init__(
        self,
        info: ReplicaInfo,
        rank: int,
        kind: EngineKind,
        make: EngineMaker | None,
        surroundings: Surroundings,
    ) -> None:
        """``info``: as the first engine has it; those that follow have ids of their own.

        ``make``: a new engine, not started. None: a failed one cannot be built again.
        """
        self.name = info.id
        self.info = info
        self.rank = rank
        self._rebuilds = 0
        self.engine: Engine | None = None  # None: not started yet, or lost
        self._kind = kind
        self._make = make
        self._around = surroundings
        settings = surroundings.recovery if make else replace(surroundings.recovery, max_attempts=0)
        self._recovery = Recovery(settings, surroundings.clock)
        self._status = _bare_status(kind, "loading")
        self._checked_at = surroundings.clock.now()
        self._building: asyncio.Task[None] | None = None
        self._leaving = False

    # --- From beginning to end -----------------------------------------------------------------------

    async def start(self) -> None:
        """Build an engine and load its model. Raises what keeps it from that."""
        engine = await self._built()
        if self._leaving:
            await _stop(engine, self._around.drain_timeout_s)
            raise ReplicaStopping("The engine was unregistered while it was loading.")
        self.adopt(engine)

    def adopt(self, engine: Engine) -> None:
        """An engine that runs already."""
        self._take(engine)
        self._around.log.add(self.info.id, "registered")

    def _take(self, engine: Engine) -> None:
        self.engine = engine
        self._set_status(_bare_status(self._kind, "idle"))  # until its first check
        self._around.pool.add(self.info, engine)

    async def leave(self, *, drain: bool) -> None:
        """Take no more requests and stop. ``drain``: let those that run come to an end first."""
        self._leaving = True
        pool = self._around.pool
        pool.hide(self.info.id)
        try:
            if self._building is not None:
                self._building.cancel()
                await asyncio.wait([self._building])
            if drain:
                await pool.drained(self.info.id, self._around.drain_timeout_s)
        finally:
            pool.lose(self.info.id, ReplicaStopping("The engine was unregistered."))
            await self._stop()
            self._around.log.add(self.info.id, "unregistered")

    async def _built(self) -> Engine:
        assert self._make is not None
        engine = self._make(self.rank)
        try:
            await engine.start()
        except BaseException:
            await _stop(engine, self._around.drain_timeout_s)
            raise
        return engine

    async def _stop(self) -> None:
        engine, self.engine = self.engine, None
        if engine is not None:
            await _stop(engine, self._around.drain_timeout_s)

    # --- How it is -----------------------------------------------------------------------------------

    @property
    def state(self) -> ReplicaState:
        if self._leaving:
            return ReplicaState.DRAINING
        if self._recovery.given_up:
            return ReplicaState.DEAD
        if self._building is not None:
            return ReplicaState.RESTARTING
        if self._recovery.failed_checks:
            return ReplicaState.SUSPECT
        return ReplicaState.STARTING if self.engine is None else ReplicaState.READY

    def health(self, model: str, memory_bytes: int) -> ReplicaHealth:
        """As the last check found it."""
        heartbeat = Heartbeat(
            replica_id=self.info.id,
            model=model,
            rank=self.rank,
            node=self.info.node,
            pid=os.getpid(),
            engine=self._status,
            memory_bytes=memory_bytes,
        )
        return ReplicaHealth(heartbeat, self.state, self._around.clock.now() - self._checked_at)

    async def check(self) -> EngineStatus:
        """Ask the engine how it is. Never raises: one that does not answer has failed."""
        engine, patience_s = self.engine, self._around.check_timeout_s
        if engine is None:
            return self._status
        try:
            async with asyncio.timeout(patience_s):
                status = await engine.get_health_status()
        except TimeoutError:
            status = _bare_status(self._kind, "failed", f"it did not answer within {patience_s:g} s")
        except Exception as error:
            logger.exception("the check of %s raised", self.info.id)
            status = _bare_status(self._kind, "failed", f"its check raised {type(error).__name__}")
        if engine is self.engine:
            self._set_status(status)
        return self._status

    def _set_status(self, status: EngineStatus) -> None:
        self._status = status
        self._checked_at = self._around.clock.now()

    # --- What is done about it -----------------------------------------------------------------------

    async def watch(self) -> None:
        """One check, and what follows from it."""
        status = await self.check()
        if self._leaving or self._building is not None or status.state == "loading":
            return
        if status.state == "failed":
            self._found_failed(status.detail or "it gives no reason")
        else:
            self._found_well()

    def _found_well(self) -> None:
        if self._recovery.failed_checks:
            self._around.log.add(self.info.id, "recovered")
            if self._recovery.given_up and self.engine is not None:
                self._around.pool.add(self.info, self.engine)
            self._around.pool.show(self.info.id)
        self._recovery.well()

    def _found_failed(self, detail: str) -> None:
        log, recovery = self._around.log, self._recovery
        self._around.pool.hide(self.info.id)
        action = recovery.failed()
        if recovery.failed_checks <= self._around.recovery.threshold:
            log.add(self.info.id, "check_failed", f"{recovery.failed_checks} in a row: {detail}")
        if action is Action.GIVE_UP:
            log.add(self.info.id, "given_up", f"after {recovery.attempts} attempts: {detail}")
            self._around.pool.lose(self.info.id, _lost())
        elif action is Action.REBUILD:
            log.add(self.info.id, "rebuilding", f"attempt {recovery.attempts}")
            self._building = asyncio.create_task(self._rebuild())

    async def _rebuild(self) -> None:
        """What ran on the failed engine goes on elsewhere, and a new one takes its place."""
        log, recovery = self._around.log, self._recovery
        try:
            self._around.pool.lose(self.info.id, _lost())
            await self._stop()
            engine = await self._built()
            # A new id, for what is still to come of the old one's calls is not held against this one.
            self._rebuilds += 1
            self.info = replace(self.info, id=f"{self.name}.{self._rebuilds}")
            self._take(engine)
            recovery.rebuilt(successfully=True)
            log.add(self.info.id, "rebuilt", f"attempt {recovery.attempts}")
        except Exception as error:
            logger.exception("%s could not be built again", self.info.id)
            reason = f"{type(error).__name__}: {error}"
            self._set_status(_bare_status(self._kind, "failed", f"it could not be built again: {reason}"))
            pause_s = recovery.rebuilt(successfully=False)
            log.add(self.info.id, "rebuild_failed", f"{reason}; not again for {pause_s:g} s")
        finally:
            self._building = None


def _bare_status(
    kind: EngineKind, state: Literal["loading", "idle", "failed"], detail: str | None = None
) -> EngineStatus:
    return EngineStatus(
        kind=kind,
        state=state,
        running=0,
        queued=0,
        steps_done=0,
        last_step_age_s=None,
        detail=detail,
    )


def _lost() -> ReplicaLost:
    return ReplicaLost("The engine has failed.")


async def _stop(engine: Engine, timeout_s: float) -> None:
    """Never raises for what the engine does: it is not used again either way."""
    try:
        async with asyncio.timeout(timeout_s):
            await engine.stop()
    except Exception:
        logger.exception("an engine did not stop in good order")
