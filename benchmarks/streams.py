"""A load of streamed answers, as their clients see it; a process of its own beside the server.

The client shares the processors with the server, so it does next to nothing while the clock runs: it keeps
what each read of a socket brought, with its time. All parsing comes after, and is the same for any server.

Reads of a command as JSON from standard input; one line of JSON for each on standard output.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.worker import Line

_END = b"\r\n0\r\n\r\n"  # of a chunked body
_PATIENCE_S = 300.0  # for one answer


@dataclass(frozen=True)
class Read:
    at: float
    data: bytes


@dataclass(frozen=True)
class Streamed:
    """One answer. ``arrivals``: the times at which text came, each counted once, however much came then."""

    started: float
    ended: float
    arrivals: list[float]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class StreamLoad:
    """One closed loop. Tokens are those of ``usage``; times are the client's.

    ``gaps_ms``: between one arrival of text and the next of the same answer. A gap counts once, whether one
    token came after it or several: whoever sends tokens in bunches gains nothing by it.
    """

    seconds: float
    completion_tokens: int
    prompt_tokens: int
    ttft_ms: list[float]
    gaps_ms: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.completion_tokens / self.seconds

    @property
    def ttft_p50_ms(self) -> float:
        return statistics.median(self.ttft_ms)

    @property
    def gap_p99_ms(self) -> float:
        return statistics.quantiles(self.gaps_ms, n=100)[98]


class _Connection(asyncio.Protocol):
    """Keep-alive: one request after another."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._reads: list[Read] = []
        self._tail = b""
        self._done: asyncio.Future[list[Read]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: bytes) -> asyncio.Future[list[Read]]:
        """What came back, read by read, once it is complete."""
        self._reads, self._tail = [], b""
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        self._reads.append(Read(time.perf_counter(), data))
        self._tail = (self._tail + data)[-len(_END) :]
        if self._done and not self._done.done() and (self._tail == _END or self._is_refusal()):
            self._done.set_result(self._reads)

    def _is_refusal(self) -> bool:
        """An answer that is no stream; parsing says what it is."""
        return not self._reads[0].data.startswith(b"HTTP/1.1 200")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError(f"closed in the middle of an answer: {exc}"))


async def closed_loop(url: str, bodies: list[bytes], connections: int) -> StreamLoad:
    """Each connection takes the next body as soon as its answer is complete, until none is left."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    waiting = iter(bodies)
    answers: list[tuple[float, list[Read]]] = []

    async def client(connection: _Connection) -> None:
        for body in waiting:
            head = (
                f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            ).encode()
            started = time.perf_counter()
            reads = await asyncio.wait_for(connection.send(head + body), _PATIENCE_S)
            answers.append((started, reads))

    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(_Connection, host, port))[1] for _ in range(connections)]
    try:
        await asyncio.gather(*(client(connection) for connection in made))
    finally:
        for connection in made:
            connection.transport.close()
    return summary([parse(started, reads) for started, reads in answers])


def summary(answers: list[Streamed]) -> StreamLoad:
    return StreamLoad(
        seconds=max(a.ended for a in answers) - min(a.started for a in answers),
        completion_tokens=sum(a.completion_tokens for a in answers),
        prompt_tokens=sum(a.prompt_tokens for a in answers),
        ttft_ms=[(a.arrivals[0] - a.started) * 1000 for a in answers],
        gaps_ms=[
            (later - earlier) * 1000
            for a in answers
            for earlier, later in zip(a.arrivals, a.arrivals[1:], strict=False)
        ],
    )


def parse(started: float, reads: list[Read]) -> Streamed:
    """Raises :class:`RuntimeError` for an answer that is an error, or lacks its usage."""
    usage: dict[str, Any] | None = None
    arrivals: list[float] = []
    for at, event in events(reads):
        if event == b"[DONE]":
            break
        chunk = json.loads(event)
        if "error" in chunk:
            raise RuntimeError(f"an error in mid-stream: {chunk}")
        usage = chunk.get("usage") or usage
        has_text = any((choice.get("delta") or {}).get("content") for choice in chunk["choices"])
        if has_text and at not in arrivals[-1:]:
            arrivals.append(at)
    if usage is None or not arrivals:
        raise RuntimeError(f"an answer without text or usage: {reads[-1].data!r}")
    return Streamed(started, reads[-1].at, arrivals, usage["prompt_tokens"], usage["completion_tokens"])


def events(reads: list[Read]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, with the time of the read that completed it."""
    pending = b""
    for at, payload in payloads(reads):
        *complete, pending = (pending + payload).split(b"\n\n")
        for event in complete:
            if event.startswith(b"data: "):
                yield at, event.removeprefix(b"data: ")


def payloads(reads: list[Read]) -> Iterator[tuple[float, bytes]]:
    """The body's chunks as they were completed."""
    head, _, data = reads[0].data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200") or b"chunked" not in head.lower():
        raise RuntimeError(reads[0].data.decode("utf-8", errors="replace"))
    buffer = b""
    for read in [Read(reads[0].at, data), *reads[1:]]:
        buffer += read.data
        while (end := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:end], 16)
            if len(buffer) < end + 2 + size + 2:
                break
            yield read.at, buffer[end + 2 : end + 2 + size]
            buffer = buffer[end + 2 + size + 2 :]


def main() -> None:
    line = Line()
    line.send({})
    for command in line.commands():
        bodies = [json.dumps(body).encode() for body in command["bodies"]]
        load = asyncio.run(closed_loop(command["url"], bodies, command["connections"]))
        line.send(asdict(load))


if __name__ == "__main__":
    main()
