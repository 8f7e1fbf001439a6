"""The end of a cluster in good order: nothing new is begun, what runs may finish, what is left ends with an
error that its client can read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from blaze.clock import Clock, SystemClock
from blaze.control import Change, SetAllDraining
from blaze.errors import BlazeError

_POLL_S = 0.25
_ENDING_S = 3.0  # every Router hears of the drain within a second: that late it may end what is left
_LAST_BYTES_S = 0.3  # from a Router through the proxy to the client


class Cluster(Protocol):
    """What is asked of it: a :class:`blaze.client.Client` is one."""

    def change(self, change: Change) -> None: ...

    def status(self) -> dict[str, Any]: ...


def let_finish(
    cluster: Cluster,
    grace_s: float,
    show: Callable[[str], None],
    *,
    clock: Clock | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait until no answer is being given any more; False: something was left when the time was up.

    After ``grace_s`` the Routers themselves end what is left. A cluster that does not answer is asked again,
    as long as there is time.
    """
    clock = clock or SystemClock()
    end_at = clock.now() + grace_s
    told = False
    while clock.now() < end_at + _ENDING_S:
        left_s = max(0.0, end_at - clock.now())
        try:
            if not told:
                cluster.change(SetAllDraining(True, left_s))
                told = True
            status = cluster.status()
        except BlazeError as error:
            show(f"Stopping: {error.message}")
        else:
            num_open = sum(int(model["open"]) for model in status["models"])
            if status["draining"] and num_open == 0:
                sleep(_LAST_BYTES_S)
                return True
            show(f"Stopping: {num_open} answers are being given, for {left_s:.0f} s at the most")
        sleep(_POLL_S)
    return False
