"""Linear layers of the fused runner: weights laid out once, at load, the way the kernels want them."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

_ROWS_HINT = 32  # packed weights serve any number of rows; oneDNN is told the usual one


class Linear(Protocol):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""
        ...

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, added to ``residual`` [rows, out]."""
        ...


class PlainLinear:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + F.linear(x, self._weight, self._bias)


class PackedLinear:
    """bfloat16 on a CPU, in oneDNN's blocked layout: the same bits as ``F.linear``, up to twice as fast."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._bias = bias
        # The overloads themselves: looking them up takes longer than some of the calls.
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        self._apply_plus = torch.ops.mkldnn._linear_pointwise.binary

    @staticmethod
    def serves(weight: torch.Tensor) -> bool:
        return (
            weight.dtype is torch.bfloat16
            and weight.device.type == "cpu"
            and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._apply(x, self._weight, self._bias, "none", [], "")
        return out

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._apply_plus(x, residual, self._weight, self._bias, "add")
        return out


class Int8Linear:
    """Weights as 8-bit integers with one scale a row of the output; activations keep their type."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        wide = weight.float()
        scale = wide.abs().amax(dim=1).clamp(min=1e-12) / 127
        self._weight = (wide / scale[:, None]).round().to(torch.int8)
        self._scale = scale.to(weight.dtype)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch._weight_int8pack_mm(x, self._weight, self._scale)
        return out if self._bias is None else out + self._bias

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + self(x)


class OperatorFormat:
    """Weights for torch's operators; see :class:`blaze.engines.llm.fused_model.LinearFormat`."""

    def __init__(self, *, int8: bool) -> None:
        self._int8 = int8
        self._shapes: dict[tuple[int, ...], torch.Tensor] = {}

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        if self._int8:
            return Int8Linear(weight, bias)
        self._shapes.setdefault(tuple(weight.shape), weight)
        if PackedLinear.serves(weight):
            return PackedLinear(weight, bias)
        return PlainLinear(weight, bias)

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return self.linear(torch.cat([gate, up]), bias)

    def needs_two_rows(self) -> bool:
        """Whether one of the matrices made so far treats a single row in a way of its own."""
        return any(_needs_two_rows(weight) for weight in self._shapes.values())


def _needs_two_rows(weight: torch.Tensor) -> bool:
    """Whether a single row takes another way through the kernels than the same row among others.

    Asked of the kernel itself, with random numbers: its choice depends on the shape and on the machine.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    together = F.linear(x, weight)
    return any(not torch.equal(F.linear(x[i : i + 1], weight)[0], together[i]) for i in range(x.shape[0]))
