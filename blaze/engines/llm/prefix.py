"""Which computed prefixes are at hand, found by the tokens that they are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from blaze.engines.llm.slots import Slot
from blaze.types import TokenId


@dataclass(eq=False, slots=True)
class Prefix:
    """Keys and values of the first ``length`` of ``token_ids``, in ``slot``."""

    token_ids: list[TokenId]  # shared with the sequence that computes it; only ever appended to
    slot: Slot
    length: int = 0
    hashes: list[int] = field(default_factory=list)  # of each full block with all before it


class PrefixIndex:
    """From the hash of a block, chained with the blocks before it, to the prefixes that contain it."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._holders: dict[int, dict[Prefix, None]] = {}

    def extend(self, prefix: Prefix, length: int) -> None:
        """``length`` tokens of it are computed now."""
        prefix.length = length
        while (len(prefix.hashes) + 1) * self._block <= length:
            value = self._hash(
                prefix.token_ids, len(prefix.hashes), prefix.hashes[-1] if prefix.hashes else 0
            )
            prefix.hashes.append(value)
            self._holders.setdefault(value, {})[prefix] = None

    def remove(self, prefix: Prefix) -> None:
        for value in set(prefix.hashes):  # two blocks of one prefix may have the same
            holders = self._holders[value]
            del holders[prefix]
            if not holders:
                del self._holders[value]

    def longest(self, token_ids: list[TokenId], limit: int) -> tuple[Prefix, int] | None:
        """The prefix that shares the most full blocks with ``token_ids``, and how many tokens those are."""
        values: list[int] = []
        for block in range(limit // self._block):
            value = self._hash(token_ids, block, values[-1] if values else 0)
            if value not in self._holders:
                break
            values.append(value)
        for blocks in range(len(values), 0, -1):
            for prefix in self._holders[values[blocks - 1]]:
                if self._contains(prefix, token_ids, blocks):
                    return prefix, blocks * self._block
        return None

    def held(self, token_ids: Sequence[TokenId]) -> int:
        """How many of the first tokens are somewhere at hand, as far as hashes tell. Any thread may ask."""
        value = 0
        for block in range(len(token_ids) // self._block):
            value = self._hash(token_ids, block, value)
            if value not in self._holders:
                return block * self._block
        return len(token_ids) // self._block * self._block

    def covered_by(self, prefix: Prefix) -> Iterator[Prefix]:
        """Others of which ``prefix`` contains every full block."""
        for blocks, value in enumerate(prefix.hashes, start=1):
            yield from (
                other
                for other in self._holders[value]
                if other is not prefix
                and len(other.hashes) == blocks
                and self._contains(other, prefix.token_ids, blocks)
            )

    def covers(self, prefix: Prefix) -> Iterator[Prefix]:
        """Others that contain every full block of ``prefix``."""
        if prefix.hashes:
            yield from (
                other
                for other in self._holders[prefix.hashes[-1]]
                if other is not prefix and self._contains(other, prefix.token_ids, len(prefix.hashes))
            )

    def __len__(self) -> int:
        return len(self._holders)

    def _hash(self, token_ids: Sequence[TokenId], block: int, before: int) -> int:
        return hash((before, *token_ids[block * self._block : (block + 1) * self._block]))

    def _contains(self, prefix: Prefix, token_ids: list[TokenId], blocks: int) -> bool:
        """Hashes may collide: what is served must not depend on that, so all the tokens are compared."""
        end = blocks * self._block
        return len(prefix.hashes) >= blocks and prefix.token_ids[:end] == token_ids[:end]
