"""What a process knows of live replicas: written by :class:`PinnedRouter`, read by the dispatcher's pool.

Serve ships the request router's module by value, so its module-level state would be a copy of its own;
this module is imported by name on both sides, so that they share one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

from blaze.routing.replica import ReplicaInfo
from blaze.types import ReplicaId

DeploymentKey: TypeAlias = str  # "app#deployment"
Listener: TypeAlias = Callable[[tuple[ReplicaInfo, ...]], None]
Prober: TypeAlias = Callable[[ReplicaId], None]

PIN = "blaze_pin"  # keyword argument of an engine call: the unique id of the replica it must go to
ANY = ""  # in its place: whichever replica there is, as soon as there is one


class LiveSets:
    """Live sets by deployment. Thread-safe: Serve may run its router on a loop of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[DeploymentKey, tuple[ReplicaInfo, ...]] = {}
        self._listeners: dict[DeploymentKey, list[Listener]] = {}
        self._probers: dict[DeploymentKey, Prober] = {}

    def publish(self, key: DeploymentKey, live: tuple[ReplicaInfo, ...]) -> None:
        with self._lock:
            self._live[key] = live
            listeners = tuple(self._listeners.get(key, ()))
        for listener in listeners:
            listener(live)

    def live(self, key: DeploymentKey) -> tuple[ReplicaInfo, ...]:
        with self._lock:
            return self._live.get(key, ())

    def subscribe(self, key: DeploymentKey, listener: Listener) -> None:
        """``listener`` is called on the thread that publishes."""
        with self._lock:
            self._listeners.setdefault(key, []).append(listener)

    def set_prober(self, key: DeploymentKey, prober: Prober) -> None:
        with self._lock:
            self._probers[key] = prober

    def suspect(self, key: DeploymentKey, replica_id: ReplicaId) -> None:
        """A call to it broke: whoever publishes should find out whether it is dead."""
        with self._lock:
            prober = self._probers.get(key)
        if prober is not None:
            prober(replica_id)


live_sets = LiveSets()
