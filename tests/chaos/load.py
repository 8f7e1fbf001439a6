"""Clients that ask one thing after another until they are told to stop, and check every answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import httpx

from tests.chaos.models import Model
from tests.chaos.score import Record
from tests.chaos.workload import Asked, what_is_wrong
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
            record = await ask_and_check(self._client, self._url, model, model.draw(rng))
            self.records.append(record)
            if record.answer.lost:
                await asyncio.sleep(0.2)  # a client that is refused does not ask a thousand times a second


async def ask_and_check(client: httpx.AsyncClient, url: str, model: Model, asked: Asked) -> Record:
    answer = await ask(client, url + asked.path, asked.body, leave_after_s=asked.leave_after_s)
    return Record(asked, answer, None if answer.lost else what_is_wrong(answer, model.expect(asked.body)))
