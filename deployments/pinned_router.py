"""A Serve request router that obeys: a call goes to the replica that the dispatcher picked, or fails."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from ray.exceptions import ActorDiedError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

import deployments.pinned_state as state
from blaze.errors import BlazeError, Overloaded, ReplicaLost, ReplicaUnreachable
from blaze.routing.replica import ReplicaInfo

_PROBES = 20
_PROBE_PERIOD_S = 0.25


class PinnedRouter(RequestRouter):  # type: ignore[misc]  # Ray ships no types
    """Chooses nothing itself: the dispatcher names the replica in the call's ``blaze_pin``.

    Every change of the live set is published to :mod:`deployments.pinned_state`, where the dispatcher in
    the same process reads it.
    """

    _probes: ClassVar[dict[str, asyncio.Task[None]]] = {}  # by pin; ids are unique in the cluster
    _by_pin: Mapping[str, RunningReplica] = MappingProxyType({})

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call has found it dead, before Serve's controller has noticed."""
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        replicas = tuple(self.curr_replicas.values())
        self._by_pin = {r.replica_id.unique_id: r for r in replicas}
        live = tuple(
            ReplicaInfo(r.replica_id.unique_id, node=r.node_id or "", actor=r.replica_id.to_full_id_str())
            for r in replicas
        )
        key = f"{self._deployment_id.app_name}#{self._deployment_id.name}"
        state.live_sets.set_prober(key, self._probe_soon)
        state.live_sets.publish(key, live)

    def _probe_soon(self, pin: str) -> None:
        self._event_loop.call_soon_threadsafe(self._start_probe, pin)

    def _start_probe(self, pin: str) -> None:
        if pin not in self._probes:  # many calls break at once when a replica dies
            self._probes[pin] = self._event_loop.create_task(self._probe(pin))

    async def _probe(self, pin: str) -> None:
        """Ask until Ray knows: a broken connection looks the same whether its replica is dead or not, and
        Serve's own health check takes up to ten seconds to tell."""
        try:
            for _ in range(_PROBES):
                replica = self._by_pin.get(pin)
                if replica is None:
                    return
                try:
                    await replica.get_queue_len(deadline_s=_PROBE_PERIOD_S)
                    return
                except ActorDiedError:
                    self.on_replica_actor_died(replica.replica_id)
                except Exception:  # unavailable, or slow: not yet decided
                    await asyncio.sleep(_PROBE_PERIOD_S)
        finally:
            self._probes.pop(pin, None)  # whatever went wrong, the next broken call may ask again

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        pin = pending_request.kwargs.get(state.PIN)
        if is_retry:
            raise self._why_not(pin)
        if pin == state.ANY:
            return await self._first_there_is()
        replica = self._by_pin.get(pin)
        if replica is None:
            raise ReplicaLost(f"Replica {pin} is gone.")
        return replica

    def _why_not(self, pin: str) -> BlazeError:
        """Serve tried and did not succeed. Where to go next is the dispatcher's decision, not Serve's."""
        replica = self._by_pin.get(pin)
        if replica is None:
            return ReplicaLost(f"Replica {pin} is gone.")
        queued = self.replica_queue_len_cache.get(replica.replica_id)
        if queued is not None and queued >= replica.max_ongoing_requests:
            return Overloaded(f"Replica {pin} refused the request: it has {queued}.", retry_after_s=1)
        return ReplicaUnreachable(f"Replica {pin} could not be reached.")

    async def _first_there_is(self) -> RunningReplica:
        """Waits as a queued request, which is what Serve's autoscaler counts as demand."""
        while not self._by_pin:
            self._replicas_updated_event.clear()
            await self._replicas_updated_event.wait()
        return next(iter(self._by_pin.values()))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        raise NotImplementedError("calls to this deployment are pinned to a replica")
