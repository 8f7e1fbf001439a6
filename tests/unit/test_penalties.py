from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from blaze.engines.llm.penalties import apply_penalties
from blaze.engines.llm.sampling import (
    SamplingRow,
    needs_history,
    sample,
)
from blaze.sampling_params import SamplingParams
from tests.sampling_rows import penalised, row, tokens_of

INF = math.inf


# --- Penalties ---------------------------------------------------------------------------------------


def test_biases_are_added() -> None:
    biased = penalised([1.0, 2.0, 3.0], row(logit_bias=((0, 100.0), (2, -1.5), (2, -1.0))))
    assert biased == [101.0, 2.0, 0.5]
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 2)
    rows = [row(temperature=0.0), row(temperature=0.0, logit_bias=((0, 100.0),))]
    assert tokens_of(sample(logits, rows)) == [2, 0]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    one = row([0, 1, 1], [2, 2], repetition_penalty=2.0)
    assert penalised([4.0, -3.0, 0.0, 5.0, -INF], one) == [2.0, -6.0, 0.0, 5.0, -INF]
    assert penalised([-INF], row([0], repetition_penalty=2.0)) == [-INF]


def test_frequency_and_presence_penalties_look_at_the_output_alone() -> None:
    generated = [1, 2, 2, 2]
    assert penalised([1.0] * 4, row([0, 1], generated, frequency_penalty=0.5)) == [1.0, 0.5, -0.5, 1.0]
    assert penalised([1.0] * 4, row([0, 1], generated, presence_penalty=2.0)) == [1.0, -1.0, -1.0, 1.0]
    both = row([0, 1], generated, presence_penalty=-1.0, frequency_penalty=1.0)
    assert penalised([1.0] * 4, both) == [1.0, 1.0, -1.0, 1.0]


def test_penalties_come_in_the_order_of_transformers() -> None:
    one = row(
        [0], [0], logit_bias=((0, 3.0),), repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=0.5
    )
    assert penalised([1.0], one) == [(1.0 + 3.0) / 2.0 - 1.0 - 0.5]


def test_end_tokens_are_forbidden_before_min_tokens() -> None:
    early = row(min_tokens=3, position=2, ends=[1, 2], logit_bias=((1, 100.0),))
    assert penalised([0.0, 1.0, 2.0], early) == [0.0, -INF, -INF]
    due = row(min_tokens=3, position=3, ends=[1, 2])
    assert penalised([0.0, 1.0, 2.0], due) == [0.0, 1.0, 2.0]
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 2)
    assert tokens_of(
        sample(logits, [row(temperature=0.0, min_tokens=1, ends=[2]), row(temperature=0.0, ends=[2])])
    ) == [1, 2]


def test_each_row_is_penalised_by_its_own_parameters() -> None:
    rows = [
        row(),
        row([0], repetition_penalty=2.0),
        row([0], [1], presence_penalty=1.0),
        row([1], [0], repetition_penalty=4.0, frequency_penalty=1.0),
        row(logit_bias=((1, 7.0),)),
        row(min_tokens=9, ends=[0]),
    ]
    logits = torch.full((6, 2), 2.0)
    apply_penalties(logits, rows)
    assert logits.tolist() == [[2.0, 2.0], [1.0, 2.0], [2.0, 1.0], [-0.5, 0.5], [2.0, 9.0], [-INF, 2.0]]


def test_a_history_that_grows_equals_one_that_is_made_whole() -> None:
    rng = random.Random(6)
    prompt = [rng.randrange(30) for _ in range(10)]
    generated = [rng.randrange(30) for _ in range(40)]
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.2}
    growing = row(prompt, generated[:5], **penalties)
    logits = [rng.gauss(0, 3) for _ in range(30)]
    assert growing.history is not None
    for length in range(5, 41):
        assert penalised(logits, growing) == penalised(logits, row(prompt, generated[:length], **penalties))
        if length < 40:
            growing.history.append(generated[length])


def test_a_history_grows_on_either_side_of_inference_mode() -> None:
    one = row([0], [0], frequency_penalty=1.0, temperature=0.0)
    assert one.history is not None
    logits = torch.tensor([[3.5, 1.0]])
    with torch.inference_mode():
        assert tokens_of(sample(logits, [one])) == [0]
    one.history.append(0)
    one.history.append(0)
    assert tokens_of(sample(logits, [one])) == [1]


def test_ids_outside_the_vocabulary_concern_no_logit() -> None:
    penalties: dict[str, Any] = {
        "repetition_penalty": 2.0,
        "frequency_penalty": 1.0,
        "logit_bias": ((7, 5.0),),
    }
    one = row([5, 0], [9], min_tokens=5, ends=[3], **penalties)
    assert penalised([2.0, 2.0], one) == [1.0, 2.0]


def test_a_history_serves_vocabularies_of_different_sizes() -> None:
    one = row([2], [1], repetition_penalty=2.0, presence_penalty=1.0)
    assert penalised([2.0, 2.0], one) == [2.0, 0.0]
    assert penalised([2.0, 2.0, 2.0], one) == [2.0, 0.0, 1.0]


def test_penalties_without_a_history_are_refused() -> None:
    lacking = SamplingRow(SamplingParams(presence_penalty=1.0), 0, 0, None, frozenset())
    with pytest.raises(ValueError, match="history"):
        sample(torch.zeros(1, 4), [lacking])


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        ({}, False),
        ({"logit_bias": ((0, 1.0),), "min_tokens": 4, "top_k": 3}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"presence_penalty": 0.1}, True),
    ],
)
def test_a_history_is_needed_for_penalties_alone(params: dict[str, Any], needed: bool) -> None:
    assert needs_history(SamplingParams(**params)) is needed
