"""A request that replicas die of is refused; what only looks like their death is no sign of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from blaze.errors import (
    BlazeError,
    EngineFailure,
    Overloaded,
    ReplicaLost,
    ReplicaStopping,
    ReplicaUnreachable,
)
from blaze.types import Failed, Progress, ReplicaId, Request, Started
from tests.breaking_pool import BreakingPool, asked, flat, whole
from tests.fakes import FakeCall, FakePool, Script
from tests.routing_bench import RoutingBench
from tests.samples import image_request, text_of
from tests.waiting import until


async def test_a_request_that_two_replicas_died_of_is_refused() -> None:
    pool = BreakingPool(tuple("abcd"), breaks=[(1, ReplicaLost("died"))] * 4)
    bench = RoutingBench(pool)
    (event,) = await bench.ask(asked())
    assert isinstance(event, Failed)
    assert (event.error.code, event.error.http_status, event.error.retryable) == (
        "poison_request",
        500,
        False,
    )
    assert len(bench.called) == 2
    assert sum(bench.failures.values()) == 2


async def test_nor_may_it_show_a_token_each_time_before_it_kills() -> None:
    breaks = [(2, ReplicaLost("died"))] * 9
    bench = RoutingBench(BreakingPool(tuple("abcdefghij"), lengths=(60,), breaks=breaks))
    events = await bench.ask(asked())
    assert isinstance(events[-1], Failed) and events[-1].error.code == "poison_request"
    assert events[:-1] == flat(whole(asked(), (60,)))[: 1 + 2]
    assert len(bench.called) == 2


async def test_replicas_that_fall_silent_after_its_first_token_are_no_sign_of_poison() -> None:
    pool = SilentPool(tuple("abcd"), shows=2)
    bench = RoutingBench(pool)
    asking = asyncio.create_task(bench.ask(asked()))
    for calls in (1, 2):
        await until(lambda calls=calls: len(pool.open_calls) == calls and pool.open_calls[-1].is_held)
        bench.dispatcher.set_suspects(bench.called)
    await until(lambda: len(pool.open_calls) == 3)
    pool.open_calls[-1].release()
    assert text_of(await asking) == "0.0 0.1 0.2 0.3 "


async def test_a_token_that_kills_kills_no_more_after_two_that_went_on_with_it() -> None:
    breaks = [(20, ReplicaLost("died")), *[(1, ReplicaLost("died"))] * 9]
    bench = RoutingBench(BreakingPool(tuple("abcdefghij"), lengths=(60,), breaks=breaks))
    events = await bench.ask(asked())
    assert isinstance(events[-1], Failed) and events[-1].error.code == "poison_request"
    assert len(bench.called) == 3


async def test_an_image_that_kills_after_the_same_step_each_time_is_refused() -> None:
    script: Script = [(Started(),), (Progress(1, 9),), (Progress(5, 9),), ReplicaLost("died")]
    bench = RoutingBench(FakePool(tuple("abcdefghij"), next_scripts=[list(script) for _ in range(9)]))
    events = await bench.ask(image_request(progress=True))
    assert isinstance(events[-1], Failed) and events[-1].error.code == "poison_request"
    assert len(bench.called) == 3


async def test_deaths_between_which_an_answer_gets_on_are_no_sign_of_poison() -> None:
    breaks = [(count, ReplicaLost("died")) for count in (2, 3, 2, 3, 2)]
    bench = RoutingBench(BreakingPool(tuple("abcdefghij"), lengths=(30,), breaks=breaks))
    assert await bench.ask(asked()) == flat(whole(asked(), (30,)))


@pytest.mark.parametrize("error", [Overloaded("full"), ReplicaStopping("bye"), ReplicaLost("gone")])
async def test_who_has_not_tried_it_between_two_deaths_says_nothing_of_it(error: BlazeError) -> None:
    breaks = [(1, ReplicaLost("died")), (0, error), (1, ReplicaLost("died"))]
    bench = RoutingBench(BreakingPool(tuple("abcdefghij"), breaks=breaks))
    (event,) = await bench.ask(asked())
    assert isinstance(event, Failed) and event.error.code == "poison_request"


async def test_who_has_failed_at_it_and_lives_shows_that_it_is_no_poison() -> None:
    breaks = [(1, ReplicaLost("died")), (1, EngineFailure("raised")), (1, ReplicaLost("died"))]
    bench = RoutingBench(BreakingPool(tuple("abcdefghij"), breaks=breaks))
    assert text_of(await bench.ask(asked())) == "0.0 0.1 0.2 0.3 "


@pytest.mark.parametrize("error", [ReplicaStopping("drained"), EngineFailure("raised")])
async def test_replicas_that_do_not_die_are_no_sign_of_poison(error: BlazeError) -> None:
    pool = BreakingPool(tuple("abcd"), breaks=[(1, error)] * 2)
    assert text_of(await RoutingBench(pool).ask(asked())) == "0.0 0.1 0.2 0.3 "


async def test_replicas_that_die_before_they_began_are_no_sign_of_poison() -> None:
    pool = BreakingPool(tuple("abcd"), breaks=[(0, ReplicaLost("died"))] * 3)
    assert text_of(await RoutingBench(pool).ask(asked())) == "0.0 0.1 0.2 0.3 "


@dataclass
class SilentPool(BreakingPool):
    """Its replicas take the request up and say nothing more until they are told to."""

    shows: int = 1  # batch, and no more

    def call(self, replica_id: ReplicaId, request: Request) -> FakeCall:
        call = super().call(replica_id, request)
        call.hold_after(self.shows)
        return call


async def test_replicas_that_are_silent_for_a_while_are_no_sign_of_poison() -> None:
    pool = SilentPool(tuple("abcd"))
    bench = RoutingBench(pool)
    asking = asyncio.create_task(bench.ask(asked()))
    for calls in (1, 2, 3):
        await until(lambda calls=calls: len(pool.open_calls) == calls and pool.open_calls[-1].is_held)
        bench.dispatcher.set_suspects([bench.called[-1]])
        await until(lambda calls=calls: len(pool.open_calls) == calls + 1)
        bench.dispatcher.set_suspects([])
    pool.open_calls[-1].release()
    assert text_of(await asking) == "0.0 0.1 0.2 0.3 "


async def test_a_request_at_which_two_replicas_fall_silent_for_good_is_refused() -> None:
    pool = SilentPool(tuple("abcd"))
    bench = RoutingBench(pool, doubt_s=0.02)
    asking = asyncio.create_task(bench.ask(asked()))
    for calls in (1, 2):
        await until(lambda calls=calls: len(pool.open_calls) == calls and pool.open_calls[-1].is_held)
        bench.dispatcher.set_suspects(bench.called)
    (event,) = await asking
    assert isinstance(event, Failed) and event.error.code == "poison_request"
    assert len(bench.called) == 2


async def test_when_two_connections_broke_it_is_found_out_first_whether_replicas_died() -> None:
    """A killed replica may only look as if it were out of reach, for a while."""
    unreachable = ReplicaUnreachable("The connection broke.")
    pool = BreakingPool(tuple("abcd"), breaks=[(1, unreachable)] * 2)
    bench = RoutingBench(pool)
    asking = asyncio.create_task(bench.ask(asked()))
    await until(lambda: len(bench.called) == 2)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (len(bench.called), asking.done()) == (2, False), "a third one is put at risk before that is known"
    pool.set_live(*sorted({*"abcd"} - {*bench.called}))
    (event,) = await asking
    assert isinstance(event, Failed) and event.error.code == "poison_request"
    assert len(bench.called) == 2


@pytest.mark.parametrize("error", [ReplicaUnreachable("The connection broke."), ReplicaLost("died")])
async def test_connections_that_broke_for_a_moment_are_no_sign_of_poison(error: BlazeError) -> None:
    """Nor is one death among them."""
    breaks = [(1, ReplicaUnreachable("The connection broke.")), (1, error)]
    bench = RoutingBench(BreakingPool(tuple("abcd"), breaks=breaks), doubt_s=0.02)
    assert text_of(await bench.ask(asked())) == "0.0 0.1 0.2 0.3 "
    assert len(bench.called) == 3


async def test_who_leaves_while_that_is_found_out_leaves_nothing_behind() -> None:
    pool = BreakingPool(tuple("abcd"), breaks=[(1, ReplicaUnreachable("The connection broke."))] * 2)
    bench = RoutingBench(pool)
    asking = asyncio.create_task(bench.ask(asked()))
    await until(lambda: len(bench.called) == 2 and sum(bench.in_flight.values()) == 0)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    assert bench.dispatcher.counters()[0].open == 0
