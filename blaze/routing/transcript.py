"""What of an answer has reached the router: enough to go on elsewhere without the reader noticing."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from blaze.types import (
    ChoiceFinished,
    Event,
    Events,
    Finished,
    GenerateRequest,
    ImageReady,
    ImageRequest,
    PartialImage,
    Progress,
    Request,
    Started,
    TextDelta,
    Usage,
)


class Transcript(Protocol):
    def take(self, events: Events) -> Events:
        """Those that the reader has not had yet; now it has."""
        ...

    def rest(self) -> Request | Finished:
        """The request for what is missing; where nothing is, the end of the answer."""
        ...

    @property
    def amounts(self) -> tuple[int, ...]:
        """How much of each part of the answer the reader has had. They only grow."""
        ...


def transcript_of(request: Request) -> Transcript:
    return TextTranscript(request) if isinstance(request, GenerateRequest) else ImageTranscript(request)


class TextTranscript:
    """The token ids of each choice. A replica that is given them goes on with the next one, and its text with
    the next character: what earlier tokens held back is rebuilt from the ids."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._generated = [list(ids) for ids in request.generated] or [[] for _ in range(request.sampling.n)]
        self._finished: set[int] = set()
        self._echoed: set[int] = set()
        self._started: Started | None = None
        self._resumed = False

    def take(self, events: Events) -> Events:
        if self._resumed:
            events = tuple(event for event in events if not self._is_known(event))
        for event in events:
            if isinstance(event, TextDelta):
                if event.echo:
                    self._echoed.add(event.index)
                else:
                    self._generated[event.index].extend(event.token_ids)
            elif isinstance(event, ChoiceFinished):
                self._finished.add(event.index)
            elif isinstance(event, Started):
                self._started = event
        return events

    def rest(self) -> GenerateRequest | Finished:
        self._resumed = True
        started = self._started or Started()
        if len(self._finished) == len(self._generated):
            return Finished(Usage(len(started.prompt_token_ids), sum(map(len, self._generated))))
        return replace(self._request, generated=tuple(map(tuple, self._generated)), variant=started.variant)

    @property
    def amounts(self) -> tuple[int, ...]:
        """Tokens of each choice."""
        return tuple(map(len, self._generated))

    def _is_known(self, event: Event) -> bool:
        if isinstance(event, Started):
            return self._started is not None
        if isinstance(event, ChoiceFinished):
            return event.index in self._finished
        return isinstance(event, TextDelta) and event.echo and event.index in self._echoed


class ImageTranscript:
    """A lost image is drawn again from the start, by the same seed: what came of it before comes again."""

    def __init__(self, request: ImageRequest) -> None:
        self._request = request
        self._started = False
        self._steps = 0
        self._ready: set[int] = set()
        self._previews: set[tuple[int, int]] = set()

    def take(self, events: Events) -> Events:
        return tuple(event for event in events if self._is_new(event))

    def rest(self) -> ImageRequest | Finished:
        if len(self._ready) == self._request.n:
            return Finished(Usage(images=self._request.n))
        return self._request

    @property
    def amounts(self) -> tuple[int, ...]:
        return self._steps, len(self._previews), len(self._ready)

    def _is_new(self, event: Event) -> bool:
        if isinstance(event, Started):
            known_before, self._started = self._started, True
            return not known_before
        if isinstance(event, Progress):
            is_further = event.step > self._steps
            self._steps = max(self._steps, event.step)
            return is_further
        if isinstance(event, PartialImage):
            is_new = (event.index, event.number) not in self._previews
            self._previews.add((event.index, event.number))
            return is_new
        if isinstance(event, ImageReady):
            is_new = event.index not in self._ready
            self._ready.add(event.index)
            return is_new
        return True
