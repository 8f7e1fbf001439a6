"""Log probabilities in OpenAI's two shapes: that of chat and that of completions.

A token may be part of a character. Engines give such bytes as lone surrogates (``surrogateescape``), so that
nothing is lost on the way; clients read them as ``\\xf0``, as from OpenAI, beside the true ``bytes``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from blaze.types import TextDelta, TokenLogprob

_LEAST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    content = [
        _chat_token(one.token, one.logprob)
        | {"top_logprobs": [_chat_token(likely.token, likely.logprob) for likely in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(deltas: Sequence[TextDelta], offsets: TextOffsets) -> dict[str, Any]:
    """``top_logprobs`` has the chosen token too, as OpenAI's; of tokens that read the same, the likeliest."""
    tokens = [one for delta in deltas for one in delta.logprobs or ()]
    return {
        "tokens": [_shown(_raw(one.token)) for one in tokens],
        "token_logprobs": [_finite(one.logprob) for one in tokens],
        "top_logprobs": [_top(one) for one in tokens],
        "text_offset": [offset for delta in deltas for offset in offsets.of(delta)],
    }


class TextOffsets:
    """Where the tokens of one choice begin in its text, in characters; goes on from delta to delta.

    Counted by the tokens' own strings, because text lags behind tokens.
    """

    def __init__(self) -> None:
        self._end = 0

    def of(self, delta: TextDelta) -> list[int]:
        start = self._end
        offsets = []
        for one in delta.logprobs or ():
            raw = _raw(one.token)
            offsets.append(self._end - _begins_inside_a_character(raw))
            hidden = delta.echo and not _is_at(one.token, delta.text, self._end - start)
            if not hidden:
                self._end += _num_characters(raw)
        if delta.echo:
            self._end = start + len(delta.text)  # the prompt's text is there in full
        return offsets


def _chat_token(token: str, logprob: float | None) -> dict[str, Any]:
    raw = _raw(token)
    return {"token": _shown(raw), "logprob": _finite(logprob), "bytes": list(raw)}


def _top(one: TokenLogprob) -> dict[str, float | None] | None:
    if one.logprob is None:
        return None
    likeliest: dict[str, float | None] = {}
    for likely in one.top:
        likeliest.setdefault(_shown(_raw(likely.token)), _finite(likely.logprob))
    likeliest.setdefault(_shown(_raw(one.token)), _finite(one.logprob))
    return likeliest


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_LEAST, logprob)


def _raw(token: str) -> bytes:
    return token.encode("utf-8", "surrogateescape")


def _shown(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _num_characters(raw: bytes) -> int:
    """Those that begin in these bytes: all but UTF-8's continuation bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)


def _begins_inside_a_character(raw: bytes) -> bool:
    return bool(raw) and raw[0] & 0xC0 == 0x80


def _is_at(token: str, text: str, position: int) -> bool:
    """False for what the text leaves out, such as the token that begins every sequence."""
    is_fragment = any("\udc80" <= character <= "\udcff" for character in token)
    return is_fragment or text.startswith(token, position)
