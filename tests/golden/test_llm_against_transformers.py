"""What the LLM engine answers equals what transformers computes for the same prompts (fp32).

Greedy answers are held to ``generate``, sampled ones to a plain forward and the reference sampler, token by
token. Where the reference's own decision is a near-tie, rounding may decide otherwise: such places are
counted and printed, and there are few.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from blaze.engines.llm.engine import LLMEngine
from blaze.sampling_params import SamplingParams
from blaze.types import ChatMessage, ChatPrompt, TextPrompt, TokenId, TokenLogprob
from tests.golden.llm import (
    NEAR_TIE,
    Tally,
    ask,
    ask_one,
    english,
    english_ids,
    running,
    served_by,
    smollm2_folder,
    smollm2_tokenizer,
)
from tests.reference_sampler import reference_sample

pytestmark = pytest.mark.models

EOS = 2
GREEDY_TOKENS = 16
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.05, "seed": 2**63 - 1},
    {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 1.0, "frequency_penalty": 1.5, "presence_penalty": 0.7},
    {"temperature": 1.0, "presence_penalty": -2.0, "top_p": 0.8},
    {"temperature": 1.5, "logit_bias": ((28, 6.0), (30, -100.0), (198, 3.0)), "top_k": 20},
    {"temperature": 1.0, "min_tokens": 12, "logit_bias": ((EOS, 12.0),)},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 1e-3, "seed": 0},
)


@dataclass(frozen=True)
class Greedy:
    prompt: tuple[TokenId, ...]
    ids: tuple[TokenId, ...]
    gaps: tuple[float, ...]  # between the two best logits


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    with running(dtype="float32") as made:
        assert served_by(made).startswith("fused")
        yield made


@pytest.fixture(scope="module")
def stock_engine() -> Iterator[LLMEngine]:
    with running(dtype="float32", runner="stock", max_batch_tokens=128) as made:
        assert served_by(made) == "stock"
        yield made


@cache
def reference() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()


@cache
def greedy() -> tuple[Greedy, ...]:
    """40 prompts of 1 to 1,500 tokens, some with a beginning in common, and how ``generate`` goes on."""
    draw = random.Random(0)
    lengths = [1, 2, 3, 1500, 700, *(draw.randint(200, 400) for _ in range(4))]
    lengths += [round(math.exp(draw.uniform(1, math.log(200)))) for _ in range(31)]
    prompts = [english(draw.choice([0, draw.randrange(640)]), length) for length in lengths]
    prompts.sort(key=len)
    found: list[Greedy] = []
    while prompts:
        rows = max(1, min(8, 1600 // len(prompts[-1])))  # alike in length: padding is computed too
        found += _generate(prompts[-rows:])
        del prompts[-rows:]
    draw.shuffle(found)
    return tuple(found)


def _generate(prompts: Sequence[tuple[TokenId, ...]]) -> list[Greedy]:
    width = max(map(len, prompts))
    output = reference().generate(
        torch.tensor([(EOS,) * (width - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts]),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        pad_token_id=EOS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits, dim=1).topk(2, dim=-1).values  # [rows, tokens, 2]
    found = []
    for row, prompt in enumerate(prompts):
        ids = tuple(output.sequences[row, width:].tolist())
        ids = ids[: ids.index(EOS) + 1] if EOS in ids else ids
        gaps = (best[row, : len(ids), 0] - best[row, : len(ids), 1]).tolist()
        found.append(Greedy(prompt, ids, tuple(gaps)))
    return found


async def _arrive(engine: LLMEngine, expected: Sequence[Greedy], *, seed: int) -> Tally:
    """All of them, at random times, while the others run."""
    draw = random.Random(seed)
    tasks = []
    for each in expected:
        tasks.append(asyncio.create_task(ask_one(engine, each.prompt, max_tokens=GREEDY_TOKENS)))
        await asyncio.sleep(draw.choice([0, draw.expovariate(20)]))
    tally = Tally()
    for each, answer in zip(expected, await asyncio.gather(*tasks), strict=True):
        tally.compare(answer.ids, each.ids, each.gaps)
    return tally


@torch.inference_mode()
def _logits(ids: Sequence[TokenId]) -> torch.Tensor:
    """[ids, vocabulary], without a cache."""
    logits: torch.Tensor = reference()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


async def test_40_prompts_that_come_at_random_are_answered_as_by_generate(engine: LLMEngine) -> None:
    expected = greedy()
    tally = await _arrive(engine, expected, seed=1)
    tally.report("fused")
    assert tally.near_ties <= 2
    assert tally.tokens > 0.9 * sum(len(each.ids) for each in expected)


async def test_the_stock_runner_answers_as_generate_does(stock_engine: LLMEngine) -> None:
    expected = [each for each in greedy() if len(each.prompt) < 700][:16]
    tally = await _arrive(stock_engine, expected, seed=2)
    tally.report("stock")
    assert tally.near_ties <= 1
    assert tally.tokens > 0.9 * sum(len(each.ids) for each in expected)


async def test_sampled_tokens_are_those_of_the_reference_sampler(engine: LLMEngine) -> None:
    prompts = [english(40 * number, 3 + 7 * number) for number in range(len(SAMPLED))]
    asked = [{"max_tokens": 24, "seed": number} | wanted for number, wanted in enumerate(SAMPLED)]
    answers = await asyncio.gather(
        *(ask_one(engine, prompt, **wanted) for prompt, wanted in zip(prompts, asked, strict=True))
    )
    equal, near_ties = 0, 0
    for prompt, wanted, answer in zip(prompts, asked, answers, strict=True):
        params, ids = SamplingParams(**wanted), answer.ids
        rows = _logits((*prompt, *ids))[len(prompt) - 1 : -1].numpy()
        for position, row in enumerate(rows):
            token, margin = reference_sample(row, params, 0, position, prompt, ids[:position], (EOS,))
            if token != ids[position]:
                assert margin < NEAR_TIE, f"{wanted}: token {position} is {ids[position]}, not {token}"
                near_ties += 1
            else:
                equal += 1
        assert len(ids) == 24 or ids[-1] == EOS
    print(f"sampled: {equal} tokens equal, {near_ties} differ at a near-tie")  # noqa: T201
    assert near_ties <= 2
    assert equal > 200


async def test_each_of_n_choices_has_draws_of_its_own(engine: LLMEngine) -> None:
    prompt = english(100, 30)
    answers = await ask(engine, prompt, n=4, max_tokens=12, temperature=1.0, seed=5)
    params = SamplingParams(temperature=1.0, seed=5)
    for index, answer in enumerate(answers.choices):
        rows = _logits((*prompt, *answer.ids))[len(prompt) - 1 : -1].numpy()
        for position, row in enumerate(rows):
            token, margin = reference_sample(row, params, index, position, prompt, answer.ids[:position], ())
            assert token == answer.ids[position] or margin < NEAR_TIE
    assert len({answer.ids for answer in answers.choices}) == 4
    assert answers.usage.completion_tokens == sum(len(answer.ids) for answer in answers.choices)


async def test_chat_prompts_are_those_of_the_chat_template(engine: LLMEngine) -> None:
    turns: list[tuple[Literal["system", "user", "assistant"], str]] = [
        ("user", "What is the capital of France?"),
        ("assistant", "Paris."),
        ("user", "And of Japan? Antworte auf Deutsch, bitte – äöü 🙂"),
    ]
    for messages in (turns[:1], [("system", "You are terse."), *turns]):
        prompt = ChatPrompt(tuple(ChatMessage(role, text) for role, text in messages))
        expected = smollm2_tokenizer().apply_chat_template(
            [{"role": role, "content": text} for role, text in messages],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        answer = await ask_one(engine, prompt, max_tokens=40)
        assert answer.prompt_ids == tuple(expected)
        assert answer.text == smollm2_tokenizer().decode(answer.ids, skip_special_tokens=True)
        (alike,) = _generate([answer.prompt_ids])
        Tally().compare(answer.ids[: len(alike.ids)], alike.ids, alike.gaps)
        assert (answer.reason == "stop") is (answer.ids[-1] == EOS)


def _check_logprobs(found: Sequence[TokenLogprob], logits: torch.Tensor, top: int) -> None:
    """``logits`` [found, vocabulary]: of each token, by the reference."""
    logprobs = logits.double().log_softmax(dim=-1)
    for token, row in zip(found, logprobs, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        best = row.topk(top)
        assert [each.logprob for each in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        for each in token.top:  # the same ones, whatever the order of near-ties
            assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
        assert len({each.token_id for each in token.top}) == top


@pytest.mark.parametrize("runner", ["engine", "stock_engine"])
async def test_log_probabilities_of_output_and_prompt(runner: str, request: pytest.FixtureRequest) -> None:
    engine: LLMEngine = request.getfixturevalue(runner)
    prompts = [english(7, 150), english(300, 9), english(11, 1)]  # one is longer than a step of the stock one
    wanted = {"echo": True, "logprobs": 5, "max_tokens": 8, "temperature": 0.8, "seed": 3}
    answers = await asyncio.gather(*(ask_one(engine, prompt, **wanted) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = _logits((*prompt, *answer.ids))
        first, *rest = answer.prompt_logprobs
        assert (first.token_id, first.logprob, first.top) == (prompt[0], None, ())
        assert tuple(token.token_id for token in answer.prompt_logprobs) == prompt
        assert tuple(token.token_id for token in answer.logprobs) == answer.ids
        _check_logprobs([*rest, *answer.logprobs], logits[:-1], 5)


async def test_a_text_prompt_is_what_the_tokenizer_makes_of_it(engine: LLMEngine) -> None:
    text = "Naïve café – “déjà vu” 🙂\n\n\tdef f(x):\n        return x ** 2  # 2**10 = 1024"
    answer = await ask_one(engine, TextPrompt(text), max_tokens=0, echo=True, logprobs=0)
    assert answer.prompt_ids == tuple(smollm2_tokenizer()(text)["input_ids"])
    assert (answer.ids, answer.reason) == ((), "length")


def test_int8_weights_change_the_perplexity_by_less_than_two_percent() -> None:
    perplexity = {}
    for quantization in ("none", "int8"):
        with running(dtype="bfloat16", quantization=quantization, max_model_len=1024) as engine:
            answer = asyncio.run(ask_one(engine, english_ids(), max_tokens=0, echo=True, logprobs=0))
        logprobs = [token.logprob for token in answer.prompt_logprobs if token.logprob is not None]
        assert len(logprobs) == len(english_ids()) - 1
        perplexity[quantization] = math.exp(-sum(logprobs) / len(logprobs))
    print(f"perplexity: {perplexity}")  # noqa: T201
    assert 5 < perplexity["none"] < 50
    assert abs(perplexity["int8"] / perplexity["none"] - 1) < 0.02
