from __future__ import annotations

import gc
import weakref

import pytest
import torch

from blaze.errors import Cancelled, ReplicaStopping
from tests.hub_bench import Caller, HubBench


@pytest.fixture
def bench() -> HubBench:
    made = HubBench()
    made.trust()
    return made


def test_calls_meet_at_the_denoiser_and_go_their_own_ways(bench: HubBench) -> None:
    callers = [Caller(1, 2), Caller(2, 4, images=2), Caller(3, 3)]
    bench.start(*callers)
    bench.finish()
    assert bench.batches == [[1, 2, 2, 3], [1, 2, 2, 3], [2, 2, 3], [2, 2]]
    assert all(caller.ends == [None] for caller in callers)


def test_one_that_comes_later_joins_at_the_next_step(bench: HubBench) -> None:
    early, late = Caller(1, 3), Caller(2, 3)
    bench.start(early)
    bench.step()
    bench.start(late)
    bench.finish()
    assert bench.batches == [[1], [1, 2], [1, 2], [2]]


def test_a_call_that_asks_for_nothing_ends_at_once(bench: HubBench) -> None:
    caller = Caller(1, 0)
    bench.start(caller)
    assert (caller.ends, bench.hub.num_waiting) == ([None], 0)
    bench.step()
    assert bench.batches == []


def test_those_that_cannot_be_joined_take_turns(bench: HubBench) -> None:
    bench.start(Caller(1, 2), Caller(2, 2, side=3), Caller(3, 2))
    bench.finish()
    assert bench.batches == [[1, 3], [2], [1, 3], [2]]


def test_an_unwanted_call_ends_before_the_next_forward_and_the_others_go_on(bench: HubBench) -> None:
    callers = [Caller(number, 5) for number in (1, 2, 3)]
    bench.start(*callers)
    bench.step()
    callers[1].reason = Cancelled("left")
    bench.finish()
    assert bench.batches == [[1, 2, 3], *[[1, 3]] * 4]
    assert [caller.ends for caller in callers] == [[None], [callers[1].reason], [None]]


def test_the_end_is_for_all(bench: HubBench) -> None:
    callers = [Caller(number, 5) for number in (1, 2)]
    bench.start(*callers)
    bench.step()
    error = ReplicaStopping("over")
    bench.hub.end(error)
    assert [caller.ends for caller in callers] == [[error], [error]]
    assert bench.hub.num_waiting == 0


def test_an_error_of_the_denoiser_ends_the_call_that_causes_it(bench: HubBench) -> None:
    def fail_at_2(numbers: list[int]) -> None:
        if 2 in numbers:
            raise ValueError("two")

    bench.module.before = fail_at_2
    callers = [Caller(number, 2) for number in (1, 2, 3)]
    bench.start(*callers)
    bench.finish()
    assert [type(caller.ends[0]) for caller in callers] == [type(None), ValueError, type(None)]


def test_a_stand_in_has_the_weights_of_the_denoiser_itself(bench: HubBench) -> None:
    bench.module.weight = torch.nn.Parameter(torch.zeros(2))
    caller = Caller(1, 0)
    bench.start(caller)
    assert caller.denoiser is not None
    assert caller.denoiser is not bench.module
    assert caller.denoiser.weight is bench.module.weight
    assert isinstance(caller.denoiser, type(bench.module))


def test_nothing_is_kept_of_calls_that_have_ended(bench: HubBench) -> None:
    callers = [Caller(1, 2), Caller(2, 9)]
    bench.start(*callers)
    bench.step()
    callers[1].reason = Cancelled("left")
    bench.finish()
    gone = [weakref.ref(caller) for caller in callers]
    callers.clear()
    gc.collect()
    assert [caller() for caller in gone] == [None, None]
