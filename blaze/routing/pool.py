"""The seam between the dispatcher and whatever runs the replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blaze.routing.replica import ReplicaInfo
from blaze.types import Events, ReplicaId, Request


class ReplicaCall(Protocol):
    """One request running on one replica: an asynchronous iterator of event batches.

    Iterating raises :class:`blaze.errors.ReplicaLost` when the replica dies or cannot be reached.
    """

    def __aiter__(self) -> ReplicaCall: ...

    async def __anext__(self) -> Events: ...

    def cancel(self) -> None:
        """Stop the work on the replica; safe at any time, more than once, and after the end."""
        ...


class ReplicaPool(Protocol):
    """The replicas of one model. The dispatcher's pick is obeyed: a call goes to that replica or fails."""

    def live(self) -> tuple[ReplicaInfo, ...]: ...

    def subscribe(self, listener: Callable[[tuple[ReplicaInfo, ...]], None]) -> None:
        """Call ``listener`` on the event loop with every new live set."""
        ...

    def call(self, replica_id: ReplicaId, request: Request) -> ReplicaCall: ...

    def wake(self) -> None:
        """There is work and no replica: whoever scales the pool should start one. Safe to repeat."""
        ...
