"""Language and image models that do what they are told, for engines that are tested without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from blaze.engines.diffusion.pipelines import LoadedPipeline
from blaze.engines.llm.model import LoadedModel
from blaze.engines.llm.sequence import Vocabulary
from tests.fakes import ByteDecoder

EOS = 0
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


def fake_model(*, max_model_len: int = 64) -> LoadedModel:
    pieces = [b"", *(bytes([code]) for code in range(1, VOCABULARY_SIZE))]
    return LoadedModel(
        model=SimpleNamespace(),
        tokenizer=CharacterTokenizer(),
        vocabulary=Vocabulary(ByteDecoder(pieces), frozenset({EOS})),
        vocabulary_size=VOCABULARY_SIZE,
        max_model_len=max_model_len,
    )


@dataclass
class ScriptedRunner:
    """Continues every prompt as its script says: the text after the prompt's first character, then EOS.

    ``scripts`` are found by the first token of the prompt, so a row is known wherever it stands.
    """

    scripts: Mapping[str, str]
    batch_sizes: list[int] = field(default_factory=list)
    before_step: Callable[[], None] = lambda: None
    _rows: list[list[int]] = field(default_factory=list)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self._rows = [self._script(chr(prompt[0])) for prompt in prompts]
        return self._logits()

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        assert len(tokens) == len(self._rows)
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]

    def _script(self, key: str) -> list[int]:
        return [*(ord(character) for character in self.scripts[key]), EOS]

    def _logits(self) -> torch.Tensor:
        self.before_step()
        self.batch_sizes.append(len(self._rows))
        logits = torch.full((len(self._rows), VOCABULARY_SIZE), -100.0)
        for row, script in enumerate(self._rows):
            logits[row, script.pop(0)] = 100.0
        return logits


class FakePipeline:
    """Draws its seed as a grey level; counts its steps on itself, as diffusers pipelines do."""

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(step_index=0)
        self.num_timesteps = 0
        self.calls: list[str] = []
        self.before_step: Callable[[str, int], None] = lambda _prompt, _step: None

    def __call__(
        self,
        prompt: list[str],
        generator: list[torch.Generator],
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]],
        output_type: str,
        num_inference_steps: int = 4,
        height: int = 8,
        width: int = 8,
    ) -> SimpleNamespace:
        self.calls.append(prompt[0])
        self.num_timesteps = num_inference_steps
        for step in range(num_inference_steps):
            self.before_step(prompt[0], step)
            assert self.scheduler.step_index == step, "another call moved this call's scheduler"
            self.scheduler.step_index += 1
            callback_on_step_end(self, step, 0, {})
        levels = [
            float("nan") if p == "nan" else g.initial_seed() % 256 / 255
            for p, g in zip(prompt, generator, strict=True)
        ]
        return SimpleNamespace(
            images=[np.full((height, width, 3), level, dtype=np.float32) for level in levels]
        )


def fake_pipeline(pipeline: FakePipeline) -> LoadedPipeline:
    return LoadedPipeline(
        pipeline=pipeline,
        accepts=frozenset(
            {
                "prompt",
                "generator",
                "callback_on_step_end",
                "output_type",
                "num_inference_steps",
                "height",
                "width",
            }
        ),
        size_factor=8,
        default_side=8,
    )
