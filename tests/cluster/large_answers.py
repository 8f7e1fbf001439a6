"""Run in a process of its own: how large an answer passes from one replica to another, as images do.

``python -m tests.cluster.large_answers ADDRESS SIZE`` prints how many bytes of SIZE arrived.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

from ray import serve
from ray.serve.handle import DeploymentHandle

import blaze
from blaze.types import Events, Finished, ImageReady, Usage


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Engine:
    async def run(self, size: int) -> AsyncIterator[Events]:
        yield (ImageReady(0, b"\0" * size, "png", 1, 1, 0), Finished(Usage(images=1)))


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Router:
    def __init__(self, engine: DeploymentHandle) -> None:
        # As RayReplicaPool calls its replicas.
        self._run = engine.options(
            method_name="run", stream=True, request_serialization="pickle", response_serialization="pickle"
        )

    async def ask(self, size: int) -> int:
        received = 0
        async for events in self._run.remote(size):
            received += sum(len(event.data) for event in events if isinstance(event, ImageReady))
        return received


if __name__ == "__main__":
    blaze.connect(sys.argv[1])
    router = serve.run(Router.bind(Engine.bind()), name="large-answers", route_prefix=None)
    print(router.ask.remote(int(sys.argv[2])).result(timeout_s=60))  # noqa: T201
    serve.delete("large-answers", _blocking=False)  # it would wait until an ingress has been idle for long
