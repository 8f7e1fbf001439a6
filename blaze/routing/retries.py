"""How often, how soon and for how many requests at once an attempt is repeated."""

from __future__ import annotations

import asyncio
import random
from collections import deque

_ALWAYS = 3  # retries at a time, however few requests there are
_SHARE = 0.2  # of the active requests
_FIRST_S, _LONGEST_S = 0.025, 0.25


class RetryBudget:
    """Retries in progress. Where most requests fail, repeating them all at once would bury what is left.
    Lives on one event loop."""

    def __init__(self) -> None:
        self._in_progress = 0
        self._line: deque[asyncio.Future[None]] = deque()
        self.total = 0

    async def reserve(self, active: int, wait_s: float) -> bool:
        """Leave for a request to be repeated, until :meth:`give_back`; in turn, for a failing replica takes
        many along at once. False: too many still are after ``wait_s``. ``active``: requests there are."""
        if self._in_progress < max(_ALWAYS, _SHARE * (active + len(self._line))):
            self._in_progress += 1
            return True
        if wait_s <= 0:
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except TimeoutError:
            return turn.done() and not turn.cancelled()
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the caller left in the moment that its turn came
                self.give_back()
            raise
        finally:
            if turn in self._line:
                self._line.remove(turn)
        return True

    def give_back(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._in_progress -= 1


def pause_s(retry: int, rng: random.Random) -> float:
    """Before retry 1, 2 and so on: at random up to a bound that doubles, 25 to 250 ms."""
    return rng.uniform(_FIRST_S, min(_LONGEST_S, _FIRST_S * 2.0 ** min(retry, 10)))
