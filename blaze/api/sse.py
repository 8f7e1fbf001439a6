"""Server-sent events of an answer, and those of a text stream in OpenAI's framing.

Each event of a text is ``data: `` + one line of JSON + a blank line; ``[DONE]`` comes once and last. After an
error in mid-stream: the error as an event, then ``[DONE]``, and no finish reason.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

from blaze.api.logprobs import TextOffsets, chat_logprobs, completion_logprobs
from blaze.api.service import AnswerStream
from blaze.api.translate import error_object, usage_object
from blaze.errors import EngineFailure
from blaze.types import ChoiceFinished, Event, Failed, Finished, TextDelta

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"

_json = json.JSONEncoder().encode  # what json.dumps calls in the end


class EventWriter(Protocol):
    def write(self, event: Event) -> str:
        """The event as it goes over the wire; empty for what this stream does not show."""
        ...


class ChunkWriter:
    """Writes the chunks of one answer: all have the same id, time and model."""

    def __init__(
        self, kind: Literal["chat", "completion"], answer_id: str, model: str, created: int, *, usage: bool
    ) -> None:
        name = "chat.completion.chunk" if kind == "chat" else "text_completion"
        head = json.dumps({"id": answer_id, "object": name, "created": created, "model": model})
        self._head = f"data: {head[:-1]}, "
        # With usage asked for, OpenAI sends a null in every chunk but the last.
        self._tail = ', "usage": null}\n\n' if usage else "}\n\n"
        self._chat = kind == "chat"
        self._usage = usage
        self._begun: set[int] = set()
        self._offsets: defaultdict[int, TextOffsets] = defaultdict(TextOffsets)

    def write(self, event: Event) -> str:
        """The event as it goes over the wire; empty for what a text stream does not show."""
        if isinstance(event, TextDelta):
            return self._delta(event)
        if isinstance(event, ChoiceFinished):
            return self._role(event.index) + self._choice(event.index, "", event.reason)
        if isinstance(event, Finished):
            return (self._usage_chunk(event) if self._usage else "") + DONE
        if isinstance(event, Failed):
            return f"data: {json.dumps(error_object(event.error))}\n\n{DONE}"
        return ""

    def _delta(self, event: TextDelta) -> str:
        role = self._role(event.index)
        if event.logprobs:  # sent without text too: none may be lost
            return role + self._with_logprobs(event)
        return role + self._choice(event.index, event.text, None) if event.text else role

    def _role(self, index: int) -> str:
        """A chat's first chunk of each choice says who is speaking."""
        if not self._chat or index in self._begun:
            return ""
        self._begun.add(index)
        return self._chunk(
            f'{{"index": {index}, "delta": {{"role": "assistant", "content": ""}}, "finish_reason": null}}'
        )

    def _choice(self, index: int, text: str, reason: str | None) -> str:
        finish = "null" if reason is None else f'"{reason}"'
        content = _json(text)
        if not self._chat:
            return self._chunk(
                f'{{"index": {index}, "text": {content}, "logprobs": null, "finish_reason": {finish}}}'
            )
        delta = f'{{"content": {content}}}' if reason is None else "{}"
        return self._chunk(f'{{"index": {index}, "delta": {delta}, "finish_reason": {finish}}}')

    def _with_logprobs(self, event: TextDelta) -> str:
        scored: dict[str, Any] = {"index": event.index}
        if self._chat:
            scored |= {"delta": {"content": event.text}, "logprobs": chat_logprobs(event.logprobs or ())}
        else:
            logprobs = completion_logprobs((event,), self._offsets[event.index])
            scored |= {"text": event.text, "logprobs": logprobs}
        return self._chunk(_json(scored | {"finish_reason": None}))

    def _chunk(self, choice: str) -> str:
        return f'{self._head}"choices": [{choice}]{self._tail}'

    def _usage_chunk(self, event: Finished) -> str:
        return f'{self._head}"choices": [], "usage": {json.dumps(usage_object(event.usage))}}}\n\n'


async def sse(stream: AnswerStream, writer: EventWriter) -> AsyncIterator[tuple[str, bool]]:
    """The whole stream as (text, whether it is the last); the response that sends it also closes it."""
    try:
        async for events in stream:
            last = isinstance(events[-1], Finished | Failed)
            text = "".join(map(writer.write, events))
            if text or last:
                yield text, last
    except Exception:
        # The status line is long gone: the only place left for the error is the stream itself.
        logger.exception("a stream broke while it was written")
        yield writer.write(Failed(EngineFailure("The stream broke inside the router.").info)), True
