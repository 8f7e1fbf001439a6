"""Running a stock transformers model over one left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StaticBatchRunner:
    """Prefill once, then decode one token per row and step; rows can leave, none can join.

    Prompts are padded on the left and masked; every row counts its own positions, so that a row's
    output does not depend on the padding around it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    @torch.inference_mode()
    def prefill(self, prompts: Rows[Rows[int]]) -> torch.Tensor:
        """Logits of the next token, [rows, vocabulary]."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self._mask = mask.to(self._model.device)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(ids.to(self._model.device), positions)

    @torch.inference_mode()
    def decode(self, tokens: Rows[int]) -> torch.Tensor:
        """Feed each row its token; logits of the one after it, [rows, vocabulary]."""
        column = torch.tensor(tokens, device=self._model.device).unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(column)], dim=1)
        return self._forward(column, self._mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Rows[int]) -> None:
        """Go on with these rows only, in this order."""
        index = torch.tensor(rows, device=self._model.device)
        self._mask = self._mask[index]
        self._cache.batch_select_indices(index)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1, :]
        return logits
