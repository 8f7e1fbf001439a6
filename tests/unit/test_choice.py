from __future__ import annotations

import pytest

from blaze.engines.llm.choice import Choice
from blaze.engines.llm.sampling import SampledToken
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.vocabulary import Vocabulary
from blaze.sampling_params import SamplingParams
from blaze.types import ChoiceFinished, Event, TextDelta, TokenLogprob, TopLogprob
from tests.fake_models import CharacterNames
from tests.fakes import ByteDecoder
from tests.samples import text_of

EOS = 0
PIECES = [b"", b"A", b"B", b"C", b"\xe2\x82", b"\xac", b" word"]
A, B, C, EURO_HEAD, EURO_TAIL, WORD = range(1, 7)


def new_choice(
    *,
    max_tokens: int = 100,
    index: int = 0,
    prompt: tuple[int, ...] = (9, 9),
    generated: tuple[int, ...] = (),
    **sampling: object,
) -> Choice:
    vocabulary = Vocabulary(ByteDecoder(PIECES), CharacterNames(), frozenset({EOS}))
    sequence = Sequence(prompt, (0.0, 0, index), generated=generated)
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return Choice(index, sequence, params, max_tokens, vocabulary)


def run(choice: Choice, *tokens: int) -> list[Event]:
    """Feed tokens until the sequence ends."""
    events: list[Event] = []
    for token in tokens:
        events.extend(choice.append(SampledToken(token, None, ())))
        if choice.finish_reason is not None:
            break
    return events


def test_every_token_is_one_delta_with_its_id() -> None:
    events = run(new_choice(), A, WORD)
    assert events == [TextDelta(0, "A", (A,)), TextDelta(0, " word", (WORD,))]


def test_eos_ends_with_stop_and_counts_as_generated() -> None:
    choice = new_choice(index=3)
    assert run(choice, A, EOS) == [
        TextDelta(3, "A", (A,)),
        TextDelta(3, "", (EOS,)),
        ChoiceFinished(3, "stop"),
    ]
    assert choice.num_generated == 2


def test_case_12_eos_first_is_an_empty_answer_that_stopped() -> None:
    assert run(new_choice(), EOS) == [TextDelta(0, "", (EOS,)), ChoiceFinished(0, "stop")]


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    events = run(new_choice(max_tokens=3, ignore_eos=True), EOS, A, EOS, B)
    assert text_of(events) == "A"
    assert events[-1] == ChoiceFinished(0, "length")


def test_max_tokens_ends_with_length() -> None:
    choice = new_choice(max_tokens=2)
    events = run(choice, A, B, C)
    assert text_of(events) == "AB"
    assert choice.finish_reason == "length"
    assert choice.num_generated == 2


def test_eos_as_the_last_allowed_token_is_a_stop() -> None:
    assert run(new_choice(max_tokens=2), A, EOS)[-1] == ChoiceFinished(0, "stop")


def test_case_10_stop_string_split_over_tokens() -> None:
    choice = new_choice(stop=("BC",))
    events = run(choice, A, B, C, A)
    assert text_of(events) == "A"
    assert events[-1] == ChoiceFinished(0, "stop")
    assert choice.num_generated == 3  # usage counts what was generated, not what was shown


def test_case_10_stop_string_on_the_last_allowed_token_is_a_stop() -> None:
    assert run(new_choice(max_tokens=2, stop=("B",)), A, B)[-1] == ChoiceFinished(0, "stop")


def test_case_10_held_back_text_is_released_at_the_end() -> None:
    assert text_of(run(new_choice(stop=("BX",)), A, B, EOS)) == "AB"
    assert text_of(run(new_choice(stop=("BX",), max_tokens=2), A, B)) == "AB"


def test_an_unfinished_character_is_released_at_the_end() -> None:
    assert text_of(run(new_choice(max_tokens=2), A, EURO_HEAD)) == "A\ufffd"
    assert text_of(run(new_choice(), EURO_HEAD, EURO_TAIL, EOS)) == "€"


def test_every_delta_names_its_token_also_when_its_text_is_held_back() -> None:
    events = run(new_choice(stop=("ABX",)), A, B, C, EOS)
    ids = [token for e in events if isinstance(e, TextDelta) for token in e.token_ids]
    assert ids == [A, B, C, EOS]
    assert text_of(events) == "ABC"


def test_before_min_tokens_nothing_ends_an_answer() -> None:
    events = run(new_choice(min_tokens=3, stop=("AB",)), A, B, A, B, C)
    assert text_of(events) == "AB"
    assert events[-1] == ChoiceFinished(0, "stop")


def test_a_stop_token_ends_like_an_end_of_sequence() -> None:
    events = run(new_choice(stop_token_ids=(C,)), A, C, B)
    assert text_of(events) == "A"
    assert events[-1] == ChoiceFinished(0, "stop")


def test_what_was_generated_elsewhere_is_counted_and_not_sent_again() -> None:
    choice = new_choice(max_tokens=4, generated=(A, EURO_HEAD), stop=("\u20acB",))
    assert choice.num_generated == 2
    assert text_of(run(choice, EURO_TAIL, B)) == ""
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("generated", "reason"),
    [((A, EOS), "stop"), ((A, B, C), "length"), ((A, B), "stop"), ((A,), None), ((), None)],
)
def test_what_was_complete_elsewhere_is_complete(generated: tuple[int, ...], reason: str | None) -> None:
    choice = new_choice(max_tokens=3, generated=generated, stop=("AB",) if len(generated) == 2 else ())
    assert choice.finish_reason == reason
    assert choice.num_generated == len(generated)


def test_what_came_after_the_end_elsewhere_does_not_change_how_it_ended() -> None:
    assert new_choice(max_tokens=3, generated=(A, EOS, B, C)).finish_reason == "stop"


def test_an_end_token_that_comes_too_early_is_passed_over() -> None:
    events = run(new_choice(min_tokens=2, stop_token_ids=(B,)), EOS, B, EOS)
    assert [event.token_ids for event in events if isinstance(event, TextDelta)] == [(EOS,), (B,), (EOS,)]
    assert events[-1] == ChoiceFinished(0, "stop")


def test_a_stop_string_that_begins_before_min_tokens_is_text() -> None:
    events = run(new_choice(min_tokens=2, max_tokens=4, stop=("AB",)), A, B, A, B)
    assert text_of(events) == "AB"
    assert events[-1] == ChoiceFinished(0, "stop")


def test_a_stop_string_in_what_an_end_token_releases_is_found() -> None:
    events = run(new_choice(stop=("\ufffd",)), A, EURO_HEAD, EOS)
    assert text_of(events) == "A"
    assert events[-1] == ChoiceFinished(0, "stop")


def test_the_sampler_is_told_the_place_the_ends_and_what_penalties_look_at() -> None:
    plain = new_choice(index=2, generated=(A,), stop_token_ids=(C,)).row()
    assert (plain.choice, plain.position, plain.end_ids) == (2, 1, frozenset({EOS, C}))
    assert plain.history is None
    assert new_choice(ignore_eos=True, stop_token_ids=(C,)).row().end_ids == {C}
    assert new_choice(presence_penalty=1.0).row().history is not None


def test_log_probabilities_name_the_token_and_the_likeliest() -> None:
    choice = new_choice(logprobs=2)
    (delta,) = choice.append(SampledToken(A, -0.5, ((A, -0.5), (B, -1.0))))
    assert isinstance(delta, TextDelta)
    assert delta.logprobs == (
        TokenLogprob(chr(A), A, -0.5, (TopLogprob(chr(A), A, -0.5), TopLogprob(chr(B), B, -1.0))),
    )


def test_the_prompt_comes_once_and_before_the_first_token() -> None:
    choice = new_choice(echo=True, prompt=(A, EURO_HEAD, EURO_TAIL))
    assert run(choice, B, C) == [
        TextDelta(0, "A\u20ac", (A, EURO_HEAD, EURO_TAIL), echo=True),
        TextDelta(0, "B", (B,)),
        TextDelta(0, "C", (C,)),
    ]


def test_of_the_prompt_alone_no_token_is_kept() -> None:
    choice = new_choice(echo=True, max_tokens=0, prompt=(A,))
    assert run(choice, B) == [TextDelta(0, "A", (A,), echo=True), ChoiceFinished(0, "length")]
    assert choice.num_generated == 0
