"""A closed loop of connections against one URL: bounded in time, every answer checked."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Load:
    connections: int
    requests: int
    seconds: float
    latencies_ms: list[float]

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def p50_ms(self) -> float:
        return statistics.median(self.latencies_ms)

    @property
    def p99_ms(self) -> float:
        return (
            statistics.quantiles(self.latencies_ms, n=100)[98] if len(self.latencies_ms) > 1 else self.p50_ms
        )


async def closed_loop(
    url: str, body: bytes, *, connections: int, seconds: float, warmup_s: float = 1.0, headers: str = ""
) -> Load:
    """Each connection sends a request, reads the whole answer, and sends the next.

    Raw sockets: a client library costs more than the server does, on the same two cores.
    """
    latencies: list[float] = []
    begin = time.perf_counter() + warmup_s
    end = begin + seconds

    async def connection() -> None:
        parts = urlsplit(url)
        head = (
            f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
            f"content-type: application/json\r\n{headers}content-length: {len(body)}\r\n\r\n"
        ).encode()
        while time.perf_counter() < end:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                while (started := time.perf_counter()) < end:
                    writer.write(head + body)
                    await read_answer(reader)
                    if begin <= started and (now := time.perf_counter()) <= end:
                        latencies.append((now - started) * 1000)
            except asyncio.IncompleteReadError as error:
                if error.partial:  # in the middle of an answer: that is a fault
                    raise
                # A proxy that reloads its configuration closes idle connections; a client opens a new one.
            finally:
                writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    return Load(connections, len(latencies), seconds, latencies)


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """The body of one chunked or sized response. Raises on any status but 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode("latin-1"))
    lowered = head.lower()
    if b"transfer-encoding: chunked" not in lowered:
        length = int(lowered.split(b"content-length:")[1].split(b"\r\n")[0])
        return await reader.readexactly(length)
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body
