from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from blaze.engines.llm.sampling import (
    SampledToken,
    sample,
    token_logprobs,
)
from blaze.errors import NonFiniteOutput
from tests.sampling_rows import row, token_of, tokens_of

SMOLLM2 = 49152  # the size of the default model's vocabulary
INF = math.inf


# --- Rows that cannot be drawn from ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [[0.0, math.nan, 1.0], [0.0, INF, 1.0], [-INF] * 3, [math.nan] * 3])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 2, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 1.0},
        {"temperature": 1.0, "logprobs": 2},
    ],
)
def test_a_row_that_is_not_finite_fails_alone(
    bad: list[float], params: dict[str, Any], dtype: torch.dtype
) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], bad, [0.0, 1.0, 2.0]], dtype=dtype)
    rows = [row([0], [1], seed=seed, **params) for seed in range(3)]
    first, second, third = sample(logits, rows)
    assert isinstance(second, NonFiniteOutput)
    assert [first] == sample(logits[:1], rows[:1])
    assert [third] == sample(logits[2:], rows[2:])
    assert token_of(first) in range(3)


def test_min_tokens_may_leave_nothing() -> None:
    (outcome,) = sample(torch.zeros(1, 2), [row(min_tokens=1, ends=[0, 1])])
    assert isinstance(outcome, NonFiniteOutput)


def test_no_log_probabilities_are_given_of_logits_that_are_not_finite() -> None:
    # The NaN is at a token that is forbidden, so a token could be chosen; but nothing be said of it.
    logits = torch.tensor([[math.nan, 1.0, 2.0]] * 2)
    silent, asked = sample(
        logits,
        [
            row(temperature=0.0, min_tokens=1, ends=[0]),
            row(temperature=0.0, min_tokens=1, ends=[0], logprobs=0),
        ],
    )
    assert token_of(silent) == 2
    assert isinstance(asked, NonFiniteOutput)


def test_rows_must_fit_the_logits() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        sample(torch.zeros(2, 4), [row()])
    with pytest.raises(ValueError, match="do not fit"):
        sample(torch.zeros(4), [row()])
    assert sample(torch.zeros(0, 4), []) == []


# --- Log probabilities -------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([[math.log(p) for p in (0.1, 0.2, 0.3, 0.4)]])
    one = row([], [3], temperature=0.0, logit_bias=((0, 50.0),), presence_penalty=1.0, top_k=1, logprobs=3)
    (outcome,) = sample(logits, [one])
    assert isinstance(outcome, SampledToken)
    assert outcome.token_id == 0
    assert outcome.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in outcome.top] == [3, 2, 1]
    assert [logprob for _, logprob in outcome.top] == pytest.approx(
        [math.log(0.4), math.log(0.3), math.log(0.2)], abs=1e-6
    )


def test_log_probabilities_come_only_where_they_are_asked_for() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 4)
    rows = [row(temperature=0.0), row(temperature=0.0, logprobs=0), row(logprobs=2), row(logprobs=20)]
    none, chosen, two, all_of_them = sample(logits, rows)
    assert none == SampledToken(2, None, ())
    assert isinstance(chosen, SampledToken)
    assert chosen.logprob == pytest.approx(2.0 - math.log(1 + math.e + math.e**2), abs=1e-6)
    assert chosen.top == ()
    assert isinstance(two, SampledToken)
    assert isinstance(all_of_them, SampledToken)
    assert [token for token, _ in two.top] == [2, 1]
    assert [token for token, _ in all_of_them.top] == [2, 1, 0]
    assert two.top == all_of_them.top[:2]


@pytest.mark.parametrize("vocabulary", [40, 1000, SMOLLM2])
def test_of_equally_likely_tokens_the_lowest_ids_are_listed(vocabulary: int) -> None:
    logits = torch.zeros(2, vocabulary, dtype=torch.bfloat16)
    logits[:, [30, 20, 10]] = 1.0
    rows = [row(temperature=0.0, logprobs=2), row(temperature=0.0, logprobs=5)]
    two, five = sample(logits, rows)
    assert isinstance(two, SampledToken)
    assert isinstance(five, SampledToken)
    assert two.token_id == two.top[0][0] == 10
    assert [token for token, _ in two.top] == [10, 20]
    assert [token for token, _ in five.top] == [10, 20, 30, 0, 1]


def test_log_probabilities_of_given_tokens_equal_those_of_drawn_ones() -> None:
    logits = torch.randn(150, 5000, generator=torch.Generator().manual_seed(8)).bfloat16()
    drawn_ones = sample(logits, [row(temperature=2.0, seed=seed, logprobs=4) for seed in range(150)])
    assert token_logprobs(logits, torch.tensor(tokens_of(drawn_ones)), 4) == drawn_ones
    exact = logits.double().log_softmax(dim=-1)
    for index, outcome in enumerate(drawn_ones):
        assert isinstance(outcome, SampledToken)
        assert outcome.logprob == pytest.approx(float(exact[index, outcome.token_id]), abs=1e-5)


def test_a_token_that_the_model_rules_out_has_the_log_probability_minus_infinity() -> None:
    assert token_logprobs(torch.tensor([[0.0, -INF]]), torch.tensor([1]), 1) == [
        SampledToken(1, -INF, ((0, 0.0),))
    ]


def test_given_tokens_of_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NonFiniteOutput):
        token_logprobs(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), torch.tensor([0, 0]), 0)
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), 0)
    assert token_logprobs(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 5) == []
