"""The HTTP application: OpenAI's paths, health, metrics and status over a :class:`Service`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from blaze.api import images, translate
from blaze.api.endpoint import Endpoint, Headers, read_body
from blaze.api.form import read_edit_form
from blaze.api.guard import Guard
from blaze.api.image_schemas import ImageBody, ImageGenerationRequest
from blaze.api.keys import KeyHolder, KeyRing
from blaze.api.limits import RateLimits
from blaze.api.management import Management
from blaze.api.merged import MergedStream
from blaze.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    TextBody,
    parse,
)
from blaze.api.service import AnswerStream, ModelCard, Opener, Service
from blaze.api.sse import ChunkWriter, EventWriter, sse
from blaze.clock import Clock, SystemClock
from blaze.engines.diffusion.inputs import own_mask
from blaze.errors import ModelNotFound, NotFound, RemoteError
from blaze.key_config import ApiKeyConfig
from blaze.routing.affinity import Network, check_session_id, client_address
from blaze.types import Caller, Failed, GenerateRequest, ImageRequest

logger = logging.getLogger(__name__)

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    service: Service,
    *,
    max_body_bytes: int,
    echo_request_id: bool = True,
    trusted_proxies: Sequence[Network] | None = (),
    keys: Sequence[ApiKeyConfig] = (),
    clock: Clock | None = None,
) -> ASGIApp:
    """``echo_request_id``: False where the server around it already answers with ``x-request-id``.

    ``trusted_proxies``: what they say of a client's address is believed; None: nobody can be, not even the
    server. ``keys``: without any, everybody may do everything.
    """
    guard = Guard(KeyRing(keys), RateLimits(clock or SystemClock()))
    handlers = _Handlers(service, guard, max_body_bytes, trusted_proxies)
    routes = [
        Route("/v1/chat/completions", Endpoint("POST", handlers.chat_completions)),
        Route("/v1/completions", Endpoint("POST", handlers.completions)),
        Route("/v1/images/generations", Endpoint("POST", handlers.image_generations)),
        Route("/v1/images/edits", Endpoint("POST", handlers.image_edits)),
        Route("/v1/models", Endpoint("GET", handlers.models)),
        Route("/v1/models/{name:path}", Endpoint("GET", handlers.model)),
        Route("/health", Endpoint("GET", handlers.health)),
        Route("/ready", Endpoint("GET", handlers.ready)),
        Route("/metrics", Endpoint("GET", handlers.metrics)),
        *Management(service, guard, max_body_bytes).routes(),
    ]
    # Starlette's Router without its Starlette: two layers of middleware less on every message that is
    # sent. What they do, errors in one format, is done by Endpoint.
    router = Router(routes, default=Endpoint("", handlers.nothing_there), redirect_slashes=False)
    return Headers(router, echo_request_id=echo_request_id)


class _Handlers:
    def __init__(
        self, service: Service, guard: Guard, max_body_bytes: int, trusted: Sequence[Network] | None
    ) -> None:
        self._service = service
        self._guard = guard
        self._max_body_bytes = max_body_bytes
        self._trusted = trusted
        self._looking = asyncio.Lock()  # at the pixels of edited images: one at a time, for its memory

    # --- Text ---------------------------------------------------------------------------------------

    async def chat_completions(self, http: HTTPRequest) -> Response:
        holder = self._guard.admit(http)
        body = parse(ChatCompletionRequest, await read_body(http, self._max_body_bytes))
        request = translate.chat_request(body, http.scope["blaze.request_id"], self._caller(http, body.user))
        stream = await self._begin(http, holder, lambda opener: opener.open(request))
        return await self._answer_text(stream, body, "chat", translate.chat_object)

    async def completions(self, http: HTTPRequest) -> Response:
        holder = self._guard.admit(http)
        body = parse(CompletionRequest, await read_body(http, self._max_body_bytes))
        caller = self._caller(http, body.user)
        requests = translate.completion_requests(body, http.scope["blaze.request_id"], caller)
        stream = await self._begin(http, holder, lambda opener: _open_all(opener, requests))
        return await self._answer_text(stream, body, "completion", translate.completion_object)

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
        holder = self._guard.admit(http)
        body = parse(ImageGenerationRequest, await read_body(http, self._max_body_bytes))
        request = self._image_request(http, body, body.image, body.mask)
        return await self._answer_images(
            http, holder, request, "image_generation", streamed=bool(body.stream)
        )

    async def image_edits(self, http: HTTPRequest) -> Response:
        holder = self._guard.admit(http)
        form = await read_edit_form(http, self._max_body_bytes)
        mask = form.mask
        if mask is None:
            async with self._looking:
                mask = await asyncio.to_thread(own_mask, form.image)
        request = self._image_request(http, form.body, form.image, mask)
        return await self._answer_images(http, holder, request, "image_edit", streamed=bool(form.body.stream))

    def _image_request(
        self, http: HTTPRequest, body: ImageBody, image: bytes | None, mask: bytes | None
    ) -> ImageRequest:
        caller = self._caller(http, body.user)
        return images.image_request(body, http.scope["blaze.request_id"], caller, image=image, mask=mask)

    async def _answer_images(
        self,
        http: HTTPRequest,
        holder: KeyHolder,
        request: ImageRequest,
        kind: Literal["image_generation", "image_edit"],
        *,
        streamed: bool,
    ) -> Response:
        stream = await self._begin(http, holder, lambda opener: opener.open(request))
        if streamed:
            writer = images.ImageEventWriter(kind, request.n, progress=request.progress)
            return _EventStream(stream, writer)
        return JSONResponse(images.images_object(await _collect(stream), int(time.time())))

    # --- About the service --------------------------------------------------------------------------

    async def models(self, http: HTTPRequest) -> Response:
        self._guard.look(http)
        return JSONResponse(
            {"object": "list", "data": [_model_object(card) for card in self._service.models()]}
        )

    async def model(self, http: HTTPRequest) -> Response:
        self._guard.look(http)
        name = http.path_params["name"]
        for card in self._service.models():
            if card.name == name:
                return JSONResponse(_model_object(card))
        raise ModelNotFound(name)

    async def health(self, _http: HTTPRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _http: HTTPRequest) -> Response:
        readiness = self._service.readiness()
        body: dict[str, Any] = {
            "ready": readiness.ready,
            "missing": list(readiness.missing),
            "draining": readiness.draining,
        }
        if readiness.reasons:
            body["reasons"] = dict(readiness.reasons)
        return JSONResponse(body, status_code=200 if readiness.ready else 503)

    async def metrics(self, http: HTTPRequest) -> Response:
        self._guard.admit_operator(http)
        return Response(await self._service.metrics(), media_type=PROMETHEUS_TEXT)

    async def nothing_there(self, http: HTTPRequest) -> Response:
        raise NotFound(f"There is no {http.url.path[:200]}.")

    # --- Shared -------------------------------------------------------------------------------------

    def _caller(self, http: HTTPRequest, user: str | None) -> Caller:
        session = http.headers.get("x-session-id")
        address: str | None = None
        if self._trusted is not None and http.client is not None:
            forwarded = http.headers.getlist("x-forwarded-for")
            address = client_address(http.client.host, forwarded, self._trusted)
        return Caller(None if session is None else check_session_id(session), user, address)

    async def _begin(
        self, http: HTTPRequest, holder: KeyHolder, begin: Callable[[Opener], Awaitable[AnswerStream]]
    ) -> AnswerStream:
        """The answer, once it has begun: an error until here can still be a plain response."""
        with self._guard.charging(holder, self._service) as opener:
            stream = await begin(opener)
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

    def __init__(self, stream: AnswerStream, writer: EventWriter) -> None:
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


async def _open_all(opener: Opener, requests: Sequence[GenerateRequest]) -> AnswerStream:
    return await (opener.open(requests[0]) if len(requests) == 1 else MergedStream.open(opener, requests))


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
