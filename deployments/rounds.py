"""What the health actor does by itself, again and again. What is slow in Ray must not hold up the rest."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from blaze.health.restarts import Kill
from blaze.health.settings import HealthSettings
from blaze.health.supervisor import Supervisor
from blaze.reports import Heartbeat

logger = logging.getLogger("ray.serve")


class Rounds:
    """``has_ended`` and ``end`` ask Ray about an actor and kill it; they block, and get threads."""

    def __init__(
        self,
        supervisor: Supervisor,
        settings: HealthSettings,
        *,
        has_ended: Callable[[str], bool],
        end: Callable[[str], None],
    ) -> None:
        self._supervisor = supervisor
        self._has_ended = has_ended
        self._end = end
        self._kills: set[asyncio.Task[None]] = set()
        period_s = min(1.0, settings.probe_period_s)
        self._loops = (
            asyncio.create_task(forever(self._stay_awake, min(period_s, settings.absent_after_s) / 4)),
            asyncio.create_task(forever(self._ask, period_s)),
            asyncio.create_task(forever(self._decide, period_s)),
        )

    async def _stay_awake(self) -> None:
        """Only a loop that stands still can delay this."""
        self._supervisor.awake()

    async def _ask(self) -> None:
        await asyncio.gather(*(self._ask_after(beat) for beat in self._supervisor.to_ask_after()))

    async def _ask_after(self, beat: Heartbeat) -> None:
        if await asyncio.to_thread(self._has_ended, beat.actor):
            self._supervisor.ended(beat.replica_id)

    async def _decide(self) -> None:
        for kill in self._supervisor.decide():
            task = asyncio.create_task(self._carry_out(kill))
            self._kills.add(task)
            task.add_done_callback(self._kills.discard)

    async def _carry_out(self, kill: Kill) -> None:
        try:
            await asyncio.to_thread(self._end, kill.actor)
        except Exception as error:
            logger.exception("replica %s could not be ended", kill.replica_id)
            self._supervisor.not_ended(kill.replica_id, type(error).__name__)


async def forever(step: Callable[[], Awaitable[None]], every_s: float) -> None:
    """One that goes wrong must not stop the next."""
    failing = False
    while True:
        await asyncio.sleep(every_s)
        try:
            await step()
            failing = False
        except Exception as error:
            if not failing:
                logger.warning("a round of the health actor failed: %s: %s", type(error).__name__, error)
            failing = True
