"""Parts of the control plane die, and what serves goes on serving; they come back by themselves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

from deployments.local import processes
from tests.cluster.served import Served, answers, served, simulator
from tests.cluster.sse import chat, read
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

STREAMS = 12
TOKENS = 160
ROUTER, HEALTH, ENGINE = ":Router", ":Health", ":simulator-"
CONTROLLER, HAPROXY, MANAGER = "ServeController", "haproxy.cfg", "HAProxyManager"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Served]:
    models = [simulator("sim", replicas=3, ttft_ms=20, inter_token_ms=50, tokens=TOKENS, slots=32)]
    with served(models, strategy="least_connections", replicas=2, slow_start_s=0) as running:
        yield running


@pytest.fixture
def app(cluster: Served) -> Served:
    """The cluster, whole: whatever the test before has ended is back, and nothing runs."""
    eventually(lambda: is_whole(cluster), within_s=60, every_s=0.25)
    return cluster


def is_whole(app: Served) -> bool:
    try:
        states = [replica["state"] for replica in app.replicas("sim")]
        return (
            states == ["ready"] * 3 and len(pids(app, ROUTER)) == 2 and app.in_flight() + app.working() == 0
        )
    except httpx.HTTPError:
        return False


def pids(app: Served, name: str) -> list[int]:
    """Processes of this cluster alone, by what Ray and HAProxy call themselves."""
    found = []
    for process in processes(app.cluster.cluster_id):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return sorted(found)


def end_one(app: Served, name: str) -> None:
    """SIGKILL to one of these processes, when HAProxy has settled: while it reloads there are two."""
    eventually(lambda: len(pids(app, HAPROXY)) == 1)
    os.kill(pids(app, name)[0], signal.SIGKILL)


def stream(app: Served, number: int) -> str | None:
    """The text, or None when the connection broke. An error that is told is a failure of the test."""
    answer = read(app.url, number)
    assert answer.status in (200, None) and answer.error_code is None, answer
    return answer.text if answer.is_whole else None


@contextmanager
def streams(app: Served) -> Iterator[list[Future[str | None]]]:
    """Streams that have begun, on every replica and through both Routers."""
    with ThreadPoolExecutor(STREAMS) as pool:
        begun = [pool.submit(stream, app, number) for number in range(STREAMS)]
        eventually(lambda: app.working() == STREAMS)
        yield begun


@pytest.fixture(scope="module")
def unbroken(cluster: Served) -> list[str | None]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda number: stream(cluster, number), range(STREAMS)))


@dataclass
class Load:
    """Short requests, one after another on each of a few connections."""

    ended: list[tuple[float, str]] = field(default_factory=list)  # when each began, and how it ended

    def more(self, requests: int = 40) -> None:
        """Wait until so many more have been made."""
        enough = len(self.ended) + requests
        eventually(lambda: len(self.ended) >= enough)

    def outcomes(self, since: float = 0.0) -> set[str]:
        return {outcome for began, outcome in self.ended if began >= since}


@contextmanager
def short_requests(app: Served) -> Iterator[Load]:
    load, enough = Load(), Event()

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            while not enough.is_set():
                began = time.monotonic()
                try:
                    response = client.post(
                        f"{app.url}/v1/chat/completions", json=chat(0, stream=False, max_tokens=4)
                    )
                    outcome = str(response.status_code)
                except httpx.HTTPError as error:
                    outcome = type(error).__name__
                load.ended.append((began, outcome))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            load.more()
            yield load
        finally:
            enough.set()
    for each in asking:
        each.result()


def test_a_routers_death_breaks_the_streams_on_it_and_nothing_else(
    app: Served, unbroken: list[str | None]
) -> None:
    before = pids(app, ROUTER)
    with streams(app) as begun:
        with short_requests(app) as load:
            end_one(app, ROUTER)
            killed_at = time.monotonic()
            load.more()
        assert load.outcomes(killed_at) == {"200"}
        # The replicas have noticed that nobody reads the broken ones any more.
        eventually(lambda: app.working() == sum(not each.done() for each in begun) > 0, within_s=5)
        found = [each.result(timeout=60) for each in begun]
    broken = found.count(None)
    assert 0 < broken < STREAMS
    assert [text for text in found if text is not None] == [
        text for text, end in zip(unbroken, found, strict=True) if end is not None
    ]
    eventually(lambda: app.in_flight() == 0, within_s=10)  # also by the account of the dead one
    eventually(lambda: len(set(pids(app, ROUTER)) - set(before)) == 1 and len(pids(app, ROUTER)) == 2)


def test_without_the_controller_replicas_may_still_die_and_no_stream_breaks(
    app: Served, unbroken: list[str | None]
) -> None:
    before = {name: pids(app, name) for name in (ROUTER, ENGINE, CONTROLLER, HEALTH)}
    with streams(app) as begun, short_requests(app) as load:
        end_one(app, CONTROLLER)
        os.kill(before[ENGINE][0], signal.SIGKILL)
        load.more()
        assert [each.result(timeout=60) for each in begun] == unbroken
    assert load.outcomes() == {"200"}
    eventually(lambda: is_whole(app), within_s=60, every_s=0.25)
    after = {name: pids(app, name) for name in before}
    assert (after[ROUTER], after[HEALTH]) == (before[ROUTER], before[HEALTH])
    assert len(set(after[ENGINE]) & set(before[ENGINE])) == 2
    assert len(after[CONTROLLER]) == 1 and after[CONTROLLER] != before[CONTROLLER]


@pytest.mark.parametrize("victim", [HAPROXY, MANAGER])
def test_haproxy_comes_back_by_itself_and_frees_what_its_clients_had(app: Served, victim: str) -> None:
    routers = pids(app, ROUTER)
    with streams(app) as begun:
        end_one(app, victim)
        assert [each.result(timeout=60) for each in begun] == [None] * STREAMS
    eventually(lambda: answers(f"{app.url}/health"), within_s=20)
    eventually(lambda: app.working() + app.in_flight() == 0, within_s=5)
    assert pids(app, ROUTER) == routers


def change(app: Served, path: str, **fields: Any) -> None:
    httpx.post(f"{app.url}/api/v1/blaze/{path}", json=fields, timeout=10).raise_for_status()


def test_without_the_health_actor_all_goes_on_and_it_learns_again_what_was_changed(app: Served) -> None:
    first, second, third = app.replicas("sim")
    change(app, f"replicas/{first['id']}/drain")
    change(app, f"replicas/{second['id']}/weight", weight=2.5)
    change(app, "strategy", model="sim", strategy="weighted_round_robin")
    before = pids(app, HEALTH)
    with short_requests(app) as load:
        end_one(app, HEALTH)
        load.more()
        eventually(lambda: pids(app, HEALTH) not in ([], before), within_s=30)
        eventually(lambda: len(app.status()["replicas"]) == 3, within_s=30)
        load.more()
    assert load.outcomes() == {"200"}
    found = {replica["id"]: replica for replica in app.replicas("sim")}
    assert (found[first["id"]]["state"], found[second["id"]]["weight"]) == ("draining", 2.5)
    assert app.status()["models"][0]["strategy"] == "weighted_round_robin"
    assert sum(replica["requests"] for replica in found.values()) >= len(load.ended)
    change(app, f"replicas/{first['id']}/drain", draining=False)  # numbered on, not from one again
    change(app, f"replicas/{second['id']}/weight", weight=1)
    change(app, "strategy", model="sim", strategy="least_connections")
    eventually(lambda: {r["state"] for r in app.replicas("sim")} == {"ready"})
    assert {replica["id"] for replica in app.replicas("sim")} == {first["id"], second["id"], third["id"]}
