"""Balancing, breakers and changes at run time, on real Serve replicas of the simulator and two Routers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from blaze.config import STRATEGIES
from tests.cluster.served import Served, served, simulator
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

MESSAGES = [{"role": "user", "content": "Say something."}]
FAILS_FOR_S = 10.0
LONGEST_OPEN_S = 12.0  # the fourth trip: 8 s, and up to half as long again; there is no time for a fifth
API = "api/v1/blaze"


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    models = [
        simulator("sim", replicas=4, ttft_ms=1, inter_token_ms=1, tokens=4),
        simulator("sick", replicas=4, ttft_ms=1, inter_token_ms=1, tokens=2, fail_for_s={1: FAILS_FOR_S}),
    ]
    with served(models, strategy="round_robin", replicas=2, slow_start_s=0) as running:
        yield running


def chat(app: Served, *, client: httpx.Client | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "sim", "messages": MESSAGES} | fields
    return (client or httpx).post(f"{app.url}/v1/chat/completions", json=body, timeout=30)


def change(app: Served, path: str, body: dict[str, Any]) -> None:
    httpx.post(f"{app.url}/{API}/{path}", json=body, timeout=10).raise_for_status()


def strategies(app: Served) -> set[str]:
    """What each Router says, in many answers: which of them answers is HAProxy's choice."""
    statuses = [app.status()["models"] for _ in range(8)]
    return {model["strategy"] for models in statuses for model in models if model["name"] == "sim"}


@contextmanager
def traffic(app: Served, model: str, *, most_s: float = 60.0) -> Iterator[Counter[int]]:
    """Requests one after another in two threads, until the test ends or for a minute; their status codes."""
    codes: Counter[int] = Counter()
    done = threading.Event()
    give_up = time.monotonic() + most_s

    def ask() -> None:
        with httpx.Client() as client:
            while not done.is_set() and time.monotonic() < give_up:
                codes[chat(app, client=client, model=model).status_code] += 1

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_failing_replica_is_left_alone_and_is_back_when_it_has_recovered(app: Served) -> None:
    def sick() -> dict[str, Any]:
        return next(replica for replica in app.replicas("sick") if replica["rank"] == 1)

    def requests() -> int:
        return sum(replica["requests"] for replica in app.replicas("sick"))

    with traffic(app, "sick") as codes:
        eventually(lambda: sick()["breaker"] != "closed")
        eventually(lambda: sick()["failures"] >= 10)  # both Routers' breakers have tripped
        before, of_all = sick()["requests"], requests()
        eventually(lambda: requests() > of_all + 300)
        to_it, to_all = sick()["requests"] - before, requests() - of_all
        assert sick()["breaker"] != "closed"
        assert to_it <= 0.02 * to_all
        eventually(lambda: sick()["breaker"] == "closed", within_s=FAILS_FOR_S + LONGEST_OPEN_S + 3.0)
        served_then = sick()["requests"]
        eventually(lambda: sick()["requests"] > served_then + 20)
    assert set(codes) == {200}


def test_a_strategy_is_changed_under_load_and_nothing_is_lost(app: Served) -> None:
    with traffic(app, "sim") as codes:
        for strategy in (*STRATEGIES, "round_robin"):
            change(app, "strategy", {"model": "sim", "strategy": strategy})
            eventually(lambda wanted=strategy: strategies(app) == {wanted}, within_s=5.0)
            seen = sum(codes.values())
            eventually(lambda since=seen: sum(codes.values()) > since + 20)
    assert set(codes) == {200}


def test_a_strategy_is_changed_by_the_command_line_and_over_a_handle(app: Served) -> None:
    command = [sys.executable, "-m", "blaze.cli", "route", "sim", "adaptive", "--url", app.url]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "sim: adaptive"
    )
    eventually(lambda: strategies(app) == {"adaptive"}, within_s=5.0)
    over_a_handle = (
        "import sys, blaze; from blaze.control import SetStrategy; "
        "blaze.connect(sys.argv[1]).change(SetStrategy('sim', 'round_robin'))"
    )
    subprocess.run([sys.executable, "-c", over_a_handle, app.cluster.address], check=True)
    eventually(lambda: strategies(app) == {"round_robin"}, within_s=5.0)


def test_an_unknown_strategy_is_refused_and_changes_nothing(app: Served) -> None:
    before = strategies(app)
    response = httpx.post(f"{app.url}/{API}/strategy", json={"model": "sim", "strategy": "fastest"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "strategy")
    response = httpx.post(f"{app.url}/{API}/strategy", json={"model": "nope", "strategy": "adaptive"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert strategies(app) == before


@pytest.mark.parametrize(
    ("path", "out", "back"),
    [
        ("weight", {"weight": 0}, {"weight": 1}),
        ("drain", {"draining": True}, {"draining": False}),
        ("breaker", {"action": "open"}, {"action": "reset"}),
    ],
)
def test_a_replica_is_taken_out_by_hand(
    app: Served, path: str, out: dict[str, Any], back: dict[str, Any]
) -> None:
    target = app.replicas("sim")[0]["id"]

    def took_some() -> bool:
        return target in {chat(app).headers["x-blaze-replica"] for _ in range(16)}

    change(app, f"replicas/{target}/{path}", out)
    eventually(lambda: not took_some(), within_s=10.0)
    assert not took_some()
    change(app, f"replicas/{target}/{path}", back)
    eventually(took_some, within_s=10.0)


def test_a_replica_that_there_is_not_is_a_404(app: Served) -> None:
    response = httpx.post(f"{app.url}/{API}/replicas/nobody/weight", json={"weight": 1})
    assert response.status_code == 404


def test_ip_hash_goes_by_the_clients_real_address(app: Served) -> None:
    """Through HAProxy and both Routers, whatever the client says of itself from far away."""
    assert app.status()["client_address"] == "available"
    change(app, "strategy", {"model": "sim", "strategy": "ip_hash"})
    eventually(lambda: strategies(app) == {"ip_hash"}, within_s=5.0)
    replicas: dict[str, set[str]] = {}
    for last in range(2, 18):
        address = f"127.0.0.{last}"
        with httpx.Client(transport=httpx.HTTPTransport(local_address=address)) as client:
            replicas[address] = {chat(app, client=client).headers["x-blaze-replica"] for _ in range(4)}
    assert all(len(found) == 1 for found in replicas.values())
    assert len(set.union(*replicas.values())) > 1
    change(app, "strategy", {"model": "sim", "strategy": "round_robin"})


def test_sessions_and_users_have_their_replicas_too(app: Served) -> None:
    change(app, "strategy", {"model": "sim", "strategy": "ip_hash"})
    eventually(lambda: strategies(app) == {"ip_hash"}, within_s=5.0)
    url, body = f"{app.url}/v1/chat/completions", {"model": "sim", "messages": MESSAGES}
    for number in range(6):
        headers = {"x-session-id": f"session {number}"}
        found = {
            httpx.post(url, json=body, headers=headers).headers["x-blaze-replica"] for _ in range(4)
        } | {  # the session counts before the user
            httpx.post(url, json=body | {"user": "u"}, headers=headers).headers["x-blaze-replica"]
        }
        assert len(found) == 1
    change(app, "strategy", {"model": "sim", "strategy": "round_robin"})


def test_both_routers_are_there(app: Served) -> None:
    assert len(app.status()["routers"]) == 2
