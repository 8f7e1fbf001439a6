"""A request on its way to a replica."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

from blaze.checks import SEED_BOUND
from blaze.prompt_chain import PromptChain
from blaze.routing.columns import stable_hash
from blaze.types import GenerateRequest, ReplicaId, Request


@dataclass(slots=True)
class Route:
    """``tried``: replicas on which it has failed."""

    request: Request
    cost: float
    key: int | None
    chain: PromptChain
    deadline: float
    tried: list[ReplicaId] = field(default_factory=list)


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
