"""Clients that read a streamed chat answer each, many at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from tests.streams import Answer, ask_in_thread


def chat(number: int, *, model: str = "sim", stream: bool = True, **fields: Any) -> dict[str, Any]:
    """The body of a request; ``fields`` change it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell story {number}."}],
        "seed": number,
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {}) | fields


def read(url: str, number: int, **fields: Any) -> Answer:
    """On a connection of its own."""
    with httpx.Client(timeout=90) as client:
        return ask_in_thread(client, f"{url}/v1/chat/completions", chat(number, **fields))


@contextmanager
def streams(url: str, count: int, **fields: Any) -> Iterator[list[Future[Answer]]]:
    """So many at once; all have ended when this does."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(read, url, number, **fields) for number in range(count)]
