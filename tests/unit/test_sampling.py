from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from blaze.checks import SEED_BOUND
from blaze.engines.llm.penalties import apply_penalties
from blaze.engines.llm.sampling import (
    SampledToken,
    SamplingRow,
    TokenHistory,
    inverse_cdf,
    kept_probabilities,
    needs_history,
    nucleus_floors,
    sample,
    token_logprobs,
    uniform,
)
from blaze.errors import NonFiniteOutput
from blaze.sampling_params import SamplingParams
from tests.reference_sampler import kept_weights, processed_scores, reference_sample

JUST_UNDER_1 = math.nextafter(1.0, 0.0)
SMOLLM2 = 49152  # the size of the default model's vocabulary
INF = math.inf


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


# --- The uniform numbers -----------------------------------------------------------------------------


def test_uniform_numbers_are_the_same_in_every_run() -> None:
    # A change here changes what every stored seed means: it needs a new revision, not a new constant.
    assert [uniform(seed, 0, 0) for seed in (0, 1, 42)] == [
        0.9130805468762743,
        0.2696414618925542,
        0.97222650987254,
    ]


@pytest.mark.parametrize("seed", [0, 1, -1, SEED_BOUND - 1, -SEED_BOUND])
def test_uniform_numbers_lie_in_the_half_open_interval(seed: int) -> None:
    assert all(0.0 <= uniform(seed, choice, position) < 1.0 for choice in range(4) for position in range(200))


def test_uniform_numbers_differ_by_seed_choice_and_position() -> None:
    numbers = {
        uniform(seed, choice, position)
        for seed in range(-5, 5)
        for choice in range(10)
        for position in range(100)
    }
    assert len(numbers) == 10 * 10 * 100


def test_uniform_numbers_are_evenly_spread_and_uncorrelated() -> None:
    numbers = [uniform(7, 0, position) for position in range(20_000)]
    mean = sum(numbers) / len(numbers)
    variance = sum((x - mean) ** 2 for x in numbers) / len(numbers)
    following = sum((x - mean) * (y - mean) for x, y in pairwise(numbers)) / len(numbers)
    # About five standard errors each; the numbers are fixed, so this cannot fail by chance.
    assert mean == pytest.approx(0.5, abs=0.01)
    assert variance == pytest.approx(1 / 12, abs=0.003)
    assert following / variance == pytest.approx(0.0, abs=0.035)
    tenths = [0] * 10
    for x in numbers:
        tenths[int(x * 10)] += 1
    assert min(tenths) > 1780
    assert max(tenths) < 2220


# --- Greedy ------------------------------------------------------------------------------------------


def test_temperature_0_is_the_largest_logit_whatever_the_draw_and_the_filters() -> None:
    rows = [row(temperature=0.0, top_p=0.1, top_k=1, min_p=1.0, seed=seed) for seed in range(5)]
    assert tokens_of(sample(torch.tensor([[0.1, 3.0, 2.9]] * 5), rows)) == [1] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 32])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_of_equal_logits_the_lowest_id_is_taken(dtype: torch.dtype, count: int, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(count)
    with threads(num_threads):
        for vocabulary in (1, 2, 17, 100, 4097, SMOLLM2):
            logits = torch.randint(-3, 3, (count, vocabulary), generator=generator).to(dtype)
            lowest = logits.float().numpy().argmax(axis=1).tolist()  # numpy: the first of equal ones
            assert tokens_of(sample(logits, [row(temperature=0.0)] * count)) == lowest
            processed = row(temperature=0.0, logit_bias=((0, 0.0),))
            assert tokens_of(sample(logits, [processed] * count)) == lowest


def test_ties_at_the_far_ends_of_a_large_vocabulary() -> None:
    # One row: where torch would split the vocabulary among its threads.
    logits = torch.zeros(1, SMOLLM2, dtype=torch.bfloat16)
    for low, high in ((0, SMOLLM2 - 1), (1, 2), (SMOLLM2 // 2 - 1, SMOLLM2 // 2), (SMOLLM2 - 2, SMOLLM2 - 1)):
        tied = logits.clone()
        tied[0, [low, high]] = 1.0
        with threads(2):
            assert tokens_of(sample(tied, [row(temperature=0.0)])) == [low]


# --- The inverse of the cumulative distribution ------------------------------------------------------


def drawn(probabilities: Sequence[float], draw: float) -> int:
    return int(inverse_cdf(torch.tensor([probabilities]), torch.tensor([[draw]], dtype=torch.float64)).item())


def test_draws_go_through_the_tokens_in_the_order_of_their_ids() -> None:
    quarters = [0.25, 0.5, 0.25]
    draws = (0.0, math.nextafter(0.25, 0), 0.25, math.nextafter(0.75, 0), 0.75, JUST_UNDER_1)
    assert [drawn(quarters, draw) for draw in draws] == [0, 0, 1, 1, 2, 2]


def test_the_mass_need_not_be_1() -> None:
    assert [drawn([2.0, 6.0], draw) for draw in (0.0, 0.2499, 0.25, JUST_UNDER_1)] == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [1, 127, 128, 129, 255, 256, 257, 1000])
def test_draws_at_the_edges_of_blocks(size: int) -> None:
    # Powers of two and their sums are exact.
    even = [1.0] * size
    for token in {0, 126, 127, 128, 129, 254, 255, 256, size - 1}:
        if token < size:
            assert drawn(even, (token + 0.5) / size) == token
    for only in {0, size // 2, size - 1}:
        alone = [float(token == only) for token in range(size)]
        assert {drawn(alone, draw) for draw in (0.0, 0.5, JUST_UNDER_1)} == {only}


def test_a_draw_never_leaves_the_kept_set() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        probabilities = rng.random(700) * 10.0 ** rng.uniform(-12, 0, 700)
        probabilities *= rng.random(700) < 0.2
        probabilities[rng.integers(700)] = 1e-30
        rows = torch.tensor(probabilities, dtype=torch.float32).repeat(6, 1)
        draws = [0.0, 5e-324, *sorted(rng.random(2)), 1 - 1e-12, JUST_UNDER_1]
        tokens = inverse_cdf(rows, torch.tensor(draws, dtype=torch.float64).unsqueeze(1)).tolist()
        assert all(probabilities[token] > 0 for token in tokens)
        assert tokens == sorted(tokens)
        likely = np.flatnonzero(probabilities > 1e-14)
        assert (tokens[0], tokens[-1]) == (np.flatnonzero(probabilities)[0], likely[-1])


def test_draws_equal_a_plain_cumulative_sum() -> None:
    rng = np.random.default_rng(2)
    probabilities = rng.random((64, 5000)).astype(np.float32)
    draws = rng.random((64, 1))
    reached = probabilities.astype(np.float64).cumsum(axis=1)
    expected = (reached <= draws * reached[:, -1:]).sum(axis=1)
    assert inverse_cdf(torch.from_numpy(probabilities), torch.from_numpy(draws)).tolist() == expected.tolist()


# --- Filters -----------------------------------------------------------------------------------------


def test_without_filters_everything_finite_may_be_drawn() -> None:
    assert kept([0.0, -INF, 2.0, -30.0]) == {0, 2, 3}


@pytest.mark.parametrize(
    ("top_k", "left"), [(1, {2}), (2, {2, 0, 3}), (3, {2, 0, 3}), (4, {2, 0, 3, 4}), (9, set(range(5)))]
)
def test_top_k_keeps_what_ties_with_the_last_one(top_k: int, left: set[int]) -> None:
    assert kept([1.0, -1.0, 2.0, 1.0, 0.0], top_k=top_k) == left


@pytest.mark.parametrize(
    ("top_p", "left"),
    [
        (1e-9, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 3, 0}),
        (0.95, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, left: set[int]) -> None:
    assert kept([math.log(p) for p in (0.2, 0.4, 0.1, 0.3)], top_p=top_p) == left


def test_top_p_is_reached_by_the_exact_mass() -> None:
    assert kept([0.0, 0.0, 0.0, 0.0, -INF], top_p=0.5) == {0, 1, 2, 3}  # equal ones stay together
    assert kept([math.log(2), 0.0, 0.0], top_p=0.49) == {0}
    assert kept([math.log(2), 0.0, 0.0], top_p=0.51) == {0, 1, 2}


def test_a_goal_that_is_reached_exactly_is_reached() -> None:
    masses = torch.tensor([[0.125, 0.5, 0.25, 0.0625, 0.0625]])
    for goal, floor in ((0.5, 0.5), (0.75, 0.25), (0.875, 0.125), (0.876, 0.0625)):
        for candidates in (1, 5):
            floors = nucleus_floors(masses, torch.tensor([[goal]], dtype=torch.float64), candidates)
            assert floors.tolist() == [[floor]]


def test_top_p_counts_the_mass_of_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # 0.4 of all, but 0.57 of the two likeliest: one token reaches half of their mass.
    assert kept(logits, top_k=2, top_p=0.5) == {0}
    assert kept(logits, top_k=0, top_p=0.5) == {0, 1}


def test_top_p_counts_before_min_p_takes_away() -> None:
    logits = [math.log(p) for p in (0.5, 0.2, 0.1, 0.1, 0.1)]
    # Were min_p first, 0.5 of the 0.7 that it leaves would reach 0.7 of them.
    assert kept(logits, top_p=0.65, min_p=0.3) == {0, 1}


@pytest.mark.parametrize(
    ("min_p", "left"), [(0.0, {0, 1, 2}), (0.24, {0, 1, 2}), (0.26, {0, 1}), (0.6, {0}), (1.0, {0})]
)
def test_min_p_is_a_fraction_of_the_likeliest(min_p: float, left: set[int]) -> None:
    assert kept([math.log(p) for p in (4.0, 2.0, 1.0)], min_p=min_p) == left


def test_temperature_comes_before_the_filters() -> None:
    logits = [math.log(p) for p in (0.6, 0.3, 0.1)]
    assert kept(logits, top_p=0.55) == {0}
    assert kept(logits, top_p=0.55, temperature=2.0) == {0, 1}  # 0.47, 0.33, 0.19
    assert kept(logits, min_p=0.45, temperature=2.0) == {0, 1}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    rows = [row(temperature=temperature, seed=seed) for seed in range(20)]
    for largest in (50.0, 1e20):
        logits = torch.tensor([[1.0, largest, largest * 0.99, -INF, -3e38]] * 20)
        assert tokens_of(sample(logits, rows)) == [1] * 20


def test_the_nucleus_is_the_same_by_candidates_and_by_a_whole_sort() -> None:
    generator = torch.Generator().manual_seed(4)
    spread = torch.rand(24, 1, generator=generator) * 6
    logits = (torch.randn(24, 5000, generator=generator) * spread).bfloat16().float()
    probabilities = logits.softmax(dim=-1)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999999, 1.0, 1.1):
        goals = torch.full((24, 1), share, dtype=torch.float64)
        whole = nucleus_floors(probabilities, goals, 5000)
        for candidates in (1, 2, 64, 256, 4999):
            assert torch.equal(nucleus_floors(probabilities, goals, candidates), whole)
        ordered = probabilities.double().sort(dim=-1, descending=True).values
        rank = (ordered.cumsum(dim=-1) < share).sum(dim=-1, keepdim=True).clamp(max=4999)
        assert torch.equal(whole, ordered.gather(1, rank).float())


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
