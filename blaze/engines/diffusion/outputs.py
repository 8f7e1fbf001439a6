"""Outputs of denoiser calls: split among the calls that were joined, put together from pieces, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

_TOLERANCE = 1e-3  # of the same rows in other company, relative; a wrong row is off by its order
_TOLERANCE_16_BIT = 5e-2


def split(output: object, sizes: Sequence[int]) -> list[object]:
    """What each of the joined calls would have returned. Raises TypeError for an output without rows."""
    total = sum(sizes)
    if output is None:
        return [None] * len(sizes)
    if isinstance(output, Tensor) and output.ndim and output.shape[0] == total:
        return list(torch.split(output, list(sizes)))
    if isinstance(output, list) and len(output) == total:
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return [output[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    if isinstance(output, tuple) and output:
        return list(zip(*(split(item, sizes) for item in output), strict=True))
    if is_dataclass(output) and not isinstance(output, type):
        parts = {field.name: split(getattr(output, field.name), sizes) for field in fields(output)}
        return [
            type(output)(**{name: values[index] for name, values in parts.items()})
            for index in range(len(sizes))
        ]
    raise TypeError(f"the denoiser returned {type(output).__name__} without a row for each of its inputs")


def join_outputs(outputs: Sequence[object]) -> object:
    """The outputs of pieces of one call, put together again."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)  # type: ignore[arg-type]
    if isinstance(first, list):
        return [item for output in outputs if isinstance(output, list) for item in output]
    if isinstance(first, tuple):
        return tuple(join_outputs(items) for items in zip(*outputs, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        return type(first)(**{name: join_outputs([getattr(o, name) for o in outputs]) for name in names})
    return first


def tensors_of(output: object) -> list[Tensor]:
    """All tensors of a denoiser's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in fields(output)]
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in tensors_of(item)]
    return []


def select(output: object, rows: Sequence[int], total: int) -> object:
    """These rows of an output of ``total``. Raises TypeError for an output without rows."""
    parts = split(output, [1] * total)
    return join_outputs([parts[row] for row in rows])


def widen(output: object, rows: Sequence[int], total: int) -> object:
    """An output of ``total`` rows that has these ones, and zeros in all others."""
    parts = dict(zip(rows, split(output, [1] * len(rows)), strict=True))
    zeros = _zeros_like(parts[rows[0]])
    return join_outputs([parts.get(row, zeros) for row in range(total)])


def _zeros_like(output: object) -> object:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    if isinstance(output, list):
        return [_zeros_like(item) for item in output]
    if isinstance(output, tuple):
        return tuple(_zeros_like(item) for item in output)
    if is_dataclass(output) and not isinstance(output, type):
        return type(output)(**{each.name: _zeros_like(getattr(output, each.name)) for each in fields(output)})
    return output


def are_close(one: object, other: object) -> bool:
    """Whether they are equal but for what the order of additions does. False where one is not finite."""
    for mine, theirs in zip(tensors_of(one), tensors_of(other), strict=True):
        is_16_bit = mine.element_size() < 4
        difference = torch.linalg.vector_norm((mine - theirs).float())
        scale = torch.linalg.vector_norm(theirs.float())
        if not bool(difference <= (_TOLERANCE_16_BIT if is_16_bit else _TOLERANCE) * scale):
            return False
    return True


def is_finite(output: object) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors_of(output))
