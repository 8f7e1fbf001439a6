"""Clients that read whole answers and streams, and miss nothing that is wrong with them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

Body = Mapping[str, Any]


@dataclass
class Answer:
    """What a client has read of one answer, by choice, and its longest wait between two pieces of text."""

    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    ids: set[str] = field(default_factory=set)
    replica: str | None = None  # the first to answer
    status: int | None = None  # None: no response came
    trouble: str | None = None  # why it is no whole answer
    broke: bool = False  # its connection did: nobody has told why it is no whole answer
    error_code: str | None = None  # of an error that was told
    done: bool = False
    left: bool = False  # the client itself went away
    first_text_s: float | None = None
    longest_gap_s: float = 0.0
    started_at: float = 0.0  # of the monotonic clock
    ended_at: float = 0.0
    _last_at: float | None = None

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    @property
    def tokens(self) -> tuple[int | None, int | None, int | None]:
        """Of the prompt, of the answer, of both; how many were cached depends on what came before."""
        usage = self.usage or {}
        return usage.get("prompt_tokens"), usage.get("completion_tokens"), usage.get("total_tokens")

    @property
    def lost(self) -> str | None:
        """Why, in a few words; None: it is whole, or nobody wanted it any more."""
        if self.trouble is not None or self.left:
            return self.trouble
        if self.status != 200:
            return f"status {self.status}"
        return None if self.done else "no [DONE]"

    @property
    def is_whole(self) -> bool:
        ended = bool(self.texts) and self.finish_reasons.keys() == self.texts.keys()
        return self.lost is None and not self.left and ended and len(self.ids) == 1

    @property
    def is_ended_by_an_error(self) -> bool:
        """A stream that had begun, and whose reader was told properly that there will be no more."""
        told = self.error_code is not None and self.done
        return self.status == 200 and told and not self.finish_reasons

    def take_line(self, line: str, now: float) -> None:
        """One line of a stream of server-sent events."""
        if not line.startswith("data: "):
            return
        if self.done:
            self.trouble = f"after [DONE]: {line}"
            return
        if line == "data: [DONE]":
            self.done = True
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            self.trouble = f"error event: {chunk['error'].get('message')}"
            self.error_code = chunk["error"].get("code")
        else:
            self.take_chunk(chunk, now)

    def take_chunk(self, chunk: Mapping[str, Any], now: float) -> None:
        self.ids.add(chunk["id"])
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if index in self.finish_reasons:
                self.trouble = f"after the finish of choice {index}: {choice}"
            if text:
                self._note_text(now)
                self.texts[index] = self.texts.get(index, "") + text
            if choice["finish_reason"]:
                self.finish_reasons[index] = choice["finish_reason"]

    def take_whole(self, body: Mapping[str, Any]) -> None:
        self.ids.add(body["id"])
        self.usage, self.done = body["usage"], True
        for choice in body["choices"]:
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            if choice["index"] in self.texts:
                self.trouble = f"choice {choice['index']} twice"
            self.texts[choice["index"]] = text
            self.finish_reasons[choice["index"]] = choice["finish_reason"]

    def end(self, now: float) -> None:
        """The silence before an end that is none counts, too."""
        self.ended_at = now
        if self.lost is not None and self._last_at is not None:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last_at)

    def _note_text(self, now: float) -> None:
        if self._last_at is None:
            self.first_text_s = now - self.started_at
        else:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last_at)
        self._last_at = now


async def ask(
    client: httpx.AsyncClient, url: str, body: Body, *, leave_after_s: float | None = None
) -> Answer:
    """Never raises for what becomes of the answer. ``leave_after_s``: the client goes away in mid-stream."""
    answer = Answer(started_at=time.monotonic())
    try:
        if body.get("stream"):
            async with client.stream("POST", url, json=body) as response:
                if not _take_head(response, answer):
                    _refused(answer, await response.aread())
                    return answer
                async for line in response.aiter_lines():
                    answer.take_line(line, now := time.monotonic())
                    late = leave_after_s is not None and now - answer.started_at > leave_after_s
                    if late and not answer.done:
                        answer.left = True
                        break
        else:
            _take_whole(await client.post(url, json=body), answer)
    except (httpx.HTTPError, ValueError) as error:
        _failed(answer, error)
    finally:
        answer.end(time.monotonic())
    return answer


def ask_in_thread(client: httpx.Client, url: str, body: Body) -> Answer:
    """The same, for clients with a thread each."""
    answer = Answer(started_at=time.monotonic())
    try:
        if body.get("stream"):
            with client.stream("POST", url, json=body) as response:
                if not _take_head(response, answer):
                    _refused(answer, response.read())
                    return answer
                for line in response.iter_lines():
                    answer.take_line(line, time.monotonic())
        else:
            _take_whole(client.post(url, json=body), answer)
    except (httpx.HTTPError, ValueError) as error:
        _failed(answer, error)
    finally:
        answer.end(time.monotonic())
    return answer


def _take_head(response: httpx.Response, answer: Answer) -> bool:
    answer.status, answer.replica = response.status_code, response.headers.get("x-blaze-replica")
    return answer.status == 200


def _take_whole(response: httpx.Response, answer: Answer) -> None:
    if _take_head(response, answer):
        answer.take_whole(response.json())
    else:
        _refused(answer, response.content)


def _refused(answer: Answer, content: bytes) -> None:
    answer.trouble = f"status {answer.status}: {content[:200]!r}"
    try:
        answer.error_code = json.loads(content)["error"]["code"]
    except (ValueError, TypeError, KeyError):
        answer.error_code = None  # whoever told it is not one of ours


def _failed(answer: Answer, error: httpx.HTTPError | ValueError) -> None:
    answer.trouble = f"{type(error).__name__}: {error}"
    answer.broke = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)


def new_client(*, timeout_s: float = 60.0) -> httpx.AsyncClient:
    """``timeout_s``: the longest silence that a client puts up with."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)
