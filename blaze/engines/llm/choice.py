"""One choice of one request as its reader sees it: text, log probabilities, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from blaze.engines.llm.detokenize import IncrementalDetokenizer
from blaze.engines.llm.sampling import SampledToken, SamplingRow, TokenHistory, needs_history
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.stopping import StopStrings
from blaze.engines.llm.vocabulary import TokenNames, Vocabulary
from blaze.sampling_params import SamplingParams
from blaze.types import (
    ChoiceFinished,
    Event,
    FinishReason,
    TextDelta,
    TokenId,
    TokenLogprob,
    TopLogprob,
)


@dataclass(frozen=True, slots=True)
class _Text:
    text: str
    reason: FinishReason | None = None


class Choice:
    """Takes the tokens of ``sequence`` as they are drawn and makes events of them."""

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        sampling: SamplingParams,
        max_tokens: int,
        vocabulary: Vocabulary,
    ) -> None:
        self.index = index
        self.sequence = sequence
        self.sampling = sampling
        self.finish_reason: FinishReason | None = None
        self.num_generated = sequence.num_generated
        self._max_tokens = max_tokens
        self.names = vocabulary.names
        eos_ids = frozenset() if sampling.ignore_eos else vocabulary.eos_ids
        self._end_ids = eos_ids | set(sampling.stop_token_ids)
        self._detokenizer = IncrementalDetokenizer(vocabulary.decoder)
        self._stops = StopStrings(sampling.stop)
        prompt = sequence.token_ids[: sequence.prompt_len]
        generated = sequence.token_ids[sequence.prompt_len :]
        self._history = TokenHistory(prompt, generated) if needs_history(sampling) else None
        self.prompt_logprobs: dict[int, TokenLogprob] = {}  # by position, when they were asked for
        self._echoed = not sampling.echo or bool(generated)
        self._replay(generated)

    def _replay(self, generated: Tokens[TokenId]) -> None:
        """Tokens from before: what they were as text has been sent, and only the state is left to rebuild."""
        for position, token in enumerate(generated, start=1):
            if self.finish_reason is None:
                self.finish_reason = self._take(token, position).reason

    def row(self) -> SamplingRow:
        return SamplingRow(
            params=self.sampling,
            choice=self.index,
            position=self.num_generated,
            history=self._history,
            end_ids=self._end_ids,
        )

    def append(self, sampled: SampledToken) -> tuple[Event, ...]:
        """Take the next token in; the events that it causes, ``ChoiceFinished`` last when it ends here."""
        before = self._echo()
        if self._max_tokens == 0:  # only the prompt was asked for
            return (*before, self._finish("length"))
        token = sampled.token_id
        self.num_generated += 1
        if self._history is not None:
            self._history.append(token)
        taken = self._take(token, self.num_generated)
        delta = TextDelta(self.index, taken.text, (token,), self._logprobs(sampled))
        if taken.reason is None:
            return (*before, delta)
        return (*before, delta, self._finish(taken.reason))

    def _take(self, token: TokenId, position: int) -> _Text:
        if token in self._end_ids and position > self.sampling.min_tokens:
            return _Text(self._rest(), "stop")
        text = self._detokenizer.feed(token)
        if position < self.sampling.min_tokens:  # a stop string is text like any other
            return _Text(text)
        fed = self._stops.feed(text)
        if fed.stopped:
            return _Text(fed.text, "stop")
        if position >= self._max_tokens:
            return _Text(fed.text + self._rest(), "length")
        return _Text(fed.text)

    def _rest(self) -> str:
        tail = self._stops.feed(self._detokenizer.flush())
        return tail.text if tail.stopped else tail.text + self._stops.flush()

    def _finish(self, reason: FinishReason) -> ChoiceFinished:
        self.finish_reason = reason
        return ChoiceFinished(self.index, reason)

    def _logprobs(self, sampled: SampledToken) -> tuple[TokenLogprob, ...] | None:
        return None if self.sampling.logprobs is None else (named(sampled, self.names),)

    def _echo(self) -> tuple[TextDelta, ...]:
        """The prompt, before the first token of the output."""
        if self._echoed:
            return ()
        self._echoed = True
        ids = tuple(self.sequence.token_ids[: self.sequence.prompt_len])
        logprobs = None
        if self.sampling.logprobs is not None:
            first = TokenLogprob(self.names.name(ids[0]), ids[0], None)
            logprobs = (first, *(self.prompt_logprobs[position] for position in range(1, len(ids))))
        return (TextDelta(self.index, self._detokenizer.decoder.decode(ids), ids, logprobs, echo=True),)


def named(sampled: SampledToken, names: TokenNames) -> TokenLogprob:
    top = tuple(TopLogprob(names.name(token), token, logprob) for token, logprob in sampled.top)
    return TokenLogprob(names.name(sampled.token_id), sampled.token_id, sampled.logprob, top)
