"""Places of replicas: in each of them one comes after the other, and what is held against a place ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from blaze.clock import Clock
from blaze.health.conditions import DeploymentFacts
from blaze.health.vitals import Vitals
from blaze.reports import Heartbeat
from blaze.types import ReplicaId

Replicas: TypeAlias = Mapping[ReplicaId, Vitals]
Slot: TypeAlias = tuple[str, int]  # a place of a model, by rank


def slot_of(heartbeat: Heartbeat) -> Slot:
    return heartbeat.model, heartbeat.rank


class Vacancies:
    """Places that are no more. Ranks have no gaps, so a deployment that is as large as it should be has none
    beyond its size. One that is not is believed when its size has not changed for long: between a death and
    the next replica it is smaller for a moment."""

    def __init__(self, after_s: float, clock: Clock) -> None:
        self._after_s = after_s
        self._clock = clock
        self._known: dict[str, tuple[DeploymentFacts, float]] = {}  # by model; of that size since when

    def learn(self, facts: Mapping[str, DeploymentFacts]) -> Iterator[tuple[str, int]]:
        """Models, and the rank from which on nothing is left of them. A new version begins anew in all."""
        now = self._clock.now()
        for model, found in facts.items():
            before, since = self._known.get(model, (found, now))
            if before.replicas != found.replicas:
                since = now
            self._known[model] = found, since
            if found.status == "UPDATING" != before.status:  # nothing but a new config leads there
                yield model, 0
            elif found.status == "HEALTHY" or now - since >= self._after_s:
                yield model, found.replicas
