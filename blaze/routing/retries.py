"""How often, how soon and for how many requests at once an attempt is repeated."""

from __future__ import annotations

import random

_ALWAYS = 3  # retries at a time, however few requests there are
_SHARE = 0.2  # of the active requests
_FIRST_S, _LONGEST_S = 0.025, 0.25


class RetryBudget:
    """Retries in progress. Where most requests fail, repeating them all would bury what is left."""

    def __init__(self) -> None:
        self._in_progress = 0
        self.total = 0

    def reserve(self, active: int) -> bool:
        """Leave for a request to be repeated, until :meth:`give_back`; False: too many are."""
        if self._in_progress >= max(_ALWAYS, _SHARE * active):
            return False
        self._in_progress += 1
        return True

    def give_back(self) -> None:
        self._in_progress -= 1


def pause_s(retry: int, rng: random.Random) -> float:
    """Before retry 1, 2 and so on: at random up to a bound that doubles, 25 to 250 ms."""
    return rng.uniform(_FIRST_S, min(_LONGEST_S, _FIRST_S * 2.0 ** min(retry, 10)))
