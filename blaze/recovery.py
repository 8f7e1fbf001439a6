"""When to build a failed engine again, and when to leave it: pure, with an injected clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from blaze.backoff import Backoff
from blaze.clock import Clock


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    threshold: int = 3  # failed checks in a row that make it lost; and good ones that clear its record
    max_attempts: int = 5  # 0: never
    backoff_s: float = 30.0  # after the first attempt; then twice as long each time
    max_backoff_s: float = 600.0


class Action(StrEnum):
    NONE = "none"
    REBUILD = "rebuild"
    GIVE_UP = "give_up"


class Recovery:
    """What to do about one engine, from what its checks have found."""

    def __init__(self, settings: RecoverySettings, clock: Clock) -> None:
        self._settings = settings
        self._backoff = Backoff(
            clock,
            first_s=settings.backoff_s,
            most_s=settings.max_backoff_s,
            max_attempts=settings.max_attempts,
        )
        self._good = 0  # checks in a row
        self.failed_checks = 0  # in a row
        self.given_up = False

    @property
    def attempts(self) -> int:
        """Since it was last well for long."""
        return self._backoff.attempts

    def well(self) -> None:
        """A check found it in order."""
        self.failed_checks = 0
        self.given_up = False
        self._good += 1
        if self._good >= self._settings.threshold:
            self._backoff.forget()

    def failed(self) -> Action:
        """A check found it failed, or not there. GIVE_UP comes once."""
        self._good = 0
        self.failed_checks += 1
        if self.failed_checks < self._settings.threshold or self.given_up:
            return Action.NONE
        if self._backoff.is_exhausted:
            self.given_up = True
            return Action.GIVE_UP
        if self._backoff.wait_s > 0:
            return Action.NONE
        self._backoff.attempt()
        return Action.REBUILD

    def rebuilt(self, *, successfully: bool) -> float:
        """An attempt has ended. Returns the seconds in which there will be no other."""
        if successfully:
            self.failed_checks = 0
        return self._backoff.pause()
