"""Replicas die and freeze under streams, and nobody who reads one can tell."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.cluster.served import Served, served, simulator
from tests.cluster.surviving import assert_survive, bodies
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

STREAMS = 16


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    models = [simulator("sim", replicas=3, ttft_ms=20, inter_token_ms=50, tokens=80, slots=32)]
    with served(models, strategy="least_connections", replicas=1, slow_start_s=0) as running:
        yield running


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_no_stream_breaks_when_its_replica_dies_or_freezes(app: Served, fault: signal.Signals) -> None:
    eventually(lambda: [r["state"] for r in app.replicas("sim")].count("ready") == 3, within_s=60)
    assert_survive(app, "sim", bodies("sim", STREAMS), fault)
