"""Ray Serve's own routers in the simulation of `strategies.py`, as `AsyncioRouter` of Ray Serve drives them.

They hear of the end of a request at once, and the length of a queue that they ask for comes after 1 ms. Their
picks are not quite the same in every run: they go through sets, whose order is the process's own.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from itertools import count
from typing import Any

from benchmarks.strategies_replicas import Ask, SimulatedReplica, VirtualLoop, Work
from benchmarks.strategies_workload import CAP, Arrival, Tally
from blaze.errors import EngineFailure

RAY_ROUTERS = {
    "ray_two_choices": "ray.serve._private.request_router.pow_2_router:PowerOfTwoChoicesRequestRouter",
    "ray_round_robin": "ray.serve.experimental.round_robin_router:RoundRobinRouter",
    "ray_consistent_hash": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter",
}
_PROBE_S = 0.001


def ray(name: str, replicas: list[SimulatedReplica], tally: Tally, *, attempts: int) -> Ask:
    """As `AsyncioRouter` of Ray Serve sends requests: choose, count, and choose again when refused.

    ``attempts``: of a client that sends a failed request again, at once.
    """
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
    from ray.serve._private.request_router.common import PendingRequest

    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    module, _, kind = RAY_ROUTERS[name].partition(":")
    deployment = DeploymentID(name="replica", app_name="strategies")
    router = getattr(import_module(module), kind)(
        deployment_id=deployment,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        get_curr_time_s=loop.now,
        self_node_id="node",
        prefer_local_node_routing=False,
    )
    router.initialize_state()
    serials = count()
    router.update_replicas([_ray_replica(deployment, replica) for replica in replicas])

    async def attempt(arrival: Arrival) -> float | None:
        serial = str(next(serials))
        metadata = RequestMetadata(request_id=serial, internal_request_id=serial, session_id=arrival.session)
        pending = PendingRequest(args=[], kwargs={}, metadata=metadata, created_at=loop.now())
        chosen = await router._choose_replica_for_request(pending)
        router.on_send_request(chosen.replica_id)
        while chosen.simulated.ongoing >= CAP:  # several were sent there at once
            router.on_new_queue_len_info(chosen.replica_id, chosen.simulated.ongoing)
            chosen = await router._choose_replica_for_request(pending, is_retry=True)
            router.on_send_request(chosen.replica_id)
        tally.attempts[chosen.simulated.rank] += 1
        work = Work(chosen.simulated, arrival.tokens)
        try:
            await work.first_token()
            first_s = loop.now() - arrival.at_s
            await work.rest()
        except EngineFailure:
            return None
        finally:
            router.decrement_queue_len_cache(chosen.replica_id)
        return first_s

    async def ask(arrival: Arrival) -> float | None:
        for _ in range(attempts):
            first_s = await attempt(arrival)
            if first_s is not None:
                return first_s
        return None

    return ask


def _ray_replica(deployment: Any, simulated: SimulatedReplica) -> Any:
    from ray.serve._private.common import ReplicaID, RunningReplicaInfo
    from ray.serve._private.request_router.replica_wrapper import RunningReplica

    class LocalReplica(RunningReplica):  # type: ignore[misc]
        """Without an actor behind it."""

        def __init__(self) -> None:
            self.simulated = simulated
            self._replica_info = RunningReplicaInfo(
                replica_id=ReplicaID(f"{simulated.rank:08x}", deployment_id=deployment),
                node_id="node",
                node_ip=None,
                availability_zone=None,
                actor_name=f"replica-{simulated.rank}",
                max_ongoing_requests=CAP,
            )
            self._multiplexed_model_ids: set[str] = set()

        async def get_queue_len(self, *, deadline_s: float) -> int:  # noqa: ARG002
            await asyncio.sleep(_PROBE_S)
            return simulated.ongoing

    return LocalReplica()
