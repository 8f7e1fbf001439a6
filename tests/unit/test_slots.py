from __future__ import annotations

import pytest

from blaze.engines.llm.slots import Slot, SlotAllocator


@pytest.mark.parametrize(
    ("length", "capacity"), [(0, 4), (1, 4), (4, 4), (5, 8), (8, 8), (9, 16), (32, 32), (33, 64)]
)
def test_a_slot_is_the_smallest_power_of_two_that_holds_the_length(length: int, capacity: int) -> None:
    assert SlotAllocator(64, unit=4, longest=32).capacity_for(length) == capacity


@pytest.mark.parametrize(("longest", "largest"), [(1, 4), (4, 4), (20, 32), (32, 32)])
def test_the_largest_slot_holds_the_longest_sequence(longest: int, largest: int) -> None:
    assert SlotAllocator(64, unit=4, longest=longest).largest == largest


def test_slots_are_cut_from_the_low_end() -> None:
    slots = SlotAllocator(64, unit=4, longest=32)
    assert [slots.allocate(4), slots.allocate(4), slots.allocate(16)] == [
        Slot(0, 4),
        Slot(4, 4),
        Slot(16, 16),
    ]
    assert slots.free_tokens == 64 - 24


def test_what_is_only_kept_is_cut_from_the_high_end() -> None:
    slots = SlotAllocator(64, unit=4, longest=32)
    assert [slots.allocate(4, high=True), slots.allocate(8, high=True)] == [Slot(60, 4), Slot(48, 8)]
    assert slots.allocate(4) == Slot(56, 4), (
        "the smallest free one that holds it, so that large ones stay whole"
    )


def test_all_of_the_memory_can_be_used_and_no_more() -> None:
    slots = SlotAllocator(64, unit=4, longest=32)
    taken = [slots.allocate(4) for _ in range(16)]
    assert taken == [Slot(start, 4) for start in range(0, 64, 4)]
    assert slots.free_tokens == 0
    assert slots.allocate(4) is None
    assert slots.allocate(4, high=True) is None


def test_neighbours_become_one_again() -> None:
    slots = SlotAllocator(32, unit=4, longest=32)
    taken = [slots.allocate(4) for _ in range(8)]
    assert slots.allocate(32) is None
    for slot in (taken[index] for index in (3, 0, 6, 5, 1, 7, 2, 4)):
        assert slot is not None
        slots.free(slot)
    assert slots.allocate(32) == Slot(0, 32)


def test_neighbours_that_are_no_buddies_stay_apart() -> None:
    slots = SlotAllocator(16, unit=4, longest=16)
    first, second, third, _ = [slots.allocate(4) for _ in range(4)]
    assert first is not None and second is not None and third is not None
    slots.free(second)
    slots.free(third)
    assert slots.free_tokens == 8
    assert slots.allocate(8) is None, "a slot starts at a multiple of its capacity"
    slots.free(first)
    assert slots.allocate(8) == Slot(0, 8)


def test_what_does_not_fill_a_largest_slot_serves_smaller_ones() -> None:
    slots = SlotAllocator(32 + 16 + 4 + 3, unit=4, longest=32)  # three tokens are less than a unit
    assert slots.total == slots.free_tokens == 52
    assert slots.allocate(16) == Slot(32, 16)
    assert slots.allocate(4) == Slot(48, 4)
    assert slots.allocate(32) == Slot(0, 32)
    assert slots.free_tokens == 0


def test_nothing_is_larger_than_the_largest() -> None:
    slots = SlotAllocator(128, unit=4, longest=32)
    assert slots.allocate(64) is None
    assert slots.free_tokens == 128
