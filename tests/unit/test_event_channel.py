from __future__ import annotations

import asyncio
import threading

import pytest

from blaze.engines.channel import Bell, EventChannel
from blaze.errors import EngineFailure
from blaze.types import Event, Failed, Finished, Progress, Usage
from tests.samples import collect
from tests.waiting import until

FINISHED = Finished(Usage())


def steps(first: int, end: int) -> list[Event]:
    return [Progress(step, 100) for step in range(first, end)]


async def test_what_piled_up_leaves_as_one_batch() -> None:
    channel = EventChannel()
    for event in steps(0, 5):
        channel.put(event)
    assert await anext(channel) == tuple(steps(0, 5))


async def test_a_reader_that_keeps_up_gets_every_event_by_itself() -> None:
    channel = EventChannel()
    for event in steps(0, 3):
        channel.put(event)
        assert await anext(channel) == (event,)


async def test_a_waiting_reader_is_woken() -> None:
    channel = EventChannel()
    reading = asyncio.create_task(anext(channel))
    await asyncio.sleep(0)
    assert not reading.done()
    channel.put(*steps(0, 2))
    assert await reading == tuple(steps(0, 2))


@pytest.mark.parametrize("terminal", [FINISHED, Failed(EngineFailure("broken").info)])
async def test_the_terminal_event_ends_the_stream(terminal: Event) -> None:
    channel = EventChannel()
    channel.put(*steps(0, 2), terminal)
    assert await collect(channel) == [*steps(0, 2), terminal]
    with pytest.raises(StopAsyncIteration):
        await anext(channel)


async def test_events_after_the_terminal_one_are_dropped() -> None:
    channel = EventChannel()
    channel.put(FINISHED)
    channel.put(*steps(0, 1))
    channel.put(Failed(EngineFailure("late").info))
    assert await collect(channel) == [FINISHED]


async def test_a_channel_is_abandoned_when_its_reader_leaves_early() -> None:
    channel = EventChannel()
    channel.put(*steps(0, 1))
    batches = channel.read()
    await anext(batches)
    assert not channel.abandoned
    await batches.aclose()
    assert channel.abandoned


async def test_a_reader_that_is_cancelled_while_it_waits_leaves_the_channel_abandoned() -> None:
    channel = EventChannel()
    reading = asyncio.create_task(collect(channel.read()))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert channel.abandoned


async def test_events_from_another_thread_arrive_in_order() -> None:
    channel = EventChannel()

    def write() -> None:
        for event in steps(0, 500):
            channel.put(event)
        channel.put(FINISHED)

    writer = threading.Thread(target=write)
    writer.start()
    assert await collect(channel.read()) == [*steps(0, 500), FINISHED]
    writer.join()


def test_a_writer_that_outlives_the_loop_sees_that_nobody_reads() -> None:
    async def make() -> EventChannel:
        return EventChannel()

    channel = asyncio.run(make())
    channel.put(*steps(0, 1))
    assert channel.abandoned


async def test_the_loop_is_woken_once_for_many_events() -> None:
    channel = EventChannel()
    batches: list[tuple[Event, ...]] = []

    async def read() -> None:
        async for batch in channel.read():
            batches.append(batch)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    for event in steps(0, 50):
        channel.put(event)
    await until(lambda: batches)
    channel.put(FINISHED)
    await reading
    assert batches == [tuple(steps(0, 50)), (FINISHED,)]


async def test_the_readers_of_many_channels_are_woken_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    calls: list[object] = []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (calls.append(call), wake(*call))[1])
    bell = Bell()
    channels = [EventChannel(bell) for _ in range(3)]
    with bell.held():
        for channel in channels:
            channel.put(*steps(0, 2))
        assert not calls
    assert len(calls) == 1
    assert [await anext(channel) for channel in channels] == [tuple(steps(0, 2))] * 3
    channels[0].put(FINISHED)  # no longer held: at once
    assert len(calls) == 2
    assert await anext(channels[0]) == (FINISHED,)


async def test_what_was_held_is_announced_though_the_step_fails() -> None:
    bell = Bell()
    channel = EventChannel(bell)
    with pytest.raises(RuntimeError), bell.held():
        channel.put(FINISHED)
        raise RuntimeError("the step")
    assert await anext(channel) == (FINISHED,)


def test_a_reader_whose_loop_is_gone_does_not_keep_the_others_waiting() -> None:
    bell = Bell()

    async def make() -> EventChannel:
        return EventChannel(bell)

    gone = asyncio.run(make())

    async def read() -> tuple[Event, ...]:
        channel = EventChannel(bell)
        with bell.held():
            gone.put(*steps(0, 1))
            channel.put(FINISHED)
        return await anext(channel)

    assert asyncio.run(read()) == (FINISHED,)
    assert gone.abandoned
