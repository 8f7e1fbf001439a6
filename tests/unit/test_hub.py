from __future__ import annotations

import gc
import weakref

import pytest
import torch

from blaze.errors import Cancelled, ReplicaStopping
from tests.hub_bench import Caller, CountingDenoiser, HubBench


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


# --- Images that nobody waits for any more ---------------------------------------------------------------


def rows(bench: HubBench) -> list[list[tuple[int, int]]]:
    """Of each forward: whose they are, and which of their images."""
    pairs = zip(bench.batches, bench.module.images, strict=True)
    return [list(zip(numbers, images, strict=True)) for numbers, images in pairs]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_who_leaves_a_call_is_out_of_the_next_forward_in_every_block_of_guidance(
    bench: HubBench, blocks: int
) -> None:
    bench.trust_narrow(blocks)
    group, other = Caller(1, 4, images=3, blocks=blocks), Caller(2, 4)
    bench.start(group, other)
    bench.step()
    group.left = {1}
    bench.step()
    group.left = {1, 0}
    bench.finish()
    alone = [(2, 0)]
    assert rows(bench) == [
        [(1, 0), (1, 1), (1, 2)] * blocks + alone,
        [(1, 0), (1, 2)] * blocks + alone,
        [(1, 2)] * blocks + alone,
        [(1, 2)] * blocks + alone,
    ]
    assert (group.ends, other.ends) == ([None], [None]), "and the rows of those who stay are theirs"


def test_what_becomes_of_who_has_left_is_nobodys_business(bench: HubBench) -> None:
    bench.trust_narrow(blocks=2)
    group = Caller(1, 3, images=3, blocks=2)
    bench.start(group)
    group.left, group.spoils = {1}, True
    bench.finish()
    assert [len(batch) for batch in bench.batches] == [4, 4, 4]
    assert group.ends == [None]


def test_the_first_time_a_narrow_call_is_compared_with_the_whole_one(bench: HubBench) -> None:
    group = Caller(1, 3, images=3, blocks=2)
    group.left = {0}
    bench.start(group)
    bench.finish()
    assert [len(batch) for batch in bench.batches] == [6, 4, 4, 4, 4]
    assert group.ends == [None]


def test_their_places_in_a_forward_are_others(bench: HubBench) -> None:
    bench.trust_narrow()
    group, late = Caller(1, 3, images=8), Caller(2, 3, images=4)
    bench.start(group, late)
    bench.step()
    assert bench.batches == [[1] * 8], "eight at once are the most"
    group.left = {1, 3, 5, 7}
    bench.step()  # of those who wait longest, which is the late one now
    assert bench.batches[1:] == [[2] * 4 + [1] * 4]


def test_rows_in_another_order_than_block_by_block_stay_whole(bench: HubBench) -> None:
    bench.trust_narrow(blocks=2)
    group = Caller(1, 2, images=3, blocks=2, interleaved=True)
    group.left = {0}
    bench.start(group)
    bench.finish()
    assert [len(batch) for batch in bench.batches] == [6, 6]
    assert group.ends == [None]


def test_images_that_nothing_tells_apart_are_not_what_trust_is_built_on(bench: HubBench) -> None:
    group = Caller(1, 2, images=3, blocks=2, distinct=False)
    group.left = {0}
    bench.start(group)
    bench.finish()
    assert [len(batch) for batch in bench.batches] == [6, 6]
    told_apart = Caller(2, 1, images=3, blocks=2)
    told_apart.left = {0}
    bench.start(told_apart)
    bench.finish()
    assert [len(batch) for batch in bench.batches[2:]] == [6, 4, 4]
    assert (group.ends, told_apart.ends) == ([None], [None])


def test_without_guidance_there_is_one_order_only(bench: HubBench) -> None:
    group = Caller(1, 2, images=3, distinct=False)
    group.left = {0}
    bench.start(group)
    bench.finish()
    assert [len(batch) for batch in bench.batches] == [3, 2, 2, 2]
    assert group.ends == [None]


def test_a_denoiser_whose_rows_depend_on_each_other_gets_whole_calls() -> None:
    class Counting(CountingDenoiser):
        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
        ) -> tuple[torch.Tensor]:
            (output,) = super().forward(sample, timestep, return_dict)
            return (output + len(sample),)

    bench = HubBench(module=Counting())
    group = Caller(1, 3, images=3)
    group.left = {0}
    group.gain += 3
    bench.start(group)
    bench.finish()
    assert [len(batch) for batch in bench.batches] == [3, 2, 3, 3, 3]
    assert group.ends == [None]


def test_a_failure_says_nothing_of_leaving_rows_out(bench: HubBench) -> None:
    def fail(_numbers: list[int]) -> None:
        raise ValueError("once")

    group = Caller(1, 1, images=2)
    group.left = {0}
    bench.module.before = fail
    bench.start(group)
    bench.finish()
    assert [type(end) for end in group.ends] == [ValueError]
    bench.module.before = lambda _numbers: None
    again = Caller(2, 1, images=2)
    again.left = {0}
    bench.start(again)
    bench.finish()
    assert again.ends == [None]
    assert len(bench.batches[-1]) == 1
