"""The HTTP application over a fake service, without a socket."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from blaze.api.app import create_app
from blaze.key_config import ApiKeyConfig
from blaze.routing.affinity import Network
from blaze.routing.settings import DispatchSettings
from blaze.types import EngineKind, Request
from tests.fakes import FakePool, FakeService

MESSAGES = [{"role": "user", "content": "hi"}]


class ApiBench:
    """Model ``m`` generates text, ``d`` draws. Requests are sent as JSON, whatever is in them."""

    def __init__(
        self,
        pool: FakePool | None = None,
        *,
        images: FakePool | None = None,
        model: str = "m",
        echo_request_id: bool = True,
        max_body_bytes: int = 1 << 20,
        settings: DispatchSettings | None = None,
        keys: Sequence[ApiKeyConfig] = (),
        trusted_proxies: Sequence[Network] | None = (),
    ) -> None:
        self.pool = pool or FakePool(("a",))
        self.images = images or FakePool(("x",))
        pools = {model: self.pool, "d": self.images}
        self.service = FakeService(pools, kinds={"d": EngineKind.DIFFUSION}, settings=settings)
        self.app = create_app(
            self.service,
            max_body_bytes=max_body_bytes,
            echo_request_id=echo_request_id,
            keys=keys,
            trusted_proxies=trusted_proxies,
            clock=self.service.clock,
        )
        # An exception that the application let through is a 500 for a client, not a traceback.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://blaze")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    async def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        # httpx's own JSON refuses NaN and infinity, which clients do send.
        return await self.http.post(path, content=json.dumps(body))

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", {"model": "m", "messages": MESSAGES, **fields})

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"model": "m", "prompt": "hi", **fields})

    async def draw(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/images/generations", {"model": "d", "prompt": "seven", **fields})

    async def edit(
        self, image: bytes | None, *, mask: bytes | None = None, fields: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """A form as clients send it: each field is a text."""
        files = {
            name: (f"{name}.png", data)
            for name, data in (("image", image), ("mask", mask))
            if data is not None
        }
        form = {"model": "d", "prompt": "seven", **(fields or {})}
        return await self.http.post("/v1/images/edits", data=form, files=files or None)

    @property
    def sent(self) -> list[Request]:
        """What reached the replicas."""
        return [request for pool in (self.pool, self.images) for _, request in pool.calls]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; fails when the body is anything but OpenAI's envelope."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def assert_refused(response: httpx.Response, param: str | None) -> None:
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream of images; fails when its framing is not OpenAI's."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    events = []
    for event in response.text[:-2].split("\n\n"):
        kind, data = event.split("\n")
        assert kind.startswith("event: ") and data.startswith("data: ")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind.removeprefix("event: ") == events[-1].get("type", "error")
    return events


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; fails when its framing is not OpenAI's."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    events = response.text[:-2].split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event and "\r" not in event for event in events)
    data = [event.removeprefix("data: ") for event in events]
    assert data[-1] == "[DONE]"
    assert data.count("[DONE]") == 1
    return [json.loads(item) for item in data[:-1]]
