"""A prompt as a chain of hashes: prompts that begin alike have chains that begin alike.

Routers know text, engines know tokens. Both can hash the text: so an engine can say which beginnings it has
keys and values of, and a Router can look a prompt up among them without a tokenizer.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from typing import TypeAlias

from blaze.types import ChatPrompt, Prompt, TextPrompt

LINK_BYTES = 256  # of text for each hash: some 64 tokens
MOST_LINKS = 64

PromptChain: TypeAlias = tuple[int, ...]  # 32 bits each, of a link and all before it


def prompt_chain(prompt: Prompt) -> PromptChain:
    """Whole links only, and no more than ``MOST_LINKS``."""
    text = _bytes(prompt)
    running = hashlib.blake2b(digest_size=4)
    chain: list[int] = []
    for start in range(0, min(len(text), MOST_LINKS * LINK_BYTES) - LINK_BYTES + 1, LINK_BYTES):
        running.update(text[start : start + LINK_BYTES])
        chain.append(int.from_bytes(running.copy().digest(), "big"))
    return tuple(chain)


def packed(hashes: Iterable[int]) -> bytes:
    """For the way between processes."""
    return array("I", hashes).tobytes()


def unpacked(digest: bytes) -> array[int]:
    hashes = array("I")
    hashes.frombytes(digest)
    return hashes


def _bytes(prompt: Prompt) -> bytes:
    if isinstance(prompt, ChatPrompt):
        parts = [prompt.tools or ""]
        for message in prompt.messages:
            parts += (message.role, message.content or "", message.tool_calls or "")
        return "\0".join(parts).encode("utf-8", "surrogatepass")
    if isinstance(prompt, TextPrompt):
        return prompt.text.encode("utf-8", "surrogatepass")
    return array("q", prompt.token_ids).tobytes()
