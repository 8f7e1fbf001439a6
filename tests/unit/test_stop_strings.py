from __future__ import annotations

from collections.abc import Iterable

import pytest

from blaze.engines.llm.stopping import StopStrings


def feed_all(stops: Iterable[str], pieces: Iterable[str]) -> tuple[list[str], bool]:
    """What was given out piece by piece (the flush last), and whether a stop string ended it."""
    matcher = StopStrings(tuple(stops))
    given = []
    for piece in pieces:
        result = matcher.feed(piece)
        given.append(result.text)
        if result.stopped:
            return given, True
    return [*given, matcher.flush()], False


def test_without_stop_strings_text_passes_at_once() -> None:
    assert feed_all([], ["any", "thing"]) == (["any", "thing", ""], False)


def test_case_10_stop_string_split_over_tokens() -> None:
    given, stopped = feed_all(["DEFGHIJ"], ["ABC", "DEF", "G", "HI", "JKL"])
    assert stopped
    assert given == ["ABC", "", "", "", ""]


def test_case_10_broken_near_match_is_released() -> None:
    given, stopped = feed_all(["DEFGHIJ"], ["ABC", "DEF", "G", "HX", "Y"])
    assert not stopped
    assert given == ["ABC", "", "", "DEFGHX", "Y", ""]


def test_case_10_stop_string_that_overlaps_itself() -> None:
    assert feed_all(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], True)


def test_case_10_the_match_that_is_complete_first_wins() -> None:
    assert feed_all(["late", "stop"], ["go stop late"]) == (["go "], True)
    assert feed_all(["abcd", "bc"], ["xabcd"]) == (["xa"], True)


def test_of_matches_that_end_together_the_longest_is_cut_off() -> None:
    assert feed_all(["c", "abc"], ["xabc"]) == (["x"], True)
    assert feed_all(["c", "abc"], ["xa", "b", "c"]) == (["x", "", ""], True)


def test_text_after_the_stop_string_is_dropped() -> None:
    assert feed_all(["."], ["One. Two. Three."]) == (["One"], True)


def test_a_held_back_tail_is_flushed_when_the_answer_ends_otherwise() -> None:
    matcher = StopStrings(["END"])
    assert matcher.feed("the EN").text == "the "
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


@pytest.mark.parametrize("stop", ["\n\n", "é€", "👩‍🚀", " "])
def test_any_characters_can_stop(stop: str) -> None:
    given, stopped = feed_all([stop], list("before" + stop + "after"))
    assert stopped
    assert "".join(given) == "before"
