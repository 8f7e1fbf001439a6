from __future__ import annotations

from blaze.engines.llm.sequence import Sequence, Vocabulary
from blaze.types import ChoiceFinished, Event, SamplingParams, TextDelta
from tests.fakes import ByteDecoder
from tests.samples import text_of

EOS = 0
PIECES = [b"", b"A", b"B", b"C", b"\xe2\x82", b"\xac", b" word"]
A, B, C, EURO_HEAD, EURO_TAIL, WORD = range(1, 7)


def new_sequence(*, max_tokens: int = 100, index: int = 0, **sampling: object) -> Sequence:
    vocabulary = Vocabulary(ByteDecoder(PIECES), frozenset({EOS}))
    return Sequence(index, (9, 9), SamplingParams(**sampling), max_tokens, vocabulary)  # type: ignore[arg-type]


def run(sequence: Sequence, *tokens: int) -> list[Event]:
    """Feed tokens until the sequence ends."""
    events: list[Event] = []
    for token in tokens:
        events.extend(sequence.append(token))
        if sequence.finish_reason is not None:
            break
    return events


def test_every_token_is_one_delta_with_its_id() -> None:
    events = run(new_sequence(), A, WORD)
    assert events == [TextDelta(0, "A", (A,)), TextDelta(0, " word", (WORD,))]


def test_eos_ends_with_stop_and_counts_as_generated() -> None:
    sequence = new_sequence(index=3)
    assert run(sequence, A, EOS) == [
        TextDelta(3, "A", (A,)),
        TextDelta(3, "", (EOS,)),
        ChoiceFinished(3, "stop"),
    ]
    assert sequence.num_generated == 2


def test_case_12_eos_first_is_an_empty_answer_that_stopped() -> None:
    assert run(new_sequence(), EOS) == [TextDelta(0, "", (EOS,)), ChoiceFinished(0, "stop")]


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    events = run(new_sequence(max_tokens=3, ignore_eos=True), EOS, A, EOS, B)
    assert text_of(events) == "A"
    assert events[-1] == ChoiceFinished(0, "length")


def test_max_tokens_ends_with_length() -> None:
    sequence = new_sequence(max_tokens=2)
    events = run(sequence, A, B, C)
    assert text_of(events) == "AB"
    assert sequence.finish_reason == "length"
    assert sequence.num_generated == 2


def test_eos_as_the_last_allowed_token_is_a_stop() -> None:
    assert run(new_sequence(max_tokens=2), A, EOS)[-1] == ChoiceFinished(0, "stop")


def test_case_10_stop_string_split_over_tokens() -> None:
    sequence = new_sequence(stop=("BC",))
    events = run(sequence, A, B, C, A)
    assert text_of(events) == "A"
    assert events[-1] == ChoiceFinished(0, "stop")
    assert sequence.num_generated == 3  # usage counts what was generated, not what was shown


def test_case_10_stop_string_on_the_last_allowed_token_is_a_stop() -> None:
    assert run(new_sequence(max_tokens=2, stop=("B",)), A, B)[-1] == ChoiceFinished(0, "stop")


def test_case_10_held_back_text_is_released_at_the_end() -> None:
    assert text_of(run(new_sequence(stop=("BX",)), A, B, EOS)) == "AB"
    assert text_of(run(new_sequence(stop=("BX",), max_tokens=2), A, B)) == "AB"


def test_an_unfinished_character_is_released_at_the_end() -> None:
    assert text_of(run(new_sequence(max_tokens=2), A, EURO_HEAD)) == "A\ufffd"
    assert text_of(run(new_sequence(), EURO_HEAD, EURO_TAIL, EOS)) == "€"


def test_every_delta_names_its_token_also_when_its_text_is_held_back() -> None:
    events = run(new_sequence(stop=("ABX",)), A, B, C, EOS)
    ids = [token for e in events if isinstance(e, TextDelta) for token in e.token_ids]
    assert ids == [A, B, C, EOS]
    assert text_of(events) == "ABC"
