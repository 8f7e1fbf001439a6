"""What one replica's heartbeats say of it over time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from blaze.health.settings import HealthSettings
from blaze.reports import EngineStatus, Heartbeat, ReplicaState

GOOD_HEARTBEATS = 2  # in a row, and who was silent is well again
_BUSY_SHARE = 0.05  # of a processor: a busy thread on a machine that has twenty times too much to do
_LEAST_CPU_S = 0.005  # what waking up from time to time costs a thread that waits


class AilmentKind(StrEnum):
    FAILED = "failed"
    SILENT = "silent"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class Ailment:
    """Why a replica has to be restarted."""

    kind: AilmentKind
    reason: str


class Vitals:
    """One replica's signs of life, and of progress.

    Engines count steps, but a step may be long: a large prefill, a denoiser's step of 30 s, the decoding of a
    large picture. So the processor time of the compute thread counts as progress, too, and that of the
    threads that encode images for it, for it may have nothing to do meanwhile. It is theirs alone and not the
    process's: an event loop and Ray's own threads use a few percent in a process whose compute thread waits
    for a lock for ever, while a thread that leads OpenMP workers computes as much as they do. Because a
    thread can also compute for ever, it has to make a step after all within ``patience_s``. Steps are not
    asked of a model that loads, for it serves nobody yet; and a load may hold the interpreter, so it may be
    silent for as long.

    All of it is judged by heartbeats alone: what a replica did after the last one is not known.
    """

    def __init__(self, heartbeat: Heartbeat, now: float, settings: HealthSettings) -> None:
        self._settings = settings
        self.heartbeat = heartbeat
        self.heard_at = now
        self._loading_since = now  # if it does
        self._good_again: int | None = None  # heartbeats in a row since it was silent
        # Of the time in which it had work: since its last step, and since it last computed, too. That the
        # work has gone is no sign of health: it was moved elsewhere because of this, or its clients gave up.
        self._without_step_s = 0.0
        self._without_progress_s = 0.0

    def hear(self, heartbeat: Heartbeat, now: float) -> None:
        before, engine = self.heartbeat.engine, heartbeat.engine
        if self.is_silent(now):
            self._good_again = 1
        elif self._good_again is not None:
            self._good_again += 1
            if self._good_again >= GOOD_HEARTBEATS:
                self._good_again = None
        if engine.steps_done != before.steps_done or engine.state == "loading":
            self._without_step_s = self._without_progress_s = 0.0
        elif before.work_pending:
            elapsed_s = now - self.heard_at
            self._without_step_s += elapsed_s
            self._without_progress_s += elapsed_s
            if _has_computed(before, engine, elapsed_s):
                self._without_progress_s = 0.0
        if before.state != "loading":
            self._loading_since = now
        self.heartbeat, self.heard_at = heartbeat, now

    def excuse(self, seconds: float, now: float) -> None:
        """Whoever listens was itself away for so long: it could not have heard anything."""
        self.heard_at = min(now, self.heard_at + seconds)

    def doubt(self) -> None:
        """It was silent, as others say: it is well again when it is heard again."""
        self._good_again = 0

    def is_silent(self, now: float) -> bool:
        return now - self.heard_at > self._settings.suspect_after_s

    def state(self, now: float) -> ReplicaState:
        if self.is_silent(now) or self._good_again is not None:
            return ReplicaState.SUSPECT
        if self.heartbeat.engine.state == "loading":
            return ReplicaState.STARTING
        if self.heartbeat.engine.state == "failed":
            return ReplicaState.DEAD
        return ReplicaState.READY

    def slow_load(self, now: float) -> str:
        """Why it is still not ready, when that takes very long. Nobody can tell from outside whether a large
        model comes over a slow line or a load hangs: so it is told, and no replica is ended for it."""
        since_s = now - self._loading_since
        if self.state(now) is ReplicaState.STARTING and since_s > self._settings.patience_s:
            return f"it has been loading for {since_s:.0f} s"
        return ""

    def ailment(self, now: float) -> Ailment | None:
        engine, silent_s = self.heartbeat.engine, now - self.heard_at
        patience_s = self._settings.patience_s
        limit_s = patience_s if engine.state == "loading" else self._settings.stall_after_s
        if engine.state == "failed":
            return Ailment(AilmentKind.FAILED, engine.detail or "the engine has failed")
        if silent_s > limit_s:
            return Ailment(AilmentKind.SILENT, f"no heartbeat for {silent_s:.1f} s")
        if self._without_progress_s > self._settings.stall_after_s:
            reason = f"requests pending and no progress for {self._without_progress_s:.1f} s"
            return Ailment(AilmentKind.STALLED, reason)
        if self._without_step_s > patience_s:
            reason = f"requests pending and {self._without_step_s:.0f} s of computing without a step"
            return Ailment(AilmentKind.STALLED, reason)
        return None


def _has_computed(before: EngineStatus, after: EngineStatus, elapsed_s: float) -> bool:
    if before.compute_cpu_s is None or after.compute_cpu_s is None:
        return False
    return after.compute_cpu_s - before.compute_cpu_s >= max(_LEAST_CPU_S, _BUSY_SHARE * elapsed_s)
