"""Signals that ask `blaze up` for its end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
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
    """Inside, a signal raises :class:`Stopped`; outside of it, that is the normal end, and further ones are
    ignored: whoever asked twice is not to find a process that was killed."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    stop_on_signals()
    try:
        yield
    except (Stopped, SystemExit):  # SystemExit: while Ray starts, its own handler of SIGTERM is in place
        ignore_signals()
        return
    except BaseException:
        _restore(before)
        raise
    _restore(before)


def _restore(before: dict[signal.Signals, _Handler]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
