from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest

from blaze.routing.cost import CostModel, prompt_tokens
from blaze.routing.speed import Speed
from blaze.types import ChatMessage, ChatPrompt, Prompt, Request, TextPrompt, TokenPrompt
from tests.samples import image_request, text_request

TEN = TokenPrompt(tuple(range(10)))

# --- Requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        (TokenPrompt((1, 2, 3)), 3.0),
        (TextPrompt("twelve bytes"), 3.0),
        (TextPrompt("äöü"), 1.5),  # bytes, not characters
        (TextPrompt(""), 0.0),
        (TextPrompt("\ud800"), 0.75),  # over a handle, lone surrogates come too
        (ChatPrompt((ChatMessage("system", "abcd"), ChatMessage("user", "abcdefgh"))), 3.0),
        (ChatPrompt((ChatMessage("user", "abcd"),), tools="[{}]"), 2.0),
        (ChatPrompt((ChatMessage("assistant", None, tool_calls="[{}]"), ChatMessage("tool", "abcd"))), 2.0),
    ],
)
def test_prompt_tokens_are_a_quarter_of_the_bytes_until_they_are_known(prompt: Prompt, tokens: float) -> None:
    assert prompt_tokens(prompt) == tokens


@pytest.mark.parametrize(
    ("request_", "cost"),
    [
        (text_request(TEN, max_tokens=100), 0.1 * 10 + 100),
        (text_request(TEN, max_tokens=1), 0.1 * 10 + 1),
        (text_request(TEN, max_tokens=100, n=3), 0.1 * 10 + 300),
        (text_request("abcd" * 10, max_tokens=5), 0.1 * 10 + 5),
        # Before anything was answered, an answer is taken to be 256 tokens, and twice that is the bound.
        (text_request(TEN), 0.1 * 10 + 512),
        (text_request(TEN, max_tokens=512), 0.1 * 10 + 512),
        (text_request(TEN, max_tokens=100_000), 0.1 * 10 + 512),
        (image_request(num_inference_steps=20, width=256, height=128), 20 * 256 * 128),
        (image_request(num_inference_steps=20, width=256, height=128, n=4), 20 * 256 * 128 * 4),
        (image_request(), 50 * 512 * 512),
    ],
)
def test_what_a_request_costs(request_: Request, cost: float) -> None:
    assert CostModel().of(request_) == pytest.approx(cost)


def test_a_resumed_request_costs_what_is_left_of_it() -> None:
    begun = dataclasses.replace(text_request(TEN, max_tokens=100), generated=((7,) * 40,))
    assert CostModel().of(begun) == pytest.approx(0.1 * (10 + 40) + 60)
    begun = dataclasses.replace(text_request(TEN, max_tokens=100, n=2), generated=((7,) * 40, (7,) * 10))
    assert CostModel().of(begun) == pytest.approx(0.1 * (10 + 50) + 150)
    longer = dataclasses.replace(text_request(TEN), generated=((7,) * 600,))
    assert CostModel().of(longer) == pytest.approx(0.1 * (10 + 600)), (
        "longer than expected, but never less than 0"
    )


def test_cached_tokens_of_the_prompt_cost_nothing() -> None:
    request = text_request(TEN, max_tokens=100)
    assert CostModel().of_text(request, 50, cached_tokens=48) == pytest.approx(0.1 * 2 + 100)


@pytest.mark.parametrize(
    ("outputs", "bound"),
    [
        ([10], 20.0),  # the first one is believed
        ([10, 20], 22.0),  # then one tenth of each
        ([10, 20, 0], 19.8),
        ([0], 0.0),
        ([100] * 50, 200.0),
    ],
)
def test_expected_output_is_bounded_by_twice_the_ewma_of_real_answers(
    outputs: Sequence[float], bound: float
) -> None:
    model = CostModel()
    for output in outputs:
        model.finished(output)
    assert model.of(text_request(TEN)) == pytest.approx(1.0 + bound)
    assert model.of(text_request(TEN, max_tokens=100_000)) == pytest.approx(1.0 + bound)
    assert model.of(text_request(TEN, max_tokens=1)) == pytest.approx(1.0 + min(1.0, bound))


@pytest.mark.parametrize(
    ("costs", "typical"), [([], 1.0), ([50], 50.0), ([50, 100], 55.0), ([50, 100, 0], 49.5)]
)
def test_the_typical_cost_is_an_ewma(costs: Sequence[float], typical: float) -> None:
    model = CostModel()
    for cost in costs:
        model.started(cost)
    assert model.typical == pytest.approx(typical)


# --- Speed -------------------------------------------------------------------------------------------


def test_nothing_served_is_no_speed() -> None:
    speed = Speed()
    assert math.isnan(speed.drain)
    speed.began(0.0)
    speed.ended(5.0, 0.0, idle=True)
    assert math.isnan(speed.drain)


def test_speed_is_cost_per_busy_second() -> None:
    speed = Speed()
    speed.began(100.0)
    speed.ended(102.0, 30.0, idle=True)
    assert speed.drain == pytest.approx(15.0)
    speed.began(200.0)  # idle in between
    speed.ended(202.0, 30.0, idle=True)
    assert speed.drain == pytest.approx(15.0)


def test_requests_at_the_same_time_share_the_seconds() -> None:
    speed = Speed()
    speed.began(0.0)
    speed.began(1.0)
    speed.ended(2.0, 10.0, idle=False)
    assert speed.drain == pytest.approx(5.0)
    speed.ended(4.0, 10.0, idle=True)
    assert speed.drain == pytest.approx(5.0)


@pytest.mark.parametrize("seconds", [0.1, 1.0, 10.0, 60.0])
def test_old_speeds_fade_with_busy_time(seconds: float) -> None:
    speed = Speed()
    speed.began(0.0)
    speed.ended(1.0, 100.0, idle=True)
    speed.began(1.0)
    speed.ended(1.0 + seconds, 20.0 * seconds, idle=True)
    keep = math.exp(-seconds / 10.0)
    assert speed.drain == pytest.approx(keep * 100.0 + (1 - keep) * 20.0)


def test_time_in_which_nothing_was_served_says_nothing() -> None:
    """A replica that hung until its request was cancelled is not slow for ever."""
    speed = Speed()
    speed.began(0.0)
    speed.ended(300.0, 0.0, idle=True)
    speed.began(310.0)
    speed.ended(311.0, 20.0, idle=True)
    assert speed.drain == pytest.approx(20.0)


def test_a_failure_beside_successes_takes_time_and_serves_nothing() -> None:
    speed = Speed()
    speed.began(0.0)
    speed.ended(0.02, 20.0, idle=False)
    speed.ended(4.0, 0.0, idle=True)
    assert speed.drain == pytest.approx(5.0)


def test_moments_are_gathered_until_they_are_worth_a_sample() -> None:
    speed = Speed()
    for number in range(4):
        speed.began(float(number))
        speed.ended(number + 0.01, 1.0, idle=True)
        assert math.isnan(speed.drain)
    speed.began(10.0)
    speed.ended(10.02, 2.0, idle=True)
    assert speed.drain == pytest.approx(6.0 / 0.06)
