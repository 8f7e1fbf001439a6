"""Requests of which replicas die."""

from __future__ import annotations

import asyncio

from blaze.clock import Clock
from blaze.routing.replicas import ReplicaTable
from blaze.routing.route import Death, Route


class PoisonJudge:
    """Tells replicas that have died from those that were only out of reach, or busy, for a moment: to whoever
    had a request there, a broken connection looks the same, and so does silence. Lives on one event loop."""

    def __init__(self, table: ReplicaTable, *, clock: Clock, doubt_s: float) -> None:
        """``doubt_s`` after its connection broke, a replica that is still there has not died; one that is
        still silent is as good as dead."""
        self._table = table
        self._clock = clock
        self._doubt_s = doubt_s
        self._changed = asyncio.Event()
        table.on_capacity.append(self._changed.set)

    async def is_poison(self, route: Route) -> bool:
        """Waits until it is known, for as many deaths as count: a replica more is not put at risk before."""
        now = self._clock.now()
        until = max((death.at + self._doubt_s for death in route.deaths), default=now)
        self._drop_living(route)
        try:
            async with asyncio.timeout(min(until, route.deadline) - now):
                while route.is_poison and any(map(self._in_doubt, route.deaths)):
                    self._changed.clear()
                    await self._changed.wait()
                    self._drop_living(route)
        except TimeoutError:
            route.deaths = [d for d in route.deaths if not self._is_there(d) or d.replica.suspect]
        return route.is_poison

    def _drop_living(self, route: Route) -> None:
        route.deaths = [death for death in route.deaths if not self._is_alive(death)]

    def _is_there(self, death: Death) -> bool:
        return not death.certain and death.replica.id in self._table.columns.place

    def _in_doubt(self, death: Death) -> bool:
        return self._is_there(death) and self._clock.now() < death.at + self._doubt_s

    def _is_alive(self, death: Death) -> bool:
        """Silence is over when its replica is heard again; of a broken connection nobody tells that."""
        known = death.silent or not self._in_doubt(death)
        return known and self._is_there(death) and not death.replica.suspect
