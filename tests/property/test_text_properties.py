"""Stop strings and detokenization: how text is cut into pieces must not show."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from blaze.engines.llm.detokenize import IncrementalDetokenizer
from blaze.engines.llm.stopping import StopStrings
from tests.fakes import ByteDecoder

Text = TypeVar("Text", str, bytes)

# Few letters, so that stop strings match, nearly match and overlap all the time.
LETTERS = st.text("ab", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@st.composite
def cut(draw: st.DrawFn, text: Text) -> list[Text]:
    """The text in pieces."""
    cuts: set[int] = set()
    if len(text) > 1:
        cuts = draw(st.sets(st.integers(1, len(text) - 1), max_size=30))
    edges = [0, *sorted(cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def through(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    given_out = ""
    for piece in pieces:
        result = matcher.feed(piece)
        given_out += result.text
        if result.stopped:
            return given_out, True
    return given_out + matcher.flush(), False


@given(st.data(), LETTERS, STOPS)
def test_case_10_the_cut_of_the_text_does_not_show(data: st.DataObject, text: str, stops: list[str]) -> None:
    assert through(stops, data.draw(cut(text))) == through(stops, [text])


@given(LETTERS, STOPS)
def test_case_10_what_is_given_out_is_the_text_before_the_first_complete_stop(
    text: str, stops: list[str]
) -> None:
    given_out, stopped = through(stops, list(text))
    assert not any(stop in given_out for stop in stops)
    assert text.startswith(given_out)
    if stopped:
        assert any(text[len(given_out) :].startswith(stop) for stop in stops)
    else:
        assert given_out == text


@given(st.data(), LETTERS, STOPS)
def test_case_10_no_more_is_held_back_than_a_stop_string_but_one(
    data: st.DataObject, text: str, stops: list[str]
) -> None:
    matcher = StopStrings(stops)
    fed = given_out = 0
    for piece in data.draw(cut(text)):
        result = matcher.feed(piece)
        if result.stopped:
            break
        fed += len(piece)
        given_out += len(result.text)
        assert fed - given_out <= max(map(len, stops)) - 1


# U+FFFD is what a decoder writes for an unfinished character: a text full of it cannot be told apart.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40)
BROAD_TEXT = st.text(st.sampled_from("aé€🚀한"), max_size=40)


@given(st.data(), ANY_TEXT | BROAD_TEXT)
def test_any_text_in_any_tokens_comes_out_whole(data: st.DataObject, text: str) -> None:
    pieces = data.draw(cut(text.encode()))
    detokenizer = IncrementalDetokenizer(ByteDecoder(pieces))
    given_out = [detokenizer.feed(token) for token in range(len(pieces))]
    assert "\ufffd" not in "".join(given_out)
    assert "".join(given_out) + detokenizer.flush() == text


@given(st.data(), BROAD_TEXT)
def test_a_character_is_given_out_with_the_token_that_completes_it(data: st.DataObject, text: str) -> None:
    pieces = data.draw(cut(text.encode()))
    detokenizer = IncrementalDetokenizer(ByteDecoder(pieces))
    seen = b""
    given_out = ""
    for token, piece in enumerate(pieces):
        seen += piece
        given_out += detokenizer.feed(token)
        assert given_out == seen.decode(errors="ignore")


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=40))
def test_bytes_that_are_no_text_neither_break_nor_stop_the_stream(pieces: list[bytes]) -> None:
    pieces = [*pieces, b"end"]
    detokenizer = IncrementalDetokenizer(ByteDecoder(pieces))
    given_out = "".join(detokenizer.feed(token) for token in range(len(pieces)))
    assert given_out.endswith("end")
    assert detokenizer.flush() == ""
