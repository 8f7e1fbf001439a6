"""What all endpoints have in common: methods, ids, bodies, and errors in OpenAI's envelope."""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blaze.api import translate
from blaze.errors import BlazeError, EngineFailure, ErrorInfo, MethodNotAllowed, PayloadTooLarge

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

Handler: TypeAlias = Callable[[HTTPRequest], Awaitable[Response]]


class Endpoint:
    """One handler as an ASGI application: the right method, and every error in OpenAI's envelope."""

    def __init__(self, method: str, handler: Handler) -> None:
        self._methods = {"GET": ("GET", "HEAD"), "POST": ("POST",)}.get(method, ())
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HTTPRequest(scope, receive)
        try:
            response = await self._respond(http)
        except ClientDisconnect:
            return  # in the middle of its own request: there is nobody to answer
        await response(scope, receive, send)

    async def _respond(self, http: HTTPRequest) -> Response:
        if self._methods and http.method not in self._methods:
            wrong = MethodNotAllowed(f"{http.method} is not allowed on {http.url.path[:200]}.")
            return error_response(wrong.info, {"allow": ", ".join(self._methods)})
        try:
            return await self._handler(http)
        except BlazeError as error:
            return error_response(error.info)
        except ClientDisconnect:
            raise
        except Exception:
            logger.exception("request %s failed", http.scope["blaze.request_id"])
            return error_response(EngineFailure("The router failed on this request.").info)


class Headers:
    """Gives every request an id, and every response the headers that name it and its replica."""

    def __init__(self, app: ASGIApp, *, echo_request_id: bool) -> None:
        self._app = app
        self._echo_request_id = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nobody answers one here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["blaze.request_id"] = request_id = _request_id(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                if self._echo_request_id:
                    headers.append((b"x-request-id", request_id.encode("ascii")))
                replica = scope.get("blaze.replica")
                if replica is not None:
                    headers.append((b"x-blaze-replica", replica.encode("utf-8")))
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _request_id(scope: Scope) -> str:
    """The caller's own, when it is one that can go into a header and a log; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given):
                return given
    return secrets.token_hex(16)


async def read_body(http: HTTPRequest, max_bytes: int) -> bytes:
    """The body; refused as soon as it is known to be too large."""
    return b"".join([chunk async for chunk in body_chunks(http, max_bytes)])


async def body_chunks(http: HTTPRequest, max_bytes: int) -> AsyncGenerator[bytes]:
    """The body as it arrives. Raises :class:`PayloadTooLarge` as soon as it is known to be too large."""
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise PayloadTooLarge(f"The body may have {max_bytes} bytes.")
    size = 0
    async for chunk in http.stream():
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLarge(f"The body may have {max_bytes} bytes.")
        yield chunk


def error_response(info: ErrorInfo, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    extra = dict(headers)
    if info.retry_after_s is not None:
        extra["retry-after"] = str(max(1, math.ceil(info.retry_after_s)))
    if info.http_status == 401:
        extra["www-authenticate"] = "Bearer"
    return JSONResponse(translate.error_object(info), status_code=info.http_status, headers=extra)
