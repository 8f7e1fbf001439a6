"""What the sampler does to logits equals what transformers' own processors and warpers do to them.

The logits are random float32 numbers; where a filter decides by less than rounding can explain (as the
reference sampler measures it), a case is passed over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blaze.engines.llm.penalties import apply_penalties
from blaze.engines.llm.sampling import (
    SampledToken,
    SamplingRow,
    TokenHistory,
    kept_probabilities,
    sample,
    uniform,
)
from blaze.types import SamplingParams
from tests.reference_sampler import kept_weights

VOCABULARY = 3000
CASES = 40
ROUNDING = 1e-5


@dataclass(frozen=True)
class Case:
    logits: torch.Tensor  # float32 [1, vocabulary]
    prompt: list[int]
    generated: list[int]
    ends: list[int]
    seed: int

    def row(self, params: SamplingParams) -> SamplingRow:
        history = TokenHistory(self.prompt, self.generated)
        return SamplingRow(params, 0, len(self.generated), history, frozenset(self.ends))

    def by_transformers(self, processors: Sequence[LogitsProcessor]) -> torch.Tensor:
        ids = torch.tensor([self.prompt + self.generated])
        scores: torch.Tensor = LogitsProcessorList(processors)(ids, self.logits.clone())
        return scores

    def processed(self, params: SamplingParams) -> torch.Tensor:
        scores = self.logits.clone()
        apply_penalties(scores, [self.row(params)])
        return scores


def _case(seed: int) -> Case:
    rng = random.Random(seed)
    spread = rng.choice([1.0, 3.0, 6.0])
    return Case(
        logits=torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread,
        prompt=[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 400))],
        generated=[rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 200))],
        ends=[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3))],
        seed=seed,
    )


def _processors(case: Case, params: SamplingParams) -> list[LogitsProcessor]:
    """In the order of ``generate``."""
    made: list[LogitsProcessor] = []
    if params.logit_bias:
        made.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens:
        made.append(MinNewTokensLengthLogitsProcessor(len(case.prompt), params.min_tokens, case.ends))
    return made


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    """In the order of ``generate``."""
    made: list[LogitsProcessor] = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        made.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        made.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        made.append(MinPLogitsWarper(params.min_p))
    return made


PROCESSED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"logit_bias": ((7, 11.5), (2999, -100.0))},
    {"min_tokens": 100},
    {"repetition_penalty": 1.1, "logit_bias": ((1, 5.0), (40, -3.25)), "min_tokens": 150},
]


@pytest.mark.parametrize("params", PROCESSED, ids=str)
def test_processed_logits(params: dict[str, Any]) -> None:
    changed = 0
    for seed in range(CASES):
        case, made = _case(seed), SamplingParams(**params)
        expected = case.by_transformers(_processors(case, made))
        torch.testing.assert_close(case.processed(made), expected, rtol=1e-6, atol=0)
        changed += not torch.equal(expected, case.logits)
    assert changed > CASES // 4


FILTERED: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 2999},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.95, "temperature": 1.3},  # of the flatter logits, more than the sampler's candidates
    {"min_p": 0.05},
    {"min_p": 0.9},
    {"top_k": 100, "top_p": 0.8, "temperature": 1.2},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.9},
    {"top_p": 0.5, "min_p": 0.3, "temperature": 2.0},
]


@pytest.mark.parametrize("params", FILTERED, ids=str)
def test_kept_tokens_and_their_probabilities(params: dict[str, Any]) -> None:
    compared = 0
    made = SamplingParams(**params)
    for seed in range(CASES):
        case = _case(seed)
        _, margin = kept_weights(case.logits[0].double().numpy(), made)
        if margin < ROUNDING:
            continue
        compared += 1
        expected = case.by_transformers(_warpers(made))
        kept = kept_probabilities(case.logits, [made])
        assert torch.equal(kept > 0, expected.isfinite())
        shares = kept / kept.sum()
        torch.testing.assert_close(shares, expected.softmax(dim=-1), rtol=2e-5, atol=1e-9)
    assert compared > CASES // 2


@pytest.mark.parametrize("params", FILTERED, ids=str)
def test_drawn_tokens(params: dict[str, Any]) -> None:
    """One uniform number, looked up in the cumulative distribution that transformers leaves."""
    compared = 0
    for seed in range(CASES):
        case = _case(seed)
        made = SamplingParams(
            **params, repetition_penalty=1.2, logit_bias=((3, 4.0),), min_tokens=120, seed=seed
        )
        _, margin = kept_weights(case.processed(made)[0].double().numpy(), made)
        scores = case.by_transformers([*_processors(case, made), *_warpers(made)])[0]
        reached = scores.double().softmax(dim=-1).cumsum(dim=-1).numpy()
        draw = uniform(seed, 0, len(case.generated))
        if min(margin, float(np.abs(reached - draw).min())) < ROUNDING:
            continue
        compared += 1
        (outcome,) = sample(case.logits, [case.row(made)])
        assert isinstance(outcome, SampledToken)
        assert outcome.token_id == int((reached <= draw).sum())
    assert compared > CASES // 4


def test_greedy_tokens() -> None:
    for seed in range(CASES):
        case = _case(seed)
        made = SamplingParams(
            temperature=0.0, repetition_penalty=1.4, logit_bias=((5, 3.0),), min_tokens=100, logprobs=3
        )
        best = case.by_transformers(_processors(case, made))[0].topk(2)
        assert best.values[0] - best.values[1] > ROUNDING
        (outcome,) = sample(case.logits, [case.row(made)])
        assert isinstance(outcome, SampledToken)
        assert outcome.token_id == int(best.indices[0])
        raw = case.logits.log_softmax(dim=-1)[0]
        assert outcome.logprob == float(raw[outcome.token_id])
        assert [token for token, _ in outcome.top] == raw.topk(3).indices.tolist()
