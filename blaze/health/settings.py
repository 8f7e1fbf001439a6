"""What the health actor is told."""

from __future__ import annotations

from dataclasses import dataclass

_PATIENCE = 10  # times stall_after_s
_LEAST_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class HealthSettings:
    probe_period_s: float = 1.0
    missed_probes: int = 3  # in a row: suspect
    stall_after_s: float = 30.0  # silent for this long, or busy without progress: unhealthy
    grace_s: float = 1.0  # between verdict and restart: Routers hear of it, and streams go on elsewhere
    replacement_s: float = 60.0  # how long a model's next restart waits for the last one's replacement
    max_restarts: int = 6  # of a replica slot that is unhealthy again and again
    backoff_s: float = 5.0  # after the first of them; then twice as long each time
    max_backoff_s: float = 300.0
    forgive_after_s: float = 120.0  # of health, after which restarts are counted from the beginning

    @property
    def suspect_after_s(self) -> float:
        return self.missed_probes * self.probe_period_s

    @property
    def patience_s(self) -> float:
        """For a step that computes, and for a load that holds the interpreter: how long they take is the
        model's doing, however soon a stall should be found."""
        return max(_LEAST_PATIENCE_S, _PATIENCE * self.stall_after_s)

    @property
    def absent_after_s(self) -> float:
        """So long without a sign of its own life, and the health actor was itself away."""
        return self.suspect_after_s / 2
