from __future__ import annotations

import asyncio
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from blaze.engines.channel import EventChannel
from blaze.types import Event, Finished, Progress, Usage
from tests.samples import collect

FINISHED = Finished(Usage())


def numbered(sizes: list[int]) -> list[list[Event]]:
    """Batches of these sizes, their events numbered through."""
    numbers = iter(range(sum(sizes)))
    return [[Progress(next(numbers), 0) for _ in range(size)] for size in sizes]


@given(st.lists(st.integers(1, 4), max_size=20), st.data())
def test_all_events_arrive_in_order_whatever_the_interleaving(sizes: list[int], data: st.DataObject) -> None:
    batches: list[list[Event]] = [*numbered(sizes), [FINISHED]]
    turns = [data.draw(st.integers(0, 2)) for _ in batches]

    async def exchange() -> list[Event]:
        channel = EventChannel()
        reading = asyncio.create_task(collect(channel.read()))
        for batch, yields in zip(batches, turns, strict=True):
            channel.put(*batch)
            for _ in range(yields):  # so often the reader may run before the next batch
                await asyncio.sleep(0)
        return await reading

    assert asyncio.run(exchange()) == [event for batch in batches for event in batch]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 4), max_size=40))
def test_events_of_another_thread_arrive_in_order_and_no_batch_is_empty(sizes: list[int]) -> None:
    batches: list[list[Event]] = [*numbered(sizes), [FINISHED]]

    async def exchange() -> list[tuple[Event, ...]]:
        channel = EventChannel()

        def write() -> None:
            for batch in batches:
                channel.put(*batch)

        writer = threading.Thread(target=write)
        writer.start()
        received = [batch async for batch in channel.read()]
        writer.join()
        return received

    received = asyncio.run(exchange())
    assert all(received)
    assert [event for batch in received for event in batch] == [event for batch in batches for event in batch]


@given(st.integers(1, 6), st.data())
def test_a_reader_may_leave_at_any_time(written: int, data: st.DataObject) -> None:
    read = data.draw(st.integers(1, written))

    async def exchange() -> tuple[list[Event], bool]:
        channel = EventChannel()
        batches = channel.read()
        seen: list[Event] = []
        for number in range(written):
            channel.put(Progress(number, 0))
            if number < read:
                seen.extend(await anext(batches))
        await batches.aclose()
        channel.put(FINISHED)  # nobody is there: it must not raise
        return seen, channel.abandoned

    assert asyncio.run(exchange()) == ([Progress(number, 0) for number in range(read)], True)
