"""Incremental detokenization that never splits a character.

A token's text depends on its neighbours (spaces, bytes of one character), so a window is decoded, not
the token, and what of its text was given out before is cut off. U+FFFD at the end of the text may be an
unfinished character: it waits for the next token, while the characters before it are given out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\ufffd"
_MAX_UNFINISHED_TOKENS = 8  # longer than any character: the bytes are invalid, not unfinished


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int]) -> str: ...


class IncrementalDetokenizer:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._window: list[int] = []  # ids from a place on at which no character is cut in two
        self._context = 0  # how many of them are there for the sake of those after them only
        self._given = 0  # characters of the window's text that were given out
        self._waiting = 0  # tokens that have given out nothing, up to now

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._window.append(token_id)
        self._waiting += 1
        text = self.decoder.decode(self._window)
        complete = text.rstrip(_UNFINISHED)
        if len(complete) == len(text) or self._waiting >= _MAX_UNFINISHED_TOKENS:
            new = text[self._given :]
            self._waiting = 0
            # The next window starts at the tokens just given out: enough context for what follows.
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._given = len(self.decoder.decode(self._window))
            return new
        new = complete[self._given :]
        if new:
            self._given = len(complete)
            self._waiting = 0
        return new

    def flush(self) -> str:
        """What an unfinished character left behind."""
        new = self.decoder.decode(self._window)[self._given :]
        self._window, self._context, self._given, self._waiting = [], 0, 0, 0
        return new
