"""A request on its way to a replica."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

from blaze.checks import SEED_BOUND
from blaze.errors import ErrorInfo, OtherVariant
from blaze.prompt_chain import PromptChain
from blaze.routing.columns import stable_hash
from blaze.routing.outcome import Outcome
from blaze.routing.replica import Lease, Replica
from blaze.types import GenerateRequest, ReplicaId, Request

POISON_DEATHS = 2
_FEW = 1  # token of a choice: what kills a replica by its first step has shown that much


@dataclass(frozen=True, slots=True)
class Death:
    """A replica went away as it began to work on a request.

    ``certain``: it is dead. Else its connection broke, or, ``silent``, the health actor hears nothing of it.
    """

    replica: Replica
    certain: bool
    silent: bool
    at: float


@dataclass(slots=True)
class Route:
    """``tried``: replicas on which it has failed; ``unfit``: those that cannot go on with it; ``tried_last``:
    where it was sent last, failed or not.

    Attempts beyond the first: ``retries`` after errors, since something last came of it; ``lost`` for
    replicas that went away, and for all that broke when its reader had had some of it. ``deaths``: since
    a replica last survived it, as far as is known, by :class:`blaze.routing.poison.PoisonJudge`.
    """

    request: Request
    cost: float
    key: int | None
    chain: PromptChain
    deadline: float
    came_at: float
    tried: list[ReplicaId] = field(default_factory=list)
    unfit: list[ReplicaId] = field(default_factory=list)
    tried_last: ReplicaId = ""
    retries: int = 0
    lost: int = 0
    deaths: list[Death] = field(default_factory=list)
    advanced: int = 0  # how much the last attempt has added to the answer, in tokens or steps
    was_probe: bool = False  # the last attempt: sent to find out whether a replica has recovered
    reserved: bool = False  # of the budget for retries
    ahead: Lease | None = None  # a place that it goes to next
    has_begun: bool = False  # its reader has had some of the answer

    def note_failure(
        self, replica_id: ReplicaId, error: ErrorInfo, *, death: Death | None = None, advanced: int = 0
    ) -> None:
        self.tried.append(replica_id)
        self.advanced = advanced
        if error.code == OtherVariant.code:
            self.unfit.append(replica_id)
        if death is not None and advanced <= _FEW:
            self.deaths.append(death)
        elif advanced > _FEW or (error.is_failure and not error.replica_gone):
            self.deaths.clear()  # who fails at it and lives, has not died of it

    def take_ahead(self) -> Lease | None:
        """The place that was found for it, unless its replica has become one where nobody is sent."""
        lease = self.ahead
        if lease is not None and not lease.replica.is_wanted:
            self.drop_ahead()
            return None
        self.ahead = None
        return lease

    def drop_ahead(self) -> None:
        """It does not go there after all."""
        lease, self.ahead = self.ahead, None
        if lease is not None:
            lease.release(Outcome.NEUTRAL)

    @property
    def is_poison(self) -> bool:
        """As far as is known."""
        return len(self.deaths) >= POISON_DEATHS


def affinity_key(request: Request) -> int | None:
    """What requests that belong together have in common."""
    caller = request.caller
    for kind, name in (("session", caller.session_id), ("user", caller.user), ("address", caller.address)):
        if name:
            return stable_hash(f"{kind}:{name}")
    return None


def with_seed(request: Request, rng: random.Random) -> Request:
    """Drawn once, before the first attempt: a second attempt repeats the draws of the first."""
    if isinstance(request, GenerateRequest):
        if request.sampling.seed is not None or request.sampling.temperature == 0:
            return request
        sampling = dataclasses.replace(request.sampling, seed=rng.randrange(SEED_BOUND))
        return dataclasses.replace(request, sampling=sampling)
    if request.seed is not None:
        return request
    return dataclasses.replace(request, seed=rng.randrange(SEED_BOUND))
