"""What operators have decided: numbered, and forgotten once the replicas that it was about are gone."""

from __future__ import annotations

from collections.abc import Set

from blaze.control import Change, Control
from blaze.types import ReplicaId

SETTINGS_KEPT_S = 600.0  # of a replica that nobody sees: it may only be cut off, and come back


class ControlKeeper:
    """The latest :class:`Control` that is known, whoever has brought it."""

    def __init__(self) -> None:
        self.latest = Control()
        self._unseen_since: dict[ReplicaId, float] = {}  # replicas that operators have settings for

    def learn(self, control: Control) -> None:
        """A Router's, which may be from before this actor came back."""
        if control.version > self.latest.version:
            self.latest = control

    def change(self, change: Change, known: Control) -> Control:
        """``known``: to the Router that brings the change, which may have seen more than an actor that has
        just come back."""
        self.learn(known)
        self.latest = self.latest.after(change)
        return self.latest

    def forget_unseen(self, seen: Set[ReplicaId], now: float) -> None:
        """Settings of replicas that have not been ``seen`` for long. The time begins when that is first
        noticed: this actor may have been away, too."""
        unseen = self.latest.replica_ids - seen
        self._unseen_since = {id: self._unseen_since.get(id, now) for id in unseen}
        gone = [id for id, since in self._unseen_since.items() if now - since > SETTINGS_KEPT_S]
        if gone:
            self.latest = self.latest.without(gone)
