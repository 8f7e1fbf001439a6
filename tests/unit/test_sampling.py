from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from blaze.checks import SEED_BOUND
from blaze.engines.llm.sampling import (
    inverse_cdf,
    nucleus_floors,
    sample,
    uniform,
)
from tests.sampling_rows import kept, row, threads, tokens_of

JUST_UNDER_1 = math.nextafter(1.0, 0.0)
SMOLLM2 = 49152  # the size of the default model's vocabulary
INF = math.inf


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
