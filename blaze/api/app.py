"""The HTTP application: OpenAI's paths, health, metrics and status over a :class:`Service`."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blaze.api import translate
from blaze.api.merged import MergedStream
from blaze.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    ImageGenerationRequest,
    TextBody,
    parse,
)
from blaze.api.service import AnswerStream, ModelCard, Service
from blaze.api.sse import ChunkWriter, sse
from blaze.errors import (
    BlazeError,
    EngineFailure,
    ErrorInfo,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    RemoteError,
)
from blaze.types import Failed, GenerateRequest

logger = logging.getLogger(__name__)

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


Handler: TypeAlias = Callable[[HTTPRequest], Awaitable[Response]]


def create_app(service: Service, *, max_body_bytes: int, echo_request_id: bool = True) -> ASGIApp:
    """``echo_request_id``: False where the server around it already answers with ``x-request-id``."""
    handlers = _Handlers(service, max_body_bytes)
    routes = [
        Route("/v1/chat/completions", _Endpoint("POST", handlers.chat_completions)),
        Route("/v1/completions", _Endpoint("POST", handlers.completions)),
        Route("/v1/images/generations", _Endpoint("POST", handlers.image_generations)),
        Route("/v1/models", _Endpoint("GET", handlers.models)),
        Route("/v1/models/{name:path}", _Endpoint("GET", handlers.model)),
        Route("/health", _Endpoint("GET", handlers.health)),
        Route("/ready", _Endpoint("GET", handlers.ready)),
        Route("/metrics", _Endpoint("GET", handlers.metrics)),
        Route("/api/v1/blaze/status", _Endpoint("GET", handlers.status)),
    ]
    # Starlette's Router without its Starlette: two layers of middleware less on every message that is
    # sent. What they do, errors in one format, is done by _Endpoint.
    router = Router(routes, default=_Endpoint("", handlers.nothing_there), redirect_slashes=False)
    return _Headers(router, echo_request_id=echo_request_id)


class _Endpoint:
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
            return _error_response(wrong.info, {"allow": ", ".join(self._methods)})
        try:
            return await self._handler(http)
        except BlazeError as error:
            return _error_response(error.info)
        except ClientDisconnect:
            raise
        except Exception:
            logger.exception("request %s failed", http.scope["blaze.request_id"])
            return _error_response(EngineFailure("The router failed on this request.").info)


class _Headers:
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


class _Handlers:
    def __init__(self, service: Service, max_body_bytes: int) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes

    # --- Text ---------------------------------------------------------------------------------------

    async def chat_completions(self, http: HTTPRequest) -> Response:
        body = parse(ChatCompletionRequest, await self._read(http))
        request = translate.chat_request(body, http.scope["blaze.request_id"])
        stream = await self._begin(http, self._service.open(request))
        return await self._answer_text(stream, body, "chat", translate.chat_object)

    async def completions(self, http: HTTPRequest) -> Response:
        body = parse(CompletionRequest, await self._read(http))
        requests = translate.completion_requests(body, http.scope["blaze.request_id"])
        stream = await self._begin(http, self._open_all(requests))
        return await self._answer_text(stream, body, "completion", translate.completion_object)

    async def _open_all(self, requests: Sequence[GenerateRequest]) -> AnswerStream:
        if len(requests) == 1:
            return await self._service.open(requests[0])
        return await MergedStream.open(self._service, requests)

    async def _answer_text(
        self,
        stream: AnswerStream,
        body: TextBody,
        kind: Literal["chat", "completion"],
        whole: Callable[[translate.Answer, str, str, int], dict[str, Any]],
    ) -> Response:
        answer_id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        created = int(time.time())
        if body.stream:
            return _EventStream(
                stream, ChunkWriter(kind, answer_id, body.model, created, usage=body.wants_usage)
            )
        return JSONResponse(whole(await _collect(stream), answer_id, body.model, created))

    # --- Images -------------------------------------------------------------------------------------

    async def image_generations(self, http: HTTPRequest) -> Response:
        body = parse(ImageGenerationRequest, await self._read(http))
        request = translate.image_request(body, http.scope["blaze.request_id"])
        answer = await _collect(await self._begin(http, self._service.open(request)))
        return JSONResponse(translate.images_object(answer, int(time.time())))

    # --- About the service --------------------------------------------------------------------------

    async def models(self, _http: HTTPRequest) -> Response:
        return JSONResponse(
            {"object": "list", "data": [_model_object(card) for card in self._service.models()]}
        )

    async def model(self, http: HTTPRequest) -> Response:
        name = http.path_params["name"]
        for card in self._service.models():
            if card.name == name:
                return JSONResponse(_model_object(card))
        raise ModelNotFound(name)

    async def health(self, _http: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _http: HTTPRequest) -> Response:
        readiness = self._service.readiness()
        body = {"ready": readiness.ready, "missing": list(readiness.missing)}
        return JSONResponse(body, status_code=200 if readiness.ready else 503)

    async def metrics(self, _http: HTTPRequest) -> Response:
        return Response(await self._service.metrics(), media_type=PROMETHEUS_TEXT)

    async def status(self, _http: HTTPRequest) -> Response:
        return JSONResponse(await self._service.status())

    async def nothing_there(self, http: HTTPRequest) -> Response:
        raise NotFound(f"There is no {http.url.path[:200]}.")

    # --- Shared -------------------------------------------------------------------------------------

    async def _read(self, http: HTTPRequest) -> bytes:
        """The body; refused as soon as it is known to be too large."""
        declared = http.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise PayloadTooLarge(f"The body may have {self._max_body_bytes} bytes.")
        chunks: list[bytes] = []
        size = 0
        async for chunk in http.stream():
            size += len(chunk)
            if size > self._max_body_bytes:
                raise PayloadTooLarge(f"The body may have {self._max_body_bytes} bytes.")
            chunks.append(chunk)
        return b"".join(chunks)

    async def _begin(self, http: HTTPRequest, opening: Awaitable[AnswerStream]) -> AnswerStream:
        """The answer, once it has begun: an error until here can still be a plain response."""
        stream = await opening
        http.scope["blaze.replica"] = stream.replica_id
        if stream.error is not None:
            raise RemoteError(stream.error)
        return stream


class _EventStream(Response):
    """A response that is written as the events come.

    The server cancels it when the client leaves. The stream is given back however the response ends, also
    when the client left before its first byte. The last events and the end of the body leave as one
    message: for a short answer that is one write to the socket instead of two.
    """

    def __init__(self, stream: AnswerStream, writer: ChunkWriter) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._stream = stream
        self._writer = writer

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for text, last in sse(self._stream, self._writer):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})
        finally:
            await self._stream.aclose()


async def _collect(stream: AnswerStream) -> translate.Answer:
    answer = translate.Answer()
    async with aclosing(stream):
        async for events in stream:
            last = events[-1]
            if isinstance(last, Failed):
                raise RemoteError(last.error)
            answer.add(events)
    return answer


def _model_object(card: ModelCard) -> dict[str, Any]:
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "blaze"}


# --- Errors: OpenAI's envelope everywhere --------------------------------------------------------------


def _error_response(info: ErrorInfo, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    extra = dict(headers)
    if info.retry_after_s is not None:
        extra["retry-after"] = str(max(1, round(info.retry_after_s)))
    return JSONResponse(translate.error_object(info), status_code=info.http_status, headers=extra)
