"""Many streams at once, while the replica that has most of them is hit: none may break, none may differ."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.cluster.served import Served
from tests.streams import Answer, Body, ask, new_client
from tests.waiting import eventually


def bodies(model: str, count: int, **sampling: Any) -> list[Body]:
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **sampling}
    return [
        {**common, "seed": number, "messages": [{"role": "user", "content": f"Tell story {number}."}]}
        for number in range(count)
    ]


def all_of(app: Served, asked: Sequence[Body]) -> list[Answer]:
    async def ask_all() -> list[Answer]:
        async with new_client() as client:
            url = f"{app.url}/v1/chat/completions"
            return await asyncio.gather(*(ask(client, url, body) for body in asked))

    return asyncio.run(ask_all())


def assert_unbroken(found: list[Answer], unbroken: list[Answer]) -> None:
    for answer, expected in zip(found, unbroken, strict=True):
        assert answer.lost is None
        assert len(answer.ids) == 1
        assert answer.texts == expected.texts
        assert (answer.finish_reasons, answer.tokens) == (expected.finish_reasons, expected.tokens)


def busiest(app: Served, model: str) -> dict[str, Any]:
    return max(app.replicas(model), key=lambda replica: replica["in_flight"])


def resumed(app: Served, model: str) -> int:
    counts: list[int] = [found["resumed"] for found in app.status()["models"] if found["name"] == model]
    return counts[0]


def assert_survive(app: Served, model: str, asked: list[Body], fault: signal.Signals) -> None:
    """All replicas of the model must be ready."""
    unbroken = all_of(app, asked)
    before = resumed(app, model)
    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(all_of, app, asked)
        eventually(lambda: app.in_flight() == len(asked))
        victim = busiest(app, model)
        assert victim["in_flight"] >= 3
        os.kill(victim["pid"], fault)
        try:
            found = streams.result(timeout=90)
        finally:
            if fault is signal.SIGSTOP:
                os.kill(victim["pid"], signal.SIGKILL)  # a frozen process would outlive the cluster
    assert_unbroken(found, unbroken)
    eventually(lambda: resumed(app, model) - before >= victim["in_flight"])
    eventually(lambda: app.in_flight() == 0)
