"""Weights as the compiled step takes them (native/matrix.h): in blocks of 64 outputs, one stream each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_PANEL = 16  # outputs; one vector of the processor
_PANELS = 4  # of a block
_BLOCK = _PANEL * _PANELS


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix [outputs, inputs] with its bias."""

    weights: torch.Tensor  # bfloat16 or int8 [blocks, inputs / 2, 4, 16, 2]
    scales: torch.Tensor | None  # float32 [blocks * 64], of int8 weights
    bias: torch.Tensor | None  # float32 [blocks * 64]
    outputs: int
    inputs: int


class PanelFormat:
    """See :class:`blaze.engines.llm.fused_model.LinearFormat`. Takes bfloat16, [out, in] with an even in."""

    def __init__(self, *, int8: bool) -> None:
        self._int8 = int8

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Panels:
        outputs, inputs = weight.shape
        scales = None
        if self._int8:
            largest = weight.abs().amax(dim=1, keepdim=True).float()
            scale = largest.clamp(min=1e-12) / 127  # one for each output
            weight = (weight.float() / scale).round().to(torch.int8)
            scales = _padded(scale[:, 0], 1)
        blocks = _padded(weight, 1).view(-1, _PANELS, _PANEL, inputs // 2, 2)
        return Panels(
            weights=blocks.permute(0, 3, 1, 2, 4).contiguous(),
            scales=scales,
            bias=None if bias is None else _padded(bias.float(), 1),
            outputs=outputs,
            inputs=inputs,
        )

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> Panels:
        """16 outputs of gate, the same 16 of up, and so on: what belongs together is in one block."""
        if bias is not None:
            of_gate, of_up = bias.chunk(2)
            bias = _alternating(of_gate, of_up)
        return self.linear(_alternating(gate, up), bias)


def _padded(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """Noughts behind the last row, up to whole blocks of ``parts`` such matrices."""
    missing = -rows.shape[0] % (_BLOCK // parts)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


def _alternating(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    panels = [padded.view(-1, _PANEL, *padded.shape[1:]) for padded in (_padded(one, 2), _padded(other, 2))]
    return torch.stack(panels, dim=1).flatten(0, 2)
