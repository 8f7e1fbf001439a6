"""The rival of `strategies.py` on real Serve: the simulator engine as a plain deployment behind one of Ray's
own routers, and an ingress that streams its answers as chat chunks.

Like Blaze's Router, the ingress answers with an error when nothing has come before it. It does not retry.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from blaze.engine_config import SimulatorConfig
from blaze.engines.simulator import SimulatorEngine
from blaze.sampling_params import SamplingParams
from blaze.types import Events, Failed, GenerateRequest, TextDelta, TextPrompt


class PlainSimulator:
    def __init__(self, options: dict[str, Any]) -> None:
        self._rank = int(serve.get_replica_context().rank.rank)
        self._engine = SimulatorEngine(SimulatorConfig(**options), rank=self._rank)

    async def run(self, request: GenerateRequest) -> AsyncGenerator[tuple[int, Events]]:
        """Batches of events, each with the rank of the replica."""
        async with aclosing(self._engine.run(request)) as answer:
            async for events in answer:
                yield self._rank, events


class PlainIngress:
    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine.options(method_name="run", stream=True)

    async def __call__(self, http: Request) -> Response:
        body = await http.json()
        request = GenerateRequest(
            request_id="",
            model="sim",
            prompt=TextPrompt(body["messages"][0]["content"]),
            sampling=SamplingParams(max_tokens=body["max_tokens"], seed=0),
        )
        handle = self._engine.options(session_id=http.headers.get("x-session-id", ""))
        batches = handle.remote(request)
        rank, events = await anext(batches)
        headers = {"x-rank": str(rank)}
        if isinstance(events[-1], Failed):
            return JSONResponse({"error": {"message": events[-1].error.message}}, 500, headers)
        return StreamingResponse(_chunks(events, batches), media_type="text/event-stream", headers=headers)


async def _chunks(first: Events, batches: Any) -> AsyncGenerator[str]:
    yield _lines(first)
    async for _, events in batches:
        yield _lines(events)
    yield "data: [DONE]\n\n"


def _lines(events: Events) -> str:
    deltas = [event.text for event in events if isinstance(event, TextDelta)]
    return "".join(
        f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n" for text in deltas
    )


def build(args: dict[str, Any]) -> Application:
    """``router``: where the class of the request router is; None: Serve's default."""
    routing = {}
    if args["router"] is not None:
        routing["request_router_config"] = RequestRouterConfig(request_router_class=args["router"])
    quiet = {"enable_access_log": False}
    engine = serve.deployment(
        PlainSimulator,
        num_replicas=args["replicas"],
        max_ongoing_requests=args["cap"],
        ray_actor_options={"num_cpus": 0.05},
        logging_config=quiet,
        **routing,
    )
    ingress = serve.deployment(
        PlainIngress, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}, logging_config=quiet
    )
    return ingress.bind(engine.bind(args["options"]))
