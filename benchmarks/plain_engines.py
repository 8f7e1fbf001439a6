"""The rival of `failover.py`: Blaze's own engines as plain deployments with Serve's defaults, and an ingress
that streams their answers as chat chunks.

What a careful user writes on stock Ray Serve: an engine that fails answers with a 500, in mid-stream with an
error event; a replica that dies breaks what it holds. Only ``max_ongoing_requests`` is not Serve's default,
which is 5: the load alone would exceed it.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from blaze.clock import SystemClock
from blaze.config import ModelConfig
from blaze.engines.faults import Faults
from blaze.engines.simulator import SimulatorEngine
from blaze.local_engines import engine_maker
from blaze.sampling_params import SamplingParams
from blaze.types import (
    ChatMessage,
    ChatPrompt,
    ChoiceFinished,
    Event,
    Events,
    Failed,
    Finished,
    GenerateRequest,
    TextDelta,
)

_MANY = 10_000


class PlainEngine:
    async def __init__(self, model: ModelConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        rank = int(serve.get_replica_context().rank.rank)
        self._engine = engine_maker(model, SystemClock())(rank)
        await self._engine.start()

    async def run(self, request: GenerateRequest) -> AsyncGenerator[Events]:
        async with aclosing(self._engine.run(request)) as answer:
            async for events in answer:
                yield events

    async def pid(self) -> int:
        return os.getpid()

    async def set_faults(self, pid: int, faults: Faults) -> None:
        """Sent to all: who is meant knows it."""
        if pid == os.getpid() and isinstance(self._engine, SimulatorEngine):
            self._engine.set_faults(faults)


class PlainIngress:
    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine.options(method_name="run", stream=True)

    async def __call__(self, http: Request) -> Response:
        if http.method == "GET":
            return JSONResponse({"ready": True})
        body = await http.json()
        names = ("max_tokens", "temperature", "top_p", "seed")
        request = GenerateRequest(
            request_id="",
            model=body["model"],
            prompt=ChatPrompt(tuple(ChatMessage(m["role"], m["content"]) for m in body["messages"])),
            sampling=SamplingParams(**{name: body[name] for name in names if name in body}),
        )
        batches = self._engine.remote(request)
        first = await anext(batches)
        if isinstance(first[-1], Failed):
            return JSONResponse({"error": {"message": first[-1].error.message}}, 500)
        return StreamingResponse(_chunks(first, batches), media_type="text/event-stream")


async def _chunks(first: Events, batches: Any) -> AsyncGenerator[str]:
    yield "".join(map(_line, first))
    async for events in batches:
        yield "".join(map(_line, events))
    yield "data: [DONE]\n\n"


def _line(event: Event) -> str:
    if isinstance(event, Failed):
        return f"data: {json.dumps({'error': {'message': event.error.message}})}\n\n"
    choices, usage = [], None
    if isinstance(event, TextDelta):
        choices = [{"index": event.index, "delta": {"content": event.text}, "finish_reason": None}]
    elif isinstance(event, ChoiceFinished):
        choices = [{"index": event.index, "delta": {}, "finish_reason": event.reason}]
    elif isinstance(event, Finished):
        counts = event.usage.prompt_tokens, event.usage.completion_tokens
        usage = {
            "prompt_tokens": counts[0],
            "completion_tokens": counts[1],
            "total_tokens": sum(counts),
        }
    else:
        return ""
    return f"data: {json.dumps({'id': 'plain', 'choices': choices, 'usage': usage})}\n\n"


def build(args: dict[str, Any]) -> Application:
    """``model``: as in the args of a Blaze application."""
    model = ModelConfig.model_validate_json(json.dumps(args["model"]), strict=True)
    quiet = {"enable_access_log": False}
    engine = serve.deployment(
        PlainEngine,
        num_replicas=model.replicas,
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": model.resources.num_cpus},
        logging_config=quiet,
    )
    ingress = serve.deployment(
        PlainIngress, max_ongoing_requests=_MANY, ray_actor_options={"num_cpus": 0}, logging_config=quiet
    )
    return ingress.bind(engine.bind(model))
