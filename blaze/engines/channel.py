"""The way of events from a compute thread to a reader on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from typing import Self

from blaze.types import Event, Events, Failed, Finished


class Bell:
    """Wakes the readers of many channels with one call into their event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[EventChannel] = []
        self._held = False

    @contextmanager
    def held(self) -> Generator[None]:
        """What is put meanwhile, by any thread, is announced at the end, or at the next ``ring``."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.ring()

    def announce(self, channel: EventChannel) -> None:
        with self._lock:
            self._waiting.append(channel)
        if not self._held:
            self.ring()

    def ring(self) -> None:
        """Wake whoever has something to read."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[EventChannel]] = defaultdict(list)
        for channel in waiting:
            by_loop[channel.loop].append(channel)
        for loop, channels in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake_all, channels)
            except RuntimeError:  # the loop is gone, and with it the readers
                for channel in channels:
                    channel.abandon()


def _wake_all(channels: list[EventChannel]) -> None:
    for channel in channels:
        channel.wake()


class EventChannel:
    """Many events in, few batches out.

    The writer (any thread) never waits: what the reader has not fetched yet piles up and leaves as one
    batch, so a slow reader costs nobody else a step. The loop is woken once per batch, not per event.
    """

    def __init__(self, bell: Bell | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._bell = bell or Bell()
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._ready = asyncio.Event()
        self._signalled = False
        self._closed_to_writer = False
        self._drained = False

    @property
    def abandoned(self) -> bool:
        """The reader has left: whoever works for it can stop."""
        return self._drained

    @property
    def is_complete(self) -> bool:
        """The terminal event is in it: whether somebody reads it is not the writer's affair."""
        return self._closed_to_writer

    def put(self, *events: Event) -> None:
        """Add events; after a terminal event, further ones are dropped."""
        with self._lock:
            if self._closed_to_writer:
                return
            self._events.extend(events)
            self._closed_to_writer = isinstance(self._events[-1], Finished | Failed)
            if self._signalled:
                return
            self._signalled = True
        self._bell.announce(self)

    def wake(self) -> None:
        """On the event loop: there is something to read."""
        self._ready.set()

    def abandon(self) -> None:
        self._drained = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        if self._drained:
            raise StopAsyncIteration
        await self._ready.wait()
        with self._lock:
            batch = tuple(self._events)
            self._events.clear()
            self._ready.clear()
            self._signalled = False
            self._drained = self._closed_to_writer
        return batch

    async def read(self) -> AsyncGenerator[Events]:
        """The batches up to the terminal event; marks the channel abandoned when the reader leaves early."""
        try:
            async for batch in self:
                yield batch
        finally:
            self.abandon()
