"""What a simulator has to answer, worked out without it: a pure function of its options and the request."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blaze.engine_config import SimulatorConfig
from blaze.types import ChatMessage, ChatPrompt, TextPrompt

WORDS = ("blaze", "keeps", "every", "stream", "alive", "while", "replicas", "come", "and", "go")


@dataclass(frozen=True)
class Expected:
    texts: Mapping[int, str]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def simulated(options: SimulatorConfig, body: Mapping[str, Any]) -> Expected:
    """``body``: of a chat of one message, or of a completion; with its seed and ``max_tokens``."""
    if "messages" in body:
        text = body["messages"][0]["content"]
        prompt: ChatPrompt | TextPrompt = ChatPrompt((ChatMessage("user", text),))
    else:
        text = body["prompt"]
        prompt = TextPrompt(text)
    key = f"{options.seed}/{body['seed']}/{prompt!r}"
    rng = random.Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))
    n, count = body.get("n", 1), min(body["max_tokens"], options.tokens)
    texts = dict.fromkeys(range(n), "")
    for _ in range(count):
        rng.random()  # the jitter of the wait before the token
        for index in range(n):
            texts[index] += WORDS[rng.randrange(len(WORDS))] + " "
    return Expected(
        texts=texts,
        finish_reason="length" if body["max_tokens"] <= options.tokens else "stop",
        prompt_tokens=max(1, len(text.encode()) // 4),
        completion_tokens=count * n,
    )
