"""Whether a request is sent once more after an attempt that has failed, and when."""

from __future__ import annotations

import random

from blaze.clock import Clock
from blaze.errors import ErrorInfo, OtherVariant, PoisonRequest, ReplicaDrained
from blaze.routing.picker import Picker
from blaze.routing.poison import PoisonJudge
from blaze.routing.retries import RetryBudget, pause_s
from blaze.routing.route import POISON_DEATHS, Route
from blaze.routing.settings import DispatchSettings

_NO_FAULT = (OtherVariant.code, ReplicaDrained.code)  # of the request, nor of the replica
_POISON = PoisonRequest(f"{POISON_DEATHS} replicas have died as they began to work on it: no other is tried.")


class RetryPolicy:
    """Lives on one event loop."""

    def __init__(
        self,
        budget: RetryBudget,
        poison: PoisonJudge,
        picker: Picker,
        *,
        clock: Clock,
        rng: random.Random,
        settings: DispatchSettings,
    ) -> None:
        self._budget = budget
        self._poison = poison
        self._picker = picker
        self._clock = clock
        self._rng = rng
        self._settings = settings

    async def pause_before_another(self, route: Route, error: ErrorInfo) -> float | ErrorInfo:
        """Seconds until the next attempt; or, if that was the last one, how the request ends."""
        if not error.retryable or self._picker.is_over:
            return error
        if await self._poison.is_poison(route):
            return _POISON.info
        # A replica that goes away is not the request's fault, nor is one that was only tried with it: neither
        # uses up its retries.
        exempt = error.replica_gone or route.was_probe or error.code in _NO_FAULT
        counts = exempt or route.has_begun
        route.lost += counts and error.code != OtherVariant.code  # which each replica says only once
        # What an attempt has brought is kept: with the rest the request begins anew, with all of its retries.
        route.retries = 0 if route.advanced > 0 else route.retries + (not exempt)
        pause = 0.0 if exempt else self._settings.retry_pause * pause_s(route.retries, self._rng)
        if route.retries > self._settings.max_retries or route.lost > self._settings.max_lost:
            return error
        if self._clock.now() + pause >= route.deadline:
            return error
        # What has begun is not given up because much else has broken with it: it only moves.
        if not exempt and not route.has_begun and not route.reserved:
            wait_s = min(self._settings.retry_wait_s, route.deadline - self._clock.now() - pause)
            route.reserved = await self._budget.reserve(self._picker.num_active, wait_s)
            if not route.reserved:
                return error
        self._budget.total += 1
        return pause

    def settled(self, route: Route) -> None:
        """It has begun to answer, or does not any more."""
        if route.reserved:
            route.reserved = False
            self._budget.give_back()
