"""What the health actor does by itself: nothing that is slow holds up the rest."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator

import pytest

from blaze.health.settings import HealthSettings
from blaze.health.supervisor import Supervisor
from blaze.reports import ReplicaState
from deployments.rounds import Rounds
from tests.fakes import FakeClock
from tests.samples import heartbeat
from tests.waiting import until

# Rounds every 4 ms of the loop's time. Silence is counted by the clock of the test.
SETTINGS = HealthSettings(probe_period_s=0.004, stall_after_s=1.0, grace_s=0.0)


class FakeRay:
    """Actors that have ended, and those about whom no answer comes before ``answers`` is set."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.slow: set[str] = set()
        self.ended: list[str] = []
        self.asked: list[str] = []
        self.answers = threading.Event()

    def has_ended(self, actor: str) -> bool:
        self.asked.append(actor)
        if actor in self.slow:
            self.answers.wait(60)
        return actor in self.gone

    def end(self, actor: str) -> None:
        self.ended.append(actor)
        if actor in self.slow:
            self.answers.wait(60)
            raise ConnectionError(actor)


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


class Bench:
    def __init__(self, ray: FakeRay) -> None:
        self.clock = FakeClock()
        self.supervisor = Supervisor(SETTINGS, self.clock)
        self.rounds = Rounds(self.supervisor, SETTINGS, has_ended=ray.has_ended, end=ray.end)

    def beat(self, *ids: str, state: str = "idle") -> None:
        for rank, replica_id in enumerate(ids):
            self.supervisor.heartbeat(
                heartbeat(replica_id, model=replica_id, rank=rank, actor=replica_id, state=state)  # type: ignore[arg-type]
            )

    def states(self) -> dict[str, ReplicaState]:
        return {r.heartbeat.replica_id: r.state for r in self.supervisor.view().replicas}

    def wait(self, seconds: float, *well: str) -> None:
        """Time passes in which the loop runs and these are heard."""
        for _ in range(round(seconds / 0.004)):
            self.clock.advance(0.004)
            self.beat(*well)
            self.supervisor.awake()


@pytest.fixture
async def bench(ray: FakeRay) -> AsyncIterator[Bench]:
    made = Bench(ray)
    yield made
    ray.answers.set()
    for task in made.rounds._loops:
        task.cancel()


async def test_one_that_cannot_be_asked_after_holds_up_neither_others_nor_decisions(
    bench: Bench, ray: FakeRay
) -> None:
    ray.slow, ray.gone = {"slow"}, {"gone"}
    bench.beat("slow", "gone", "frozen")
    bench.wait(0.1)
    await until(lambda: "gone" not in bench.states())
    assert ray.asked.count("slow") == 1  # and no answer has come
    bench.beat("failed", state="failed")
    await until(lambda: "failed" in ray.ended)


async def test_one_that_cannot_be_ended_does_not_keep_others_from_it(bench: Bench, ray: FakeRay) -> None:
    ray.slow = {"slow"}
    bench.beat("slow", state="failed")
    await until(lambda: ray.ended == ["slow"])
    bench.beat("other", state="failed")
    await until(lambda: "other" in ray.ended)
    assert bench.states()["slow"] is ReplicaState.RESTARTING
    ray.answers.set()
    await until(lambda: bench.states()["slow"] is not ReplicaState.RESTARTING)
    events = [event.reason for event in bench.supervisor.view().events if event.replica_id == "slow"]
    assert "could not be ended: ConnectionError" in events
