"""Whole answers, collected from events."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from blaze.errors import EngineFailure, ErrorInfo, RemoteError
from blaze.types import (
    ChoiceFinished,
    Event,
    Events,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    ImageReady,
    Request,
    TextDelta,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Generation:
    """A complete answer; all but ``usage`` have one entry a choice.

    ``logprobs`` are empty unless asked for. With ``echo``, texts, ids and logprobs begin with the prompt's.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    usage: Usage
    logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()

    @property
    def text(self) -> str:
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class Images:
    """All images of a request, by index."""

    images: tuple[ImageReady, ...]
    usage: Usage


Answer: TypeAlias = Generation | Images


@dataclass(frozen=True, slots=True)
class Batch:
    """The answers to several requests, in their order; where there is none, what kept it away."""

    answers: tuple[Answer | ErrorInfo, ...]

    @property
    def errors(self) -> tuple[ErrorInfo, ...]:
        return tuple(answer for answer in self.answers if isinstance(answer, ErrorInfo))


Result: TypeAlias = Answer | Batch


def as_generation(events: Iterable[Event]) -> Generation:
    texts: dict[int, list[str]] = {}
    token_ids: dict[int, list[int]] = {}
    logprobs: dict[int, list[TokenLogprob]] = {}
    reasons: dict[int, FinishReason] = {}
    usage = Usage()
    for event in events:
        if isinstance(event, TextDelta):
            texts.setdefault(event.index, []).append(event.text)
            token_ids.setdefault(event.index, []).extend(event.token_ids)
            logprobs.setdefault(event.index, []).extend(event.logprobs or ())
        elif isinstance(event, ChoiceFinished):
            reasons[event.index] = event.reason
        elif isinstance(event, Finished):
            usage = event.usage
    return Generation(
        texts=tuple("".join(texts.get(index, ())) for index in sorted(reasons)),
        token_ids=tuple(tuple(token_ids.get(index, ())) for index in sorted(reasons)),
        finish_reasons=tuple(reasons[index] for index in sorted(reasons)),
        usage=usage,
        logprobs=tuple(tuple(logprobs.get(index, ())) for index in sorted(reasons)),
    )


def as_images(events: Iterable[Event]) -> Images:
    ready: list[ImageReady] = []
    usage = Usage()
    for event in events:
        if isinstance(event, ImageReady):
            ready.append(event)
        elif isinstance(event, Finished):
            usage = event.usage
    return Images(tuple(sorted(ready, key=lambda image: image.index)), usage)


async def whole(request: Request, batches: AsyncIterable[Events]) -> Answer:
    """Read an answer to its end. Raises :class:`RemoteError` with the error that it ends with."""
    events = [event async for batch in batches for event in batch]
    last = events[-1] if events else None
    if isinstance(last, Failed):
        raise RemoteError(last.error)
    if not isinstance(last, Finished):
        raise EngineFailure("The engine ended its answer without a result.")
    return as_generation(events) if isinstance(request, GenerateRequest) else as_images(events)
