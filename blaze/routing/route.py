"""A request on its way to a replica."""

from __future__ import annotations

from dataclasses import dataclass, field

from blaze.prompt_chain import PromptChain
from blaze.routing.columns import stable_hash
from blaze.types import ReplicaId, Request


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
