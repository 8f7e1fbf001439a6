"""Layer operations by the compiled kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from blaze.engines.llm.fused_model import FusedModel
from blaze.engines.llm.kv_store import KVStore
from blaze.engines.llm.linear import Linear
from blaze.engines.llm.native.kernels import Kernels, StepStruct, heads_struct, pointer, step_struct
from blaze.engines.llm.step_rows import StepRows


class NativeOperations:
    name = "compiled kernels"
    batches_neighbours = False

    def __init__(self, model: FusedModel[Linear], store: KVStore, library: Path) -> None:
        self._kernels = Kernels(library, store.dtype)
        self._threads = torch.get_num_threads()
        self._weights: list[torch.Tensor] = []  # what the structures point into
        # The kernels take norm weights as float32, exact for each of the types.
        norms = [norm for layer in model.layers for norm in (layer.input_norm, layer.mlp_norm)]
        self._norms = {id(norm): self._address(norm) for norm in (*norms, model.final_norm)}
        self._structures = [
            heads_struct(
                layer.heads,
                self._address(model.cos),
                self._address(model.sin),
                (self._address(layer.heads.q_norm), self._address(layer.heads.k_norm)),
            )
            for layer in model.layers
        ]
        self._layers = [
            (pointer(structure), *(rows.data_ptr() for rows in store.rows(layer)))
            for layer, structure in enumerate(self._structures)
        ]
        heads = model.layers[0].heads
        self._width = heads.queries * heads.dim
        self._rows: StepRows | None = None  # keeps the tensors alive that the step points into
        self._step = pointer(StepStruct())
        self._memory: dict[str, torch.Tensor] = {}
        self._scratches: dict[tuple[str, int, int], tuple[torch.Tensor, int]] = {}

    def _address(self, weight: torch.Tensor | None) -> int | None:
        if weight is None:
            return None
        self._weights.append(weight.float().contiguous())
        return self._weights[-1].data_ptr()

    def begin(self, rows: StepRows) -> None:
        self._rows = rows
        self._step = pointer(step_struct(rows, self._threads))

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, address = self._scratch("norm", x.shape[0], x.shape[1], x.dtype)
        self._kernels.rms_norm(
            x.shape[0], x.shape[1], self._threads, eps, x.data_ptr(), self._norms[id(weight)], address
        )
        return out

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        # A row that only keeps another company (see FusedRunner) is not attended for.
        out, address = self._scratch("attend", qkv.shape[0], self._width, qkv.dtype)
        heads, keys, values = self._layers[layer]
        self._kernels.attend(self._step, heads, qkv.data_ptr(), keys, values, address)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape
        out, address = self._scratch("silu_mul", rows, width // 2, gate_up.dtype)
        self._kernels.silu_mul(rows, width // 2, self._threads, gate_up.data_ptr(), address)
        return out

    def _scratch(self, use: str, rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """Memory for one result, the same at every call: each is used up before the next of its kind."""
        key = (use, rows, width)
        found = self._scratches.get(key)
        if found is None:
            whole = self._memory.get(use)
            if whole is None or whole.numel() < rows * width:
                whole = self._memory[use] = torch.zeros(rows * width, dtype=dtype)
                self._scratches = {k: v for k, v in self._scratches.items() if k[0] != use}
            view = whole[: rows * width].view(rows, width)
            found = self._scratches[key] = (view, view.data_ptr())
        return found
