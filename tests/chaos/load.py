"""Clients that ask one thing after another until they are told to stop, and check every answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import httpx

from tests.chaos.models import Model
from tests.chaos.score import Record
from tests.chaos.workload import what_is_wrong
from tests.streams import ask


class Load:
    """Inside the ``async with`` it runs; after it every answer has come to its end."""

    def __init__(self, client: httpx.AsyncClient, url: str, models: Sequence[Model], seed: int) -> None:
        self.records: list[Record] = []
        self._client = client
        self._url = url
        self._stopping = False
        self._clients = [
            (model, random.Random(f"load/{seed}/{model.name}/{number}"))
            for model in models
            for number in range(model.clients)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._ask_on(*client)) for client in self._clients]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _ask_on(self, model: Model, rng: random.Random) -> None:
        await asyncio.sleep(rng.random())
        while not self._stopping:
            asked = model.draw(rng)
            answer = await ask(
                self._client, self._url + asked.path, asked.body, leave_after_s=asked.leave_after_s
            )
            wrong = None if answer.lost else what_is_wrong(answer, model.expect(asked.body))
            self.records.append(Record(asked, answer, wrong))
            if answer.lost:
                await asyncio.sleep(0.2)  # a client that is refused does not ask a thousand times a second
