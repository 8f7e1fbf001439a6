"""Requests for images, and when they come: the same for every contestant of a turn."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

GUIDANCES = (2.0, 4.0, 7.0)
COLOURS = ("red", "blue", "green", "white")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Wanted:
    """``at_s``: seconds from the beginning of the turn."""

    at_s: float
    prompt: str
    steps: int
    guidance: float
    seed: int

    @classmethod
    def all_of(cls, command: dict[str, Any]) -> list[Self]:
        return [cls(**fields) for fields in command["requests"]]


@dataclass(frozen=True)
class Served:
    """What became of a turn: for each request, seconds from its coming to its encoded image."""

    latencies_s: list[float]
    seconds: float  # from the first request's coming to the last image

    @classmethod
    def of(cls, requests: list[Wanted], ended_s: list[float]) -> Self:
        latencies = [end - request.at_s for request, end in zip(requests, ended_s, strict=True)]
        return cls(latencies, max(ended_s) - min(request.at_s for request in requests))

    @property
    def per_second(self) -> float:
        return len(self.latencies_s) / self.seconds

    @property
    def mean_s(self) -> float:
        return statistics.mean(self.latencies_s)


def command(requests: list[Wanted]) -> dict[str, Any]:
    return {"requests": [asdict(request) for request in requests]}


def mixed(count: int, steps: range, per_second: float, seed: int) -> list[Wanted]:
    """Poisson arrivals. Every number of steps comes equally often, as far as that is possible."""
    rng = random.Random(seed)
    numbers = list(itertools.islice(itertools.cycle(steps), count))
    rng.shuffle(numbers)
    at_s = 0.0
    found = []
    for number, prompt in zip(numbers, _prompts(rng), strict=False):
        found.append(Wanted(at_s, prompt, number, rng.choice(GUIDANCES), rng.randrange(2**31)))
        at_s += rng.expovariate(per_second)
    return found


def alike(count: int, steps: int, seed: int) -> list[Wanted]:
    """All at once, and the same but for prompt and seed."""
    rng = random.Random(seed)
    prompts = itertools.islice(_prompts(rng), count)
    return [Wanted(0.0, prompt, steps, GUIDANCES[1], rng.randrange(2**31)) for prompt in prompts]


def _prompts(rng: random.Random) -> Iterator[str]:
    while True:
        yield f"a {rng.choice(COLOURS)} {rng.choice(DIGITS)} on black"
