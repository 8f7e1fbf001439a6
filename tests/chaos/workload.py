"""Requests of many kinds, drawn from a seed, and what is wrong with an answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from tests.chaos.expected import Expected
from tests.streams import Answer

Expect: TypeAlias = Callable[[Mapping[str, Any]], Expected]

_USAGE = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Asked:
    path: str
    body: Mapping[str, Any]
    leave_after_s: float | None = None


def draw_request(rng: random.Random, model: str, *, tokens: int) -> Asked:
    """For a simulator that makes up to ``tokens``: some answers end by themselves, some are cut."""
    content = f"Tell story {rng.randrange(1000)}, " + "once more, " * rng.randrange(20)
    common = {"model": model, "seed": rng.randrange(2**31), "max_tokens": rng.randrange(1, tokens + 10)}
    chat = {**common, "messages": [{"role": "user", "content": content}]}
    kind = rng.random()
    if kind < 0.15:
        return Asked("/v1/chat/completions", chat)
    if kind < 0.30:
        return Asked("/v1/completions", {**common, "prompt": content, "stream": True, **_USAGE})
    if kind < 0.40:
        return Asked("/v1/chat/completions", {**chat, "n": 2, "stream": True, **_USAGE})
    leave_after_s = rng.uniform(0.0, 1.0) if kind < 0.47 else None
    return Asked("/v1/chat/completions", {**chat, "stream": True, **_USAGE}, leave_after_s)


def what_is_wrong(answer: Answer, expected: Expected) -> str | None:
    """Of an answer that is not lost; of one that the client left, as far as it has read."""
    if len(answer.ids) > 1:
        return f"{len(answer.ids)} ids"
    more = (answer.texts.keys() | answer.finish_reasons.keys()) - expected.texts.keys()
    if more:
        return f"choices {sorted(more)}, which nobody asked for"
    if answer.left:
        cut = [i for i, text in answer.texts.items() if not expected.texts[i].startswith(text)]
        return f"text of choices {cut}" if cut else None
    for index, text in expected.texts.items():
        found = answer.texts.get(index, "")
        if found != text:
            return f"text of choice {index}: {_difference(found, text)}"
        if answer.finish_reasons.get(index) != expected.finish_reason:
            return f"finish_reason of choice {index}: {answer.finish_reasons.get(index)}"
    prompt, completion = expected.prompt_tokens, expected.completion_tokens
    return None if answer.tokens == (prompt, completion, prompt + completion) else f"usage: {answer.usage}"


def _difference(found: str, expected: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    at = min(len(found), len(expected)) if same is None else same
    return f"at {at} of {len(expected)}: {found[at : at + 40]!r}, not {expected[at : at + 40]!r}"
