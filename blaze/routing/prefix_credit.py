"""What the replicas' kept prefixes would spare a request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from blaze.prompt_chain import LINK_BYTES, PromptChain, unpacked
from blaze.routing.columns import Columns, Floats
from blaze.routing.cost import BYTES_PER_TOKEN, PROMPT_TOKEN
from blaze.types import ReplicaId

_LINK_COST = PROMPT_TOKEN * LINK_BYTES / BYTES_PER_TOKEN
_RECENT = 4096  # links that were sent somewhere, and that no digest may tell of yet
_RECENT_S = 3.0


class PrefixCredit:
    def __init__(self) -> None:
        self._holders: dict[int, list[ReplicaId]] = {}  # as the replicas say
        self._sent: OrderedDict[int, tuple[ReplicaId, float]] = OrderedDict()  # as this router knows

    def learn(self, digests: Iterable[tuple[ReplicaId, bytes]]) -> None:
        """What all replicas hold now."""
        holders: dict[int, list[ReplicaId]] = {}
        for replica_id, digest in digests:
            for value in unpacked(digest):
                holders.setdefault(value, []).append(replica_id)
        self._holders = holders

    def sent(self, chain: PromptChain, replica_id: ReplicaId, now: float) -> None:
        for value in chain:
            self._sent[value] = (replica_id, now)
            self._sent.move_to_end(value)
        while len(self._sent) > _RECENT:
            self._sent.popitem(last=False)

    def of(self, chain: PromptChain, columns: Columns, now: float) -> Floats | None:
        """The cost that each replica is spared; None where nobody is."""
        links: dict[ReplicaId, int] = {}
        for depth, value in enumerate(chain):
            holders = self._holders.get(value, ())
            sent_to, at = self._sent.get(value, ("", 0.0))
            fresh = (sent_to,) if sent_to and now - at < _RECENT_S else ()
            found = False
            for replica_id in (*holders, *fresh):
                if links.get(replica_id, 0) == depth:  # a chain that it holds without a gap
                    links[replica_id] = depth + 1
                    found = True
            if not found:
                break
        places = [(columns.place[id], count) for id, count in links.items() if count and id in columns.place]
        if not places:
            return None
        credit = np.zeros(len(columns))
        for place, count in places:
            credit[place] = count * _LINK_COST
        return credit
