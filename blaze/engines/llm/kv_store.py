"""The KV memory itself: keys and values of all layers, in slots."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from blaze.engines.llm.kv_cache import BLOCK, SlotCopy
from blaze.engines.llm.slots import Slot


@dataclass(frozen=True, slots=True)
class LayerShape:
    heads: int  # of keys and values
    key_dim: int
    value_dim: int

    @property
    def numbers_per_token(self) -> int:
        return self.heads * (self.key_dim + self.value_dim)


def bytes_per_token(shapes: Iterable[LayerShape], dtype: torch.dtype) -> int:
    return sum(shape.numbers_per_token for shape in shapes) * dtype.itemsize


class KVStore:
    """A slot of C tokens holds, for each layer, keys as [heads, C, key_dim] and values alike.

    So the heads of neighbouring slots are one batch of matrices. Behind the last slot lies one token that
    belongs to nobody: rows that only fill a hole are written there.
    """

    def __init__(
        self, shapes: tuple[LayerShape, ...], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = shapes
        self.tokens = tokens
        self.dtype = dtype
        # All in one, [layers * 2, rows, dim], where they are alike: then a copy is one call.
        self._whole: torch.Tensor | None = None
        if len({(s.heads, dim) for s in shapes for dim in (s.key_dim, s.value_dim)}) == 1:
            rows = (tokens + 1) * shapes[0].heads
            self._whole = _zeros(len(shapes) * 2 * rows, shapes[0].key_dim, dtype, device).view(
                len(shapes) * 2, rows, -1
            )
            self._keys, self._values = list(self._whole[::2]), list(self._whole[1::2])
        else:
            self._keys = [_zeros((tokens + 1) * s.heads, s.key_dim, dtype, device) for s in shapes]
            self._values = [_zeros((tokens + 1) * s.heads, s.value_dim, dtype, device) for s in shapes]

    def slots(self, layer: int, start: int, capacity: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``count`` neighbouring slots, [count * heads, capacity, dim], in place."""
        heads = self.shapes[layer].heads
        rows = slice(start * heads, (start + capacity * count) * heads)
        return (
            self._keys[layer][rows].view(count * heads, capacity, -1),
            self._values[layer][rows].view(count * heads, capacity, -1),
        )

    def rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values as [rows, dim]; see :func:`row_index`."""
        return self._keys[layer], self._values[layer]

    def copy(self, copies: Iterable[SlotCopy]) -> None:
        for copy in copies:
            # Whole blocks: inside one, keys may lie in any order (see native/kv_layout.h).
            length = -(-copy.length // BLOCK) * BLOCK
            for source, target in zip(self._parts(copy.source), self._parts(copy.target), strict=True):
                target[..., :length, :].copy_(source[..., :length, :])

    def _parts(self, slot: Slot) -> Iterable[torch.Tensor]:
        """All of a slot, [..., heads, capacity, dim] each."""
        if self._whole is not None:
            heads = self.shapes[0].heads
            rows = self._whole[:, slot.start * heads : (slot.start + slot.capacity) * heads]
            return (rows.view(rows.shape[0], heads, slot.capacity, -1),)
        return [
            part
            for layer in range(len(self.shapes))
            for part in self.slots(layer, slot.start, slot.capacity, 1)
        ]

    def clear(self, slot: Slot) -> None:
        """Numbers that are no numbers would outlive their sequence: nought times NaN is NaN."""
        for part in self._parts(slot):
            part.zero_()


def row_index(
    starts: torch.Tensor, capacities: torch.Tensor, positions: torch.Tensor, heads: int
) -> torch.Tensor:
    """Rows of :meth:`KVStore.rows` for token ``positions`` of slots; all int64 [n], result [n * heads]."""
    first = starts * heads + positions
    return (first[:, None] + capacities[:, None] * torch.arange(heads, device=starts.device)).view(-1)


def _zeros(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(rows, dim, dtype=dtype, device=device)
    # The system's own noughts: memory that is not written takes no place. In small pages, for the first token
    # of a slot touches a page of every layer, and large ones would stop the step to be cleared.
    memory = mmap.mmap(-1, rows * dim * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(rows, dim)
