"""Which replicas may take one more request: one mask for each reason why not."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from blaze.routing.columns import Places

Mask = npt.NDArray[np.bool_]


class Eligibility:
    """Answers are kept until a mask changes: a pick asks, and most requests change nothing.

    ``cap``: requests of this router on one replica. ``at_once``: requests that a replica works on at the same
    time, whoever sent them; more wait there. Each of ``routers`` has a share of them that it may always use,
    for what the others have in flight is known late; of the rest, what they leave as far as is known.
    """

    def __init__(self, *, cap: int, at_once: int, routers: int) -> None:
        self._cap = cap
        self._at_once = at_once
        self._share = math.ceil(at_once / routers)
        self._usable = np.empty(0, bool)
        self._full: list[bool] = []  # one by one they are looked at far more often than all together
        self._busy: list[bool] = []
        self._with_room: Places | None = None  # to be looked up
        self._idle: Places | None = None

    def resize(self, count: int) -> None:
        """Nobody may be picked until :meth:`admit` and :meth:`note` have been told of all."""
        self._usable = np.zeros(count, bool)
        self._full, self._busy = [True] * count, [True] * count
        self._with_room = self._idle = None

    def admit(self, usable: Mask) -> None:
        """``usable``: alive, ready, not draining, admitted by its breaker, of a weight above 0."""
        self._usable = usable
        self._with_room = self._idle = None

    def note(self, place: int, *, here: int, peers: float) -> None:
        """Requests in flight on that replica: of this router, and of the others as far as is known."""
        full = here >= self._cap
        busy = full or (here >= self._share and here + peers >= self._at_once)
        if full != self._full[place] or busy != self._busy[place]:
            self._full[place], self._busy[place] = full, busy
            self._with_room = self._idle = None

    def usable(self) -> Places:
        """Whether they are full or not."""
        return np.flatnonzero(self._usable)

    def with_room(self) -> Places:
        """A request may be sent there, if only to wait."""
        if self._with_room is None:
            self._with_room = np.flatnonzero(self._usable & ~np.array(self._full, bool))
        return self._with_room

    def idle(self) -> Places:
        """A request that is sent there does not have to wait for others."""
        if self._idle is None:
            self._idle = np.flatnonzero(self._usable & ~np.array(self._busy, bool))
        return self._idle
