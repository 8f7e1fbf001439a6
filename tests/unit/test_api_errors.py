from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from blaze.errors import (
    BlazeError,
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    NonFiniteOutput,
    Overloaded,
    ReplicaLost,
)
from blaze.routing.settings import DispatchSettings
from blaze.types import Started, TextDelta
from tests.api_bench import MESSAGES, ApiBench, assert_refused, error_of
from tests.fakes import FakePool, Script

POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/images/generations"]
GETS = ["/v1/models", "/health", "/ready", "/metrics", "/api/v1/blaze/status"]
NO_RETRIES = DispatchSettings(max_retries=0, max_lost=0)
BEGINNING = (Started((1,)), TextDelta(0, "be", (5,)))


def failing(*script: Any) -> ApiBench:
    """A model whose only replica answers like this."""
    return ApiBench(FakePool(("a",), next_scripts=[list(script)]), settings=NO_RETRIES)


@pytest.fixture
async def api() -> AsyncIterator[ApiBench]:
    async with ApiBench(max_body_bytes=10_000) as bench:
        yield bench


# --- Bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"5", b"\xff\xfe", b'{"model": "m"', b"[" * 5000, b"{'a': 1}"]
)
async def test_case_09_a_body_that_is_no_json_object_is_refused(
    api: ApiBench, path: str, body: bytes
) -> None:
    assert_refused(await api.http.post(path, content=body), None)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": 5}, {"model": ["m"]}])
async def test_case_09_a_missing_or_wrong_model_is_refused(
    api: ApiBench, path: str, body: dict[str, Any]
) -> None:
    assert_refused(await api.post(path, body), "model")


async def test_case_09_the_first_wrong_field_is_named(api: ApiBench) -> None:
    assert_refused(await api.chat(messages={"role": "user"}), "messages")
    assert_refused(await api.post("/v1/completions", {"model": "m"}), "prompt")
    assert_refused(await api.post("/v1/images/generations", {"model": "d", "prompt": None}), "prompt")


async def test_case_09_what_was_sent_is_never_echoed(api: ApiBench) -> None:
    secret = "secret" * 200
    for response in (
        await api.chat(messages=[{"role": secret, "content": secret}]),
        await api.chat(messages=secret),
        await api.chat(temperature=secret),
        await api.chat(logit_bias={secret: "x"}),
        await api.chat(logit_bias={"secret": 1}),
        await api.chat(tools=[{"type": secret}]),
        await api.chat(messages=[{"role": "assistant", "tool_calls": [{"type": secret}]}]),
        await api.complete(prompt=[secret, 5]),
        await api.complete(prompt=[secret] * 200),
        await api.complete(prompt={secret: secret}),
    ):
        error_of(response)
        assert "secret" not in response.text


async def test_case_09_a_content_type_of_plain_text_is_read_as_json(api: ApiBench) -> None:
    body = b'{"model": "m", "prompt": "hi"}'
    response = await api.http.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", POSTS)
async def test_case_09_a_body_that_is_too_large_is_413(api: ApiBench, path: str) -> None:
    response = await api.http.post(path, content=b"x" * 10_001)
    assert response.status_code == 413
    assert error_of(response)["code"] == "payload_too_large"


async def test_case_09_a_body_of_undeclared_length_is_read_only_up_to_the_limit(api: ApiBench) -> None:
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1000
            yield b"x" * 1000

    response = await api.http.post("/v1/completions", content=body())
    assert response.status_code == 413
    assert taken <= 12_000
    # A length that lies is caught by counting.
    lying = await api.http.post(
        "/v1/completions", content=b"x" * 20_000, headers={"content-length": "5", "transfer-encoding": ""}
    )
    assert lying.status_code == 413


async def test_a_body_of_just_the_limit_is_read(api: ApiBench) -> None:
    body = b'{"model": "m", "prompt": "hi"}'
    assert (await api.http.post("/v1/completions", content=body.ljust(10_000))).status_code == 200


# --- Paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nope", "/api/v1/blaze/nope", "/v1/chat", "/docs"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_case_09_an_unknown_path_is_404(api: ApiBench, path: str, method: str) -> None:
    response = await api.http.request(method, path)
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [*(("GET", path) for path in POSTS), *(("POST", path) for path in GETS), ("DELETE", "/v1/models/m")],
)
async def test_case_09_a_wrong_method_is_405(api: ApiBench, method: str, path: str) -> None:
    response = await api.http.request(method, path)
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"]


# --- Models ------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "gpt2",
    "hf-internal-testing/tiny-random-gpt2",
    "file:///x",
    "",
    "a\0b",
    "%2e%2e%2f",
    "x" * 5_000,
    "M",
    " m ",
]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("model", HOSTILE)
async def test_case_46_a_model_that_is_not_on_the_list_is_404(api: ApiBench, path: str, model: str) -> None:
    response = await api.post(path, {"model": model, "messages": MESSAGES, "prompt": "hi"})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"], error["type"]) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    assert len(error["message"]) < 200
    assert api.sent == []


@pytest.mark.parametrize("name", ["../x", "nope", "%2e%2e/%2e%2e/etc/passwd", "a/b/c"])
async def test_case_46_the_model_path_knows_the_list_only(api: ApiBench, name: str) -> None:
    response = await api.http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    error_of(response)


# --- What replicas answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_case_05_too_long_a_prompt_is_a_plain_400_streaming_or_not(path: str, stream: bool) -> None:
    refusal = ContextLengthExceeded(limit=100, prompt_tokens=90, requested_tokens=50, param="messages")
    async with failing(refusal) as api:
        response = await getattr(api, path)(stream=stream)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("100", "90", "50"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequest("no", param="messages"), 400, "invalid_request_error", None),
        (EngineFailure("raised"), 500, "server_error", "engine_error"),
        (NonFiniteOutput("NaN"), 500, "server_error", "non_finite_output"),
        (ReplicaLost("died"), 502, "server_error", "replica_lost"),
        (Overloaded("full", retry_after_s=2.0), 503, "overloaded_error", "overloaded"),
    ],
)
async def test_an_error_before_the_first_event_is_a_plain_response(
    stream: bool, error: BlazeError, status: int, kind: str, code: str | None
) -> None:
    async with failing(error) as api:
        response = await api.chat(stream=stream)
    assert response.status_code == status
    found = error_of(response)
    assert (found["message"], found["type"], found["code"]) == (error.message, kind, code)
    assert found["param"] == error.param
    assert response.headers["x-blaze-replica"] == "a"
    assert response.headers.get("retry-after") == (None if error.retry_after_s is None else "2")


@pytest.mark.parametrize("script", [[BEGINNING, EngineFailure("broke")], [BEGINNING]])
async def test_an_error_after_the_first_event_of_a_whole_answer_is_a_plain_response(script: Script) -> None:
    async with failing(*script) as api:
        response = await api.chat()
        assert response.status_code == 500
        assert error_of(response)["code"] == "engine_error"
        assert api.service.in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_case_27_overload_is_503_with_whole_seconds_to_wait(stream: bool) -> None:
    settings = DispatchSettings(request_timeout_s=1e-6, deadline_grace_s=0, recheck_s=0)
    async with ApiBench(FakePool(()), settings=settings) as api:
        response = await api.chat(stream=stream)
    assert response.status_code == 503
    assert error_of(response)["type"] == "overloaded_error"
    assert int(response.headers["retry-after"]) >= 1
    assert "x-blaze-replica" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_is_504(stream: bool) -> None:
    settings = DispatchSettings(request_timeout_s=1e-6, deadline_grace_s=0, recheck_s=0)
    async with ApiBench(FakePool(("a",), held=True), settings=settings) as api:
        response = await api.chat(stream=stream)
        assert response.status_code == 504
        assert error_of(response)["code"] == "deadline_exceeded"
        assert api.pool.open_calls[0].cancelled


@pytest.mark.parametrize("stream", [False, True])
async def test_what_nobody_foresaw_is_a_500_in_the_envelope_without_its_details(stream: bool) -> None:
    async with failing(RuntimeError("internal detail")) as api:
        response = await api.chat(stream=stream)
        assert response.status_code == 500
        error_of(response)
        assert "internal detail" not in response.text
        assert api.service.in_flight == 0
