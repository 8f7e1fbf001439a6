"""The KV memory itself: keys and values of all layers, in slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
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
            # Whole blocks: inside one, keys may lie in any order (see native/kernels.cpp).
            length = -(-copy.length // BLOCK) * BLOCK
            for layer in range(len(self.shapes)):
                sources = self.slots(layer, copy.source.start, copy.source.capacity, 1)
                targets = self.slots(layer, copy.target.start, copy.target.capacity, 1)
                for source, target in zip(sources, targets, strict=True):
                    target[:, :length].copy_(source[:, :length])

    def clear(self, slot: Slot) -> None:
        """Numbers that are no numbers would outlive their sequence: nought times NaN is NaN."""
        for layer in range(len(self.shapes)):
            for tensor in self.slots(layer, slot.start, slot.capacity, 1):
                tensor.zero_()


def row_index(
    starts: torch.Tensor, capacities: torch.Tensor, positions: torch.Tensor, heads: int
) -> torch.Tensor:
    """Rows of :meth:`KVStore.rows` for token ``positions`` of slots; all int64 [n], result [n * heads]."""
    first = starts * heads + positions
    return (first[:, None] + capacities[:, None] * torch.arange(heads, device=starts.device)).view(-1)


def _zeros(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(rows, dim, dtype=dtype, device=device)
    # numpy's zeros are the system's: memory that is not written takes no place.
    numbers = np.zeros(rows * dim * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(numbers).view(dtype).view(rows, dim)
