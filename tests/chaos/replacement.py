"""Whether the health actor replaces who was frozen or wedged, and in what time."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tests.chaos.schedule import SeenReplica


class Replacement:
    """Of one replica: it is there when the old process has ended and a new replica is ready.

    A frozen replica is unhealthy ``stall_after_s`` after the fault. One that is wedged is when it has had
    work for as long, which may never be: a strategy need not send it any. ``within_s`` is the time from then.
    """

    def __init__(
        self,
        victim: SeenReplica,
        known: Collection[str],
        now: float,
        *,
        only_with_work: bool,
        stall_after_s: float,
        within_s: float,
    ) -> None:
        """``known``: the replicas that there were at the time of the fault."""
        self.victim = victim
        self._known = known
        self._stall_after_s = stall_after_s
        self._within_s = within_s
        self._unhealthy_at = None if only_with_work else now + stall_after_s
        self._is_working = False
        self._working_s = 0.0
        self._looked_at = now
        self._ended_at: float | None = None
        self._replaced_at: float | None = None

    def look(self, now: float, seen: Iterable[SeenReplica], *, has_ended: bool) -> None:
        """``has_ended``: the process that was frozen or wedged."""
        seen = tuple(seen)
        self._is_working = any(replica.id == self.victim.id and replica.working for replica in seen)
        if self._is_working:
            self._working_s += now - self._looked_at
        if self._unhealthy_at is None and self._working_s >= self._stall_after_s:
            self._unhealthy_at = now
        self._looked_at = now
        if has_ended and self._ended_at is None:
            self._ended_at = now
        if has_ended and self._replaced_at is None and any(self._is_new(replica) for replica in seen):
            self._replaced_at = now

    def _is_new(self, replica: SeenReplica) -> bool:
        return replica.healthy and replica.model == self.victim.model and replica.id not in self._known

    @property
    def is_idle(self) -> bool:
        """Without work, and has not had enough of it. Unless there is more, it need not be replaced."""
        return self._unhealthy_at is None and not self._is_working

    @property
    def is_there(self) -> bool:
        return self._replaced_at is not None

    @property
    def is_overdue(self) -> bool:
        found_at = self._looked_at if self._replaced_at is None else self._replaced_at
        return self._unhealthy_at is not None and found_at > self._unhealthy_at + self._within_s

    @property
    def replaced_s(self) -> float | None:
        """Since it was unhealthy."""
        return self._since_unhealthy(self._replaced_at)

    @property
    def told(self) -> str:
        if self.is_idle and not self.is_there:
            return "had too little work to be found out"
        parts = (("ended", self._since_unhealthy(self._ended_at)), ("replaced", self.replaced_s))
        return (
            ", ".join(
                f"not {what} within {self._within_s:g} s" if after_s is None else f"{what} {after_s:.1f} s"
                for what, after_s in parts
            )
            + " after stall_after_s"
        )

    def _since_unhealthy(self, at: float | None) -> float | None:
        """Looks come now and then, so it may have been unhealthy for longer than they have found."""
        if at is None:
            return None
        return 0.0 if self._unhealthy_at is None else max(0.0, at - self._unhealthy_at)
