from __future__ import annotations

from blaze.engines.llm.choice import Choice
from blaze.engines.llm.sampling import SampledToken
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.vocabulary import Vocabulary
from blaze.sampling_params import SamplingParams
from blaze.types import ChoiceFinished, Event, TextDelta
from tests.fake_models import CharacterNames
from tests.fakes import ByteDecoder
from tests.samples import text_of

EOS = 0
PIECES = [b"", b"A", b"B", b"C", b"\xe2\x82", b"\xac", b" word"]
A, B, C, EURO_HEAD, EURO_TAIL, WORD = range(1, 7)


def new_choice(
    *, max_tokens: int = 100, index: int = 0, generated: tuple[int, ...] = (), **sampling: object
) -> Choice:
    vocabulary = Vocabulary(ByteDecoder(PIECES), CharacterNames(), frozenset({EOS}))
    sequence = Sequence((9, 9), (0.0, 0, index), generated=generated)
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
