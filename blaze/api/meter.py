"""How many tokens one prompt and its answer have used, as far as the answer's events tell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from blaze.routing.cost import prompt_tokens
from blaze.types import Events, Finished, GenerateRequest, Request, Started, TextDelta


@dataclass(slots=True)
class Meter:
    """Tokens of the prompt and of all choices; images have none."""

    prompt_tokens: int
    output_tokens: int = 0

    @classmethod
    def of(cls, request: Request) -> Self:
        """Before there is an answer: an estimate of the prompt, from its bytes where it has no token ids."""
        if isinstance(request, GenerateRequest):
            return cls(math.ceil(prompt_tokens(request.prompt)))
        return cls(0)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def count(self, events: Events) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                self.output_tokens += 0 if event.echo else len(event.token_ids)
            elif isinstance(event, Started) and event.prompt_token_ids:
                self.prompt_tokens = len(event.prompt_token_ids)
            elif isinstance(event, Finished):
                self.prompt_tokens = event.usage.prompt_tokens
                self.output_tokens = event.usage.completion_tokens
