from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blaze.engines.llm.sampling import sample, uniform
from blaze.types import SEED_BOUND, SamplingParams

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12)
DRAW = st.floats(0, 1, exclude_max=True)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 15),
)


@given(st.integers(-SEED_BOUND, SEED_BOUND - 1), st.integers(0, 127), st.integers(0, 2**31))
def test_uniform_numbers_are_in_the_half_open_interval_and_repeat(
    seed: int, choice: int, position: int
) -> None:
    number = uniform(seed, choice, position)
    assert 0.0 <= number < 1.0
    assert number == uniform(seed, choice, position)


@settings(max_examples=100)
@given(LOGITS, PARAMS, DRAW)
def test_a_drawn_token_is_among_the_likeliest_that_the_filters_left(
    logits: list[float], params: SamplingParams, draw: float
) -> None:
    (token,) = sample(torch.tensor([logits]), [params], [draw])
    likelier = sum(other > logits[token] for other in logits)
    assert likelier < (params.top_k or len(logits))
    if params.temperature == 0 or params.top_p < 1e-9:
        assert likelier == 0


@settings(max_examples=100)
@given(LOGITS, PARAMS, DRAW, DRAW)
def test_a_larger_draw_never_gives_a_likelier_token(
    logits: list[float], params: SamplingParams, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    first, second = sample(torch.tensor([logits, logits]), [params, params], [low, high])
    assert logits[first] >= logits[second]
