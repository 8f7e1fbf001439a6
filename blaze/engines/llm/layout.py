"""How the tokens of a step lie in its tensors: decode rows side by side in runs, then the chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blaze.engines.llm.scheduler import Work
from blaze.engines.llm.slots import Slot

# Key lengths are rounded up to it: shapes repeat, and torch's softmax, which adds up in another order what is
# left over behind whole vectors, gives a row the same bits at each length.
_BUCKET = 32
_MAX_HOLE = 1  # free slots inside a run: computing one for nothing is cheaper than another call


@dataclass(frozen=True, slots=True)
class Run:
    """Decode rows whose slots lie next to each other, so that one batched matmul reads them in place.

    A row is None where the slot belongs to nobody in this step.
    """

    start: int  # of the first row's slot
    capacity: int
    rows: tuple[Work | None, ...]

    @property
    def length(self) -> int:
        """Keys that the longest row attends to, rounded up."""
        return rounded(max(work.end for work in self.rows if work is not None), self.capacity)


def rounded(length: int, capacity: int) -> int:
    """Keys to hand out of a slot so that ``length`` are among them."""
    return min(-(-length // _BUCKET) * _BUCKET, capacity)


def slot_of(work: Work) -> Slot:
    slot = work.sequence.slot
    assert slot is not None, "scheduled without a slot"
    return slot


def split(work: Iterable[Work]) -> tuple[list[Run], list[Work]]:
    """Runs of single tokens, and chunks of several."""
    singles = [item for item in work if item.count == 1]
    chunks = [item for item in work if item.count > 1]
    return list(runs(singles)), chunks


def runs(singles: Iterable[Work]) -> Iterable[Run]:
    rows: list[Work | None] = []
    first = Slot(0, 0)
    for work in sorted(singles, key=lambda item: (slot_of(item).capacity, slot_of(item).start)):
        slot = slot_of(work)
        if rows:
            hole = (slot.start - first.start) // first.capacity - len(rows)
            if slot.capacity == first.capacity and hole <= _MAX_HOLE:
                rows += [None] * hole
            else:
                yield Run(first.start, first.capacity, tuple(rows))
                rows = []
        if not rows:
            first = slot
        rows.append(work)
    if rows:
        yield Run(first.start, first.capacity, tuple(rows))
