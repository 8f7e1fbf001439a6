"""One choice of one request while it is generated: ids, text, and when it ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from blaze.engines.llm.detokenize import Decoder, IncrementalDetokenizer
from blaze.engines.llm.stopping import StopStrings
from blaze.types import ChoiceFinished, Event, FinishReason, SamplingParams, TextDelta


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a sequence needs to know of the tokenizer."""

    decoder: Decoder
    eos_ids: frozenset[int]


class Sequence:
    def __init__(
        self,
        index: int,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        max_tokens: int,
        vocabulary: Vocabulary,
    ) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.num_generated = 0
        self.finish_reason: FinishReason | None = None
        self._max_tokens = max_tokens
        self._eos_ids: Collection[int] = () if sampling.ignore_eos else vocabulary.eos_ids
        self._detokenizer = IncrementalDetokenizer(vocabulary.decoder)
        self._stops = StopStrings(sampling.stop)

    def append(self, token_id: int) -> tuple[Event, ...]:
        """Take the next token in; the events that it causes, ``ChoiceFinished`` last when it ends here."""
        self.num_generated += 1
        if token_id in self._eos_ids:
            return self._finish("stop", self._rest(), token_id)
        result = self._stops.feed(self._detokenizer.feed(token_id))
        if result.stopped:
            return self._finish("stop", result.text, token_id)
        if self.num_generated >= self._max_tokens:
            return self._finish("length", result.text + self._rest(), token_id)
        return (TextDelta(self.index, result.text, (token_id,)),)

    def _rest(self) -> str:
        tail = self._stops.feed(self._detokenizer.flush())
        return tail.text if tail.stopped else tail.text + self._stops.flush()

    def _finish(self, reason: FinishReason, text: str, token_id: int) -> tuple[Event, ...]:
        self.finish_reason = reason
        return TextDelta(self.index, text, (token_id,)), ChoiceFinished(self.index, reason)
