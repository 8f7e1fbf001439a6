"""Replicas, nodes and the whole of a cluster are drained under streams, and nobody who reads one can tell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deployments.local import LocalCluster, free_port
from tests.cluster.served import Served, serve_config, simulator, wait_until_ready
from tests.cluster.sse import read, streams
from tests.cluster.surviving import assert_unbroken
from tests.streams import Answer
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

STREAMS = 16
TOKENS = 80
INTER_TOKEN_S = 0.05  # 4 s each
API = "api/v1/blaze"


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    """Two nodes with two replicas each, and two Routers."""
    model = simulator(replicas=4, ttft_ms=20, inter_token_ms=1000 * INTER_TOKEN_S, tokens=TOKENS, slots=32)
    model["resources"] = {"num_cpus": 1}  # all fit on one node, too
    port = free_port()
    config = serve_config(port, [model], replicas=2, slow_start_s=0) | {"proxy_location": "HeadOnly"}
    with LocalCluster(num_cpus=4) as cluster:
        add_node(cluster, num_cpus=4)
        cluster.deploy(config)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(cluster, url)
        running = Served(cluster, url, config)
        eventually(lambda: len([r for r in running.replicas("sim") if r["state"] == "ready"]) == 4)
        yield running


def add_node(cluster: LocalCluster, *, num_cpus: int) -> None:
    """It carries the cluster's marker, and ends with it."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    params = RayParams(
        gcs_address=cluster.address,
        node_ip_address="127.0.0.1",
        num_cpus=num_cpus,
        num_gpus=0,
        object_store_memory=150 * 1024 * 1024,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        include_log_monitor=False,
    )
    params.dashboard_agent_listen_port = None
    Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)


@pytest.fixture(scope="module")
def unbroken(app: Served) -> list[Answer]:
    with streams(app.url, STREAMS) as asked:
        told = [future.result() for future in asked]
    assert all(one.is_whole for one in told)
    return told


def change(app: Served, path: str, **body: Any) -> None:
    httpx.post(f"{app.url}/{API}/{path}", json=body, timeout=10).raise_for_status()


def resumed(app: Served) -> int:
    counts: list[int] = [model["resumed"] for model in app.status()["models"]]
    return counts[0]


def of(app: Served, key: str, value: str) -> list[dict[str, Any]]:
    return [replica for replica in app.replicas("sim") if replica[key] == value]


def is_drained(app: Served, key: str, value: str) -> bool:
    return all((r["state"], r["in_flight"], r["running"]) == ("draining", 0, 0) for r in of(app, key, value))


def test_what_runs_on_a_drained_replica_goes_on_elsewhere_at_its_deadline(
    app: Served, unbroken: list[Answer]
) -> None:
    before = resumed(app)
    with streams(app.url, STREAMS) as asked:
        eventually(lambda: app.in_flight() == STREAMS)
        target = max(app.replicas("sim"), key=lambda replica: replica["in_flight"])["id"]
        change(app, f"replicas/{target}/drain", timeout_s=0.5)
        eventually(lambda: is_drained(app, "id", target), within_s=5.0)
        assert not any(future.done() for future in asked), "it had to be empty before they were done"
        assert app.in_flight() == STREAMS
        sent = of(app, "id", target)[0]["requests"]
        told = [future.result() for future in asked]
    assert_unbroken(told, unbroken)
    assert resumed(app) > before
    assert all(read(app.url, number, max_tokens=2).is_whole for number in range(8))
    (drained,) = of(app, "id", target)
    assert (drained["requests"], drained["state"], drained["failures"]) == (sent, "draining", 0)
    assert drained["breaker"] == "closed"
    change(app, f"replicas/{target}/drain", draining=False)
    eventually(lambda: of(app, "id", target)[0]["state"] == "ready")


def test_a_drained_node_is_empty_and_stays_so(app: Served, unbroken: list[Answer]) -> None:
    nodes = {replica["node"] for replica in app.replicas("sim")}
    assert len(nodes) == 2
    node = min(nodes)
    with streams(app.url, STREAMS) as asked:
        eventually(lambda: app.in_flight() == STREAMS)
        change(app, f"nodes/{node}/drain", timeout_s=0.5)
        eventually(lambda: is_drained(app, "node", node), within_s=5.0)
        assert not any(future.done() for future in asked)
        told = [future.result() for future in asked]
    assert_unbroken(told, unbroken)
    sent = sum(replica["requests"] for replica in of(app, "node", node))
    assert all(read(app.url, number, max_tokens=2).is_whole for number in range(8))
    assert sum(replica["requests"] for replica in of(app, "node", node)) == sent
    change(app, f"nodes/{node}/drain", draining=False)
    eventually(lambda: all(replica["state"] == "ready" for replica in of(app, "node", node)))


def test_with_all_replicas_drained_streams_stay_and_new_ones_wait(
    app: Served, unbroken: list[Answer]
) -> None:
    ids = [replica["id"] for replica in app.replicas("sim")]
    with streams(app.url, STREAMS) as asked:
        eventually(lambda: app.in_flight() == STREAMS)
        before = resumed(app)
        for replica_id in ids:
            change(app, f"replicas/{replica_id}/drain", timeout_s=0.0)
        eventually(lambda: all(is_drained(app, "id", id) for id in ids))
        told = [future.result() for future in asked]
    assert_unbroken(told, unbroken)
    moved = resumed(app) - before  # to those that were not drained yet
    with streams(app.url, 4, max_tokens=2) as asked:
        eventually(lambda: app.status()["models"][0]["waiting"] == 4)
        for replica_id in ids:
            change(app, f"replicas/{replica_id}/drain", draining=False)
        assert all(future.result().is_whole for future in asked)
    assert resumed(app) - before == moved


def test_in_maintenance_nothing_new_is_begun_and_nothing_is_lost(app: Served, unbroken: list[Answer]) -> None:
    with streams(app.url, STREAMS) as asked:
        eventually(lambda: app.in_flight() == STREAMS)
        change(app, "drain")
        eventually(lambda: app.status()["draining"], within_s=2.0)
        refused = httpx.post(f"{app.url}/v1/chat/completions", json={"model": "sim", "messages": [_HELLO]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        ready = httpx.get(f"{app.url}/ready")
        assert (ready.status_code, ready.json()["draining"]) == (503, True)
        told = [future.result() for future in asked]
    assert_unbroken(told, unbroken)
    eventually(lambda: app.status()["models"][0]["open"] == 0)
    change(app, "drain", draining=False)
    eventually(lambda: not app.status()["draining"], within_s=2.0)
    eventually(lambda: all(read(app.url, n, max_tokens=2).is_whole for n in range(8)), within_s=15.0)


_HELLO = {"role": "user", "content": "hello"}


def test_what_is_left_when_the_time_is_up_is_told_so(app: Served) -> None:
    with streams(app.url, 4) as asked:
        eventually(lambda: app.in_flight() == 4)
        change(app, "drain", timeout_s=0.5)
        began = time.monotonic()
        told = [future.result() for future in asked]
        assert time.monotonic() - began < 3.0, "as long as it takes every Router to hear of it, and no longer"
    assert all(one.is_ended_by_an_error for one in told)
    assert [one.error_code for one in told] == ["draining"] * 4
    change(app, "drain", draining=False)
    eventually(
        lambda: all(read(app.url, number, max_tokens=2).is_whole for number in range(4)), within_s=15.0
    )
    assert sum(replica["failures"] for replica in app.replicas("sim")) == 0


def test_a_node_that_ray_drains_loses_nothing(app: Served, unbroken: list[Answer]) -> None:
    """As an autoscaler or the notice of a preemption does it. Serve brings others and stops those."""
    import ray

    head = ray.get_runtime_context().get_node_id()
    (node,) = {replica["node"] for replica in app.replicas("sim")} - {head}
    with streams(app.url, STREAMS) as asked:
        eventually(lambda: app.in_flight() == STREAMS)
        drain_by_ray(app.cluster, node, within_s=40)
        told = [future.result() for future in asked]
    assert_unbroken(told, unbroken)

    def all_on_the_head() -> bool:
        assert read(app.url, 1, max_tokens=2).is_whole
        rows = app.replicas("sim")
        return [(row["node"], row["state"]) for row in rows] == [(head, "ready")] * 4

    eventually(all_on_the_head, within_s=60.0)
    assert sum(replica["failures"] for replica in app.replicas("sim")) == 0


def drain_by_ray(cluster: LocalCluster, node: str, *, within_s: int) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = time.time_ns() // 1_000_000 + within_s * 1000
    accepted, why_not = GcsClient(address=cluster.address).drain_node(node, reason, "a test", deadline_ms)
    assert accepted, why_not


def test_what_there_is_not_is_a_404(app: Served) -> None:
    response = httpx.post(f"{app.url}/{API}/nodes/nowhere/drain", json={})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "node")


def test_when_the_application_is_deleted_what_runs_finishes(app: Served, unbroken: list[Answer]) -> None:
    """The last test of the module: nothing is served after it."""
    with streams(app.url, STREAMS) as asked:
        eventually(lambda: app.in_flight() == STREAMS)
        app.cluster.deploy(app.config | {"applications": []})
        told = [future.result() for future in asked]
    assert_unbroken(told, unbroken)
