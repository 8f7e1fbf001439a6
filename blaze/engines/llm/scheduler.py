"""What the next step computes: iteration-level scheduling, without a tensor in sight.

There is one rule: each step, the computed tokens of a sequence catch up with its tokens. A decode is one
token behind, a prompt many (taken in chunks), a prefix hit starts ahead, and what comes back after a
preemption or from another replica is behind by all it has. (Orca, OSDI 2022; chunked prefill after
Sarathi-Serve, OSDI 2024.)
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import filterfalse, islice

from blaze.engines.llm.kv_cache import KVCache, SlotCopy
from blaze.engines.llm.sequence import Rank, Sequence

_MANY = 12  # sequences: with more of them a step takes long anyway, and prompts may take as much longer


@dataclass(frozen=True, slots=True)
class Work:
    """Compute ``count`` tokens of the sequence, from ``start`` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def yields_token(self) -> bool:
        return self.end == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class Step:
    """First the copies, in their order; then the work, all of it at once."""

    copies: tuple[SlotCopy, ...]
    work: tuple[Work, ...]


def rank(arrival_s: float, priority: int, serial: int, index: int, *, aging_s: float) -> Rank:
    """Lower priority numbers first, then first come, first served.

    A level of priority is worth ``aging_s`` of waiting: whoever waits long enough gets past any number of
    later arrivals, so that nobody starves. The rank never changes.
    """
    return (arrival_s + priority * aging_s, serial, index)


class Scheduler:
    """At most ``max_batch_size`` sequences run, at most ``max_batch_tokens`` tokens are computed a step.

    ``prefill_chunk``: of them, those of prompts while other sequences generate, which wait for it. More in
    proportion where more sequences wait for their first token than for their next, or where many generate.
    """

    def __init__(
        self, cache: KVCache, *, max_batch_size: int, max_batch_tokens: int, prefill_chunk: int | None = None
    ) -> None:
        self._cache = cache
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk = max_batch_tokens if prefill_chunk is None else prefill_chunk
        self._waiting: list[Sequence] = []  # both by rank
        self._running: list[Sequence] = []
        self.preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        assert len(sequence.token_ids) <= self._cache.longest, "it would wait for ever"
        insort(self._waiting, sequence, key=_by_rank)

    def remove(self, sequence: Sequence, *, keep: bool = True) -> None:
        """It is over. ``keep``: what was computed is sound, and may serve others as a prefix."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._cache.end(sequence, keep=keep)

    def schedule(self) -> Step:
        """The next step; without work when nothing is left to do."""
        # Whoever is one token behind comes first: a decode must not wait for somebody's long prompt.
        work: dict[Sequence, Work] = {}
        budget = self._max_batch_tokens
        preemptions = self.preemptions
        for decoding in (True, False):
            for sequence in list(self._running):
                if sequence.slot is None or (sequence.num_pending == 1) is not decoding or budget == 0:
                    continue
                count = min(sequence.num_pending, budget)
                if self._make_room(sequence, sequence.num_computed + count, work):
                    work[sequence] = Work(sequence, sequence.num_computed, count)
                    budget -= count
            if decoding:
                budget = min(budget, self._prefill_limit(len(work)))
        if self.preemptions > preemptions and work:  # memory is short: what was just taken is not given away
            budget = 0
        for sequence in self._admitted(budget):
            count = min(sequence.num_pending, budget)
            work[sequence] = Work(sequence, sequence.num_computed, count)
            budget -= count
            if budget == 0:
                break
        # Without work, copies wait for the next step that has some: an idle engine need not look for them.
        return Step(self._cache.take_copies() if work else (), tuple(work.values()))

    def _prefill_limit(self, generating: int) -> int:
        """Tokens of prompts in this step, beside so many sequences that wait for their next token."""
        if generating == 0:
            return self._max_batch_tokens
        beginning = sum(sequence.num_pending > 1 for sequence in self._running)
        places = self._max_batch_size - len(self._running)
        beginning += sum(1 for _ in islice(filterfalse(_has_to_wait_for_leader, self._waiting), places))
        by_those_who_wait = self._prefill_chunk * beginning // generating
        by_those_who_generate = self._prefill_chunk * generating // _MANY
        return max(self._prefill_chunk, by_those_who_wait, by_those_who_generate)

    def computed(self, step: Step) -> None:
        """The step has been carried out."""
        for work in step.work:
            if work.sequence.slot is not None:  # it may have left in the meantime
                work.sequence.num_computed = work.end
                self._cache.computed(work.sequence)

    def _admitted(self, budget: int) -> Iterable[Sequence]:
        """Sequences that start to run now, as long as the caller asks for more."""
        if budget == 0:
            return
        for sequence in list(self._waiting):
            if len(self._running) >= self._max_batch_size:
                return
            if _better_later(sequence):
                continue
            if not self._cache.begin(sequence):
                return  # nobody overtakes: or a long prompt would wait for ever
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=_by_rank)
            yield sequence

    def _make_room(self, sequence: Sequence, length: int, work: dict[Sequence, Work]) -> bool:
        """Memory for ``length`` tokens, taken from whoever ranks last. False: that was itself."""
        while not self._cache.reserve(sequence, length):
            last = self._running[-1]
            work.pop(last, None)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Its memory goes to others; it comes back later and computes its tokens again."""
        self.preemptions += 1
        self._running.remove(sequence)
        self._cache.end(sequence, keep=False)
        insort(self._waiting, sequence, key=_by_rank)


def _better_later(sequence: Sequence) -> bool:
    """Its prompt is just being computed for another choice: soon it can be shared."""
    leader = sequence.leader
    return leader is not None and leader.slot is not None and leader.num_computed < leader.prompt_len


def _has_to_wait_for_leader(sequence: Sequence) -> bool:
    """Its prompt is still to be computed, and for another choice."""
    return sequence.leader is not None and sequence.leader.num_generated == 0


def _by_rank(sequence: Sequence) -> Rank:
    return sequence.rank
