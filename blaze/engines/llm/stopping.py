"""Stop strings, across token borders: text that may become one is held back, never leaked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    text: str  # safe to send
    stopped: bool  # a stop string was found; ``text`` ends before it


class StopStrings:
    """Feed it text in pieces; it gives back what can be sent.

    Holds back only a tail that is the beginning of some stop string: at most ``max(len(stop)) - 1``
    characters. With several matches the one that is complete first wins, the longest of those that end
    together: so the result is the same however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> StopResult:
        if not self._stops:
            return StopResult(text, stopped=False)
        buffer = self._held + text
        starts = ((buffer.find(stop), stop) for stop in self._stops)
        found = [(at + len(stop), at) for at, stop in starts if at >= 0]
        if found:
            self._held = ""
            _end, start = min(found)
            return StopResult(buffer[:start], stopped=True)
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return StopResult(buffer[: len(buffer) - keep], stopped=False)

    def flush(self) -> str:
        """The answer ended for another reason: what was held back belongs to it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
