"""One choice of one request as the model sees it: tokens, and how far the model has got with them."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TypeAlias

from blaze.engines.llm.slots import Slot
from blaze.types import TokenId

Rank: TypeAlias = tuple[float, int, int]  # who comes first; no two sequences have the same


class Sequence:
    """``token_ids`` are the prompt and what was generated; keys and values of the first ``num_computed`` lie
    in ``slot``. A step computes some of the rest; when it reaches the end, it yields the next token.
    """

    __slots__ = (
        "counted",
        "leader",
        "needs_all_logits",
        "num_cached",
        "num_computed",
        "prompt_len",
        "rank",
        "slot",
        "token_ids",
    )

    def __init__(
        self,
        prompt_ids: Tokens[TokenId],
        rank: Rank,
        *,
        generated: Tokens[TokenId] = (),
        leader: Sequence | None = None,
        needs_all_logits: bool = False,
    ) -> None:
        self.token_ids: list[TokenId] = [*prompt_ids, *generated]
        self.prompt_len = len(prompt_ids)
        self.rank = rank
        self.leader = leader  # a choice with the same prompt, worth waiting for: its prefix is then at hand
        self.needs_all_logits = needs_all_logits  # of the prompt too, so that nothing of it can be skipped
        self.num_computed = 0
        self.num_cached = 0  # of the prompt's tokens, those that a hit spared when it was first taken up
        self.counted = False  # among the lookups of prefixes
        self.slot: Slot | None = None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed
