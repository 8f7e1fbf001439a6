"""The replicas of one engine deployment, as the dispatcher sees them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

import deployments.pinned_state as state
from blaze.errors import BlazeError, Cancelled, EngineFailure, ReplicaLost, ReplicaUnreachable
from blaze.routing.replica import ReplicaInfo
from blaze.types import Events, ReplicaId, Request, is_batch

logger = logging.getLogger("ray.serve")


class RayReplicaPool:
    """A :class:`blaze.routing.pool.ReplicaPool` over a Serve handle whose request router is pinned."""

    def __init__(self, handle: DeploymentHandle, *, weight: float = 1.0) -> None:
        self._weight = weight
        self._loop = asyncio.get_running_loop()
        self._key = f"{handle.app_name}#{handle.deployment_name}"
        # Options are set once: they also start Serve's router, and with it the flow of live sets.
        # Plain pickle is faster than cloudpickle, and events are plain importable classes.
        self._handle = handle.options(
            method_name="run", stream=True, request_serialization="pickle", response_serialization="pickle"
        )
        self._probe = handle.options(method_name="get_health_status")
        self._waking: asyncio.Task[None] | None = None

    def live(self) -> tuple[ReplicaInfo, ...]:
        return self._weighted(state.live_sets.live(self._key))

    def subscribe(self, listener: Callable[[tuple[ReplicaInfo, ...]], None]) -> None:
        def on_this_loop(live: tuple[ReplicaInfo, ...]) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(listener, self._weighted(live))

        state.live_sets.subscribe(self._key, on_this_loop)

    def _weighted(self, live: tuple[ReplicaInfo, ...]) -> tuple[ReplicaInfo, ...]:
        return tuple(replace(info, weight=self._weight) for info in live)

    def wake(self) -> None:
        """One call that waits for any replica: Serve scales up for it."""
        if self._waking is None or self._waking.done():
            self._waking = self._loop.create_task(self._wait_for_any())

    async def _wait_for_any(self) -> None:
        try:
            await self._probe.remote(**{state.PIN: state.ANY})
        except Exception as error:  # whoever waits asks again
            logger.warning("waking %s: %s: %s", self._key, type(error).__name__, error)

    def call(self, replica_id: ReplicaId, request: Request) -> RayReplicaCall:
        responses = self._handle.remote(request, **{state.PIN: replica_id})
        return RayReplicaCall(responses, lambda: state.live_sets.suspect(self._key, replica_id))


class RayReplicaCall:
    """One streaming call; what Ray raises becomes Blaze's own errors here, and nowhere else."""

    def __init__(self, responses: DeploymentResponseGenerator, on_break: Callable[[], None]) -> None:
        """``on_break`` is called when the connection breaks, before the error is raised."""
        self._responses = responses
        self._on_break = on_break
        self._cancelled = False

    def __aiter__(self) -> RayReplicaCall:
        return self

    async def __anext__(self) -> Events:
        try:
            events: Events = await self._responses.__anext__()
        except ReplicaUnreachable:
            self._on_break()
            raise
        except (StopAsyncIteration, BlazeError):
            raise
        except ActorUnavailableError as error:
            self._on_break()
            raise ReplicaUnreachable("The connection to the replica broke.") from error
        except RayActorError as error:
            raise ReplicaLost(f"The replica was lost: {type(error).__name__}.") from error
        except RequestCancelledError as error:
            if self._cancelled:
                raise Cancelled("The call was cancelled.") from error
            raise ReplicaLost("The replica gave the call up.") from error
        except Exception as error:
            # The text holds a traceback with paths and addresses: for the log, not for the client.
            logger.exception("a replica raised")
            raise EngineFailure(f"The replica failed: {type(error).__name__}.") from error
        if not is_batch(events):
            logger.error("a replica answered with what is no batch of events: %.200r", events)
            raise EngineFailure("The replica answered with something that is no event.")
        return events

    def cancel(self) -> None:
        self._cancelled = True
        try:
            self._responses.cancel()
        except Exception as error:  # Serve raises again what kept the call from its replica: nothing runs
            logger.debug("nothing to cancel: %s", error)
