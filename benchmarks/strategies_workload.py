"""What `strategies.py` asks of a pool, and what it counts: the same for the simulation and for real Serve."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from blaze.engine_config import SimulatorConfig

REPLICAS = 8
SLOW, SLOWDOWN = 3, 5.0  # the rank of the replica that is slow, and by how much
FAILING, FAIL_RATE = 6, 0.3
SLOTS = 4
CAP = 2 * SLOTS  # requests in flight per replica
SESSIONS = 1000  # for what goes by session: all are equally busy

Sizes: TypeAlias = tuple[tuple[int, float], ...]  # tokens, and the share of the requests that have so many


@dataclass(frozen=True)
class Workload:
    ttft_ms: float
    inter_token_ms: float
    tokens: Sizes  # of answers
    prompt_tokens: Sizes
    known: bool = True  # requests say in max_tokens how long their answers will be

    @property
    def engine(self) -> SimulatorConfig:
        return SimulatorConfig(
            ttft_ms=self.ttft_ms,
            inter_token_ms=self.inter_token_ms,
            tokens=max(tokens for tokens, _ in self.tokens),
            slots=SLOTS,
            slowdown={SLOW: SLOWDOWN},
            fail_rate={FAILING: FAIL_RATE},
        )

    @property
    def capacity_per_s(self) -> float:
        """Answers per second when all slots are busy.

        The slow replica counts as the fifth that it does, the failing one as the 70 % that it answers.
        """
        mean_service_s = sum(share * self.service_s(tokens) for tokens, share in self.tokens)
        return SLOTS * (REPLICAS - 2 + 1 / SLOWDOWN + 1 - FAIL_RATE) / mean_service_s

    def service_s(self, tokens: int) -> float:
        """For how long an answer holds a slot of a replica of usual speed."""
        return (self.ttft_ms + (tokens - 1) * self.inter_token_ms) / 1000

    def arrivals(self, load: float, seconds: float, seed: int) -> list[Arrival]:
        """An open loop: Poisson, ``load`` of the capacity, whatever becomes of the requests before."""
        rng = random.Random(f"{seed}/{load}")
        found: list[Arrival] = []
        rate, now = load * self.capacity_per_s, 0.0
        longest = max(tokens for tokens, _ in self.tokens)
        while (now := now + rng.expovariate(rate)) < seconds:
            tokens = _one_of(self.tokens, rng)
            session = f"session-{rng.randrange(SESSIONS)}"
            found.append(
                Arrival(
                    number=len(found),
                    at_s=now,
                    tokens=tokens,
                    max_tokens=tokens if self.known else longest,
                    prompt_tokens=_one_of(self.prompt_tokens, rng),
                    session=session,
                )
            )
        return found


SIMULATED = Workload(50.0, 20.0, ((32, 0.8), (512, 0.2)), ((50, 0.7), (400, 0.25), (2000, 0.05)))
# Long times between tokens, so that few events come of 32 busy slots: two cores carry them with ease.
SERVED = Workload(50.0, 60.0, ((6, 0.8), (60, 0.2)), ((10, 0.7), (40, 0.25), (200, 0.05)))


@dataclass(frozen=True)
class Arrival:
    number: int
    at_s: float
    tokens: int
    max_tokens: int
    prompt_tokens: int
    session: str

    @property
    def prompt(self) -> str:
        """Four bytes for each token; no two begin alike, so that no prefix is ever at hand."""
        return f"{self.number:08} ".ljust(4 * self.prompt_tokens, "x")


def _one_of(sizes: Sizes, rng: random.Random) -> int:
    values, shares = zip(*sizes, strict=True)
    chosen: int = rng.choices(values, shares)[0]
    return chosen


@dataclass
class Tally:
    """What became of the requests that came in the window, which begins after the warm-up."""

    begin_s: float
    end_s: float
    ttft_s: list[float] = field(default_factory=list)
    failures: int = 0
    finished: int = 0  # inside the window
    attempts: list[int] = field(default_factory=lambda: [0] * REPLICAS)  # by rank, of the whole run

    def ended(self, came_s: float, ttft_s: float | None, now_s: float) -> None:
        """``ttft_s``: None for a request that failed."""
        if not self.begin_s <= came_s < self.end_s:
            return
        if ttft_s is None:
            self.failures += 1
            return
        self.ttft_s.append(ttft_s)
        self.finished += now_s < self.end_s


@dataclass(frozen=True)
class Measured:
    name: str
    load: float
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    failures: int
    finished_per_s: float
    slow_share: float  # of all attempts
    failing_share: float
    rounds_p99_s: tuple[float, ...]

    @classmethod
    def of(cls, name: str, load: float, tallies: list[Tally]) -> Measured:
        """Quantiles are of the requests of all rounds together: those of one have too few for a p99."""
        ttft = [value for tally in tallies for value in tally.ttft_s]
        failures = sum(tally.failures for tally in tallies)
        attempts = [sum(ranks) for ranks in zip(*(tally.attempts for tally in tallies), strict=True)]
        return cls(
            name=name,
            load=load,
            requests=len(ttft) + failures,
            ttft_p50_s=statistics.median(ttft),
            ttft_p99_s=p99(ttft),
            failures=failures,
            finished_per_s=sum(tally.finished for tally in tallies)
            / sum(tally.end_s - tally.begin_s for tally in tallies),
            slow_share=attempts[SLOW] / max(1, sum(attempts)),
            failing_share=attempts[FAILING] / max(1, sum(attempts)),
            rounds_p99_s=tuple(p99(tally.ttft_s) for tally in tallies),
        )

    def row(self) -> dict[str, Any]:
        return dict(vars(self))


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]
