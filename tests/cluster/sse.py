"""What a client reads of streamed chat answers, many at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass
class Told:
    """``status``: of the response; None: there was none. ``cut``: the connection broke before the end."""

    status: int | None = None
    text: str = ""
    ids: frozenset[str] = frozenset()
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    errors: tuple[dict[str, Any], ...] = ()
    num_done: int = 0
    cut: bool = False

    @property
    def is_whole(self) -> bool:
        whole = self.finish_reason is not None and self.num_done == 1 and len(self.ids) == 1
        return self.status == 200 and whole and not self.errors and not self.cut


def read(url: str, number: int, **fields: Any) -> Told:
    told = Told()
    body = {
        "model": "sim",
        "messages": [{"role": "user", "content": f"Tell story {number}."}],
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | fields, timeout=90) as response:
            told.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: "):
                    _take(told, line.removeprefix("data: "))
    except httpx.HTTPError:
        told.cut = True
    return told


def _take(told: Told, data: str) -> None:
    if data == "[DONE]":
        told.num_done += 1
        return
    chunk = json.loads(data)
    if "error" in chunk:
        told.errors += (chunk["error"],)
        return
    told.ids |= {chunk["id"]}
    told.usage = chunk.get("usage") or told.usage
    for choice in chunk["choices"]:
        told.text += choice["delta"].get("content") or ""
        told.finish_reason = choice["finish_reason"] or told.finish_reason


@contextmanager
def streams(url: str, count: int, **fields: Any) -> Iterator[list[Future[Told]]]:
    """So many at once; all have ended when this does."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(read, url, number, **fields) for number in range(count)]
