"""Requests that wait to be drawn, and which of them are one call of the pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import replace

from blaze.engines.diffusion.job import Job
from blaze.errors import BlazeError
from blaze.types import Caller, ImageRequest


class WaitingLine:
    """First come, first served. ``grouped``: requests that are alike become one call.

    Alike means: equal in everything that the pipeline is told but prompt and seed.
    """

    def __init__(self, *, grouped: bool) -> None:
        self._grouped = grouped
        self._line: deque[Job] = deque()
        self._apart: list[Job] = []  # to be drawn singly, before all others

    def __len__(self) -> int:
        return len(self._apart) + len(self._line)

    def add(self, job: Job) -> None:
        self._line.append(job)

    def put_back(self, jobs: Sequence[Job]) -> None:
        """They failed together: next, each is a call of its own."""
        self._apart += jobs

    def take(self, room: int, *, most_calls: int | None = None) -> list[tuple[Job, ...]]:
        """The calls to begin now: of those who wait longest, as many as have ``room`` images together.

        Nobody is overtaken. ``most_calls``: at most so many calls.
        """
        calls: dict[Hashable, list[Job]] = {}
        while self:
            source = self._apart or self._line
            job = source[0]
            key = alike(job.request) if self._grouped and not self._apart else job
            has_call = most_calls is None or key in calls or len(calls) < most_calls
            if job.images > room or not has_call:
                break
            room -= job.images
            calls.setdefault(key, []).append(job)
            self._remove_first()
        return [tuple(jobs) for jobs in calls.values()]

    def remove_unwanted(self) -> list[tuple[Job, BlazeError]]:
        """Those whose answer nobody waits for any more, and why."""
        reasons = [(job, job.unwanted()) for job in (*self._apart, *self._line)]
        gone = [(job, reason) for job, reason in reasons if reason is not None]
        if gone:
            left = {job for job, reason in reasons if reason is None}
            self._apart = [job for job in self._apart if job in left]
            self._line = deque(job for job in self._line if job in left)
        return gone

    def clear(self) -> list[Job]:
        left = [*self._apart, *self._line]
        self._apart.clear()
        self._line.clear()
        return left

    def _remove_first(self) -> None:
        if self._apart:
            self._apart.pop(0)
        else:
            self._line.popleft()


def alike(request: ImageRequest) -> Hashable:
    """Equal for requests that one call of a pipeline can draw."""
    return replace(
        request,
        request_id="",
        model="",
        prompt="",
        seed=None,
        n=1,
        output_format="png",
        output_compression=None,
        partial_images=0,
        progress=False,
        timeout_s=None,
        caller=Caller(),
    )
