"""From token ids to text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from blaze.engines.llm.detokenize import Decoder
from blaze.types import TokenId

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")  # of byte fallback


class TokenNames(Protocol):
    def name(self, token_id: TokenId) -> str:
        """The token's own text. Bytes that are no whole character are surrogate escapes (PEP 383)."""
        ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a choice needs to know of the tokenizer."""

    decoder: Decoder
    names: TokenNames
    eos_ids: frozenset[TokenId]


class TextDecoder:
    """Token ids to text without special tokens, exactly as they were written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._single = lru_cache(maxsize=1 << 16)(self._decode)

    def decode(self, token_ids: Sequence[TokenId]) -> str:
        return self._single(token_ids[0]) if len(token_ids) == 1 else self._decode(*token_ids)

    def _decode(self, *token_ids: TokenId) -> str:
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=True)
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What decodes in the end, where transformers adds nothing of its own: the way there takes longer."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    own = PreTrainedTokenizerFast
    if not issubclass(kind, own) or (kind.decode, kind._decode) != (own.decode, own._decode):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    return backend


class TokenizerNames:
    """Names from the tokenizer's own pieces: byte-level BPE, byte fallback, or plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._byte_level = _is_byte_level(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[TokenId, str] = {}

    def name(self, token_id: TokenId) -> str:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._name(token_id)
        return known

    def _name(self, token_id: TokenId) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id that pads the embedding: no token
            return ""
        if token_id in self._special or token_id in self._tokenizer.added_tokens_decoder:
            return str(piece)
        if self._byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece).decode("utf-8", "surrogateescape")
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1]).decode("utf-8", "surrogateescape")
        return str(piece).replace("\u2581", " ")


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()
