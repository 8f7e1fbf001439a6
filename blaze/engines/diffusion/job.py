"""One image request on its way through the engine."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blaze.clock import Clock
from blaze.engines.channel import EventChannel
from blaze.errors import BlazeError, Cancelled, DeadlineExceeded
from blaze.types import Event, ImageRequest

if TYPE_CHECKING:
    from PIL import Image


@dataclass(slots=True, eq=False)
class Job:
    """``image`` and ``mask``: what the request brings, in the size in which it is drawn.

    ``deadline``: in the clock's time.
    """

    request: ImageRequest
    channel: EventChannel
    clock: Clock
    deadline: float | None = None
    image: Image.Image | None = None
    mask: Image.Image | None = None
    started: bool = field(default=False, init=False)
    written: Future[None] | None = field(default=None, init=False)  # the last of its images so far

    @property
    def images(self) -> int:
        return self.request.n

    def put(self, *events: Event) -> None:
        self.channel.put(*events)

    def unwanted(self) -> BlazeError | None:
        """Why it is to be ended: its reader left, or its time is up."""
        if self.channel.abandoned:
            return Cancelled("The caller left.")
        if self.deadline is not None and self.clock.now() >= self.deadline:
            return DeadlineExceeded("The deadline passed before the image was complete.")
        return None
