from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blaze.checks import SEED_BOUND
from blaze.engines.llm.sampling import (
    SampledToken,
    SamplingRow,
    TokenHistory,
    inverse_cdf,
    kept_probabilities,
    nucleus_floors,
    sample,
    uniform,
)
from blaze.errors import NonFiniteOutput
from blaze.sampling_params import SamplingParams
from tests.reference_sampler import reference_sample

SIZE = 300  # of the vocabulary: more than two blocks of the sampler's search, and not a multiple of one
TOKENS = st.integers(0, SIZE - 1)
# Few different values, so that ties are common; and some that only float32 tells apart.
LOGIT = st.one_of(st.integers(-8, 8).map(float), st.floats(-50, 50, width=32), st.just(-float("inf")))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.floats(0, 2)),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1, exclude_min=True)),
    top_k=st.one_of(st.just(0), st.integers(0, 15)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.1, 10)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    logit_bias=st.lists(st.tuples(TOKENS, st.floats(-100, 100)), max_size=3).map(tuple),
    min_tokens=st.integers(0, 3),
    seed=st.one_of(st.none(), st.integers(-SEED_BOUND, SEED_BOUND - 1)),
    logprobs=st.one_of(st.none(), st.integers(0, 5)),
)
DRAW = st.floats(0, 1, exclude_max=True)


@dataclass(frozen=True)
class Case:
    """What one row is made of: a row's history grows, so that each use makes its own."""

    logits: tuple[float, ...]
    params: SamplingParams
    choice: int
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    ends: frozenset[int]

    def row(self) -> SamplingRow:
        history = TokenHistory(self.prompt, self.generated)
        return SamplingRow(self.params, self.choice, len(self.generated), history, self.ends)


CASE = st.builds(
    Case,
    logits=st.lists(LOGIT, min_size=5, max_size=12).map(lambda few: tuple((few * SIZE)[:SIZE])),
    params=PARAMS,
    choice=st.integers(0, 3),
    prompt=st.lists(TOKENS, max_size=6).map(tuple),
    generated=st.lists(TOKENS, max_size=6).map(tuple),
    ends=st.frozensets(TOKENS, max_size=2),
)


def outcome_of(outcome: SampledToken | NonFiniteOutput) -> tuple[object, ...]:
    """Errors are not equal to one another; their kind is."""
    if isinstance(outcome, NonFiniteOutput):
        return (NonFiniteOutput,)
    return (outcome.token_id, outcome.logprob, outcome.top)


@given(st.integers(-SEED_BOUND, SEED_BOUND - 1), st.integers(0, 127), st.integers(0, 2**31))
def test_uniform_numbers_are_in_the_half_open_interval_and_repeat(
    seed: int, choice: int, position: int
) -> None:
    number = uniform(seed, choice, position)
    assert 0.0 <= number < 1.0
    assert number == uniform(seed, choice, position)


@settings(max_examples=100)
@given(st.lists(CASE, min_size=1, max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_a_row_does_not_depend_on_the_rows_around_it(
    cases: list[Case], shuffler: object, is_bfloat16: bool
) -> None:
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    logits = torch.tensor([case.logits for case in cases], dtype=dtype)
    order = list(range(len(cases)))
    shuffler.shuffle(order)  # type: ignore[attr-defined]
    alone = [outcome_of(sample(logits[i : i + 1], [cases[i].row()])[0]) for i in range(len(cases))]
    together = [outcome_of(outcome) for outcome in sample(logits, [case.row() for case in cases])]
    shuffled = [outcome_of(outcome) for outcome in sample(logits[order], [cases[i].row() for i in order])]
    assert together == alone
    assert shuffled == [alone[i] for i in order]


@given(CASE)
def test_a_draw_equals_the_reference(case: Case) -> None:
    (outcome,) = sample(torch.tensor([case.logits]), [case.row()])
    try:
        expected, margin = reference_sample(
            case.logits,
            case.params,
            case.choice,
            len(case.generated),
            case.prompt,
            case.generated,
            case.ends,
        )
    except ValueError:
        assert isinstance(outcome, NonFiniteOutput)
        return
    assert isinstance(outcome, SampledToken)
    if margin > 1e-4:
        assert outcome.token_id == expected


@given(st.lists(LOGIT, min_size=1, max_size=12).filter(lambda few: max(few) > -60), PARAMS)
def test_the_filters_keep_whole_groups_of_equals_from_the_likeliest_down(
    logits: list[float], params: SamplingParams
) -> None:
    (probabilities,) = kept_probabilities(torch.tensor([logits]), [params]).tolist()
    kept = [logit for logit, p in zip(logits, probabilities, strict=True) if p > 0]
    dropped = [logit for logit, p in zip(logits, probabilities, strict=True) if p == 0]
    assert max(logits) in kept
    assert all(logit < min(kept) for logit in dropped)
    if params.top_k:
        # Those that are likelier than the least of the kept ones are fewer than k.
        assert sum(logit > min(kept) for logit in logits) < params.top_k


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=400), DRAW, DRAW)
def test_a_larger_draw_never_gives_a_smaller_id(masses: list[float], one: float, other: float) -> None:
    masses[len(masses) // 2] = 0.5
    low, high = sorted((one, other))
    draws = torch.tensor([[low], [high]], dtype=torch.float64)
    first, second = inverse_cdf(torch.tensor([masses, masses]), draws).tolist()
    assert first <= second
    assert masses[first] > 0
    assert masses[second] > 0


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.floats(0, 50), st.integers(1, 40))
def test_the_nucleus_does_not_depend_on_the_number_of_candidates(
    masses: list[float], goal: float, candidates: int
) -> None:
    rows, goals = torch.tensor([masses]), torch.tensor([[goal]], dtype=torch.float64)
    floor = nucleus_floors(rows, goals, candidates)
    assert torch.equal(floor, nucleus_floors(rows, goals, len(masses)))
    at_least = sorted((mass for mass in masses if mass >= floor.item()), reverse=True)
    above = [mass for mass in masses if mass > floor.item()]
    assert sum(above) < goal + 1e-9 or not above
    assert sum(at_least) > goal - 1e-9 or len(at_least) == len(masses)
