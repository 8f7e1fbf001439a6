"""Clients that keep asking while something is done to the cluster, and hold every answer to what is true."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from blaze.api.schemas import ChatCompletionRequest, parse
from blaze.api.translate import chat_request
from blaze.config import SimulatorConfig
from blaze.engines.simulator import SimulatorEngine
from blaze.types import Caller, TextDelta

_NO_WAIT = {"ttft_ms": 0.001, "inter_token_ms": 0.001}  # as many draws as with longer waits


def body(model: str, number: int, *, stream: bool) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell story {number}."}],
        "seed": number,
        "max_tokens": 20 + 7 * number % 21,  # so that they do not all end together
        "stream": stream,
    }


def expected(options: Mapping[str, Any], request: dict[str, Any]) -> str:
    """What a simulator with these options answers, computed here."""

    async def ask() -> str:
        engine = SimulatorEngine(SimulatorConfig(**dict(options) | _NO_WAIT))
        asked = chat_request(parse(ChatCompletionRequest, json.dumps(request).encode()), "r", Caller())
        texts = [
            event.text
            async for events in engine.run(asked)
            for event in events
            if isinstance(event, TextDelta)
        ]
        return "".join(texts)

    return asyncio.run(ask())


@dataclass
class Answer:
    model: str
    number: int
    text: str = ""
    error: str = ""
    longest_gap_s: float = 0.0


@dataclass
class SteadyLoad:
    """``readers`` clients for each of the models, each with one connection that it keeps, and no retries.
    Half of them read streams; the others read whole answers, and leave their connection idle for ``idle_s``
    after each. Another client asks all the time whether the service is ready."""

    url: str
    models: tuple[str, ...]
    readers: int
    idle_s: float
    unready: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: int = 0

    @contextmanager
    def running(self) -> Iterator[SteadyLoad]:
        threads = [
            threading.Thread(target=self._keep_asking, args=(model, index % 2 == 0))
            for model in self.models
            for index in range(self.readers)
        ]
        threads.append(threading.Thread(target=self._watch))
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def done(self, model: str) -> int:
        with self._lock:
            return Counter(answer.model for answer in self.answers)[model]

    def _watch(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._over.wait(0.1):
                try:
                    response = client.get(f"{self.url}/ready")
                except httpx.HTTPError as error:
                    self.unready.append(f"{type(error).__name__}: {error}")
                else:
                    if response.status_code != 200:
                        self.unready.append(f"{response.status_code}: {response.text[:300]}")

    def _keep_asking(self, model: str, stream: bool) -> None:
        with httpx.Client(timeout=60, limits=httpx.Limits(keepalive_expiry=None)) as client:
            while not self._over.is_set():
                with self._lock:
                    self._next += 1
                    answer = Answer(model, self._next)
                try:
                    (self._stream if stream else self._whole)(client, answer)
                except httpx.HTTPError as error:
                    answer.error = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.answers.append(answer)
                if not stream:
                    self._over.wait(self.idle_s)

    def _whole(self, client: httpx.Client, answer: Answer) -> None:
        request = body(answer.model, answer.number, stream=False)
        response = client.post(f"{self.url}/v1/chat/completions", json=request)
        if response.status_code == 200:
            answer.text = response.json()["choices"][0]["message"]["content"]
        else:
            answer.error = f"{response.status_code}: {response.text[:300]}"

    def _stream(self, client: httpx.Client, answer: Answer) -> None:
        request, at = body(answer.model, answer.number, stream=True), time.perf_counter()
        done = False
        with client.stream("POST", f"{self.url}/v1/chat/completions", json=request) as response:
            for line in response.iter_lines():
                if response.status_code != 200:
                    answer.error = f"{response.status_code}: {line[:300]}"
                if not line.startswith("data: "):
                    continue
                now = time.perf_counter()
                answer.longest_gap_s, at = max(answer.longest_gap_s, now - at), now
                done = line == "data: [DONE]"
                chunk = {} if done else json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    answer.error = json.dumps(chunk["error"])
                for choice in chunk.get("choices", ()):
                    answer.text += choice["delta"].get("content") or ""
        if not done and not answer.error:
            answer.error = "the stream was cut off"
