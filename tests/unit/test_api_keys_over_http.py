"""Keys, limits and addresses at the door of the HTTP API."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from blaze.errors import ConfigError
from blaze.key_config import ApiKeyConfig
from blaze.routing.affinity import LOOPBACK
from blaze.types import Caller, Finished, Started, TextDelta, Usage
from tests.api_bench import MESSAGES, ApiBench
from tests.fakes import FakePool, Script
from tests.unit.test_config import refusal
from tests.waiting import until

KEYS = (
    ApiKeyConfig(name="user", key=SecretStr("sk-user")),
    ApiKeyConfig(name="boss", key=SecretStr("sk-boss"), admin=True),
)
USER, BOSS, WRONG = ({"authorization": f"Bearer sk-{name}"} for name in ("user", "boss", "nobody"))
CHAT = {"model": "m", "messages": MESSAGES}
STATUS = "/api/v1/blaze/status"


def limited(**limits: int) -> tuple[ApiKeyConfig, ...]:
    return (ApiKeyConfig(name="user", key=SecretStr("sk-user"), **limits),)


async def chat(bench: ApiBench, headers: dict[str, str], **fields: Any) -> httpx.Response:
    return await bench.http.post("/v1/chat/completions", json=CHAT | fields, headers=headers)


def spending(tokens: int) -> Script:
    """An answer to a prompt of one token."""
    return [
        (Started((1,)), TextDelta(0, "x", tuple(range(tokens - 1)))),
        (Finished(Usage(prompt_tokens=1, completion_tokens=tokens - 1)),),
    ]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/m"),
    ],
)
@pytest.mark.parametrize("headers", [{}, WRONG, {"authorization": "Basic sk-user"}])
async def test_without_a_key_nothing_is_done(method: str, path: str, headers: dict[str, str]) -> None:
    async with ApiBench(keys=KEYS) as bench:
        response = await bench.http.request(method, path, headers=headers, content="not even JSON")
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "sk-" not in response.text
        assert bench.pool.calls == []


@pytest.mark.parametrize("headers", [USER, BOSS])
async def test_with_a_key_requests_are_answered(headers: dict[str, str]) -> None:
    async with ApiBench(keys=KEYS) as bench:
        assert (await chat(bench, headers)).status_code == 200
        assert (await bench.http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", STATUS),
        ("GET", "/api/v1/blaze/replicas"),
        ("GET", "/metrics"),
        ("POST", "/api/v1/blaze/strategy"),
        ("POST", "/api/v1/blaze/replicas/a/weight"),
        ("POST", "/api/v1/blaze/replicas/a/drain"),
        ("POST", "/api/v1/blaze/nodes/n/drain"),
        ("POST", "/api/v1/blaze/drain"),
        ("POST", "/api/v1/blaze/replicas/a/breaker"),
    ],
)
async def test_what_is_the_operators_needs_an_admin_key(method: str, path: str) -> None:
    async with ApiBench(keys=KEYS) as bench:
        codes = [
            (await bench.http.request(method, path, headers=headers, content="")).status_code
            for headers in ({}, USER, BOSS)
        ]
        assert codes[:2] == [401, 403]
        assert codes[2] in (200, 400)
        assert all(change == bench.service.changes[0] for change in bench.service.changes)


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_no_key(path: str) -> None:
    async with ApiBench(keys=KEYS) as bench:
        assert (await bench.http.get(path)).status_code == 200


async def test_requests_beyond_the_limit_are_a_429_that_says_when() -> None:
    async with ApiBench(keys=limited(requests_per_minute=2)) as bench:
        assert [(await chat(bench, USER)).status_code for _ in range(3)] == [200, 200, 429]
        refused = await chat(bench, USER)
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        bench.service.clock.advance(float(refused.headers["retry-after"]))
        assert (await chat(bench, USER)).status_code == 200


async def test_tokens_are_charged_when_an_answer_ends() -> None:
    pool = FakePool(("a",), next_scripts=[spending(8), spending(8), spending(8)])
    async with ApiBench(pool, keys=limited(tokens_per_minute=10)) as bench:
        assert [(await chat(bench, USER)).status_code for _ in range(3)] == [200, 200, 429]


async def test_who_leaves_in_the_middle_pays_for_what_came() -> None:
    script = [(Started((1,)), TextDelta(0, "x", tuple(range(20)))), (Finished(Usage()),)]
    pool = FakePool(("a",), next_scripts=[script])
    async with ApiBench(pool, keys=limited(tokens_per_minute=10)) as bench:
        bench.pool.held = True
        task = asyncio.create_task(chat(bench, USER, stream=True))
        await until(lambda: len(pool.open_calls) == 1)
        pool.open_calls[0].hold_after(1)
        pool.open_calls[0].release()
        await until(lambda: pool.open_calls[0].is_held)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: bench.service.in_flight == 0)
        assert (await chat(bench, USER)).status_code == 429


@pytest.mark.parametrize(
    "keys",
    [
        [{"name": "a", "kee": "sk-secret"}],
        [{"name": "a", "key": 5550123}],
        ["sk-secret"],
        "sk-secret",
        [{"name": "sk-secret!", "key": "x"}],
    ],
)
def test_a_refused_config_shows_no_key(keys: object) -> None:
    message = refusal(router={"api_keys": keys})
    assert "router.api_keys" in message
    assert "secret" not in message and "5550123" not in message


def test_two_keys_of_one_name_are_refused() -> None:
    message = refusal(router={"api_keys": [{"name": "a", "key": "x"}, {"name": "a", "key": "y"}]})
    assert "api_keys" in message
    assert ConfigError.http_status == 500


@pytest.mark.parametrize(
    ("headers", "caller"),
    [
        ({}, Caller(address="127.0.0.1")),
        ({"x-session-id": "s 1"}, Caller(session_id="s 1", address="127.0.0.1")),
        ({"x-forwarded-for": "6.6.6.6"}, Caller(address="127.0.0.1")),
    ],
)
async def test_the_caller_is_known(headers: dict[str, str], caller: Caller) -> None:
    async with ApiBench() as bench:
        await chat(bench, headers)
        assert bench.pool.calls[0][1].caller == caller


async def test_a_proxy_that_is_trusted_says_for_whom_it_calls() -> None:
    async with ApiBench(trusted_proxies=LOOPBACK) as bench:
        await chat(bench, {"x-forwarded-for": "6.6.6.6, 10.1.2.3"}, user="u")
        assert bench.pool.calls[0][1].caller == Caller(user="u", address="10.1.2.3")


async def test_where_nobody_can_be_believed_there_is_no_address() -> None:
    async with ApiBench(trusted_proxies=None) as bench:
        await chat(bench, {"x-forwarded-for": "6.6.6.6"})
        assert bench.pool.calls[0][1].caller == Caller()


@pytest.mark.parametrize("session", ["", "x" * 257, "caf\xe9"])
async def test_a_session_id_that_is_none_is_named(session: str) -> None:
    async with ApiBench() as bench:
        response = await chat(bench, {"x-session-id": session.encode("latin-1")})  # type: ignore[dict-item]
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "x-session-id"
        assert bench.pool.calls == []
