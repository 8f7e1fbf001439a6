"""What runs on a draining replica goes on elsewhere when its time is up, and not before, and not nowhere."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from blaze.control import NO_CHANGES, Change, SetAllDraining, SetDraining, SetNodeDraining
from blaze.errors import Draining, EngineFailure, ReplicaLost
from blaze.routing.outcome import Outcome
from blaze.routing.replica import ReplicaInfo
from blaze.routing.routed_stream import RoutedStream
from blaze.types import (
    Event,
    Failed,
    Finished,
    ImageReady,
    PartialImage,
    Progress,
    ReplicaId,
    Request,
    Started,
    Usage,
)
from tests.breaking_pool import BreakingPool, asked, flat, whole
from tests.fakes import FakeCall, FakePool, Script
from tests.routing_bench import RoutingBench
from tests.samples import image_request
from tests.waiting import until

WHOLE = flat(whole(asked(), (4,)))


@dataclass
class NodePool(BreakingPool):
    nodes: dict[ReplicaId, str] = field(default_factory=dict)

    def live(self) -> tuple[ReplicaInfo, ...]:
        return tuple(ReplicaInfo(id, node=self.nodes.get(id, "")) for id in self.ids)


class DrainBench(RoutingBench):
    """Requests whose replicas are held between two batches: told to go on, each reads one more."""

    def __init__(self, pool: FakePool, **settings: Any) -> None:
        super().__init__(pool, **settings)
        self.control = NO_CHANGES

    def change(self, change: Change) -> None:
        self.control = self.control.after(change)
        self.dispatcher.follow(self.control)

    async def turns(self, count: int = 20) -> None:
        """The dispatcher looks again, several times."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def reading(self, request: Request) -> Reader:
        """In the middle of its answer, waiting for more of it."""
        stream = await self.dispatcher.open(request)
        call = self.pool.open_calls[-1]
        reader = Reader(stream, stream.replica_id, call, [*await anext(stream)])
        call.hold()
        reader.task = asyncio.create_task(reader.read())
        await self.turns()
        return reader


@dataclass
class Reader:
    stream: RoutedStream
    replica_id: ReplicaId
    call: FakeCall
    events: list[Event]
    task: asyncio.Task[None] | None = None

    async def read(self) -> None:
        async for batch in self.stream:
            self.events += batch
        await self.stream.aclose()

    async def finish(self) -> list[Event]:
        assert self.task is not None
        await self.task
        return self.events


def drain(replica_id: ReplicaId, timeout_s: float | None = None) -> Change:
    return SetDraining(replica_id, True, timeout_s)


# --- At the deadline, not before ---------------------------------------------------------------------


async def test_a_text_moves_at_the_deadline_and_its_reader_notices_nothing() -> None:
    bench = DrainBench(BreakingPool(("a", "b")))
    reader = await bench.reading(asked())
    bench.change(drain(reader.replica_id, 5.0))
    bench.clock.advance(4.9)
    await bench.turns()
    assert len(bench.called) == 1

    bench.clock.advance(0.2)
    await bench.turns()
    assert len(bench.called) == 1, "it leaves with its next token"
    assert sum(bench.in_flight.values()) == 2, "and has a place by then"
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert len(set(bench.called)) == 2
    assert reader.call.cancelled
    assert sum(bench.in_flight.values()) == 0
    counters = bench.dispatcher.counters()[0]
    assert (counters.resumed, bench.outcomes) == (1, {"success": 1, "failure": 0, "neutral": 1})
    assert bench.failures[reader.replica_id] == 0


async def test_without_seconds_of_its_own_a_drain_takes_those_of_the_config() -> None:
    bench = DrainBench(BreakingPool(("a", "b")), drain_timeout_s=7.0)
    reader = await bench.reading(asked())
    bench.change(drain(reader.replica_id))
    bench.clock.advance(6.9)
    await bench.turns()
    assert sum(bench.in_flight.values()) == 1
    bench.clock.advance(0.2)
    await until(lambda: sum(bench.in_flight.values()) == 2)
    reader.call.release()
    assert await reader.finish() == WHOLE


async def test_what_finishes_in_time_does_not_move() -> None:
    bench = DrainBench(BreakingPool(("a", "b")))
    reader = await bench.reading(asked())
    bench.change(drain(reader.replica_id, 5.0))
    reader.call.release()
    assert await reader.finish() == WHOLE
    bench.clock.advance(10.0)
    await bench.turns()
    assert len(bench.called) == 1


async def test_undone_before_the_deadline_nothing_moves() -> None:
    bench = DrainBench(BreakingPool(("a", "b")))
    reader = await bench.reading(asked())
    bench.change(drain(reader.replica_id, 5.0))
    bench.change(SetDraining(reader.replica_id, False))
    bench.clock.advance(10.0)
    await bench.turns()
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert len(bench.called) == 1


async def test_the_seconds_are_counted_from_the_drain_not_from_the_last_change() -> None:
    bench = DrainBench(BreakingPool(("a", "b", "c")))
    reader = await bench.reading(asked())
    (other,) = {"a", "b", "c"} - {reader.replica_id, "c"}
    bench.change(drain(reader.replica_id, 5.0))
    bench.clock.advance(3.0)
    bench.change(drain(other, 100.0))
    bench.clock.advance(2.1)
    await until(lambda: sum(bench.in_flight.values()) == 2)
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert bench.called == [reader.replica_id, "c"]


async def test_a_second_drain_gives_new_seconds() -> None:
    bench = DrainBench(BreakingPool(("a", "b")))
    reader = await bench.reading(asked())
    bench.change(drain(reader.replica_id, 5.0))
    bench.clock.advance(4.0)
    bench.change(drain(reader.replica_id, 5.0))
    bench.clock.advance(4.0)
    await bench.turns()
    assert sum(bench.in_flight.values()) == 1
    bench.change(drain(reader.replica_id, 0.0))
    assert sum(bench.in_flight.values()) == 2, "at once"
    reader.call.release()
    assert await reader.finish() == WHOLE


async def test_a_node_takes_all_its_replicas_with_it() -> None:
    pool = NodePool(("a", "b", "c"), nodes={"a": "n1", "b": "n1", "c": "n2"})
    bench = DrainBench(pool)
    bench.change(SetNodeDraining("n2", True))
    readers = [await bench.reading(asked()) for _ in range(2)]
    bench.change(SetNodeDraining("n2", False))
    bench.change(SetNodeDraining("n1", True, 0.0))
    for reader in readers:
        reader.call.release()
    assert [await reader.finish() for reader in readers] == [WHOLE, WHOLE]
    assert bench.called[2:] == ["c", "c"]


async def test_of_two_drains_the_earlier_deadline_counts_and_each_is_undone_by_itself() -> None:
    pool = NodePool(("a", "b"), nodes={"a": "n1", "b": "n2"})
    bench = DrainBench(pool)
    bench.change(drain("a", 50.0))
    bench.change(SetNodeDraining("n1", True, 3.0))
    assert bench.dispatcher.table.columns.ids == ("a", "b")
    bench.change(SetNodeDraining("n1", False))
    assert {await _asked_at(bench) for _ in range(4)} == {"b"}
    bench.change(SetDraining("a", False))
    assert {await _asked_at(bench) for _ in range(4)} == {"a", "b"}


async def _asked_at(bench: RoutingBench) -> ReplicaId:
    await bench.ask(asked())
    return bench.called[-1]


async def test_what_runs_on_a_replica_that_has_left_the_live_set_has_the_same_time() -> None:
    bench = DrainBench(BreakingPool(("a", "b")), drain_timeout_s=5.0)
    reader = await bench.reading(asked())
    bench.pool.set_live(*({"a", "b"} - {reader.replica_id}))
    bench.clock.advance(5.1)
    await until(lambda: sum(bench.in_flight.values()) == 1)  # the one that is there
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert len(set(bench.called)) == 2


async def test_what_runs_on_a_replica_that_comes_back_stays_there() -> None:
    bench = DrainBench(BreakingPool(("a", "b")), drain_timeout_s=5.0)
    reader = await bench.reading(asked())
    bench.pool.set_live(*({"a", "b"} - {reader.replica_id}))
    bench.pool.set_live("a", "b")
    bench.clock.advance(5.1)
    bench.change(drain("nobody"))  # it looks
    await bench.turns()
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert bench.called == [reader.replica_id]


@pytest.mark.parametrize(("others", "condemned"), [(("b",), ()), ((), ()), ((), ("a",))])
async def test_a_replica_that_has_left_and_does_not_answer_is_not_waited_for(
    others: tuple[str, ...], condemned: tuple[str, ...]
) -> None:
    bench = DrainBench(BreakingPool(("a",)))
    reader = await bench.reading(asked())
    bench.pool.set_live(*others)
    bench.dispatcher.set_suspects(["a"], condemned)
    await bench.turns()
    may_be_cut_off = not others and not condemned
    assert reader.call.cancelled != may_be_cut_off, "if nobody is there, it may be who asks that is cut off"
    reader.call.release()
    bench.pool.set_live(*others, "c")
    assert await reader.finish() == WHOLE


# --- Nowhere to go -----------------------------------------------------------------------------------


async def test_without_another_replica_it_stays_to_its_end() -> None:
    bench = DrainBench(BreakingPool(("a",)))
    reader = await bench.reading(asked())
    bench.change(drain("a", 0.0))
    await bench.turns()
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert bench.called == ["a"]
    assert bench.outcomes["success"] == 1


async def test_it_waits_for_room_elsewhere_and_comes_before_what_has_not_begun() -> None:
    bench = DrainBench(BreakingPool(("a", "b")), max_in_flight=1)
    reader = await bench.reading(asked())
    (other,) = {"a", "b"} - {reader.replica_id}
    blocker = bench.dispatcher.table.lease(other)
    waiting = asyncio.create_task(bench.ask(asked()))
    await until(lambda: bench.waiting == 1)
    bench.change(drain(reader.replica_id, 0.0))
    await bench.turns()
    assert bench.called == [reader.replica_id]
    blocker.release(Outcome.SUCCESS)
    assert bench.waiting == 1
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert bench.called[1] == other
    assert (await waiting) == WHOLE


async def test_where_only_other_variants_are_it_stays() -> None:
    pool = BreakingPool(("a", "b", "c"))
    bench = DrainBench(pool)
    reader = await bench.reading(asked())
    others = {"a", "b", "c"} - {reader.replica_id}
    pool.variants = dict.fromkeys(others, "new")
    bench.change(drain(reader.replica_id, 0.0))
    reader.call.release()
    assert await reader.finish() == WHOLE
    tried = bench.called[1:]
    assert set(tried) <= others and len(tried) == len(set(tried)), "each is tried once at the most"
    assert bench.outcomes["failure"] == 0
    assert not reader.call.cancelled
    assert sum(bench.in_flight.values()) == 0


@pytest.mark.parametrize("error", [EngineFailure("raised"), ReplicaLost("died")])
async def test_a_replica_that_fails_to_take_it_over_does_it_no_harm(error: EngineFailure) -> None:
    pool = BreakingPool(("a", "b"))
    bench = DrainBench(pool, max_retries=0, max_lost=8)
    reader = await bench.reading(asked())
    pool.breaks = [(0, error)]
    bench.change(drain(reader.replica_id, 0.0))
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert len(bench.called) == 2
    assert sum(bench.in_flight.values()) == 0


async def test_it_does_not_move_for_ever() -> None:
    bench = DrainBench(BreakingPool(("a", "b", "c"), lengths=(4,)), max_lost=0)
    reader = await bench.reading(asked())
    bench.change(drain(reader.replica_id, 0.0))
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert len(bench.called) == 1


async def test_who_does_not_begin_soon_is_left_again_and_asked_no_second_time() -> None:
    pool = BreakingPool(("a", "b"))
    bench = DrainBench(pool, move_within_s=0.01)
    reader = await bench.reading(asked())
    pool.held = True  # takes it and says nothing: wedged, or at work on something long
    bench.change(drain(reader.replica_id, 0.0))
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert len(bench.called) == 2
    assert pool.open_calls[1].cancelled
    assert bench.outcomes == {"success": 1, "failure": 0, "neutral": 1}
    assert sum(bench.in_flight.values()) == 0


@pytest.mark.parametrize("becomes", ["suspect", "draining"])
async def test_nobody_moves_to_a_place_that_nobody_is_sent_to_any_more(becomes: str) -> None:
    bench = DrainBench(BreakingPool(("a", "b")))
    reader = await bench.reading(asked())
    (other,) = {"a", "b"} - {reader.replica_id}
    bench.change(drain(reader.replica_id, 0.0))
    assert bench.in_flight[other] == 1
    if becomes == "suspect":
        bench.dispatcher.set_suspects([other])
    else:
        bench.change(drain(other, 0.0))
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert bench.called == [reader.replica_id]
    assert sum(bench.in_flight.values()) == 0


async def test_an_answer_that_is_nearly_due_stays() -> None:
    bench = DrainBench(BreakingPool(("a", "b")), move_within_s=2.0)
    reader = await bench.reading(replace(asked(), timeout_s=60.0))
    bench.clock.advance(58.5)
    bench.change(drain(reader.replica_id, 0.0))
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert len(bench.called) == 1
    assert sum(bench.in_flight.values()) == 0


async def test_moves_take_nothing_from_the_budget_of_retries() -> None:
    bench = DrainBench(BreakingPool(("a", "b")), max_retries=0)
    first = await bench.reading(asked())
    readers = [first]
    while len(readers) < 12:
        readers.append(await bench.reading(asked()))
    there = [reader for reader in readers if reader.replica_id == first.replica_id]
    bench.change(drain(first.replica_id, 0.0))
    for reader in readers:
        reader.call.release()
    assert [await reader.finish() for reader in readers] == [WHOLE] * 12
    counters = bench.dispatcher.counters()[0]
    assert (counters.resumed, counters.retries) == (len(there), 0)


# --- Before the first content, and images ------------------------------------------------------------


async def test_what_has_shown_nothing_yet_begins_elsewhere_at_once() -> None:
    pool = BreakingPool(("a", "b"))
    bench = DrainBench(pool)
    pool.held = True
    asking = asyncio.create_task(bench.ask(asked()))
    await until(lambda: bench.called)
    await bench.turns()
    pool.held = False
    bench.change(drain(bench.called[0], 1.0))
    await bench.turns()
    assert len(bench.called) == 1
    bench.clock.advance(1.1)
    assert await asking == WHOLE
    assert len(set(bench.called)) == 2
    assert pool.open_calls[0].cancelled
    assert (bench.outcomes["failure"], bench.outcomes["neutral"]) == (0, 1)
    assert bench.dispatcher.counters()[1][0].breaker == "closed"


async def test_what_has_shown_nothing_stays_where_nobody_else_is() -> None:
    pool = BreakingPool(("a",))
    bench = DrainBench(pool)
    pool.held = True
    asking = asyncio.create_task(bench.ask(asked()))
    await until(lambda: bench.called)
    bench.change(drain("a", 0.0))
    await bench.turns()
    pool.open_calls[0].release()
    assert await asking == WHOLE
    assert bench.called == ["a"]


async def test_an_image_is_drawn_again_elsewhere_and_shows_nothing_twice() -> None:
    preview, image = PartialImage(0, 0, b"", "png", 8, 8), ImageReady(0, b"", "png", 8, 8, 1)
    drawn: Script = [(Started(), preview), (Progress(2, 2),), (image, Finished(Usage(images=1)))]
    pool = FakePool(("a", "b"), next_scripts=[list(drawn), list(drawn)])
    bench = DrainBench(pool)
    reader = await bench.reading(image_request(partial_images=1))
    bench.change(drain(reader.replica_id, 0.0))
    events = await reader.finish()
    assert events == [Started(), preview, Progress(2, 2), image, Finished(Usage(images=1))]
    assert len(set(bench.called)) == 2
    assert pool.open_calls[0].cancelled
    assert sum(bench.in_flight.values()) == 0


async def test_who_leaves_on_the_way_leaves_nothing_behind() -> None:
    pool = FakePool(("a", "b"), next_scripts=[[(Started(), PartialImage(0, 0, b"", "png", 8, 8))]])
    bench = DrainBench(pool)
    image = await bench.reading(image_request(partial_images=1))
    text = DrainBench(BreakingPool(("a", "b")))
    reader = await text.reading(asked())
    for bench_, read in ((bench, image), (text, reader)):
        bench_.change(drain(read.replica_id, 0.0))
        assert sum(bench_.in_flight.values()) == 2
        assert read.task is not None
        read.task.cancel()
        await asyncio.wait([read.task])
        await read.stream.aclose()
        assert sum(bench_.in_flight.values()) == 0


async def test_a_reader_who_is_away_moves_when_he_reads_on() -> None:
    bench = DrainBench(BreakingPool(("a", "b")))
    stream = await bench.dispatcher.open(asked())
    events = [*await anext(stream)]
    bench.change(drain(stream.replica_id, 0.0))
    await bench.turns()
    assert sum(bench.in_flight.values()) == 1
    bench.pool.open_calls[0].hold()
    reading = asyncio.create_task(anext(stream))
    await until(lambda: sum(bench.in_flight.values()) == 2)
    bench.pool.open_calls[0].release()
    events += await reading
    async for batch in stream:
        events += batch
    await stream.aclose()
    assert events == WHOLE
    assert len(set(bench.called)) == 2


# --- All ---------------------------------------------------------------------------------------------


async def test_in_maintenance_what_has_come_before_finishes_and_nothing_new_is_begun() -> None:
    bench = DrainBench(BreakingPool(("a",)), max_in_flight=1)
    reader = await bench.reading(asked())
    waiting = asyncio.create_task(bench.ask(asked()))
    await until(lambda: bench.waiting == 1)
    bench.change(SetAllDraining(True))
    bench.clock.advance(100.0)
    await bench.turns()
    with pytest.raises(Draining) as refused:
        await bench.dispatcher.open(asked())
    assert refused.value.retry_after_s
    reader.call.release()
    assert await reader.finish() == WHOLE
    assert await waiting == WHOLE
    bench.change(SetAllDraining(False))
    assert await bench.ask(asked()) == WHOLE


async def test_in_maintenance_a_broken_answer_still_goes_on_elsewhere() -> None:
    pool = BreakingPool(("a", "b"))
    bench = DrainBench(pool)
    reader = await bench.reading(asked())
    bench.change(SetAllDraining(True))
    reader.call.play([ReplicaLost("died")])
    reader.call.release()
    assert await reader.finish() == WHOLE


async def test_when_its_time_is_up_what_is_left_ends_with_an_error() -> None:
    bench = DrainBench(BreakingPool(("a",)), max_in_flight=2)
    reader = await bench.reading(asked())
    away = await bench.dispatcher.open(asked())
    await anext(away)
    waiting = asyncio.create_task(bench.ask(asked()))
    await until(lambda: bench.waiting == 1)
    bench.change(SetAllDraining(True, 10.0))
    bench.clock.advance(9.9)
    await bench.turns()
    assert (bench.waiting, bench.in_flight) == (1, {"a": 2})
    bench.clock.advance(0.2)
    events = await reader.finish()
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.code, events[-1].error.http_status) == ("draining", 503)
    assert events[:-1] == flat(whole(asked(), (4,))[:2])
    assert bench.in_flight == {"a": 0}, "also of whom nobody reads"
    with pytest.raises(Draining):
        await waiting
    (last,) = await anext(away)
    assert isinstance(last, Failed) and last.error.code == "draining"
    assert bench.outcomes["failure"] == 0

    bench.change(SetAllDraining(False))
    assert await bench.ask(asked()) == WHOLE


async def test_taken_back_before_its_time_is_up_nothing_ends() -> None:
    bench = DrainBench(BreakingPool(("a",)))
    reader = await bench.reading(asked())
    bench.change(SetAllDraining(True, 10.0))
    bench.change(SetAllDraining(False))
    bench.clock.advance(20.0)
    await bench.turns()
    reader.call.release()
    assert await reader.finish() == WHOLE
