"""Places of replicas: in each of them one comes after the other, and what is held against a place ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


class Pardon:
    """What is held against a slot is forgiven when whoever is in it has been well for long since.

    Two may be in one for a while: a rolling update starts the next replica before the last one goes, and
    Serve closes gaps between ranks when it has become healthy. So health is each replica's own.
    """

    def __init__(self, after_s: float, clock: Clock) -> None:
        self._after_s = after_s
        self._clock = clock
        self._held: dict[Slot, float] = {}  # something is; the last of it, when
        self._well_since: dict[ReplicaId, float] = {}

    def hold(self, slot: Slot) -> None:
        """Something is held against it, from now on."""
        self._held[slot] = self._clock.now()

    def drop(self, slot: Slot) -> None:
        self._held.pop(slot, None)

    def due(self, replicas: Replicas, is_well: Callable[[ReplicaId, Vitals], bool]) -> list[Slot]:
        """To be asked at every look at the replicas. Slots that are forgiven now."""
        now = self._clock.now()
        well = [replica_id for replica_id, vitals in replicas.items() if is_well(replica_id, vitals)]
        self._well_since = {replica_id: self._well_since.get(replica_id, now) for replica_id in well}
        calm: dict[Slot, float] = {}
        for replica_id, vitals in replicas.items():
            slot = slot_of(vitals.heartbeat)
            if slot in self._held:
                since = self._well_since.get(replica_id, now)
                calm[slot] = max(since, calm.get(slot, self._held[slot]))
        forgiven = [slot for slot, since in calm.items() if now - since >= self._after_s]
        for slot in forgiven:
            self.drop(slot)
        return forgiven


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
