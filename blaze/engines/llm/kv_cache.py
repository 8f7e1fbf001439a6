"""Who holds which part of the KV memory: running sequences, and prefixes kept for those to come.

Bookkeeping only, no tensor: what has to be moved is handed out as a list of copies, which the runner
carries out in that order before the step that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass

from blaze.engines.llm.prefix import Prefix, PrefixIndex
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.slots import Slot, SlotAllocator
from blaze.types import TokenId

BLOCK = 16  # tokens; prefixes are shared in whole blocks
UNIT = 128  # tokens; the smallest slot
_MOST_EVICTIONS_TO_KEEP = 8  # one kept prefix is not worth more old ones than that


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """The first ``length`` tokens of ``source``, with their keys and values, to ``target``."""

    source: Slot
    target: Slot
    length: int


@dataclass(slots=True)
class PrefixCounters:
    queries: int = 0  # prompt tokens that were looked up
    hits: int = 0  # of them, those that did not have to be computed


class KVCache:
    """``tokens``: the memory budget. ``longest``: the most tokens that one sequence can have.

    ``compact``: running sequences are to lie side by side, so what is kept of finished ones is moved away.
    Without it, it stays where it is.
    """

    def __init__(
        self,
        tokens: int,
        *,
        longest: int,
        prefix_caching: bool = True,
        compact: bool = True,
        unit: int = UNIT,
        block: int = BLOCK,
    ) -> None:
        self.longest = longest
        self._compact = compact
        self._slots = SlotAllocator(tokens, unit=unit, longest=longest)
        if self._slots.total < self._slots.largest:
            raise ValueError(f"{tokens} tokens of KV memory do not hold one sequence of {longest}")
        self._prefix_caching = prefix_caching
        self._index = PrefixIndex(block)
        self._held: dict[Sequence, Prefix] = {}  # of running sequences
        self._kept: dict[Prefix, None] = {}  # of nobody, least recently used first
        self._copies: list[SlotCopy] = []
        self.counters = PrefixCounters()

    @property
    def total_tokens(self) -> int:
        return self._slots.total

    @property
    def free_tokens(self) -> int:
        """What nobody uses, kept prefixes counted as used."""
        return self._slots.free_tokens

    @property
    def kept_tokens(self) -> int:
        return sum(prefix.slot.capacity for prefix in tuple(self._kept))  # asked for from other threads too

    def held(self, token_ids: TokenIds[TokenId]) -> int:
        """How many of the first tokens need not be computed. Any thread may ask; it is a hint."""
        return self._index.held(token_ids) if self._prefix_caching else 0

    def begin(self, sequence: Sequence) -> bool:
        """Give the sequence a slot, with what of its tokens is at hand already. False: no memory."""
        hit = self._find(sequence)
        length = min(len(sequence.token_ids) + 1, self.longest)  # with the next token, if there can be one
        slot = self._allocate(length, protect=hit[0] if hit else None)
        if slot is None and hit is not None:  # the prefix itself is in the way
            hit = None
            slot = self._allocate(length)
        if slot is None:
            return False
        if hit is not None:
            prefix, length = hit
            self._touch(prefix)
            self._copies.append(SlotCopy(prefix.slot, slot, length))
            sequence.num_computed = length
        if self._looks_up(sequence) and not sequence.num_generated and not sequence.counted:
            sequence.counted = True  # when it first came, and not when it comes back
            self.counters.queries += sequence.prompt_len
            self.counters.hits += sequence.num_computed
            sequence.num_cached = sequence.num_computed
        sequence.slot = slot
        self._held[sequence] = Prefix(sequence.token_ids, slot)
        self.computed(sequence)
        return True

    def reserve(self, sequence: Sequence, length: int) -> bool:
        """Make room for ``length`` tokens in all, moving the sequence if need be. False: no memory."""
        slot = sequence.slot
        assert slot is not None
        assert length <= self.longest, "no memory would ever be enough"
        if length <= slot.capacity:
            return True
        larger = self._allocate(length)
        if larger is None:
            return False
        self._copies.append(SlotCopy(slot, larger, sequence.num_computed))
        self._slots.free(slot)
        sequence.slot = self._held[sequence].slot = larger
        return True

    def computed(self, sequence: Sequence) -> None:
        """More of the sequence is computed: others can share it from now on."""
        if self._prefix_caching:
            self._index.extend(self._held[sequence], sequence.num_computed)

    def end(self, sequence: Sequence, *, keep: bool) -> None:
        """Take the slot back. ``keep``: leave its prefix for others, as long as nobody needs the memory."""
        prefix = self._held.pop(sequence)
        sequence.slot = None
        sequence.num_computed = 0
        if keep and self._worth_keeping(prefix):
            self._keep(prefix)
        else:
            self._drop(prefix)

    def evict_all(self) -> None:
        """Keep nothing any longer: after a failed step nobody knows which of its copies were made."""
        for prefix in list(self._kept):
            self._evict(prefix)

    def take_copies(self) -> tuple[SlotCopy, ...]:
        copies, self._copies = tuple(self._copies), []
        return copies

    def _find(self, sequence: Sequence) -> tuple[Prefix, int] | None:
        if not self._looks_up(sequence):
            return None
        # The last token is always computed: its logits are what the next one is drawn from.
        return self._index.longest(sequence.token_ids, len(sequence.token_ids) - 1)

    def _looks_up(self, sequence: Sequence) -> bool:
        return self._prefix_caching and not sequence.needs_all_logits

    def _worth_keeping(self, prefix: Prefix) -> bool:
        if not prefix.hashes:
            return False
        for other in self._index.covers(prefix):
            if other in self._kept:
                self._touch(other)
                return False
        return True

    def _keep(self, prefix: Prefix) -> None:
        for other in list(self._index.covered_by(prefix)):
            if other in self._kept:
                del self._kept[other]
                self._drop(other)
        if self._compact:
            self._move_away(prefix)
        self._kept[prefix] = None

    def _move_away(self, prefix: Prefix) -> None:
        """Into a slot of its size, as high as there is one; unless it lies higher already."""
        capacity = self._slots.capacity_for(prefix.length)
        slot = self._slots.allocate(capacity, high=True)
        for oldest in list(self._kept)[:_MOST_EVICTIONS_TO_KEEP]:
            if slot is not None:
                break
            self._evict(oldest)
            slot = self._slots.allocate(capacity, high=True)
        if slot is not None and slot.start < prefix.slot.start:  # not where the running ones belong
            self._slots.free(slot)
            slot = None
        if slot is not None:
            self._copies.append(SlotCopy(prefix.slot, slot, prefix.length))
            self._slots.free(prefix.slot)
            prefix.slot = slot

    def _allocate(self, length: int, *, protect: Prefix | None = None) -> Slot | None:
        capacity = self._slots.capacity_for(length)
        slot = self._slots.allocate(capacity)
        if slot is None and (victims := self._victims(capacity, protect)):
            for prefix in victims:
                self._evict(prefix)
            slot = self._slots.allocate(capacity)
        return slot

    def _victims(self, capacity: int, protect: Prefix | None) -> list[Prefix]:
        """What is kept at one place for such a slot: where it has been of no use for longest.

        Nothing where no place can be freed: else all that is kept would go in vain, step after step.
        """
        places = range(self._slots.total // capacity)
        taken = {place for prefix in self._held.values() for place in _places(prefix.slot, capacity)}
        if protect is not None:
            taken.update(_places(protect.slot, capacity))
        last_use = {
            place: use
            for use, prefix in enumerate(self._kept)  # the later uses overwrite the earlier ones
            for place in _places(prefix.slot, capacity)
            if place in places and place not in taken
        }
        if not last_use:
            return []
        chosen = min(last_use, key=lambda place: last_use[place])
        return [prefix for prefix in self._kept if chosen in _places(prefix.slot, capacity)]

    def _evict(self, prefix: Prefix) -> None:
        del self._kept[prefix]
        self._drop(prefix)

    def _drop(self, prefix: Prefix) -> None:
        self._index.remove(prefix)
        self._slots.free(prefix.slot)

    def _touch(self, prefix: Prefix) -> None:
        if prefix in self._kept:
            del self._kept[prefix]
            self._kept[prefix] = None


def _places(slot: Slot, capacity: int) -> range:
    """Of the places where slots of that capacity can lie, those that this slot lies in."""
    return range(slot.start // capacity, -(-(slot.start + slot.capacity) // capacity))
