"""How much a replica gets done while it has something to do."""

from __future__ import annotations

import math

_TAU_S = 10.0  # of the EWMA, in busy seconds
_SHORTEST_S = 0.05  # of busy time that is worth a sample


class Speed:
    """EWMA of the cost served per busy second; NaN before anything was served.

    Busy time in which nothing was served at all does not count: it tells of a hang or of failures, which
    others see to.
    """

    __slots__ = ("_busy_since", "_seconds", "_served", "drain")

    def __init__(self) -> None:
        self.drain = math.nan
        self._busy_since: float | None = None
        self._seconds = 0.0  # busy, not yet part of the EWMA
        self._served = 0.0

    def began(self, now: float) -> None:
        """A request has come."""
        if self._busy_since is None:
            self._busy_since = now

    def ended(self, now: float, served: float, *, idle: bool) -> None:
        """A request is over. ``served``: its cost, 0 for one that was not; ``idle``: it was the last one."""
        if self._busy_since is not None:
            self._seconds += now - self._busy_since
        self._busy_since = None if idle else now
        self._served += served
        if not self._served:
            self._seconds = 0.0  # a hang, or nothing but failures: that says nothing of its speed
        if not self._served or self._seconds < _SHORTEST_S:
            return
        sample, keep = self._served / self._seconds, math.exp(-self._seconds / _TAU_S)
        self.drain = sample if math.isnan(self.drain) else keep * self.drain + (1 - keep) * sample
        self._seconds = self._served = 0.0
