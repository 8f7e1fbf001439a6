"""Answers that break in the middle go on on another replica, and their readers notice nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blaze.errors import (
    BlazeError,
    Cancelled,
    EngineFailure,
    NonFiniteOutput,
    ReplicaLost,
    ReplicaStopping,
    ReplicaUnreachable,
)
from blaze.routing.orders import Orders
from blaze.routing.outcome import Outcome
from blaze.routing.transcript import ImageTranscript, TextTranscript
from blaze.types import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ImageReady,
    PartialImage,
    Progress,
    ReplicaId,
    Request,
    Started,
    TextDelta,
    Usage,
)
from tests.breaking_pool import PROMPT, BreakingPool, asked, flat, whole
from tests.fakes import FakeCall, FakePool, Script
from tests.routing_bench import RoutingBench
from tests.samples import collect, image_request, text_of
from tests.waiting import until

LOST = st.sampled_from([ReplicaLost("died"), ReplicaUnreachable("away"), ReplicaStopping("drained")])


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 7), LOST), max_size=6),
)
def test_wherever_it_breaks_the_reader_gets_the_unbroken_answer(
    lengths: list[int], breaks: list[tuple[int, BlazeError]]
) -> None:
    async def ask() -> tuple[list[Event], RoutingBench]:
        # Never with the first tokens twice in a row: that would be taken for poison.
        pool = BreakingPool(
            tuple("abcdefgh"), lengths=lengths, breaks=[(3 + after, e) for after, e in breaks]
        )
        bench = RoutingBench(pool)
        return await bench.ask(asked(len(lengths))), bench

    events, bench = asyncio.run(ask())
    assert events == flat(whole(asked(len(lengths)), lengths))
    assert sum(bench.in_flight.values()) == 0
    assert bench.dispatcher.counters()[0].resumed <= len(breaks)


async def test_what_the_next_replica_is_asked_for() -> None:
    pool = BreakingPool(("a", "b"), lengths=(4, 2), breaks=[(3, ReplicaLost("died"))])
    bench = RoutingBench(pool, strategy="least_connections")
    await bench.ask(asked(2))
    (first, request), (second, rest) = pool.calls
    assert first != second
    assert isinstance(rest, GenerateRequest) and isinstance(request, GenerateRequest)
    assert rest == replace(request, generated=((0, 1), (100, 101)), variant="v", timeout_s=rest.timeout_s)
    assert bench.dispatcher.counters()[0].resumed == 1


async def test_an_engine_that_fails_in_the_middle_is_gone_on_from_as_often_as_one_that_dies() -> None:
    breaks = [(2, EngineFailure("raised"))]
    bench = RoutingBench(BreakingPool(("a", "b", "c"), lengths=(9,), breaks=breaks * 8), max_retries=0)
    assert await bench.ask(asked()) == flat(whole(asked(), (9,)))
    assert len(bench.called) == 9

    bench = RoutingBench(BreakingPool(("a", "b", "c"), lengths=(19,), breaks=breaks * 9))
    events = await bench.ask(asked())
    assert isinstance(events[-1], Failed) and events[-1].error.message == "raised"
    assert len(bench.called) == 9


async def test_an_answer_that_does_not_get_any_further_ends_with_its_retries() -> None:
    """An engine that always fails at the same token is not asked for it again and again."""
    breaks = [(3, EngineFailure("raised")), *[(1, EngineFailure("raised"))] * 8]
    bench = RoutingBench(BreakingPool(("a", "b", "c"), breaks=breaks), max_retries=2)
    events = await bench.ask(asked())
    assert isinstance(events[-1], Failed) and events[-1].error.message == "raised"
    assert len(bench.called) == 1 + 1 + 2
    assert text_of(events) == "0.0 0.1 "


async def test_an_image_that_is_drawn_again_gets_no_further_by_showing_the_same_once_more() -> None:
    script: Script = [(Started(), Progress(1, 9)), (Progress(2, 9),), EngineFailure("raised")]
    bench = RoutingBench(FakePool(next_scripts=[list(script) for _ in range(9)]), max_retries=2)
    events = await bench.ask(image_request(progress=True))
    assert isinstance(events[-1], Failed)
    assert len(bench.called) == 1 + 1 + 2


async def test_what_another_replica_would_not_do_better_ends_the_answer() -> None:
    bench = RoutingBench(BreakingPool(breaks=[(2, NonFiniteOutput("NaN"))]))
    events = await bench.ask(asked())
    assert isinstance(events[-1], Failed)
    assert len(bench.called) == 1


async def test_when_only_the_end_was_lost_nobody_is_asked() -> None:
    pool = FakePool(("a",), next_scripts=[[*whole(asked(), (2,))[:-1]]])
    script = pool.next_scripts[0]
    script.append((TextDelta(0, "0.1 ", (1,)), ChoiceFinished(0, "stop")))
    script.append(ReplicaLost("died"))
    bench = RoutingBench(pool)
    events = await bench.ask(asked())
    assert events == flat(whole(asked(), (2,)))
    assert len(bench.called) == 1


async def test_max_lost_bounds_it() -> None:
    pool = BreakingPool(tuple("abcdefgh"), lengths=(60,), breaks=[(3, ReplicaLost("died"))] * 20)
    bench = RoutingBench(pool, max_lost=5)
    events = await bench.ask(asked())
    assert isinstance(events[-1], Failed)
    assert len(bench.called) == 6


async def test_it_goes_on_only_on_the_same_variant() -> None:
    pool = BreakingPool(tuple("abc"), breaks=[(2, ReplicaLost("died"))], variants={"b": "new"})
    bench = RoutingBench(pool)
    bench.dispatcher.table.follow(Orders({"a": 1000.0, "b": 10.0, "c": 0.1}))
    bench.dispatcher.strategy = RoutingBench(FakePool(), strategy="weighted_round_robin").dispatcher.strategy
    events = await bench.ask(asked())
    assert text_of(events) == "0.0 0.1 0.2 0.3 "
    assert bench.called[0] == "a"
    assert bench.called[-1] == "c"
    assert bench.failures["b"] == 0, "it is not to blame"


async def test_however_many_replicas_of_another_variant_there_are_it_finds_its_own() -> None:
    names = tuple("abcdefghijklmnop")
    pool = BreakingPool(names, breaks=[(2, ReplicaLost("died"))], variants=dict.fromkeys(names[1:-1], "new"))
    bench = RoutingBench(pool, strategy="weighted_round_robin", max_lost=2)
    weights = {"a": 1000.0, "p": 0.1} | dict.fromkeys(names[1:-1], 10.0)
    bench.dispatcher.table.follow(Orders(weights))
    assert text_of(await bench.ask(asked())) == "0.0 0.1 0.2 0.3 "
    assert (bench.called[0], bench.called[-1], len(bench.called)) == ("a", "p", 16)


async def test_when_no_replica_of_its_variant_is_left_the_answer_ends() -> None:
    pool = BreakingPool(("a", "b"), breaks=[(2, ReplicaLost("died"))])
    bench = RoutingBench(pool)
    stream = await bench.dispatcher.open(asked())
    first = stream.replica_id
    pool.variants = {id: "new" for id in "ab" if id != first}
    pool.set_live(*(id for id in "ab" if id != first))
    events = [event async for batch in stream for event in batch]
    assert isinstance(events[-1], Failed)
    assert events[-1].error.http_status == 503


@pytest.mark.parametrize("out", ["suspended", "suspect", "breaker", "gone with all others"])
async def test_the_only_replica_of_its_variant_is_waited_for_while_it_is_out(out: str) -> None:
    pool = BreakingPool(("a", "b", "c"))
    bench = RoutingBench(pool)
    stream = await bench.dispatcher.open(asked())
    fits, other = sorted({"a", "b", "c"} - {stream.replica_id})
    pool.variants = {other: "new"}
    events = [*await anext(stream)]
    table = bench.dispatcher.table
    if out == "suspect":
        bench.dispatcher.set_suspects([fits])
    elif out == "breaker":
        table.breakers.act(fits, "open")
        table.changed()
    else:
        table.suspend(fits, 2.0)
    pool.open_calls[-1].play([ReplicaLost("died")])
    pool.set_live(fits, other)
    reading = asyncio.create_task(collect(stream))
    await until(lambda: other in bench.called and bench.waiting == 1)

    if out == "gone with all others":
        pool.set_live()
    bench.clock.advance(2.1)
    bench.dispatcher.set_suspects([])
    table.breakers.act(fits, "close") if out == "breaker" else pool.set_live(fits, other)
    table.changed()
    events += await reading
    assert events == flat(whole(asked(), (4,)))
    assert bench.called[-1] == fits
    assert sum(bench.in_flight.values()) == 0


async def test_a_replica_that_is_out_and_then_gone_is_not_waited_for_any_more() -> None:
    pool = BreakingPool(("a", "b", "c"))
    bench = RoutingBench(pool)
    stream = await bench.dispatcher.open(asked())
    fits, other = sorted({"a", "b", "c"} - {stream.replica_id})
    pool.variants = {other: "new"}
    bench.dispatcher.table.suspend(fits, 2.0)
    pool.open_calls[-1].play([ReplicaLost("died")])
    pool.set_live(fits, other)
    reading = asyncio.create_task(collect(stream))
    await until(lambda: bench.waiting == 1)
    pool.set_live(other)
    events = await reading
    assert isinstance(events[-1], Failed)
    assert events[-1].error.message == "The replicas that could go on with the answer are gone."


async def test_who_leaves_while_it_is_moved_leaves_nothing_behind() -> None:
    pool = BreakingPool(("a", "b"), breaks=[(2, ReplicaLost("died"))])
    bench = RoutingBench(pool, max_in_flight=1)
    stream = await bench.dispatcher.open(asked())
    others = ["a", "b"]
    others.remove(stream.replica_id)
    blocker = bench.dispatcher.table.lease(others[0])
    await anext(stream)
    reading = asyncio.create_task(anext(stream))
    await until(lambda: bench.waiting == 1)
    reading.cancel()
    await asyncio.wait([reading])
    await stream.aclose()
    assert bench.waiting == 0
    assert sum(bench.in_flight.values()) == 1
    blocker.release(Outcome.SUCCESS)


# --- Many at once ------------------------------------------------------------------------------------


async def test_all_that_runs_on_a_replica_breaks_at_once_and_goes_on() -> None:
    """As in a failed step of its engine: many more than are begun anew at a time."""
    pool = BreakingPool(("a", "b"), held=True, breaks=[(3, EngineFailure("raised"))] * 30)
    bench = RoutingBench(pool, max_in_flight=64, retry_pause=1.0)
    asking = [asyncio.create_task(bench.ask(asked())) for _ in range(30)]
    await until(lambda: len(pool.open_calls) == 30)
    pool.held = False
    for call in tuple(pool.open_calls):
        call.release()
    assert [text_of(events) for events in await asyncio.gather(*asking)] == ["0.0 0.1 0.2 0.3 "] * 30
    assert sum(bench.in_flight.values()) == 0


async def test_a_full_queue_turns_no_answer_away_that_has_begun() -> None:
    pool = BreakingPool(("a", "b"))
    bench = RoutingBench(pool, max_in_flight=1, max_queued=1)
    first, second = [await bench.dispatcher.open(asked()) for _ in range(2)]
    waiting = asyncio.create_task(bench.ask(asked()))
    await until(lambda: bench.waiting == 1)
    pool.open_calls[0].play([ReplicaLost("died")])
    reading = asyncio.create_task(collect(first))
    await until(lambda: bench.waiting == 2)
    await collect(second)
    assert text_of(await reading) == "0.0 0.1 0.2 0.3 "
    assert text_of(await waiting) == "0.0 0.1 0.2 0.3 "


# --- Replicas that say nothing -----------------------------------------------------------------------


async def test_what_runs_on_a_suspect_replica_goes_on_elsewhere() -> None:
    pool = BreakingPool(("a", "b", "c"))
    bench = RoutingBench(pool)
    stream = await bench.dispatcher.open(asked())
    frozen = stream.replica_id
    pool.open_calls[0].hold()
    events = list(await anext(stream))
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    bench.dispatcher.set_suspects([frozen])
    events += await reading
    async for batch in stream:
        events += batch
    assert events == flat(whole(asked(), (4,)))
    assert pool.open_calls[0].cancelled
    assert bench.failures[frozen] == 1
    assert sum(bench.in_flight.values()) == 0


async def test_whoever_does_not_read_holds_no_place_on_a_suspect_replica() -> None:
    pool = BreakingPool(("a", "b", "c"))
    bench = RoutingBench(pool)
    stream = await bench.dispatcher.open(asked())
    frozen = stream.replica_id
    events = list(await anext(stream))
    bench.dispatcher.set_suspects([frozen])
    assert (sum(bench.in_flight.values()), bench.failures[frozen]) == (0, 1)
    assert pool.open_calls[0].cancelled

    bench.dispatcher.set_suspects([])
    async for batch in stream:
        events += batch
    assert events == flat(whole(asked(), (4,)))
    assert bench.dispatcher.available_replicas == 3, "it was suspect before, and is not now"
    assert bench.outcomes == {"success": 1, "failure": 1, "neutral": 0}


async def test_a_call_that_says_that_it_was_cancelled_is_moved_nevertheless() -> None:
    class Talkative(FakeCall):
        def cancel(self) -> None:
            self.play([Cancelled("The call was cancelled.")])
            self.release()

    class Pool(BreakingPool):
        def call(self, replica_id: ReplicaId, request: Request) -> FakeCall:
            super().call(replica_id, request)
            assert isinstance(request, GenerateRequest)
            self.open_calls[-1] = Talkative([*whole(request, self.lengths)])
            return self.open_calls[-1]

    pool = Pool(("a", "b", "c"))
    bench = RoutingBench(pool)
    stream = await bench.dispatcher.open(asked())
    events = list(await anext(stream))
    pool.open_calls[0].hold()
    bench.dispatcher.set_suspects([stream.replica_id])
    async for batch in stream:
        events += batch
    assert events == flat(whole(asked(), (4,)))


async def test_suspicion_of_all_moves_nothing() -> None:
    pool = BreakingPool(("a",))
    bench = RoutingBench(pool)
    stream = await bench.dispatcher.open(asked())
    bench.dispatcher.set_suspects(["a"])
    assert text_of([event async for batch in stream for event in batch]) == "0.0 0.1 0.2 0.3 "
    assert len(bench.called) == 1


# --- Transcripts -------------------------------------------------------------------------------------


def test_an_image_that_is_drawn_again_shows_nothing_twice() -> None:
    request = image_request(n=2)
    transcript = ImageTranscript(request)
    image = [ImageReady(i, b"", "png", 8, 8, i) for i in range(2)]
    assert transcript.take((Started(), Progress(1, 3), Progress(2, 3), image[0]))
    assert transcript.rest() == request
    again = (Started(), Progress(1, 3), Progress(2, 3), Progress(3, 3), *image)
    assert transcript.take(again) == (Progress(3, 3), image[1])
    assert transcript.rest() == Finished(Usage(images=2))


def test_previews_come_once() -> None:
    transcript = ImageTranscript(image_request())
    preview = PartialImage(0, 0, b"", "png", 8, 8)
    assert transcript.take((preview,)) == (preview,)
    assert transcript.take((preview,)) == ()


def test_an_echo_comes_once() -> None:
    request = asked()
    transcript = TextTranscript(request)
    echo = TextDelta(0, "prompt", PROMPT, echo=True)
    assert transcript.take((Started(PROMPT), echo, TextDelta(0, "a", (7,)))) == (
        Started(PROMPT),
        echo,
        TextDelta(0, "a", (7,)),
    )
    assert transcript.rest() == replace(request, generated=((7,),))
    assert transcript.take((Started(PROMPT), echo, TextDelta(0, "b", (8,)))) == (TextDelta(0, "b", (8,)),)
    assert transcript.rest() == replace(request, generated=((7, 8),))
