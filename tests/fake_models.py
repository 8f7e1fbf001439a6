"""Language models that do what they are told, for engines that are tested without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from blaze.engines.llm.kv_cache import KVCache
from blaze.engines.llm.loading import ServedModel
from blaze.engines.llm.model import LoadedModel
from blaze.engines.llm.runner import StepResult, wants_all_logits
from blaze.engines.llm.scheduler import Step, Work
from blaze.engines.llm.slots import Slot
from blaze.engines.llm.vocabulary import Vocabulary
from tests.fakes import ByteDecoder

EOS = 0
BROKEN = 127  # has no text: decoding it raises
VOCABULARY_SIZE = 128  # token i is the character i, and 0 ends a sequence


class CharacterTokenizer:
    """One token a character; the template puts a ``>`` before every message."""

    def __init__(self, *, chat_template: str | None = "yes", refuses: Exception | None = None) -> None:
        self.chat_template = chat_template
        self._refuses = refuses

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, return_dict: bool
    ) -> dict[str, list[int]]:
        if self._refuses is not None:
            raise self._refuses
        assert add_generation_prompt
        assert return_dict
        return self("".join(">" + message["content"] for message in messages))


class CharacterNames:
    def name(self, token_id: int) -> str:
        return chr(token_id) if token_id else ""


def fake_model(*, max_model_len: int = 64) -> LoadedModel:
    pieces = [b"", *(bytes([code]) for code in range(1, BROKEN))]
    return LoadedModel(
        model=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
        tokenizer=CharacterTokenizer(),
        vocabulary=Vocabulary(ByteDecoder(pieces), CharacterNames(), frozenset({EOS})),
        vocabulary_size=VOCABULARY_SIZE,
        max_model_len=max_model_len,
    )


def fake_served(
    runner: ScriptedRunner, *, max_model_len: int = 64, kv_tokens: int = 4096, unit: int = 16
) -> ServedModel:
    cache = KVCache(kv_tokens, longest=max_model_len, unit=unit, block=4)
    return ServedModel(fake_model(max_model_len=max_model_len), runner, cache)


@dataclass
class RecordingStore:
    """Of the KV memory, what the loop itself asks for."""

    cleared: list[Slot] = field(default_factory=list)

    def clear(self, slot: Slot) -> None:
        self.cleared.append(slot)


@dataclass
class ScriptedRunner:
    """Continues every prompt as its script says, then ends.

    ``scripts`` are found by the first token of the prompt, so a sequence is known wherever it stands.
    ``batch_sizes``: of each step, the sequences that yielded a token. ``shape`` changes their logits.
    """

    scripts: Mapping[str, str]
    batch_sizes: list[int] = field(default_factory=list)
    before_step: Callable[[], None] = lambda: None
    shape: Callable[[torch.Tensor, Work], object] = lambda _logits, _work: None
    name: str = "scripted"
    batches_neighbours: bool = True
    store: Any = field(default_factory=RecordingStore)

    def settle(self) -> None:
        pass

    def execute(self, step: Step, launching: Callable[[], None] = lambda: None) -> StepResult:
        launching()
        self.before_step()
        yielding = [work for work in step.work if work.yields_token]
        self.batch_sizes.append(len(yielding))
        rows = [self._logits(work, work.end) for work in yielding]
        whole = [
            (work, torch.stack([self._logits(work, end) for end in range(work.start + 1, work.end + 1)]))
            for work in step.work
            if wants_all_logits(work)
        ]
        return StepResult(torch.stack(rows) if rows else torch.empty(0, VOCABULARY_SIZE), tuple(whole))

    def _logits(self, work: Work, end: int) -> torch.Tensor:
        """Of the token after the first ``end``; inside a prompt, the prompt's own next one is likely."""
        sequence = work.sequence
        script = [*(ord(character) for character in self.scripts[chr(sequence.token_ids[0])]), EOS]
        at = end - sequence.prompt_len
        token = script[min(at, len(script) - 1)] if at >= 0 else sequence.token_ids[end]
        logits = torch.full((VOCABULARY_SIZE,), -100.0)
        logits[token] = 100.0
        self.shape(logits, work)
        return logits
