"""Any causal language model of transformers, as it is, over our KV memory.

The model's own attention asks a :class:`Cache` for keys and values; ours hands out the slots where they lie.
Rows of different lengths share a step by explicit positions and a mask of four dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from blaze.engines.llm.kv_store import KVStore, LayerShape, row_index
from blaze.engines.llm.layout import Run, slot_of, split
from blaze.engines.llm.runner import StepResult, wants_all_logits
from blaze.engines.llm.scheduler import Step, Work
from blaze.errors import ModelSourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the rows of one forward lie."""

    start: int
    capacity: int
    slots: int
    real: torch.Tensor | None  # the slots that have a row, when not all have
    length: int  # keys to hand out
    starts: torch.Tensor  # [rows * tokens], as for row_index
    capacities: torch.Tensor
    positions: torch.Tensor


class SlotCache(Cache):  # type: ignore[misc]  # transformers gives it no type
    """One forward's view of the KV memory."""

    def __init__(self, store: KVStore, place: _Place) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._store = store
        self._place = place

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep [rows, heads, tokens, dim]; give back all that the rows may attend to, alike."""
        place = self._place
        rows, heads = key_states.shape[:2]
        index = row_index(place.starts, place.capacities, place.positions, heads)
        out = []
        for states, stored, slots in zip(
            (key_states, value_states),
            self._store.rows(layer_idx),
            self._store.slots(layer_idx, place.start, place.capacity, place.slots),
            strict=True,
        ):
            stored.index_copy_(0, index, states.transpose(1, 2).reshape(-1, states.shape[-1]))
            view = slots.view(place.slots, heads, place.capacity, -1)[:, :, : place.length]
            out.append(view if place.real is None else view[place.real])
        assert out[0].shape[0] == rows
        return out[0], out[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self._place.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        return self._place.length, 0


class StockRunner:
    """A forward for each run of single tokens and for each prompt chunk."""

    name = "stock"

    batches_neighbours = True

    def __init__(self, model: PreTrainedModel, store: KVStore, *, compiled: bool = False) -> None:
        self._model = model
        self._forward = torch.compile(model, dynamic=True) if compiled else model
        self._windows = windows(model.config)
        self.store = store

    def settle(self) -> None:
        """Any thread will do."""

    @torch.inference_mode()
    def execute(self, step: Step, launching: Callable[[], None] = lambda: None) -> StepResult:
        launching()
        self.store.copy(step.copies)
        runs, chunks = split(step.work)
        last: dict[Work, torch.Tensor] = {}
        whole: list[tuple[Work, torch.Tensor]] = []
        for run in runs:
            logits = self._run(run)[:, -1]
            real = [work for work in run.rows if work is not None]
            for row, work in enumerate(real):
                last[work] = logits[row]
                if wants_all_logits(work):
                    whole.append((work, logits[row : row + 1]))
        for work in chunks:
            every = wants_all_logits(work)
            if not (every or work.yields_token):
                self._chunk(work, keep=1)  # for its keys and values alone
                continue
            logits = self._chunk(work, keep=work.count if every else 1)[0]
            last[work] = logits[-1]
            if every:
                whole.append((work, logits))
        yielding = [last[work] for work in step.work if work.yields_token]
        return StepResult(torch.stack(yielding) if yielding else torch.empty(0, 0), tuple(whole))

    def _run(self, run: Run) -> torch.Tensor:
        real = [(place, work) for place, work in enumerate(run.rows) if work is not None]
        slots = [slot_of(work) for _, work in real]
        device = self._model.device
        holes = len(real) < len(run.rows)
        positions = torch.tensor([work.start for _, work in real], device=device)
        place = _Place(
            start=run.start,
            capacity=run.capacity,
            slots=len(run.rows),
            real=torch.tensor([at for at, _ in real], device=device) if holes else None,
            length=run.length,
            starts=torch.tensor([slot.start for slot in slots], device=device),
            capacities=torch.tensor([slot.capacity for slot in slots], device=device),
            positions=positions,
        )
        ids = torch.tensor([[work.sequence.token_ids[work.start]] for _, work in real], device=device)
        return self._call(ids, positions[:, None], place, keep=1)

    def _chunk(self, work: Work, *, keep: int) -> torch.Tensor:
        slot, device = slot_of(work), self._model.device
        positions = torch.arange(work.start, work.end, device=device)
        place = _Place(
            start=slot.start,
            capacity=slot.capacity,
            slots=1,
            real=None,
            length=work.end,
            starts=torch.full_like(positions, slot.start),
            capacities=torch.full_like(positions, slot.capacity),
            positions=positions,
        )
        ids = torch.tensor([work.sequence.token_ids[work.start : work.end]], device=device)
        return self._call(ids, positions[None], place, keep=keep)

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, place: _Place, *, keep: int) -> torch.Tensor:
        masks = {
            kind: _mask(positions, place.length, window, self.store.dtype)
            for kind, window in self._windows.items()
        }
        output = self._forward(
            input_ids=ids,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions,
            cache=SlotCache(self.store, place),
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits


def windows(config: PretrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layers, with the number of tokens that each sees (None: all).

    Raises :class:`ModelSourceError` for kinds that keep something else than keys and values.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo: hidden in its modules
        raise ModelSourceError("source: local attention layers are not served", param="source")
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelSourceError(
            f"source: layers of kind {', '.join(sorted(unknown))} are not served", param="source"
        )
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


@torch.inference_mode()
def kv_shapes(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """What the model keeps of a token, learned by giving it one.

    Raises :class:`ModelSourceError` for a model that keeps something else than keys and values.
    """
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), cache=cache, use_cache=True)
    shapes = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
            raise ModelSourceError(
                f"source: this model's cache ({type(layer).__name__}) is not served", param="source"
            )
        shapes.append(LayerShape(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]))
    if not shapes:
        raise ModelSourceError("source: this model keeps no keys and values in its cache", param="source")
    return tuple(shapes)


def _mask(positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[rows, tokens] positions -> [rows, 1, tokens, length], added to the scores."""
    places = torch.arange(length, device=positions.device)
    hidden = places > positions[..., None]
    if window is not None:
        hidden |= places <= positions[..., None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)
