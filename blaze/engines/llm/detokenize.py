"""Incremental detokenization that never splits a character.

A token's text depends on its neighbours (spaces, bytes of one character), so a window is decoded, not
the token: the text of ``ids[start:]`` minus the text of ``ids[start:read]`` that was already given out.
Text that ends in U+FFFD, an unfinished character, waits for the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "�"
_MAX_UNFINISHED_TOKENS = 8  # longer than any character: the bytes are invalid, not unfinished


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str: ...


class IncrementalDetokenizer:
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []  # ids from the start of the window on
        self._given = 0  # how many of them are already text that was given out
        self._given_text = ""

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._window.append(token_id)
        text = self._decoder.decode(self._window)
        unfinished = text.endswith(_UNFINISHED) and len(self._window) - self._given < _MAX_UNFINISHED_TOKENS
        if unfinished:
            return ""
        new = text[len(self._given_text) :]
        # The next window starts at the tokens just given out: enough context for what follows.
        self._window = self._window[self._given :]
        self._given = len(self._window)
        self._given_text = self._decoder.decode(self._window)
        return new

    def flush(self) -> str:
        """What an unfinished character left behind."""
        text = self._decoder.decode(self._window)
        new = text[len(self._given_text) :]
        self._window, self._given, self._given_text = [], 0, ""
        return new
