"""Where in the KV memory a sequence lies: slots of power-of-two sizes, from a buddy allocator."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A stretch of the KV memory, both in tokens; slots of one capacity start at multiples of it."""

    start: int
    capacity: int


class SlotAllocator:
    """A buddy allocator (Knowlton, "A fast storage allocator", CACM 1965) over ``tokens`` tokens.

    Sizes are ``unit`` times a power of two, up to the first that holds ``longest``. Slots of one size that
    lie next to each other are one batch of a matrix multiplication, without a copy: hence slots, and hence
    running sequences are put low and what is only kept is put high, so that the running ones lie together.
    """

    def __init__(self, tokens: int, *, unit: int, longest: int) -> None:
        self.unit = unit
        self.largest = self.capacity_for(longest)
        self.total = tokens // unit * unit
        self._free: dict[int, list[int]] = {}  # capacity -> starts, sorted
        size = unit
        while size <= self.largest:
            self._free[size] = []
            size *= 2
        start = 0
        for size in sorted(self._free, reverse=True):
            while start + size <= self.total:
                self._free[size].append(start)
                start += size

    def capacity_for(self, length: int) -> int:
        """The size of a slot that holds ``length`` tokens."""
        size = self.unit
        while size < length:
            size *= 2
        return size

    @property
    def free_tokens(self) -> int:
        return sum(size * len(starts) for size, starts in self._free.items())

    def allocate(self, capacity: int, *, high: bool = False) -> Slot | None:
        """The lowest slot, cut from the smallest free one that holds it; or simply the highest of all."""
        sizes = [size for size, starts in self._free.items() if size >= capacity and starts]
        if not sizes:
            return None
        # The smallest free slot is often the buddy of a running one, and thus not high at all.
        size = max(sizes, key=lambda size: self._free[size][-1] + size) if high else sizes[0]
        start = self._free[size].pop(-1 if high else 0)
        while size > capacity:
            size //= 2
            spare = start if high else start + size
            insort(self._free[size], spare)
            start += size if high else 0
        return Slot(start, capacity)

    def free(self, slot: Slot) -> None:
        start, size = slot.start, slot.capacity
        while size < self.largest:
            buddy = start ^ size
            starts = self._free[size]
            at = bisect_left(starts, buddy)
            if at == len(starts) or starts[at] != buddy:
                break
            del starts[at]
            start = min(start, buddy)
            size *= 2
        insort(self._free[size], start)
