from __future__ import annotations

from itertools import count

import pytest

from blaze.engines.llm.layout import Run, runs, slot_of, split
from blaze.engines.llm.scheduler import Work
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.slots import Slot

_serials = count()


def work(start: int, capacity: int, *, end: int = 1, tokens: int = 1) -> Work:
    """The last ``tokens`` of ``end``, of a sequence in that slot."""
    sequence = Sequence([0] * end, (0.0, next(_serials), 0))
    sequence.slot = Slot(start, capacity)
    sequence.num_computed = end - tokens
    return Work(sequence, end - tokens, tokens)


def test_rows_side_by_side_are_one_run() -> None:
    first, second, third = work(8, 8), work(16, 8), work(24, 8)
    assert list(runs([third, first, second])) == [Run(8, 8, (first, second, third))]


def test_one_slot_in_between_is_computed_for_nothing() -> None:
    first, third, fourth = work(0, 8), work(16, 8), work(24, 8)
    assert list(runs([first, third, fourth])) == [Run(0, 8, (first, None, third, fourth))]
    second = work(0, 8), work(16, 8), work(32, 8)
    assert list(runs(second)) == [Run(0, 8, (second[0], None, second[1], None, second[2]))]


def test_two_slots_in_between_are_not() -> None:
    first, fourth, fifth = work(0, 8), work(24, 8), work(32, 8)
    assert list(runs([first, fourth, fifth])) == [Run(0, 8, (first,)), Run(24, 8, (fourth, fifth))]


def test_slots_of_different_sizes_are_different_runs() -> None:
    small, large, medium = work(0, 8), work(32, 32), work(16, 16)
    assert list(runs([small, large, medium])) == [
        Run(0, 8, (small,)),
        Run(16, 16, (medium,)),
        Run(32, 32, (large,)),
    ]
    left, middle, right = work(0, 8), work(8, 4), work(16, 8)
    assert list(runs([left, middle, right])) == [Run(8, 4, (middle,)), Run(0, 8, (left, None, right))]


@pytest.mark.parametrize(
    ("ends", "length"), [([1], 32), ([32], 32), ([33], 64), ([3, 65, 4], 96), ([100], 112)]
)
def test_a_run_attends_to_its_longest_row_rounded_up(ends: list[int], length: int) -> None:
    rows = [work(index * 112, 112, end=end) for index, end in enumerate(ends)]
    (run,) = runs(rows)
    assert run.length == length


def test_a_hole_has_no_length() -> None:
    (run,) = runs([work(0, 64, end=2), work(128, 64, end=33)])
    assert run.rows[1] is None
    assert run.length == 64


def test_single_tokens_are_rows_and_more_are_chunks() -> None:
    decode, chunk, tail = work(0, 8, end=5), work(8, 8, end=6, tokens=4), work(16, 8, end=3)
    layout = split([chunk, tail, decode])
    assert layout == ([Run(0, 8, (decode, None, tail))], [chunk])


def test_nothing_has_no_layout() -> None:
    assert split([]) == ([], [])


def test_work_without_a_slot_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="without a slot"):
        slot_of(Work(Sequence([1], (0.0, 0, 0)), 0, 1))
