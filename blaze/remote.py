"""A running Blaze over its HTTP API, as the command line needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx

from blaze.errors import EnvironmentProblem
from blaze.records import newest_running

MANAGEMENT = "/api/v1/blaze"


def base_url(given: str | None) -> str:
    if given:
        return given.rstrip("/")
    record = newest_running()
    return record.url if record else "http://127.0.0.1:8000"


def first_model(base: str, engines: tuple[str, ...]) -> str:
    for model in get_json(f"{base}{MANAGEMENT}/status")["models"]:
        if model["engine"] in engines:
            return str(model["name"])
    raise EnvironmentProblem(f"this cluster has no {' or '.join(engines)} model")


def stream_text(url: str, request: dict[str, Any]) -> Iterator[str]:
    """The text of a streamed chat answer. Raises :class:`EnvironmentProblem` with the server's own words."""
    for event in _stream(url, json=request):
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def stream_images(
    base: str, request: dict[str, Any], *, image: Path | None, mask: Path | None
) -> Generator[dict[str, Any]]:
    """Events of drawn images, or, with ``image``, of edited ones. Raises :class:`EnvironmentProblem` with the
    server's own words."""
    wanted = {name: value for name, value in request.items() if value is not None} | {"stream": True}
    if image is None:
        return _stream(f"{base}/v1/images/generations", json=wanted)
    paths = {"image": image} if mask is None else {"image": image, "mask": mask}
    fields = {name: v if isinstance(v, str) else json.dumps(v) for name, v in wanted.items()}
    files = {name: (path.name, _read(path)) for name, path in paths.items()}
    return _stream(f"{base}/v1/images/edits", data=fields, files=files)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentProblem(f"{path}: {error.strerror}") from None


def _stream(url: str, **sent: Any) -> Generator[dict[str, Any]]:
    """The events of an answer, without their framing."""
    with httpx.stream(
        "POST", url, timeout=600.0, trust_env=_by_proxy(url), headers=_headers(), **sent
    ) as response:
        if response.status_code != 200:
            response.read()
            _check(response)
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data in (line, "[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise EnvironmentProblem(event["error"]["message"])
            yield event


def get_json(url: str) -> dict[str, Any]:
    body: dict[str, Any] = _check(
        httpx.get(url, timeout=30.0, trust_env=_by_proxy(url), headers=_headers())
    ).json()
    return body


def post_json(url: str, request: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(url, json=request, timeout=600.0, trust_env=_by_proxy(url), headers=_headers())
    body: dict[str, Any] = _check(response).json()
    return body


def _headers() -> dict[str, str]:
    """The key of ``BLAZE_API_KEY``, if the cluster asks for one: others could read a command line."""
    key = os.environ.get("BLAZE_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def _by_proxy(url: str) -> bool:
    """A proxy of the environment's knows nothing of this machine's own addresses."""
    return httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1")


def _check(response: httpx.Response) -> httpx.Response:
    if response.status_code != 200:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {response.status_code}"
        raise EnvironmentProblem(message)
    return response
