"""Signals that ask `blaze up` for its end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked for the end. Not an Exception: nothing on the way may swallow it."""


def _stop(_signum: int, _frame: FrameType | None) -> None:
    ignore_signals()  # one is enough: the clean-up must not be cut off by the next
    raise Stopped


def stop_on_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, _stop)


def ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, a signal raises :class:`Stopped`; outside of it, that is the normal end."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    stop_on_signals()
    try:
        yield
    except (Stopped, SystemExit):
        pass  # SystemExit: while Ray starts, its own handler of SIGTERM is in place
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
