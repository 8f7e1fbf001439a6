"""What replicas and Routers tell of themselves: values that cross processes, standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from blaze.control import NO_CHANGES, Control
from blaze.types import EngineKind, ReplicaId


class ReplicaState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    RESTARTING = "restarting"
    DEAD = "dead"


@dataclass(frozen=True)
class KVCacheStatus:
    """Memory for keys and values, in tokens; counters since the start."""

    total_tokens: int
    free_tokens: int
    kept_tokens: int  # of finished sequences, kept for prompts that begin alike; given up when needed
    prefix_queries: int  # prompt tokens looked up
    prefix_hits: int  # of them, found
    preemptions: int


@dataclass(frozen=True)
class DiffusionStatus:
    """How often there was NaN or infinity instead of an image; counters since the start."""

    decoded_again: int  # images and previews that were too much for 16 bits: in fp32
    non_finite: int  # requests that failed for it


@dataclass(frozen=True)
class EngineStatus:
    """An engine's own account of itself; ``work_pending`` counts queued and running requests."""

    kind: EngineKind
    state: Literal["loading", "idle", "busy", "failed"]
    running: int
    queued: int
    steps_done: int
    last_step_age_s: float | None  # None before the first step
    detail: str | None = None  # why it failed, or why it cannot work as it usually does
    kv_cache: KVCacheStatus | None = None  # of LLM engines
    diffusion: DiffusionStatus | None = None  # of diffusion engines
    prefixes: bytes = b""  # packed links of the prompts that it holds, see prompt_chain.py
    compute_cpu_s: float | None = None  # processor time of the threads that work; None: not measured

    @property
    def work_pending(self) -> int:
        return self.running + self.queued


@dataclass(frozen=True)
class Heartbeat:
    """Pushed by every replica once a probe period."""

    replica_id: ReplicaId
    model: str
    rank: int
    node: str
    pid: int
    engine: EngineStatus
    memory_bytes: int  # resident set size of the replica's process
    actor: str = ""  # the name by which it can be ended; "": it cannot


@dataclass(frozen=True)
class ReplicaCounters:
    """One Router's account of one replica."""

    replica_id: ReplicaId
    model: str
    in_flight: int
    weight: float
    requests: int
    failures: int
    cost: float = 0.0  # of the requests in flight, see blaze/routing/cost.py
    ewma_ms: float | None = None  # peak EWMA of response times; None: not measured yet
    breaker: str = "closed"
    draining: bool = False
    node: str = ""
    actor: str = ""  # the name by which it can be ended; "": it cannot
    suspect: bool = False  # as the health actor has said


@dataclass(frozen=True)
class BreakerEvent:
    """A breaker has changed its state."""

    model: str
    replica_id: ReplicaId
    before: str
    after: str
    reason: str
    age_s: float  # ago, at the time of the report: clocks are each process's own


@dataclass(frozen=True)
class ReplicaEvent:
    """What the health actor has found of a replica, or decided about it."""

    model: str
    replica_id: ReplicaId
    before: str
    after: str
    reason: str
    age_s: float


@dataclass(frozen=True)
class ModelCondition:
    """Whether a model can be served, and if not, why not.

    ``reason`` is for everybody, ``detail`` for operators: it may name paths.
    """

    model: str
    state: Literal["loading", "ready", "idle", "failing"]  # idle: scaled to zero
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class ModelCounters:
    """One Router's account of one model. ``ttft_buckets[i]`` counts times up to ``TTFT_BUCKETS_S[i]``."""

    model: str
    strategy: str
    waiting: int
    outcomes: tuple[tuple[str, int], ...]  # ("success" | "failure" | "neutral", count)
    prompt_tokens: int
    completion_tokens: int
    images: int
    ttft_buckets: tuple[int, ...]
    ttft_sum_s: float
    retries: int = 0
    resumed: int = 0  # answers that went on on another replica
    open: int = 0  # answers that are being given, or wait to be
    panic: bool = False  # breakers are ignored, for they refuse more than half of the replicas
    transitions: tuple[tuple[str, int], ...] = ()  # (state that a breaker came to, count)
    events: tuple[BreakerEvent, ...] = ()  # the last ones
    died_at_work: tuple[ReplicaId, ...] = ()  # the last replicas that were lost with requests on them


TTFT_BUCKETS_S: tuple[float, ...] = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    float("inf"),
)


@dataclass(frozen=True)
class RouterReport:
    """Pushed by every Router once a probe period."""

    router_id: str
    models: tuple[ModelCounters, ...]
    replicas: tuple[ReplicaCounters, ...]
    control: Control = NO_CHANGES  # what it follows

    def had_requests_on(self, replica_id: ReplicaId) -> bool:
        """When it died: one that kills its replica at once is in no heartbeat of it."""
        return any(replica_id in model.died_at_work for model in self.models) or any(
            replica.in_flight > 0 for replica in self.replicas if replica.replica_id == replica_id
        )

    def without_load(self) -> RouterReport:
        """What it has counted, when nothing waits or runs for it any more, and it sends nothing anywhere."""
        return replace(
            self,
            models=tuple(replace(model, waiting=0, open=0) for model in self.models),
            replicas=tuple(
                replace(replica, in_flight=0, cost=0.0, draining=True) for replica in self.replicas
            ),
        )


@dataclass(frozen=True)
class PeerLoad:
    """What the other Routers have in flight on a replica."""

    in_flight: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class News:
    """The health actor's answer to a Router's report."""

    control: Control
    peers: tuple[tuple[ReplicaId, PeerLoad], ...]
    suspects: tuple[ReplicaId, ...]  # nobody should be sent there
    prefixes: tuple[tuple[ReplicaId, bytes], ...] = ()
    conditions: tuple[ModelCondition, ...] = ()
    condemned: tuple[ReplicaId, ...] = ()  # suspects that are not only silent: that is no mistake
