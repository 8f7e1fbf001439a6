"""One request on its way through the LLM engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from blaze.engines.channel import EventChannel
from blaze.engines.llm.choice import Choice
from blaze.errors import BlazeError, DeadlineExceeded
from blaze.types import ChoiceFinished, Event, Failed, Finished, Started, TokenId, Usage


@dataclass(eq=False)
class Job:
    prompt_ids: tuple[TokenId, ...]
    choices: tuple[Choice, ...]
    channel: EventChannel
    deadline: float | None
    variant: str = ""
    started: bool = field(default=False)
    over: bool = field(default=False)  # the terminal event is sent, or nobody waits for it

    def start(self) -> None:
        """Something of it is computed now."""
        if not self.started:
            self.started = True
            self.channel.put(Started(self.prompt_ids, self.variant))

    def fail(self, error: BlazeError) -> None:
        self.channel.put(Failed(error.info))
        self.over = True

    def give(self, events: tuple[Event, ...]) -> None:
        """Pass events on; after the last choice's end, the terminal event goes with them."""
        if isinstance(events[-1], ChoiceFinished) and all(choice.finish_reason for choice in self.choices):
            self.over = True
            events = (*events, Finished(self._usage()))
        self.channel.put(*events)

    def end_if_unwanted(self, now: float) -> None:
        """Its reader has left, or its time is up."""
        if self.channel.abandoned:
            self.over = True
        elif self.deadline is not None and now >= self.deadline:
            self.fail(DeadlineExceeded("The deadline passed before the answer was complete."))

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=sum(choice.num_generated for choice in self.choices),
            cached_tokens=self.choices[0].sequence.num_cached,
        )
