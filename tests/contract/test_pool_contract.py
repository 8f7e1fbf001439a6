"""What ``blaze/routing/pool.py`` promises to the dispatcher, checked on every pool.

A pool joins by a harness in ``POOLS``. The real one holds the alpha interface of Serve's request routers,
which ``PinnedRouter`` builds on, to what Blaze expects of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import pytest

from blaze.errors import ReplicaLost
from blaze.local_pool import LocalPool
from blaze.routing.pool import ReplicaCall, ReplicaPool
from blaze.routing.replica import ReplicaInfo
from blaze.types import Finished, ReplicaId, Request, Started
from tests.cluster.ray_pool import MODEL, ray_pool
from tests.cluster.served import Served, served, simulator
from tests.fake_engine import FakeEngine
from tests.fakes import FakePool
from tests.samples import collect, terminals, text_request
from tests.waiting import until


class Harness(Protocol):
    """A pool of at least two replicas that answer, and what a test may do to them."""

    @property
    def pool(self) -> ReplicaPool: ...

    short: Request  # is answered soon
    endless: Request  # is still being answered at the end of the test

    async def lose(self, replica_id: ReplicaId) -> None:
        """The replica dies without a word."""
        ...

    async def served(self, replica_id: ReplicaId) -> int:
        """How many requests have reached the replica."""
        ...

    async def working(self) -> int:
        """How many requests are at work on all replicas."""
        ...


class FakeHarness:
    def __init__(self) -> None:
        self.pool = FakePool(("a", "b"))
        self.short: Request = text_request()
        self.endless: Request = text_request("on and on")

    async def lose(self, replica_id: ReplicaId) -> None:
        self.pool.lose(replica_id)

    async def served(self, replica_id: ReplicaId) -> int:
        return sum(called == replica_id for called, _ in self.pool.calls)

    async def working(self) -> int:
        calls = zip(self.pool.calls, self.pool.open_calls, strict=True)
        return sum(request is self.endless and not call.cancelled for (_, request), call in calls)


@asynccontextmanager
async def fake_pool() -> AsyncIterator[Harness]:
    harness = FakeHarness()
    call = harness.pool.call

    def call_and_hold(replica_id: ReplicaId, request: Request) -> ReplicaCall:
        if request is harness.endless:
            harness.pool.next_scripts = [[(Started((1,)),)]]
        made = call(replica_id, request)
        if request is harness.endless:
            made.hold_after(1)
        return made

    harness.pool.call = call_and_hold  # type: ignore[method-assign, assignment]
    yield harness


class LocalHarness:
    def __init__(self) -> None:
        self.pool = LocalPool()
        self._engines = {id: FakeEngine(inter_token_ms=1, tokens=10**6) for id in ("a", "b")}
        for replica_id, engine in self._engines.items():
            self.pool.add(ReplicaInfo(replica_id), engine)
        self.short: Request = text_request(max_tokens=1)
        self.endless: Request = text_request(max_tokens=10**6)

    async def lose(self, replica_id: ReplicaId) -> None:
        self.pool.lose(replica_id, ReplicaLost("The engine has failed."))

    async def served(self, replica_id: ReplicaId) -> int:
        return len(self._engines[replica_id].requests)

    async def working(self) -> int:
        statuses = [await engine.get_health_status() for engine in self._engines.values()]
        return sum(status.work_pending for status in statuses)


@asynccontextmanager
async def local_pool() -> AsyncIterator[Harness]:
    yield LocalHarness()


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served([simulator("sim", **MODEL)]) as running:
        yield running


POOLS = ["fake", "local", pytest.param("ray", marks=[pytest.mark.cluster, pytest.mark.ray_driver])]


@pytest.fixture(params=POOLS)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    made: AbstractAsyncContextManager[Harness]
    if request.param == "ray":
        made = ray_pool(request.getfixturevalue("app"))
    else:
        made = fake_pool() if request.param == "fake" else local_pool()
    async with made as found:
        yield found


def first(harness: Harness) -> ReplicaId:
    return harness.pool.live()[0].id


async def test_it_satisfies_the_protocols() -> None:
    pools: list[ReplicaPool] = [FakePool(), LocalPool()]
    for pool in pools:
        call: ReplicaCall = pool.call("a", text_request())
        assert call.__aiter__() is call


async def test_the_live_set_lists_every_replica_once(harness: Harness) -> None:
    live = harness.pool.live()
    assert len(live) >= 2
    assert all(isinstance(info, ReplicaInfo) for info in live)
    assert len({info.id for info in live}) == len(live)
    assert harness.pool.live() == live


async def test_an_answer_is_batches_that_end_with_one_terminal_event(harness: Harness) -> None:
    batches = [batch async for batch in harness.pool.call(first(harness), harness.short)]
    assert all(batches)
    events = [event for batch in batches for event in batch]
    assert isinstance(events[0], Started)
    assert terminals(events) == [events[-1]]
    assert isinstance(events[-1], Finished)


async def test_the_pick_is_obeyed(harness: Harness) -> None:
    for info in harness.pool.live():
        for _ in range(3):
            await collect(harness.pool.call(info.id, harness.short))
    assert [await harness.served(info.id) for info in harness.pool.live()] == [3] * len(harness.pool.live())


async def test_an_unknown_replica_is_lost_when_the_call_is_read_not_when_it_is_made(harness: Harness) -> None:
    call = harness.pool.call("no-such-replica", harness.short)
    with pytest.raises(ReplicaLost):
        await anext(call)


async def test_a_replica_that_dies_leaves_the_live_set_and_every_listener_is_told(harness: Harness) -> None:
    told: list[list[tuple[ReplicaInfo, ...]]] = [[], []]
    for seen in told:
        harness.pool.subscribe(seen.append)
    gone = first(harness)
    others = [info.id for info in harness.pool.live() if info.id != gone]
    await harness.lose(gone)
    await until(lambda: all(seen and gone not in {info.id for info in seen[-1]} for seen in told))
    assert set(others) <= {info.id for info in harness.pool.live()}
    with pytest.raises(ReplicaLost):
        await anext(harness.pool.call(gone, harness.short))


async def test_a_listener_is_called_on_the_event_loop(harness: Harness) -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    harness.pool.subscribe(lambda _live: loops.append(asyncio.get_running_loop()))
    await harness.lose(first(harness))
    await until(lambda: loops)
    assert set(loops) == {asyncio.get_running_loop()}


async def test_a_stream_on_a_replica_that_dies_raises_replica_lost(harness: Harness) -> None:
    call = harness.pool.call(first(harness), harness.endless)
    await anext(call)
    await harness.lose(first(harness))
    with pytest.raises(ReplicaLost):
        await collect(call)


async def test_a_stream_on_another_replica_does_not_notice(harness: Harness) -> None:
    dying, other = (info.id for info in harness.pool.live()[:2])
    call = harness.pool.call(other, harness.endless)
    await anext(call)
    await harness.lose(dying)
    assert await harness.working() == 1
    call.cancel()


async def test_cancelling_stops_the_work(harness: Harness) -> None:
    call = harness.pool.call(first(harness), harness.endless)
    await anext(call)
    assert await harness.working() == 1
    call.cancel()
    for _ in range(1000):
        if await harness.working() == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the replica is still at work")


async def test_cancelling_is_safe_at_any_time_and_more_than_once(harness: Harness) -> None:
    unread = harness.pool.call(first(harness), harness.endless)
    unread.cancel()
    unread.cancel()
    ended = harness.pool.call(first(harness), harness.short)
    await collect(ended)
    ended.cancel()
    lost = harness.pool.call("no-such-replica", harness.short)
    lost.cancel()
    failed = harness.pool.call("no-such-replica", harness.short)
    with pytest.raises(ReplicaLost):
        await anext(failed)
    failed.cancel()
    events = await collect(harness.pool.call(first(harness), harness.short))
    assert isinstance(events[-1], Finished), "the pool goes on serving"


async def test_waking_is_safe_to_repeat(harness: Harness) -> None:
    harness.pool.wake()
    harness.pool.wake()
    assert isinstance(
        (await collect(harness.pool.call(first(harness), harness.short)))[-1],
        Finished,
    )
