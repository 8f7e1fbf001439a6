from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from blaze.engines.llm.sampling import sample, uniform
from blaze.types import SEED_BOUND, SamplingParams

JUST_UNDER_1 = math.nextafter(1.0, 0.0)


def reference(logits: Sequence[float], params: SamplingParams, draw: float) -> int:
    """The definition, one token at a time: temperature, top_k, top_p, inverse cumulative distribution."""
    if params.temperature == 0:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    top = max(logits)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[: params.top_k] if params.top_k else order
    masses = [math.exp((logits[token] - top) / params.temperature) for token in kept]
    total = sum(masses)
    nucleus: list[tuple[int, float]] = []
    reached = 0.0
    for token, mass in zip(kept, masses, strict=True):
        if nucleus and reached >= params.top_p * total:
            break
        nucleus.append((token, mass))
        reached += mass
    target = draw * reached
    reached = 0.0
    for token, mass in nucleus:
        reached += mass
        if target < reached:
            return token
    return nucleus[-1][0]


def draw_one(logits: Sequence[float], params: SamplingParams, draw: float) -> int:
    return sample(torch.tensor([logits]), [params], [draw])[0]


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


# --- Choosing a token --------------------------------------------------------------------------------


def test_temperature_0_is_the_arg_max_whatever_the_draw() -> None:
    params = SamplingParams(temperature=0.0, top_p=0.1, top_k=1)
    assert [draw_one([0.1, 3.0, 2.9], params, draw) for draw in (0.0, 0.5, JUST_UNDER_1)] == [1, 1, 1]


def test_draws_at_the_edges_give_the_likeliest_and_the_last_kept_token() -> None:
    logits = [0.0, 2.0, 1.0, -1.0]
    assert draw_one(logits, SamplingParams(), 0.0) == 1
    assert draw_one(logits, SamplingParams(), JUST_UNDER_1) == 3
    assert draw_one(logits, SamplingParams(top_k=2), JUST_UNDER_1) == 2
    assert draw_one(logits, SamplingParams(top_p=0.7), JUST_UNDER_1) == 2


def test_the_draw_crosses_from_one_token_to_the_next_at_its_mass() -> None:
    halves = [1.0, 1.0]
    assert draw_one(halves, SamplingParams(), math.nextafter(0.5, 0.0)) == 0
    assert draw_one(halves, SamplingParams(), 0.5) == 1


def test_top_p_keeps_the_likeliest_even_when_it_is_above_the_bound() -> None:
    assert draw_one([5.0, 0.0], SamplingParams(top_p=1e-9), JUST_UNDER_1) == 0


def test_top_p_counts_the_mass_of_what_top_k_left() -> None:
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # 0.4 of all, but 0.57 of the two likeliest: one token reaches half of their mass.
    assert draw_one(logits, SamplingParams(top_k=2, top_p=0.5), JUST_UNDER_1) == 0
    assert draw_one(logits, SamplingParams(top_k=0, top_p=0.5), JUST_UNDER_1) == 1


def test_top_k_above_the_vocabulary_filters_nothing() -> None:
    assert draw_one([1.0, 0.0], SamplingParams(top_k=1000), JUST_UNDER_1) == 1


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert draw_one([1.0, 50.0, 49.0], SamplingParams(temperature=temperature), 0.999) == 1


def test_banned_tokens_are_never_drawn() -> None:
    logits = [-math.inf, 0.0, -math.inf, 0.0]
    drawn = {draw_one(logits, SamplingParams(), draw) for draw in (0.0, 0.3, 0.6, JUST_UNDER_1)}
    assert drawn == {1, 3}


def test_samples_equal_the_reference() -> None:
    rng = random.Random(3)
    for _ in range(300):
        logits = [rng.gauss(0, 3) for _ in range(rng.randint(1, 40))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=rng.choice([0, 1, 3, 100]),
            top_p=rng.choice([0.05, 0.5, 0.9, 1.0]),
        )
        draw = rng.random()
        # The same float32 logits for both sides.
        exact = torch.tensor(logits).tolist()
        assert draw_one(exact, params, draw) == reference(exact, params, draw), (exact, params, draw)


def test_case_20_a_row_does_not_depend_on_the_batch_around_it() -> None:
    rng = random.Random(5)
    rows = [[rng.gauss(0, 2) for _ in range(20)] for _ in range(6)]
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(temperature=2.0, top_k=7, top_p=0.8),
        SamplingParams(temperature=1.0, top_k=1),
    ]
    draws = [uniform(row, 0, 9) for row in range(6)]
    alone = [draw_one(row, p, d) for row, p, d in zip(rows, params, draws, strict=True)]
    assert sample(torch.tensor(rows), params, draws) == alone
    backwards = sample(torch.tensor(rows[::-1]), params[::-1], draws[::-1])
    assert backwards == alone[::-1]
