"""The rival of `data_plane.py`: two hops of plain Ray Serve, with nothing in them.

An ingress that passes the body on and an engine that streams one answer: what any server on Serve costs
before it does anything.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import StreamingResponse


@serve.deployment(max_ongoing_requests=10_000)
class BareEngine:
    def __init__(self, answer: str) -> None:
        self._answer = answer

    async def run(self, _body: bytes) -> AsyncGenerator[str]:
        yield self._answer


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
class BareIngress:
    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine.options(method_name="run", stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        stream = self._engine.remote(await request.body())
        return StreamingResponse(stream, media_type="text/event-stream")


def build(args: dict[str, Any]) -> Application:
    engine = BareEngine.options(ray_actor_options={"num_cpus": 0.1}).bind(args["answer"])
    return BareIngress.bind(engine)
