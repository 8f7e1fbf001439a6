"""Layer operations by torch's own operators: on a GPU, and on CPUs without a compiler.

Attention is two batched matrix multiplications over the slots where they lie. On CPUs in bf16 each row of
them has the same bits whatever the number of rows, of keys behind the mask, and of neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blaze.engines.llm.fused_model import FusedModel, Heads
from blaze.engines.llm.kv_store import KVStore, row_index
from blaze.engines.llm.layout import Run, rounded, slot_of
from blaze.engines.llm.linear import Linear
from blaze.engines.llm.scheduler import Work
from blaze.engines.llm.step_rows import StepRows

_CHUNK_ROWS = 128  # of a prompt at once: bounds the scores, and skips the keys that all of them must not see


class TorchOperations:
    name = "torch operators"
    batches_neighbours = True

    def __init__(self, model: FusedModel[Linear], store: KVStore) -> None:
        self._model = model
        self._store = store
        self._half = model.layers[0].heads.dim // 2
        # x * cos + roll(x) * sin: the sign of the rotation lies in the sine.
        sign = torch.ones(2 * self._half, device=model.sin.device)
        sign[: self._half] = -1
        self._cos = model.cos
        self._sin = model.sin * sign

    def begin(self, rows: StepRows) -> None:
        heads = self._model.layers[0].heads
        dtype = self._store.dtype
        self._rows = rows
        self._index = row_index(rows.starts, rows.capacities, rows.positions, heads.keys)
        self._angles = (
            self._cos[rows.positions].to(dtype).unsqueeze(1),
            self._sin[rows.positions].to(dtype).unsqueeze(1),
        )
        self._masks: dict[tuple[int | None, int, int], torch.Tensor] = {}

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        heads = self._model.layers[layer].heads
        count = self._rows.ids.shape[0]
        parts = qkv[:count].view(count, -1, heads.dim)
        queries, keys, values = torch.split(parts, [heads.queries, heads.keys, heads.keys], dim=1)
        if heads.q_norm is not None and heads.k_norm is not None:
            queries = self.norm(queries, heads.q_norm, heads.eps)
            keys = self.norm(keys, heads.k_norm, heads.eps)
        queries, keys = self._rotated(queries), self._rotated(keys)
        stored_keys, stored_values = self._store.rows(layer)
        stored_keys.index_copy_(0, self._index, keys.reshape(-1, heads.dim))
        stored_values.index_copy_(0, self._index, values.reshape(-1, heads.dim))
        out = qkv.new_zeros(qkv.shape[0], heads.queries * heads.dim)
        at = 0
        for run in self._rows.runs:
            at = self._attend_run(layer, run, queries, at, out)
        for work in self._rows.chunks:
            at = self._attend_chunk(layer, work, queries, at, out)
        return out

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self._angles
        return torch.addcmul(x * cos, torch.roll(x, self._half, -1), sin)

    def _attend_run(self, layer: int, run: Run, queries: torch.Tensor, at: int, out: torch.Tensor) -> int:
        heads = self._model.layers[layer].heads
        real = [place for place, work in enumerate(run.rows) if work is not None]
        q = queries[at : at + len(real)]
        if len(real) < len(run.rows):  # holes are computed with nought and thrown away
            padded = q.new_zeros(len(run.rows), *q.shape[1:])
            padded[real] = q
            q = padded
        keys, values = self._store.slots(layer, run.start, run.capacity, len(run.rows))
        length = run.length
        mask = self._mask(heads.window, at, length, run)
        attended = _attention(
            q.reshape(len(run.rows) * heads.keys, -1, heads.dim),
            keys[:, :length],
            values[:, :length],
            mask,
            heads,
        ).view(len(run.rows), -1)
        out[at : at + len(real)] = attended if len(real) == len(run.rows) else attended[real]
        return at + len(real)

    def _attend_chunk(self, layer: int, work: Work, queries: torch.Tensor, at: int, out: torch.Tensor) -> int:
        heads = self._model.layers[layer].heads
        slot = slot_of(work)
        keys, values = self._store.slots(layer, slot.start, slot.capacity, 1)
        for first in range(0, work.count, _CHUNK_ROWS):
            count = min(_CHUNK_ROWS, work.count - first)
            length = rounded(work.start + first + count, slot.capacity)
            q = queries[at + first : at + first + count].view(count, heads.keys, -1, heads.dim)
            q = q.permute(1, 2, 0, 3).reshape(heads.keys, -1, heads.dim)
            mask = self._mask(heads.window, at + first, length, None, count)
            attended = _attention(q, keys[:, :length], values[:, :length], mask, heads)
            attended = attended.view(heads.keys, -1, count, heads.dim).permute(2, 0, 1, 3)
            out[at + first : at + first + count] = attended.reshape(count, -1)
        return at + work.count

    def _mask(
        self, window: int | None, at: int, length: int, run: Run | None, count: int = 0
    ) -> torch.Tensor:
        """Nought where a key may be seen, -inf where not; the same for all layers with that window."""
        key = (window, at, length)
        if key not in self._masks:
            heads = self._model.layers[0].heads
            group = heads.queries // heads.keys
            places = torch.arange(length, device=self._store.rows(0)[0].device)
            if run is None:
                positions = self._rows.positions[at : at + count]
                mask = self._hidden(places, positions, window).expand(heads.keys, group, -1, -1)
                self._masks[key] = mask.reshape(heads.keys, group * count, length)
            else:
                ends = [0 if work is None else work.start for work in run.rows]
                mask = self._hidden(places, torch.tensor(ends, device=places.device), window)
                mask = mask[:, None, None].expand(-1, heads.keys, group, -1)
                self._masks[key] = mask.reshape(-1, group, length)
        return self._masks[key]

    def _hidden(self, places: torch.Tensor, positions: torch.Tensor, window: int | None) -> torch.Tensor:
        hidden = places[None] > positions[:, None]
        if window is not None:
            hidden |= places[None] <= positions[:, None] - window
        return torch.zeros(hidden.shape, dtype=self._store.dtype, device=places.device).masked_fill_(
            hidden, float("-inf")
        )


def _attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, heads: Heads
) -> torch.Tensor:
    scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=heads.scale)
    return torch.bmm(torch.softmax(scores, dim=-1), values)
