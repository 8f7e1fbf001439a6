"""Rows to draw from, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from blaze.engines.llm.penalties import apply_penalties
from blaze.engines.llm.sampling import (
    SampledToken,
    SamplingRow,
    TokenHistory,
    kept_probabilities,
    needs_history,
)
from blaze.errors import NonFiniteOutput
from blaze.sampling_params import SamplingParams


def row(
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    *,
    choice: int = 0,
    position: int = 0,
    ends: Sequence[int] = (),
    **params: Any,
) -> SamplingRow:
    made = SamplingParams(**params)
    history = TokenHistory(prompt, generated) if needs_history(made) else None
    return SamplingRow(made, choice, position, history, frozenset(ends))


def token_of(outcome: SampledToken | NonFiniteOutput) -> int:
    assert isinstance(outcome, SampledToken)
    return outcome.token_id


def tokens_of(outcomes: Sequence[SampledToken | NonFiniteOutput]) -> list[int]:
    return [token_of(outcome) for outcome in outcomes]


def kept(logits: Sequence[float], **params: Any) -> set[int]:
    (probabilities,) = kept_probabilities(torch.tensor([logits]), [SamplingParams(**params)])
    return set(probabilities.nonzero().flatten().tolist())


def penalised(logits: Sequence[float], one: SamplingRow) -> list[float]:
    changed = torch.tensor([logits])
    apply_penalties(changed, [one])
    return list(changed[0].tolist())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
