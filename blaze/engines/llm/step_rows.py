"""The rows of one step as tensors: one for each token that is computed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from blaze.engines.llm.greedy import Largest
from blaze.engines.llm.layout import Run, slot_of, split
from blaze.engines.llm.runner import StepResult, wants_all_logits
from blaze.engines.llm.scheduler import Step, Work

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Single tokens come first, in the order of ``runs``; then the chunks. All tensors are int64."""

    runs: tuple[Run, ...]
    chunks: tuple[Work, ...]
    table: torch.Tensor  # [4, rows]: tokens, starts and capacities of slots, positions
    longest: int  # keys of the row that has the most
    logit_rows: torch.Tensor  # the rows whose logits are wanted
    first_row: dict[Work, int]

    @property
    def ids(self) -> torch.Tensor:
        """[rows], like the others."""
        return self.table[0]

    @property
    def starts(self) -> torch.Tensor:
        return self.table[1]

    @property
    def capacities(self) -> torch.Tensor:
        return self.table[2]

    @property
    def positions(self) -> torch.Tensor:
        return self.table[3]

    @classmethod
    def of(cls, step: Step, device: torch.device) -> StepRows:
        runs, chunks = split(step.work)
        ordered = [work for run in runs for work in run.rows if work is not None] + chunks
        offsets = list(accumulate((work.count for work in ordered), initial=0))
        slots = [slot_of(work) for work in ordered]
        columns = np.empty((4, offsets[-1]), dtype=np.int64)
        singles = len(ordered) - len(chunks)
        columns[0, :singles] = [work.sequence.token_ids[work.start] for work in ordered[:singles]]
        columns[1, :singles] = [slot.start for slot in slots[:singles]]
        columns[2, :singles] = [slot.capacity for slot in slots[:singles]]
        columns[3, :singles] = [work.start for work in ordered[:singles]]
        for work, slot, offset in zip(chunks, slots[singles:], offsets[singles:], strict=False):
            rows = slice(offset, offset + work.count)
            columns[0, rows] = work.sequence.token_ids[work.start : work.end]
            columns[1, rows] = slot.start
            columns[2, rows] = slot.capacity
            columns[3, rows] = np.arange(work.start, work.end)
        first_row = dict(zip(ordered, offsets, strict=False))
        wanted = [row for work in step.work for row in _logit_rows(work, first_row[work])]
        return cls(
            runs=tuple(runs),
            chunks=tuple(chunks),
            table=_on(device, columns),
            longest=max(work.end for work in ordered),
            logit_rows=_on(device, np.array(wanted, dtype=np.int64)),
            first_row=first_row,
        )

    def result(self, step: Step, logits: torch.Tensor, largest: Largest | None = None) -> StepResult:
        """``logits`` are those of ``logit_rows``, [rows, vocabulary], as is what is known of them."""
        yielding: list[int] = []
        whole: list[tuple[Work, torch.Tensor]] = []
        at = 0
        for work in step.work:
            rows = len(_logit_rows(work, 0))
            if wants_all_logits(work):
                whole.append((work, logits[at : at + rows]))
            at += rows
            if work.yields_token:
                yielding.append(at - 1)
        if len(yielding) < at:
            logits = logits[torch.tensor(yielding, dtype=torch.int64, device=logits.device)]
            largest = None if largest is None else largest.of(yielding)
        return StepResult(logits, tuple(whole), largest)


def _on(device: torch.device, numbers: IntArray) -> torch.Tensor:
    """Without an operator of torch's where it can be: each lets go of the interpreter."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.to(device)


def _logit_rows(work: Work, first: int) -> range:
    if wants_all_logits(work):
        return range(first, first + work.count)
    if work.yields_token:
        return range(first + work.count - 1, first + work.count)
    return range(0)
