"""The likeliest token of each row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Largest:
    """Of some rows of logits: the largest, and the lowest id that has it."""

    logits: list[float]  # not finite where a row has NaN, +inf or nothing above -inf
    token_ids: list[int]

    def of(self, rows: Iterable[int]) -> Largest:
        chosen = list(rows)
        return Largest([self.logits[row] for row in chosen], [self.token_ids[row] for row in chosen])


def greedy(logits: torch.Tensor) -> list[int | None]:
    # max, not argmax: documented to give the first of equal ones, several times faster with bfloat16, and
    # its values tell the rows that are not finite (it hands NaN on) without another look at the logits.
    values, ids = logits.max(dim=-1)
    return finite(Largest(values.tolist(), ids.tolist()))


def finite(largest: Largest) -> list[int | None]:
    return [
        token if math.isfinite(logit) else None
        for token, logit in zip(largest.token_ids, largest.logits, strict=True)
    ]
