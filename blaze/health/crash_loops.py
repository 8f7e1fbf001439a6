"""Replicas that die by themselves, or cannot load, again and again: how long the next one waits, and what is
said of its model."""

from __future__ import annotations

from dataclasses import dataclass

from blaze.backoff import Backoff
from blaze.clock import Clock
from blaze.health.settings import HealthSettings
from blaze.health.slots import Pardon, Replicas, Slot
from blaze.reports import ReplicaState

_FIRST_S = 1.0
_MOST_S = 60.0
_MOST_AT_WORK_S = 5.0


@dataclass(slots=True)
class _Record:
    """Of one slot. ``at_work``: deaths with requests on them, which may have been the requests' fault."""

    idle: Backoff
    at_work: Backoff
    why: str = ""


class CrashLoops:
    """Serve brings a new replica at once, whatever became of the last one. So each waits before it loads, for
    longer and longer, from the second death in a row on.

    Whoever died with requests on it may have been killed by one of them: such a request is refused after two
    deaths, and must not keep a good model away. So these pauses stay short, and no model is failing for it.
    """

    def __init__(self, settings: HealthSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._records: dict[Slot, _Record] = {}
        self._pardon = Pardon(settings.forgive_after_s, clock)

    def died(self, slot: Slot, why: str, *, at_work: bool) -> None:
        record = self._records.get(slot)
        if record is None:
            record = self._records[slot] = _Record(self._backoff(_MOST_S), self._backoff(_MOST_AT_WORK_S))
        record.why = why
        self._pardon.hold(slot)
        backoff = record.at_work if at_work else record.idle
        backoff.attempt()
        if backoff.attempts > 1:
            backoff.pause()

    def wait_s(self, slot: Slot) -> float:
        """Until a replica of the slot should load."""
        record = self._records.get(slot)
        return 0.0 if record is None else max(record.idle.wait_s, record.at_work.wait_s)

    def failing(self, model: str) -> tuple[str, ...]:
        """Why, for each slot of the model that fails again and again."""
        return tuple(
            f"{record.idle.attempts} replicas in a row have died or could not load: {record.why}"
            for (of, _), record in self._records.items()
            if of == model and record.idle.is_exhausted
        )

    def look(self, replicas: Replicas, now: float) -> None:
        """A slot whose replica has been well for long begins anew."""
        for slot in self._pardon.due(replicas, lambda _, vitals: vitals.state(now) is ReplicaState.READY):
            del self._records[slot]

    def forget(self, model: str, first_rank: int) -> None:
        """The model's slots from this rank on are no more, or begin anew."""
        for slot in [slot for slot in self._records if slot[0] == model and slot[1] >= first_rank]:
            del self._records[slot]
            self._pardon.drop(slot)

    def _backoff(self, most_s: float) -> Backoff:
        bound = self._settings.max_restarts
        return Backoff(self._clock, first_s=_FIRST_S / 2, most_s=most_s, max_attempts=bound)
