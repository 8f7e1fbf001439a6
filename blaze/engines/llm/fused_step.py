"""A whole step of the Llama family in one compiled call: nothing of it is left to Python but its beginning.

So the interpreter is free for the event loop meanwhile, and no time goes by between the operations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from ctypes import Array, addressof, byref, c_float, c_int64
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blaze.engines.llm.fused_model import FusedModel, Layer
from blaze.engines.llm.greedy import Largest
from blaze.engines.llm.kv_store import KVStore
from blaze.engines.llm.native.kernels import (
    BuffersStruct,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    ResultStruct,
    heads_struct,
    step_function,
    step_struct,
)
from blaze.engines.llm.panels import Panels
from blaze.engines.llm.runner import StepResult
from blaze.engines.llm.scheduler import Step
from blaze.engines.llm.step_rows import StepRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU = torch.device("cpu")
_KEPT_LOGITS = 64  # rows of memory for logits that are kept; what asks for more is a rare prompt's


class StepRunner:
    """For bfloat16 on a CPU with a bf16 dot product; see :func:`serves`."""

    name = "fused, compiled steps"
    batches_neighbours = False

    def __init__(self, model: FusedModel[Panels], store: KVStore, library: Path) -> None:
        run = step_function(library)
        assert run is not None, "asked for before"
        self._run = run
        self.store = store
        self._threads = torch.get_num_threads()
        self._alive: list[torch.Tensor | Array[LayerStruct]] = []  # what the structures point into
        self._head = model.head
        self._hidden = model.embedding.shape[1]
        self._layer = model.layers[0]
        layers = (LayerStruct * len(model.layers))(
            *(self._layer_struct(index, layer, model) for index, layer in enumerate(model.layers))
        )
        self._alive.append(layers)
        self._model = ModelStruct(
            hidden=self._hidden,
            layers=len(model.layers),
            eps=model.eps,
            layer=layers,
            final_norm=self._float(model.final_norm),
            head=self._matrix(model.head),
            # A row of the embedding is found in the head too, when they are the same.
            embedding=None if model.tied and model.head.scales is None else self._address(model.embedding),
        )
        self._buffers: dict[str, torch.Tensor] = {}

    def settle(self) -> None:
        """Keep each thread on a core of its own, if there are just as many: they are meant for it."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) == self._threads:
            self._model.cores = self._address(torch.tensor(cores))

    def execute(self, step: Step, launching: Callable[[], None] = lambda: None) -> StepResult:
        """The logits are good until the next step."""
        if step.copies:
            with torch.inference_mode():
                self.store.copy(step.copies)
        rows = StepRows.of(step, _CPU)
        count, wanted = rows.table.shape[1], rows.logit_rows.shape[0]
        layer = self._layer
        buffers = BuffersStruct(
            hidden=self._buffer("hidden", count, self._hidden, torch.float32).data_ptr(),
            normed=self._buffer("normed", count, self._hidden).data_ptr(),
            qkv=self._buffer("qkv", count, layer.qkv.outputs).data_ptr(),
            attended=self._buffer("attended", count, layer.output.inputs).data_ptr(),
            gated=self._buffer("gated", count, layer.down.inputs).data_ptr(),
            last_hidden=self._buffer("last_hidden", wanted, self._hidden, torch.float32).data_ptr(),
            last_qkv=self._buffer("last_qkv", wanted, layer.qkv.outputs).data_ptr(),
        )
        logits = self._logits(wanted)
        largest, likeliest = (c_float * wanted)(), (c_int64 * wanted)()
        result = ResultStruct(
            count=wanted,
            rows=rows.logit_rows.data_ptr(),
            logits=logits.data_ptr(),
            largest=addressof(largest),
            likeliest=addressof(likeliest),
        )
        whole = step_struct(rows, self._threads)
        launching()
        if self._run(byref(self._model), byref(whole), byref(buffers), byref(result)):
            raise MemoryError(f"a step of {count} rows")
        return rows.result(step, logits, Largest(list(largest), list(likeliest)))

    def _logits(self, wanted: int) -> torch.Tensor:
        if wanted > _KEPT_LOGITS:
            return torch.empty(wanted, self._head.outputs, dtype=torch.bfloat16)
        return self._buffer("logits", wanted, self._head.outputs)[:wanted]

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """[at least ``rows``, width], kept from step to step: fresh pages cost more than what is computed
        into them."""
        kept = self._buffers.get(name)
        if kept is None or kept.shape[0] < rows:
            kept = self._buffers[name] = torch.empty(rows, width, dtype=dtype)
        return kept

    def _layer_struct(self, index: int, layer: Layer[Panels], model: FusedModel[Panels]) -> LayerStruct:
        keys, values = self.store.rows(index)
        return LayerStruct(
            heads=heads_struct(
                layer.heads,
                self._float(model.cos),
                self._float(model.sin),
                (self._float(layer.heads.q_norm), self._float(layer.heads.k_norm)),
            ),
            input_norm=self._float(layer.input_norm),
            mlp_norm=self._float(layer.mlp_norm),
            qkv=self._matrix(layer.qkv),
            output=self._matrix(layer.output),
            gate_up=self._matrix(layer.gate_up),
            down=self._matrix(layer.down),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )

    def _matrix(self, panels: Panels) -> MatrixStruct:
        return MatrixStruct(
            outputs=panels.outputs,
            inputs=panels.inputs,
            weights=self._address(panels.weights),
            scales=self._float(panels.scales),
            bias=self._float(panels.bias),
        )

    def _float(self, numbers: torch.Tensor | None) -> int | None:
        return None if numbers is None else self._address(numbers.float().contiguous())

    def _address(self, numbers: torch.Tensor) -> int:
        self._alive.append(numbers)
        return numbers.data_ptr()


def serves(library: Path, model: PreTrainedModel) -> bool:
    """Whether this processor runs such steps of this model, and nothing that it has is faster.

    With tiles for matrices (AMX) oneDNN multiplies several times as fast as the dot product.
    """
    config = model.config
    return (
        model.dtype is torch.bfloat16
        and config.hidden_size % 2 == 0
        and config.intermediate_size % 2 == 0
        and step_function(library) is not None
        and not torch.cpu._is_amx_tile_supported()
    )
