from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from blaze.checks import SEED_BOUND
from blaze.engines.llm.sampling import (
    SamplingRow,
    kept_probabilities,
    sample,
    token_logprobs,
    uniform,
)
from blaze.sampling_params import SamplingParams
from tests.reference_sampler import kept_weights, processed_scores, reference_sample
from tests.sampling_rows import row, threads, tokens_of

SMOLLM2 = 49152  # the size of the default model's vocabulary


# --- Independence and agreement ----------------------------------------------------------------------


def varied_rows(count: int, vocabulary: int) -> list[SamplingRow]:
    """Every kind of row; the same at every call."""
    rng = random.Random(9)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 0.9, "top_p": 0.95, "logprobs": 3},
        {"temperature": 1.9, "top_p": 0.9999},  # more than the candidates hold
        {"temperature": 1.1, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.0, "frequency_penalty": 0.8, "presence_penalty": 0.3, "logprobs": 0},
        {"temperature": 1.0, "top_k": 300, "top_p": 0.8, "min_p": 0.01, "logit_bias": ((17, 4.0), (3, -9.0))},
        {"temperature": 1.0, "min_tokens": 99},
    ]
    return [
        row(
            [rng.randrange(vocabulary) for _ in range(50)],
            [rng.randrange(vocabulary) for _ in range(20)],
            choice=index % 3,
            position=index,
            ends=[0, 2],
            seed=rng.choice([None, -5, 123456789]),
            **kinds[index % len(kinds)],
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [SMOLLM2, SMOLLM2 + 77])
def test_case_20_a_row_does_not_depend_on_the_batch_around_it(dtype: torch.dtype, vocabulary: int) -> None:
    count = 40
    logits = (torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(10)) * 3).to(dtype)
    with threads(2):
        together = sample(logits, varied_rows(count, vocabulary))
        rows = varied_rows(count, vocabulary)
        alone = [sample(logits[index : index + 1].clone(), [rows[index]])[0] for index in range(count)]
        backwards = sample(logits.flip(0), varied_rows(count, vocabulary)[::-1])
        halves = sample(logits[:13], rows[:13]) + sample(logits[13:], rows[13:])
    with threads(1):
        one_thread = sample(logits, varied_rows(count, vocabulary))
    assert len(set(tokens_of(together))) > count // 2
    assert together == alone == backwards[::-1] == halves == one_thread  # log probabilities to the last bit


def test_the_kept_probabilities_do_not_depend_on_the_batch_either() -> None:
    rows = varied_rows(40, SMOLLM2)
    params = [one.params for one in rows if one.params.temperature > 0]
    logits = torch.randn(len(params), SMOLLM2, generator=torch.Generator().manual_seed(11)) * 3
    with threads(2):
        together = kept_probabilities(logits, params)
        alone = [kept_probabilities(logits[i : i + 1].clone(), params[i : i + 1]) for i in range(len(params))]
    assert torch.equal(together, torch.cat(alone))


def test_logits_are_not_modified() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(12)).to(dtype)
        before = logits.clone()
        sample(logits, varied_rows(20, 500))
        sample(logits, varied_rows(20, 500)[6:7] * 20)  # all of them processed: no row is selected
        token_logprobs(logits, torch.zeros(20, dtype=torch.int64), 5)
        assert torch.equal(logits, before)


def test_the_draw_is_that_of_seed_choice_and_position() -> None:
    even = torch.zeros(1, 1000)
    for seed, choice, position in ((None, 0, 0), (0, 1, 0), (7, 0, 31), (-SEED_BOUND, 2, 5)):
        expected = int(uniform(seed or 0, choice, position) * 1000)
        assert tokens_of(sample(even, [row(seed=seed, choice=choice, position=position)])) == [expected]


def test_samples_equal_the_reference() -> None:
    rng = random.Random(3)
    compared = 0
    for case in range(400):
        size = rng.randint(1, 40)
        logits = torch.tensor([[rng.gauss(0, 3) for _ in range(size)]])
        prompt = [rng.randrange(size) for _ in range(rng.randint(0, 5))]
        generated = [rng.randrange(size) for _ in range(rng.randint(0, 8))]
        one = row(
            prompt,
            generated,
            choice=case % 2,
            position=len(generated),
            ends=[0] if size > 1 else [],
            temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=rng.choice([0, 1, 3, 100]),
            top_p=rng.choice([0.05, 0.5, 0.9, 1.0]),
            min_p=rng.choice([0.0, 0.1, 0.5]),
            repetition_penalty=rng.choice([1.0, 0.7, 1.5]),
            frequency_penalty=rng.choice([0.0, 0.6]),
            presence_penalty=rng.choice([0.0, -0.4]),
            logit_bias=rng.choice([(), ((size - 1, 2.5),)]),
            min_tokens=rng.choice([0, 5]),
            seed=case,
        )
        expected, margin = reference_sample(
            logits[0].tolist(), one.params, one.choice, one.position, prompt, generated, one.end_ids
        )
        if margin > 1e-5:
            compared += 1
            assert tokens_of(sample(logits, [one])) == [expected], (case, one.params)
    assert compared > 380


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 50, "temperature": 0.6}, {"min_p": 0.02}])
def test_samples_of_a_large_vocabulary_equal_the_reference(params: dict[str, Any]) -> None:
    logits = (torch.randn(32, SMOLLM2, generator=torch.Generator().manual_seed(13)) * 3).bfloat16()
    rows = [row(seed=index, **params) for index in range(32)]
    compared = 0
    for index, token in enumerate(tokens_of(sample(logits, rows))):
        exact = logits[index].double().numpy()
        expected, margin = reference_sample(exact, rows[index].params, 0, 0, (), (), ())
        if margin > 1e-7:
            compared += 1
            assert token == expected
    assert compared > 16


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5},
    ],
)
def test_frequencies_match_the_probabilities(params: dict[str, Any]) -> None:
    """Chi-square; the numbers are fixed, so this cannot fail by chance."""
    draws, size = 20_000, 200
    rng = np.random.default_rng(14)
    logits = rng.normal(0, 1, size).astype(np.float32)
    logits[::17] += 4.0
    rows = [row([3], [17], seed=15, position=position, **params) for position in range(draws)]
    tokens = tokens_of(sample(torch.from_numpy(logits).expand(draws, -1), rows))
    counts = np.bincount(tokens, minlength=size)
    expected = draws * _probabilities(logits.astype(np.float64), rows[0].params)
    assert counts[expected == 0].sum() == 0
    # Rare tokens together: the statistic is only approximately chi-square where few are expected.
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom >= 4
    # Mean plus four standard deviations of the chi-square distribution, and no less than its mean minus four.
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def _probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    weights, _ = kept_weights(processed_scores(logits, params, 0, [3], [17], ()), params)
    shares: np.ndarray = weights / weights.sum()
    return shares
