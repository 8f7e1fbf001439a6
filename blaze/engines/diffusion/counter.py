"""How often a model produced no numbers."""

from __future__ import annotations

import threading

from blaze.errors import BlazeError, NonFiniteOutput
from blaze.reports import DiffusionStatus


class NonFiniteCounter:
    """Written by the threads that decode and encode, read by the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoded_again = 0
        self._failed = 0

    def decoded_again(self, images: int) -> None:
        with self._lock:
            self._decoded_again += images

    def failed(self, error: BlazeError) -> None:
        """A request did; other errors are not counted."""
        if isinstance(error, NonFiniteOutput):
            with self._lock:
                self._failed += 1

    def status(self) -> DiffusionStatus:
        with self._lock:
            return DiffusionStatus(decoded_again=self._decoded_again, non_finite=self._failed)
