from __future__ import annotations

import asyncio
import random

import pytest

from blaze.errors import Overloaded
from blaze.routing.admission import WaitingRoom
from blaze.routing.breaker import BreakerBoard
from blaze.routing.outcome import Outcome
from blaze.routing.replica import Lease, ReplicaInfo
from blaze.routing.replicas import ReplicaTable
from blaze.routing.trip import BreakerSettings
from tests.fakes import FakeClock
from tests.waiting import until

FOREVER_S = 3600.0


class Desk:
    """One replica that takes ``cap`` requests, and a waiting room in front of it."""

    def __init__(self, *, cap: int = 1, max_queued: int = 10) -> None:
        self.clock = FakeClock()
        breakers = BreakerBoard(BreakerSettings(), self.clock, random.Random(0))
        self.table = ReplicaTable(cap=cap, clock=self.clock, breakers=breakers)
        self.table.sync([ReplicaInfo("a")])
        self.room = WaitingRoom(self.clock, max_queued=max_queued)
        self.table.on_capacity.append(self.room.pump)

    def attempt(self) -> Lease | None:
        return self.table.lease("a") if len(self.table.eligible()) else None

    async def wait(self, timeout_s: float = FOREVER_S, *, admitted: bool = False) -> Lease:
        return await self.room.wait(self.attempt, timeout_s, admitted=admitted)

    @property
    def in_flight(self) -> int:
        return self.table.counters("m")[0].in_flight


async def test_places_are_given_in_order_of_arrival() -> None:
    desk = Desk()
    held = desk.table.lease("a")
    served: list[int] = []

    async def wait(number: int) -> None:
        lease = await desk.wait()
        served.append(number)
        lease.release(Outcome.SUCCESS)

    tasks = [asyncio.create_task(wait(number)) for number in range(5)]
    await until(lambda: len(desk.room) == 5)
    held.release(Outcome.SUCCESS)
    await asyncio.gather(*tasks)
    assert served == [0, 1, 2, 3, 4]
    assert len(desk.room) == 0
    assert desk.in_flight == 0


async def test_a_place_is_leased_in_the_moment_that_it_comes_free() -> None:
    desk = Desk()
    held = desk.table.lease("a")
    waiter = asyncio.create_task(desk.wait())
    await until(lambda: len(desk.room) == 1)
    held.release(Outcome.SUCCESS)
    # The waiter has not run yet, but nobody else can slip in.
    assert not waiter.done()
    assert desk.in_flight == 1
    assert desk.attempt() is None
    (await waiter).release(Outcome.SUCCESS)


async def test_several_places_at_once_serve_several_waiters() -> None:
    desk = Desk(cap=3)
    held = [desk.table.lease("a") for _ in range(3)]
    waiters = [asyncio.create_task(desk.wait()) for _ in range(3)]
    await until(lambda: len(desk.room) == 3)
    for lease in held:
        lease.release(Outcome.SUCCESS)
    leases = await asyncio.gather(*waiters)
    assert desk.in_flight == 3
    for lease in leases:
        lease.release(Outcome.SUCCESS)
    assert desk.in_flight == 0


@pytest.mark.parametrize("max_queued", [0, 2])
async def test_a_full_room_refuses_at_once(max_queued: int) -> None:
    desk = Desk(max_queued=max_queued)
    held = desk.table.lease("a")
    tasks = [asyncio.create_task(desk.wait()) for _ in range(max_queued)]
    await until(lambda: len(desk.room) == max_queued)
    with pytest.raises(Overloaded) as caught:
        await desk.wait()
    assert caught.value.retry_after_s == max_queued + 1  # a second for each place, to begin with
    assert len(desk.room) == max_queued
    held.release(Outcome.SUCCESS)
    for task in tasks:
        (await task).release(Outcome.SUCCESS)


async def test_whoever_has_been_at_work_before_is_let_into_a_full_room() -> None:
    desk = Desk(max_queued=0)
    held = desk.table.lease("a")
    moved = asyncio.create_task(desk.wait(admitted=True))
    await until(lambda: len(desk.room) == 1)
    held.release(Outcome.SUCCESS)
    (await moved).release(Outcome.SUCCESS)
    assert desk.in_flight == 0


async def test_the_deadline_ends_the_wait_with_overloaded() -> None:
    desk = Desk()
    held = desk.table.lease("a")
    with pytest.raises(Overloaded) as caught:
        await desk.wait(timeout_s=0.0)
    assert caught.value.http_status == 503
    assert caught.value.retry_after_s
    assert len(desk.room) == 0
    held.release(Outcome.SUCCESS)
    assert desk.in_flight == 0


async def test_a_waiter_that_leaves_gives_up_its_turn() -> None:
    desk = Desk()
    held = desk.table.lease("a")
    first, second = (asyncio.create_task(desk.wait()) for _ in range(2))
    await until(lambda: len(desk.room) == 2)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert len(desk.room) == 1
    held.release(Outcome.SUCCESS)
    (await second).release(Outcome.SUCCESS)
    assert desk.in_flight == 0


async def test_a_waiter_cancelled_before_it_is_cleaned_up_is_passed_over() -> None:
    desk = Desk()
    held = desk.table.lease("a")
    first, second = (asyncio.create_task(desk.wait()) for _ in range(2))
    await until(lambda: len(desk.room) == 2)
    first.cancel()
    held.release(Outcome.SUCCESS)  # before the cancelled task has run
    (await second).release(Outcome.SUCCESS)
    assert first.cancelled()
    assert desk.in_flight == 0


async def test_case_17_a_waiter_cancelled_in_the_moment_of_its_turn_gives_the_lease_back() -> None:
    desk = Desk()
    held = desk.table.lease("a")
    first, second = (asyncio.create_task(desk.wait()) for _ in range(2))
    await until(lambda: len(desk.room) == 2)
    held.release(Outcome.SUCCESS)  # first has its lease, but has not run yet
    first.cancel()
    (await second).release(Outcome.SUCCESS)
    assert first.cancelled()
    assert desk.in_flight == 0


@pytest.mark.parametrize(
    ("came_later_s", "order"),
    [(0.0, ["small", "large"]), (3.9, ["small", "large"]), (4.1, ["large", "small"])],
)
async def test_a_small_request_overtakes_a_large_one_that_came_a_little_earlier(
    came_later_s: float, order: list[str]
) -> None:
    desk = Desk()
    held = desk.table.lease("a")
    served: list[str] = []

    async def wait(name: str, size: float) -> None:
        lease = await desk.room.wait(desk.attempt, FOREVER_S, size=size)
        served.append(name)
        lease.release(Outcome.SUCCESS)

    large = asyncio.create_task(wait("large", 100.0))
    await until(lambda: len(desk.room) == 1)
    desk.clock.advance(came_later_s)
    small = asyncio.create_task(wait("small", 0.0))
    await until(lambda: len(desk.room) == 2)
    held.release(Outcome.SUCCESS)
    await asyncio.gather(large, small)
    assert served == order
