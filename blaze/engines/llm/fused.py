"""The Llama family in a few fused operations per layer, instead of transformers' modules.

Same weights, same numbers (checked against the stock model when it is loaded), less in between: QKV is one
matrix, gate and up are one, weights lie the way the processor wants them, and all tokens of a step - decodes
and prompt chunks of any sequences - go through each matrix together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from blaze.engines.llm.fused_model import FusedModel
from blaze.engines.llm.kv_store import KVStore
from blaze.engines.llm.linear import Linear
from blaze.engines.llm.runner import StepResult
from blaze.engines.llm.scheduler import Step
from blaze.engines.llm.step_rows import StepRows


class LayerOperations(Protocol):
    """What lies between the matrices, and the keys and values of the step."""

    @property
    def name(self) -> str: ...

    @property
    def batches_neighbours(self) -> bool: ...

    def begin(self, rows: StepRows) -> None: ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm of each row."""
        ...

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Rotate, keep keys and values, attend: [rows, (queries + 2 keys) * dim] -> [rows, queries * dim]."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[rows, gate + up] -> silu(gate) * up."""
        ...


class FusedRunner:
    def __init__(
        self, model: FusedModel[Linear], store: KVStore, operations: LayerOperations, *, two_rows: bool
    ) -> None:
        """``two_rows``: a row that is alone takes another way through some kernel, and is given company."""
        self._model = model
        self._operations = operations
        self._two_rows = two_rows
        self.store = store

    @property
    def name(self) -> str:
        return f"fused, {self._operations.name}"

    @property
    def batches_neighbours(self) -> bool:
        return self._operations.batches_neighbours

    def settle(self) -> None:
        """Any thread will do."""

    @torch.inference_mode()
    def execute(self, step: Step, launching: Callable[[], None] = lambda: None) -> StepResult:
        self.store.copy(step.copies)
        model, operations = self._model, self._operations
        rows = StepRows.of(step, model.embedding.device)
        operations.begin(rows)
        launching()
        x = F.embedding(rows.ids, model.embedding)
        if self._two_rows and x.shape[0] == 1:
            x = x.expand(2, -1).contiguous()
        for index, layer in enumerate(model.layers):
            h = operations.norm(x, layer.input_norm, model.eps)
            x = layer.output.plus(operations.attend(index, layer.qkv(h)), x)
            h = operations.norm(x, layer.mlp_norm, model.eps)
            x = layer.down.plus(operations.silu_mul(layer.gate_up(h)), x)
        return rows.result(step, self._logits(x, rows.logit_rows))

    def _logits(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        x = x[wanted]
        count = x.shape[0]
        if self._two_rows and count == 1:
            x = x.expand(2, -1)
        return self._model.head(
            self._operations.norm(x.contiguous(), self._model.final_norm, self._model.eps)
        )[:count]
