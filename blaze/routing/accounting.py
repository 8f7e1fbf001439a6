"""One Router's counters of one model: what `/metrics` and `status` are summed from."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from blaze.reports import TTFT_BUCKETS_S, ModelCounters
from blaze.routing.outcome import Outcome
from blaze.types import ReplicaId, Usage

_DEATHS = 64  # the last ones: the health actor asks about each within seconds


class ModelAccount:
    def __init__(self, model: str) -> None:
        self._model = model
        self._outcomes = dict.fromkeys(Outcome, 0)
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._images = 0
        self.resumed = 0  # answers that went on on another replica
        self._ttft_buckets = [0] * len(TTFT_BUCKETS_S)
        self._ttft_sum_s = 0.0
        self._died_at_work: deque[ReplicaId] = deque(maxlen=_DEATHS)

    def first_content(self, after_s: float) -> None:
        self._ttft_buckets[bisect_left(TTFT_BUCKETS_S, after_s)] += 1
        self._ttft_sum_s += after_s

    def outcome(self, outcome: Outcome) -> None:
        self._outcomes[outcome] += 1

    def finished(self, usage: Usage) -> None:
        self._prompt_tokens += usage.prompt_tokens
        self._completion_tokens += usage.completion_tokens
        self._images += usage.images

    def died_at_work(self, replica_id: ReplicaId) -> None:
        if replica_id not in self._died_at_work:
            self._died_at_work.append(replica_id)

    def counters(self, *, strategy: str, waiting: int) -> ModelCounters:
        return ModelCounters(
            model=self._model,
            strategy=strategy,
            waiting=waiting,
            outcomes=tuple((outcome.value, count) for outcome, count in self._outcomes.items()),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            images=self._images,
            resumed=self.resumed,
            ttft_buckets=tuple(self._ttft_buckets),
            ttft_sum_s=self._ttft_sum_s,
            died_at_work=tuple(self._died_at_work),
        )
