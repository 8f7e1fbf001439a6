"""What becomes of a request at the HTTP edge: what reaches a replica, or which field is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from blaze.types import GenerateRequest, Request
from tests.api_bench import MESSAGES, ApiBench, assert_refused
from tests.fakes import FakePool
from tests.samples import image_answer

CHAT, COMPLETION, IMAGE = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
REQUIRED: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": MESSAGES},
    COMPLETION: {"model": "m", "prompt": "hi"},
    IMAGE: {"model": "d", "prompt": "seven"},
}


def bench() -> ApiBench:
    return ApiBench(FakePool(("a",)), images=FakePool(("x",), scripts={"x": [image_answer(1)]}))


def comparable(request: Request) -> Request:
    return dataclasses.replace(request, request_id="")


async def sent_for(path: str, **fields: Any) -> Request:
    """What reaches a replica for a request that is accepted."""
    async with bench() as api:
        response = await api.post(path, {**REQUIRED[path], **fields})
        assert response.status_code == 200, response.text
        (request,) = api.sent
        return comparable(request)


async def sent_text(path: str, **fields: Any) -> GenerateRequest:
    request = await sent_for(path, **fields)
    assert isinstance(request, GenerateRequest)
    return request


async def assert_param_refused(path: str, param: str, **fields: Any) -> None:
    async with bench() as api:
        assert_refused(await api.post(path, {**REQUIRED[path], **fields}), param)
        assert api.sent == [], "a refused request must not reach an engine"
        assert (await api.post(path, REQUIRED[path])).status_code == 200
