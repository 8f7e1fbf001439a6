from __future__ import annotations

from collections.abc import Sequence

import pytest

from blaze.engines.llm.detokenize import IncrementalDetokenizer
from tests.fakes import ByteDecoder


def feed_all(pieces: Sequence[bytes]) -> list[str]:
    """The text that came with each token, and what was left at the end."""
    detokenizer = IncrementalDetokenizer(ByteDecoder(pieces))
    return [*(detokenizer.feed(token) for token in range(len(pieces))), detokenizer.flush()]


def test_plain_tokens_are_text_at_once() -> None:
    assert feed_all([b"Hel", b"lo", b" world"]) == ["Hel", "lo", " world", ""]


@pytest.mark.parametrize("character", ["é", "€", "🚀"])
def test_a_character_appears_with_its_last_byte(character: str) -> None:
    encoded = character.encode()
    pieces = [bytes([byte]) for byte in encoded]
    assert feed_all([b"x", *pieces, b"y"]) == ["x", *[""] * (len(encoded) - 1), character, "y", ""]


def test_characters_before_an_unfinished_one_do_not_wait_for_it() -> None:
    assert feed_all([b"caf\xc3", b"\xa9 cr\xc3", b"\xa8me"]) == ["caf", "é cr", "ème", ""]


def test_a_long_run_of_tokens_that_all_end_inside_a_character_loses_nothing() -> None:
    text = "€" * 20
    encoded = text.encode()
    cuts = [encoded[0:2], *(encoded[at : at + 3] for at in range(2, len(encoded), 3))]
    given = feed_all(cuts)
    assert "".join(given) == text
    assert given[1:5] == ["€", "€", "€", "€"]


def test_a_replacement_character_in_the_text_itself_is_kept() -> None:
    assert "".join(feed_all([b"a", "\ufffd".encode(), b"b"])) == "a\ufffdb"


def test_an_unfinished_character_at_the_end_is_flushed() -> None:
    assert feed_all([b"ok", b"\xe2", b"\x82"]) == ["ok", "", "", "\ufffd"]


def test_invalid_bytes_are_given_up_on_and_text_goes_on() -> None:
    given = feed_all([b"a", *[b"\xff"] * 12, b"b", b"c"])
    assert "".join(given) == "a" + "\ufffd" * 12 + "bc"
    assert any(given[2:10]), "invalid bytes must not hold the text back for ever"


def test_tokens_without_text_of_their_own_change_nothing() -> None:
    assert "".join(feed_all([b"a", b"", b"\xc3", b"", b"\xa9", b""])) == "aé"


def test_flush_makes_it_ready_for_another_text() -> None:
    pieces = [b"\xe2", b"A"]
    detokenizer = IncrementalDetokenizer(ByteDecoder(pieces))
    assert detokenizer.feed(0) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.feed(1) == "A"
