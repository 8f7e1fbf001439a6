"""Which prompts' beginnings an engine has keys and values of, for Routers to know."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from blaze.prompt_chain import PromptChain, packed
from blaze.types import TokenId

_PROMPTS = 64
_HASHES = 256  # of a digest: 1 KiB


class HeldPrompts:
    """The latest prompts, by the last link of their chains."""

    def __init__(self) -> None:
        self._latest: OrderedDict[int, tuple[PromptChain, tuple[TokenId, ...]]] = OrderedDict()

    def note(self, chain: PromptChain, token_ids: tuple[TokenId, ...]) -> None:
        if not chain:
            return
        self._latest[chain[-1]] = (chain, token_ids)
        self._latest.move_to_end(chain[-1])
        if len(self._latest) > _PROMPTS:
            self._latest.popitem(last=False)

    def digest(self, held: Callable[[Sequence[TokenId]], int]) -> bytes:
        """Hashes of the links that are at hand, the latest prompts first. ``held``: how many of the tokens
        are; which part of the text they are is taken to be the same part of the links."""
        hashes: dict[int, None] = {}
        for chain, token_ids in reversed(self._latest.values()):
            links = len(chain) * held(token_ids) // max(1, len(token_ids))
            hashes.update(dict.fromkeys(chain[:links]))
            if len(hashes) >= _HASHES:
                break
        return packed(list(hashes)[:_HASHES])
