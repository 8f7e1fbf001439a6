"""A request that replicas die of is refused; what only looks like their death is no sign of it."""

from __future__ import annotations

import asyncio

import pytest

from blaze.errors import BlazeError, EngineFailure, ReplicaLost, ReplicaStopping, ReplicaUnreachable
from blaze.types import Failed, ReplicaId, Request
from tests.breaking_pool import BreakingPool, asked
from tests.fakes import FakeCall
from tests.routing_bench import RoutingBench
from tests.samples import text_of
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


@pytest.mark.parametrize("error", [ReplicaStopping("drained"), EngineFailure("raised")])
async def test_replicas_that_do_not_die_are_no_sign_of_poison(error: BlazeError) -> None:
    pool = BreakingPool(tuple("abcd"), breaks=[(1, error)] * 2)
    assert text_of(await RoutingBench(pool).ask(asked())) == "0.0 0.1 0.2 0.3 "


async def test_replicas_that_die_before_they_began_are_no_sign_of_poison() -> None:
    pool = BreakingPool(tuple("abcd"), breaks=[(0, ReplicaLost("died"))] * 3)
    assert text_of(await RoutingBench(pool).ask(asked())) == "0.0 0.1 0.2 0.3 "


class SilentPool(BreakingPool):
    """Its replicas take the request up and say nothing more until they are told to."""

    def call(self, replica_id: ReplicaId, request: Request) -> FakeCall:
        call = super().call(replica_id, request)
        call.hold_after(1)
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
