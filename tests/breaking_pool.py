"""Replicas that answer truly, one token a batch, and break where they are told to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from blaze.errors import BlazeError, OtherVariant
from blaze.types import (
    ChoiceFinished,
    Event,
    Events,
    Finished,
    GenerateRequest,
    ReplicaId,
    Request,
    Started,
    TextDelta,
    Usage,
)
from tests.fakes import FakeCall, FakePool, Script
from tests.samples import text_request

PROMPT = (1, 2, 3)


def whole(request: GenerateRequest, lengths: Sequence[int], *, variant: str = "v") -> list[Events]:
    """What an engine says that is asked for choices of such lengths: a batch for each token."""
    generated = request.generated or tuple(() for _ in lengths)
    batches: list[Events] = [(Started(PROMPT, variant),)]
    done = [ChoiceFinished(i, "stop") for i, n in enumerate(lengths) if len(generated[i]) == n]
    if done:
        batches.append(tuple(done))
    for position in range(max(lengths)):
        events: list[Event] = []
        for index, length in enumerate(lengths):
            if len(generated[index]) <= position < length:
                events.append(TextDelta(index, f"{index}.{position} ", (100 * index + position,)))
                if position == length - 1:
                    events.append(ChoiceFinished(index, "stop"))
        if events:
            batches.append(tuple(events))
    batches[-1] = (*batches[-1], Finished(Usage(len(PROMPT), sum(lengths))))
    return batches


@dataclass
class BreakingPool(FakePool):
    """Its replicas answer truly, and break where they are told to."""

    lengths: Sequence[int] = (4,)
    breaks: list[tuple[int, BlazeError]] = field(default_factory=list)  # after so many batches
    variants: dict[ReplicaId, str] = field(default_factory=dict)

    def call(self, replica_id: ReplicaId, request: Request) -> FakeCall:
        assert isinstance(request, GenerateRequest)
        variant = self.variants.get(replica_id, "v")
        script: Script = [*whole(request, self.lengths, variant=variant)]
        if request.variant not in ("", variant):
            script = [OtherVariant("another one")]
        elif self.breaks:
            after, error = self.breaks.pop(0)
            script = [*script[:after], error]
        call = FakeCall(script, held=self.held)
        self.calls.append((replica_id, request))
        self.open_calls.append(call)
        return call


def flat(batches: Sequence[Events]) -> list[Event]:
    return [event for batch in batches for event in batch]


def asked(n: int = 1) -> GenerateRequest:
    request = text_request(n=n, temperature=0.0)
    assert isinstance(request, GenerateRequest)
    return request
