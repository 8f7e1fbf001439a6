"""What operators ask and change: the paths under `/api/v1/blaze/`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from blaze.api.endpoint import Endpoint, read_body
from blaze.api.guard import Guard
from blaze.api.schemas import parse
from blaze.api.service import Service
from blaze.checks import MOST_SECONDS
from blaze.control import (
    ActOnBreaker,
    Change,
    SetAllDraining,
    SetDraining,
    SetNodeDraining,
    SetStrategy,
    SetWeight,
)

_PREFIX = "/api/v1/blaze"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StrategyBody(_Body):
    model: str
    strategy: str


class WeightBody(_Body):
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BreakerBody(_Body):
    action: Literal["open", "close", "reset"]


class DrainBody(_Body):
    """Without a body: drain it, in the time of the config."""

    draining: bool = True
    timeout_s: Annotated[float, Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False)] | None = None


class Management:
    def __init__(self, service: Service, guard: Guard, max_body_bytes: int) -> None:
        self._service = service
        self._guard = guard
        self._max_body_bytes = max_body_bytes

    def routes(self) -> list[Route]:
        return [
            Route(f"{_PREFIX}/status", Endpoint("GET", self.status)),
            Route(f"{_PREFIX}/replicas", Endpoint("GET", self.replicas)),
            Route(f"{_PREFIX}/strategy", Endpoint("POST", self.strategy)),
            Route(f"{_PREFIX}/replicas/{{id}}/weight", Endpoint("POST", self.weight)),
            Route(f"{_PREFIX}/replicas/{{id}}/drain", Endpoint("POST", self.drain)),
            Route(f"{_PREFIX}/nodes/{{node}}/drain", Endpoint("POST", self.drain_node)),
            Route(f"{_PREFIX}/drain", Endpoint("POST", self.drain_all)),
            Route(f"{_PREFIX}/replicas/{{id}}/breaker", Endpoint("POST", self.breaker)),
        ]

    async def status(self, http: HTTPRequest) -> Response:
        self._guard.admit_operator(http)
        return JSONResponse(await self._service.status())

    async def replicas(self, http: HTTPRequest) -> Response:
        self._guard.admit_operator(http)
        return JSONResponse({"replicas": (await self._service.status())["replicas"]})

    async def strategy(self, http: HTTPRequest) -> Response:
        body = parse(StrategyBody, await self._read(http))
        return await self._changed(SetStrategy(body.model, body.strategy))

    async def weight(self, http: HTTPRequest) -> Response:
        body = parse(WeightBody, await self._read(http))
        return await self._changed(SetWeight(http.path_params["id"], body.weight))

    async def drain(self, http: HTTPRequest) -> Response:
        body = await self._drain_body(http)
        return await self._changed(SetDraining(http.path_params["id"], body.draining, body.timeout_s))

    async def drain_node(self, http: HTTPRequest) -> Response:
        body = await self._drain_body(http)
        return await self._changed(SetNodeDraining(http.path_params["node"], body.draining, body.timeout_s))

    async def drain_all(self, http: HTTPRequest) -> Response:
        body = await self._drain_body(http)
        return await self._changed(SetAllDraining(body.draining, body.timeout_s))

    async def _drain_body(self, http: HTTPRequest) -> DrainBody:
        return parse(DrainBody, await self._read(http) or b"{}")

    async def breaker(self, http: HTTPRequest) -> Response:
        body = parse(BreakerBody, await self._read(http))
        return await self._changed(ActOnBreaker(http.path_params["id"], body.action))

    async def _read(self, http: HTTPRequest) -> bytes:
        self._guard.admit_operator(http)
        return await read_body(http, self._max_body_bytes)

    async def _changed(self, change: Change) -> Response:
        """Every Router follows within a second."""
        await self._service.change(change)
        return JSONResponse({"done": True})
