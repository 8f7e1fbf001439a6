"""The Python client: the same requests as over HTTP, over a Serve handle."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn

from blaze.config import APP_NAME
from blaze.control import Change
from blaze.errors import EnvironmentProblem, ErrorInfo, RemoteError, ReplicaLost, UnsupportedOperation
from blaze.records import newest_running
from blaze.requests import PromptLike, image_request, text_request
from blaze.results import Generation, as_generation, as_images
from blaze.types import (
    Event,
    Events,
    Failed,
    Finished,
    GenerateRequest,
    ImageReady,
    PartialImage,
    Progress,
    Request,
    TextDelta,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

_PATIENCE_S = 30.0


class Client:
    """Blocking calls. Every error is a :class:`blaze.errors.BlazeError`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._stream = handle.options(method_name="stream", stream=True)
        self._status = handle.options(method_name="status")
        self._change = handle.options(method_name="change")

    def generate(
        self,
        model: str,
        prompt: PromptLike,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> Generation:
        """A whole answer. ``prompt``: text, token ids, or chat messages in OpenAI's shape.

        A text is sent as one user message; for one that is continued, or for tools, give a
        :class:`blaze.types.TextPrompt` or :class:`blaze.types.ChatPrompt`. ``sampling``: fields of
        :class:`blaze.sampling_params.SamplingParams`.
        """
        return as_generation(self.events(_generate_request(model, prompt, timeout_s, priority, sampling)))

    def stream(
        self,
        model: str,
        prompt: PromptLike,
        *,
        timeout_s: float | None = None,
        priority: int = 0,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer's text as it is generated; leaving the loop cancels the request."""
        request = _generate_request(model, prompt, timeout_s, priority, sampling)
        with closing(self.events(request)) as events:
            for event in events:
                if isinstance(event, TextDelta) and event.text:
                    yield event.text

    def images(
        self, model: str, prompt: str, *, timeout_s: float | None = None, **options: Any
    ) -> list[ImageReady]:
        """Encoded images. ``options``: fields of :class:`blaze.types.ImageRequest`, as ``n`` and ``seed``.

        With ``image``, the bytes of a file, they begin with that; with ``mask`` too, they edit it there.
        """
        request = image_request(_new_id(), model, prompt, {"timeout_s": timeout_s, **options})
        return list(as_images(self.events(request)).images)

    def edit(
        self,
        model: str,
        image: bytes,
        prompt: str,
        *,
        mask: bytes | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> list[ImageReady]:
        """As :meth:`images`, and as ``/v1/images/edits``: without a mask, an image that is partly transparent
        is edited there, and any other as a whole."""
        from blaze.engines.diffusion.inputs import own_mask

        marked = own_mask(image) if mask is None else mask
        return self.images(model, prompt, timeout_s=timeout_s, image=image, mask=marked, **options)

    def image_stream(
        self, model: str, prompt: str, *, timeout_s: float | None = None, **options: Any
    ) -> Iterator[Progress | PartialImage | ImageReady]:
        """Images as they come; before them ``partial_images`` previews of each and, with ``progress=True``,
        the steps. Leaving the loop cancels the request."""
        request = image_request(_new_id(), model, prompt, {"timeout_s": timeout_s, **options})
        with closing(self.events(request)) as events:
            for event in events:
                if isinstance(event, PartialImage | ImageReady) or (
                    isinstance(event, Progress) and request.progress
                ):
                    yield event

    def embed(self, _model: str, _text: str | Sequence[str]) -> NoReturn:
        raise UnsupportedOperation("embeddings are not implemented in this version")

    def change(self, change: Change) -> None:
        """Change a strategy, a weight, a drain or a breaker at run time (see :mod:`blaze.control`)."""
        error: ErrorInfo | None = self._answer_to(self._change.remote(change))
        if error is not None:
            raise RemoteError(error)

    def status(self) -> dict[str, Any]:
        body: dict[str, Any] = self._answer_to(self._status.remote())
        return body

    def _answer_to(self, call: DeploymentResponse) -> Any:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            return call.result(timeout_s=_PATIENCE_S)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaLost(f"The Router did not answer: {type(error).__name__}") from error

    def events(self, request: Request) -> Generator[Event]:
        """The request's events one by one; raises where the terminal event is ``Failed``."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        responses = self._stream.remote(request)
        done = False
        try:
            batch: Events
            for batch in responses:
                for event in batch:
                    if isinstance(event, Failed):
                        raise RemoteError(event.error)
                    done = isinstance(event, Finished)
                    yield event
        except (RayError, RayServeException) as error:
            raise ReplicaLost(f"The Router was lost: {type(error).__name__}") from error
        finally:
            if not done:
                responses.cancel()


def _generate_request(
    model: str, prompt: PromptLike, timeout_s: float | None, priority: int, sampling: dict[str, Any]
) -> GenerateRequest:
    return text_request(_new_id(), model, prompt, {"timeout_s": timeout_s, "priority": priority, **sampling})


def _new_id() -> str:
    return f"handle-{uuid.uuid4().hex}"


def connect(address: str | None = None, *, app_name: str = APP_NAME) -> Client:
    """See :func:`blaze.connect`."""
    running = newest_running()
    target = address or os.environ.get("RAY_ADDRESS") or (running.address if running else "auto")
    # A driver has no event loop of its own for Serve's router to share.
    os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "1")
    try:
        import ray
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException
    except ImportError as error:
        raise EnvironmentProblem(f"Ray is not installed: {error}") from None
    if not ray.is_initialized():
        _check_reachable(target)
        _use_token_when_there_is_one()
        try:
            ray.init(address=target, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            raise EnvironmentProblem(f"no Ray cluster at {target!r}: {error}") from None
    try:
        return Client(serve.get_app_handle(app_name))
    except RayServeException as error:
        raise EnvironmentProblem(f"no application {app_name!r} runs on this cluster: {error}") from None


def _check_reachable(target: str) -> None:
    """Raises :class:`EnvironmentProblem` at once where Ray would try for minutes; "auto" is Ray's to find."""
    host, _, port = target.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    if host in ("127.0.0.1", "localhost"):
        # A cluster that is bound to this machine. Ray would turn the address into the machine's outer
        # one, where nothing listens, unless it takes this machine for one that is in no cluster.
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise EnvironmentProblem(f"no Ray cluster at {target}: {error}") from None


def _use_token_when_there_is_one() -> None:
    """A new cluster asks for the token in ``~/.ray``; Ray sends it only where RAY_AUTH_MODE says so."""
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    # Ray warns that the token is in use, which is as it should be.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
