"""New weights, settings, other numbers of replicas, a version that does not start: nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from blaze.engine_config import SimulatorConfig
from deployments.data_plane import fast_data_plane
from deployments.local import LocalCluster, free_port
from tests.chaos.expected import simulated
from tests.cluster.served import Served, serve_config, simulator, wait_until_ready
from tests.cluster.steady_load import SteadyLoad, body
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

OPTIONS = {"ttft_ms": 20, "inter_token_ms": 50, "tokens": 60, "slots": 64}
KEEP_ALIVE_S, LISTENS_S = 2, 3
DRAIN_TIMEOUT_S = 0.2  # so that most of what runs on a replica that stops is moved


def model(name: str, *, replicas: int, **options: Any) -> dict[str, Any]:
    return simulator(name, replicas=replicas, **OPTIONS, **options)


def settings(port: int, *models: dict[str, Any], **router: Any) -> dict[str, Any]:
    config = serve_config(port, list(models), drain_timeout_s=DRAIN_TIMEOUT_S, slow_start_s=0, **router)
    config["http_options"]["keep_alive_timeout_s"] = KEEP_ALIVE_S
    return config


class Rollout(Served):
    """The application as it was deployed last, under load since the beginning."""

    def deploy(self, *models: dict[str, Any], **router: Any) -> None:
        port = int(self.url.rpartition(":")[2])
        self.cluster.deploy(settings(port, *models, **router))

    def ids(self, name: str) -> frozenset[str]:
        return frozenset(replica["id"] for replica in self.replicas(name) if replica["state"] == "ready")

    def is_settled(self) -> bool:
        """Nothing is being started or stopped any more."""
        return self.cluster.progress().status == "RUNNING"


ONE, NEW_ONE = model("one", replicas=2, seed=1), model("one", replicas=2, seed=11)
TWO = model("two", replicas=4, seed=2)


@pytest.fixture(scope="module")
def rollout() -> Iterator[Rollout]:
    port = free_port()
    config = settings(port, ONE, TWO)
    with pytest.MonkeyPatch.context() as patch:
        # In place of HAProxy's and Serve's own times, in the same proportion.
        patch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", str(LISTENS_S))
        assert fast_data_plane()["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] == str(LISTENS_S)
        with LocalCluster(num_cpus=4) as cluster:
            cluster.deploy(config)
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(cluster, url)
            yield Rollout(cluster, url, config)


@contextmanager
def load(rollout: Rollout, *truths: tuple[str, tuple[int, ...]]) -> Iterator[SteadyLoad]:
    """``truths``: the models that are asked, and the seeds of the weights by which they may answer."""
    models = tuple(name for name, _ in truths)
    with SteadyLoad(rollout.url, models, readers=6, idle_s=KEEP_ALIVE_S / 2).running() as steady:
        eventually(lambda: all(steady.done(name) >= 6 for name, _ in truths))
        yield steady
    assert steady.answers
    assert [asked for asked in steady.answers if not asked.answer.is_whole] == []
    assert steady.unready == []
    for name, seeds in truths:
        for asked in steady.answers:
            if asked.model == name:
                true = [_true(name, asked.number, seed) for seed in seeds]
                assert asked.answer.text in true, f"{asked}\n{true}"


def _true(name: str, number: int, seed: int) -> str:
    return simulated(SimulatorConfig(**OPTIONS, seed=seed), body(name, number, stream=True)).texts[0]


def some_more(steady: SteadyLoad, name: str) -> Callable[[], bool]:
    enough = steady.done(name) + 8
    return lambda: steady.done(name) >= enough


def seed_of(rollout: Rollout, name: str, *seeds: int) -> int | None:
    """By whose weights the model answers now."""
    request = body(name, 0, stream=False)
    answer = httpx.post(f"{rollout.url}/v1/chat/completions", json=request, timeout=60).json()
    text = answer["choices"][0]["message"]["content"]
    return next((seed for seed in seeds if _true(name, 0, seed) == text), None)


def resumed(rollout: Rollout, name: str) -> int:
    return sum(m["resumed"] for m in rollout.status()["models"] if m["name"] == name)


def test_a_version_that_does_not_start_leaves_the_old_one_serving_and_says_so(rollout: Rollout) -> None:
    before = rollout.ids("one")
    with load(rollout, ("one", (1,)), ("two", (2,))) as steady:
        rollout.deploy(model("one", replicas=2, seed=10, fail_load=True), TWO)
        eventually(lambda: rollout.cluster.progress().status == "DEPLOY_FAILED", within_s=60, every_s=0.25)
        eventually(some_more(steady, "one"))
    said = {d.name: d.message for d in rollout.cluster.progress().deployments}["simulator-one"]
    assert "told to fail to load" in said and "previous version keep running" in said
    assert rollout.ids("one") == before


def test_new_weights_of_one_model(rollout: Rollout) -> None:
    """Also what comes after an update that failed."""
    ones, twos = rollout.ids("one"), rollout.ids("two")
    with load(rollout, ("one", (1, 11)), ("two", (2,))) as steady:
        rollout.deploy(NEW_ONE, TWO)
        eventually(lambda: len(rollout.ids("one") - ones) == 2, within_s=60, every_s=0.25)
        eventually(rollout.is_settled, within_s=60, every_s=0.25)
        eventually(some_more(steady, "one"))
    assert not rollout.ids("one") & ones
    assert rollout.ids("two") == twos, "its replicas are others, although nothing of it was changed"
    assert seed_of(rollout, "one", 1, 11) == 11


def test_settings_of_the_router(rollout: Rollout) -> None:
    before = rollout.ids("one") | rollout.ids("two")
    with load(rollout, ("one", (11,)), ("two", (2,))) as steady:
        rollout.deploy(NEW_ONE, TWO, strategy="round_robin")
        eventually(lambda: all("round_robin" in m["strategy"] for m in rollout.status()["models"]))
        eventually(rollout.is_settled, within_s=60, every_s=0.25)
        eventually(some_more(steady, "one"))
    assert rollout.ids("one") | rollout.ids("two") == before


def test_from_four_replicas_to_one_and_back(rollout: Rollout) -> None:
    before, moved = rollout.ids("two"), resumed(rollout, "two")
    assert len(before) == 4
    with load(rollout, ("two", (2,))) as steady:
        rollout.deploy(NEW_ONE, model("two", replicas=1, seed=2), strategy="round_robin")
        eventually(lambda: len(rollout.ids("two")) == 1 and rollout.is_settled(), within_s=60, every_s=0.25)
        (left,) = rollout.ids("two")
        eventually(lambda: resumed(rollout, "two") > moved)
        rollout.deploy(NEW_ONE, TWO, strategy="round_robin")
        eventually(lambda: len(rollout.ids("two")) == 4 and rollout.is_settled(), within_s=60, every_s=0.25)
        eventually(some_more(steady, "two"))
    assert left in before and left in rollout.ids("two")
