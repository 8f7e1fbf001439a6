"""How much a key may use in a minute: requests and tokens, in windows that move with the clock."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from limits import RateLimitItemPerMinute
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter

from blaze.api.keys import KeyHolder
from blaze.clock import Clock
from blaze.errors import RateLimited, TokensLimited

_SLOTS = 600  # of a full window: what a key has used is remembered to a tenth of a second
_TICK_S = 1e-6  # clocks are floats: who waits for as long as he was told must not come a rounding too early


class RateLimits:
    """Refuses a key that is over its limits; a key without limits costs nothing.

    Limits hold per Router process: with N Routers a key gets up to N times as much. Used by one thread.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._windows = _Windows(clock)
        self._limiter = MovingWindowRateLimiter(self._windows)

    def admit(self, holder: KeyHolder) -> None:
        """Count a request. Raises :class:`RateLimited`; a refused request is not counted.

        Tokens are known when an answer ends: until then, requests at the same time may go beyond the limit,
        and what they took beyond it keeps the key out for longer.
        """
        requests = _requests(holder)
        refusals = [
            self._refusal(kind, item, holder)
            for kind, item in ((RateLimited, requests), (TokensLimited, _tokens(holder)))
            if item is not None and not self._limiter.test(item, holder.name)
        ]
        if refusals:
            # The later of the two: coming back earlier would be of no use.
            raise max(refusals, key=lambda refusal: refusal.retry_after_s or 0.0)
        if requests is not None:
            self._limiter.hit(requests, holder.name)

    def charge(self, holder: KeyHolder, tokens: int) -> None:
        """Tokens that an answer has used, prompt and completion together."""
        item = _tokens(holder)
        if item is not None and tokens > 0:
            self._windows.add(item.key_for(holder.name), tokens, item.get_expiry())

    def _refusal(
        self, kind: type[RateLimited], item: RateLimitItemPerMinute, holder: KeyHolder
    ) -> RateLimited:
        left_s = self._limiter.get_window_stats(item, holder.name).reset_time - self._clock.now()
        wait_s = max(1, math.ceil(left_s))  # a header has whole seconds, and fewer than needed would be a lie
        return kind(
            f"Rate limit reached: {item.amount} {kind.type} per minute. Try again in {wait_s} s.",
            retry_after_s=float(wait_s),
        )


def _requests(holder: KeyHolder) -> RateLimitItemPerMinute | None:
    amount = holder.limits.requests_per_minute
    return None if amount is None else RateLimitItemPerMinute(amount, namespace="requests")


def _tokens(holder: KeyHolder) -> RateLimitItemPerMinute | None:
    amount = holder.limits.tokens_per_minute
    return None if amount is None else RateLimitItemPerMinute(amount, namespace="tokens")


@dataclass(slots=True)
class _Slot:
    """What was used from ``first_at`` to ``last_at``; all of it leaves the window with the last."""

    first_at: float
    last_at: float
    amount: int


@dataclass(slots=True)
class _Window:
    slots: deque[_Slot] = field(default_factory=deque)
    total: int = 0


class _Windows(Storage, MovingWindowSupport):
    """Moving windows in memory, at most ``_SLOTS`` + 1 slots for each key.

    The library's own storage reads the wall clock, which may jump, remembers each token by itself, and copies
    all of that in a thread a hundred times a second; and it refuses a charge that goes beyond the limit.
    """

    STORAGE_SCHEME = None  # not to be had by a URI

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        if self._current(key, expiry).total + amount > limit:
            return False
        self.add(key, amount, expiry)
        return True

    def add(self, key: str, amount: int, expiry: int) -> None:
        """Without asking for a limit. ``expiry``: length of the window in seconds."""
        now = self._clock.now()
        window = self._current(key, expiry)
        window.total += amount
        newest = window.slots[-1] if window.slots else None
        if newest is not None and now - newest.first_at < expiry / _SLOTS:
            newest.last_at = now
            newest.amount += amount
        else:
            window.slots.append(_Slot(now, now, amount))

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When that was used whose leaving makes room below ``limit``, and how much the window holds."""
        window = self._current(key, expiry)
        kept = window.total
        for slot in window.slots:
            kept -= slot.amount
            if kept < limit:
                return slot.last_at, window.total
        return self._clock.now(), window.total

    def _current(self, key: str, expiry: int) -> _Window:
        """The window without what has left it."""
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window()
        gone_before = self._clock.now() - expiry + _TICK_S
        while window.slots and window.slots[0].last_at <= gone_before:
            window.total -= window.slots.popleft().amount
        return window

    # --- What the library asks of every storage, for its other strategies too ----------------------------

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError

    def get(self, key: str) -> int:
        raise NotImplementedError

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        self._windows.clear()
        return None

    def clear(self, key: str) -> None:
        self._windows.pop(key, None)
