"""Clients that keep asking while something is done to the cluster, and hold every answer to what is true."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.cluster.sse import chat
from tests.streams import Answer, ask_in_thread


def body(model: str, number: int, *, stream: bool) -> dict[str, Any]:
    tokens = 20 + 7 * number % 21  # so that they do not all end together
    return chat(number, model=model, stream=stream, max_tokens=tokens)


@dataclass(frozen=True)
class Asked:
    model: str
    number: int
    answer: Answer


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
    answers: list[Asked] = field(default_factory=list)
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
            return sum(asked.model == model for asked in self.answers)

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
        url = f"{self.url}/v1/chat/completions"
        with httpx.Client(timeout=60, limits=httpx.Limits(keepalive_expiry=None)) as client:
            while not self._over.is_set():
                with self._lock:
                    self._next += 1
                    number = self._next
                answer = ask_in_thread(client, url, body(model, number, stream=stream))
                with self._lock:
                    self.answers.append(Asked(model, number, answer))
                if not stream:
                    self._over.wait(self.idle_s)
