"""What a dispatcher is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from blaze.routing.trip import BreakerSettings


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    max_retries: int = 2  # further attempts after an error
    max_lost: int = 8  # further attempts after a replica went away
    retry_wait_s: float = 5.0  # for leave to repeat a request while too many are being repeated
    retry_pause: float = 1.0  # times the usual pauses
    request_timeout_s: float = 600.0
    max_queued: int = 256
    max_in_flight: int = 64  # per replica, from this dispatcher
    at_once: int = 32  # requests that a replica works on at the same time; more wait there
    suspend_s: float = 2.0  # after a lost call; longer than a dead replica takes to leave the live set
    doubt_s: float = 5.0  # after a lost call: longer than a dead replica takes to be found dead
    recheck_s: float = 0.5  # how often waiting requests look again without being told to
    deadline_grace_s: float = 1.0  # for the engine to say itself that the deadline has passed
    slow_start_s: float = 30.0
    sticky_sessions: bool = False
    sticky_session_timeout_s: float = 300.0
    move_within_s: float = 2.0  # else it stays: while it begins there, its reader hears nothing
    drain_timeout_s: float = 30.0  # then what runs on a draining replica goes on elsewhere
    routers: int = 1  # that share the replicas
    breaker: BreakerSettings = field(default_factory=BreakerSettings)
