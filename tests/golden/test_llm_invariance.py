"""An answer has the same bits whatever happens around it: neighbours, chunks, prefixes, preemption, cuts.

The real model in bfloat16, whole answers compared: token ids and log probabilities, as floats, exactly. In
float32, where the matrix multiplications themselves depend on the number of rows, up to near-ties.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from blaze.config import cache_dir
from blaze.engines.llm.engine import LLMEngine
from blaze.engines.llm.native.build import library
from blaze.engines.torch_setup import has_native_bfloat16
from blaze.reports import KVCacheStatus
from blaze.types import TokenId
from tests.golden.llm import Answer, Tally, ask, ask_one, english, running, runs_steps, served_by, without

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(
        not has_native_bfloat16(torch.device("cpu")),
        reason="bfloat16 is emulated on this processor, and slow",
    ),
]

TOKENS = 24
BYTES_PER_TOKEN = 30 * 3 * 2 * 64 * 2  # layers x heads x (key + value) x dim x bfloat16
GREEDY: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "logprobs": 2}
SAMPLED = GREEDY | {"temperature": 1.0, "seed": 7}
FILTERED = SAMPLED | {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}

# Prompts shorter and longer than a slot (128 tokens) and than the chunks below, or crossing its end.
REQUESTS: tuple[tuple[tuple[TokenId, ...], dict[str, Any]], ...] = (
    (english(0, 1), GREEDY),
    (english(5, 17), SAMPLED),
    (english(40, 64), FILTERED),
    (english(90, 120), SAMPLED | {"frequency_penalty": 0.5, "presence_penalty": 0.5}),
    (english(200, 300), GREEDY),
    (english(330, 130), SAMPLED | {"seed": 8}),
)


@pytest.fixture(scope="module", params=["compiled steps", "compiled kernels", "torch operators"])
def operations(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled steps" and not runs_steps():
        pytest.skip("this machine serves bfloat16 in another way")
    if request.param == "compiled kernels" and library(cache_dir()) is None:
        pytest.skip("there is no C++ compiler here")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "compiled kernels":
            without(patch, "steps")
        elif request.param == "torch operators":
            without(patch, "library")
        yield f"fused, {request.param}"


@contextmanager
def _engine(operations: str, **options: Any) -> Iterator[LLMEngine]:
    # ``deterministic``: it is what promises all this, and refuses to start where it cannot be kept.
    with running(dtype="bfloat16", deterministic=True, **options) as engine:
        assert served_by(engine) == operations
        yield engine


@pytest.fixture(scope="module")
def engine(operations: str) -> Iterator[LLMEngine]:
    with _engine(operations) as made:
        yield made


@pytest.fixture(scope="module")
def alone(operations: str) -> list[Answer]:
    """What each request is answered with nothing else in the engine, and nothing from before."""
    with _engine(operations, prefix_caching=False) as engine:
        return [asyncio.run(ask_one(engine, prompt, **params)) for prompt, params in REQUESTS]


async def _all(engine: LLMEngine) -> list[Answer]:
    return list(await asyncio.gather(*(ask_one(engine, prompt, **params) for prompt, params in REQUESTS)))


async def _kv_cache(engine: LLMEngine) -> KVCacheStatus:
    status = (await engine.get_health_status()).kv_cache
    assert status is not None
    return status


async def _among_others(engine: LLMEngine, *, others: int) -> list[Answer]:
    """The requests in the midst of others, of which some end early and some late."""
    crowd = [
        asyncio.create_task(
            ask_one(engine, english(31 * n, 2 + 5 * n), max_tokens=4 + n, temperature=1.0, seed=n)
        )
        for n in range(others)
    ]
    await asyncio.sleep(0)
    answers = await _all(engine)
    await asyncio.gather(*crowd)
    return answers


async def test_in_a_batch_of_32(engine: LLMEngine, alone: list[Answer]) -> None:
    assert await _among_others(engine, others=26) == alone


async def test_with_a_prefix_at_hand(engine: LLMEngine, alone: list[Answer]) -> None:
    await _all(engine)  # leaves its prefixes behind
    before = await _kv_cache(engine)
    assert await _all(engine) == alone
    for (prompt, params), first in zip(REQUESTS, alone, strict=True):
        again = await ask(engine, prompt, **params)
        assert again.choices == (first,)
        assert again.usage.cached_tokens == (len(prompt) - 1) // 16 * 16
    assert (await _kv_cache(engine)).prefix_hits > before.prefix_hits


async def test_with_another_prompts_beginning_at_hand(engine: LLMEngine, alone: list[Answer]) -> None:
    prompt, params = REQUESTS[4]
    for shared in (16, 33, 200):
        await ask_one(engine, prompt[:shared] + english(500, 20), max_tokens=3)
        assert await ask_one(engine, prompt, **params) == alone[4]


async def test_continued_from_any_cut(engine: LLMEngine, alone: list[Answer]) -> None:
    """As another replica continues it: what it finds is the tokens so far, or none of them."""
    cuts = [(index, cut) for index in range(len(REQUESTS)) for cut in (1, 7, 8, TOKENS - 1)]

    async def continued(index: int, cut: int) -> Answer:
        prompt, params = REQUESTS[index]
        return (await ask(engine, prompt, generated=(alone[index].ids[:cut],), **params)).choices[0]

    for (index, cut), rest in zip(
        cuts, await asyncio.gather(*(continued(*cut) for cut in cuts)), strict=True
    ):
        whole = alone[index]
        assert (rest.ids, rest.logprobs) == (whole.ids[cut:], whole.logprobs[cut:])
        assert whole.text.endswith(rest.text)
        assert rest.reason == whole.reason


async def test_n_choices_are_the_same_together_again_and_in_part(engine: LLMEngine) -> None:
    prompt, params = english(123, 45), SAMPLED | {"n": 4}
    first = await ask(engine, prompt, **params)
    again, *_ = await asyncio.gather(ask(engine, prompt, **params), _among_others(engine, others=8))
    assert again.choices == first.choices
    assert len({answer.ids for answer in first.choices}) == 4
    assert await ask_one(engine, prompt, **SAMPLED) == first.choices[0]
    cuts = (3, 0, TOKENS - 1, 12)
    rest = await ask(
        engine,
        prompt,
        generated=tuple(answer.ids[:cut] for answer, cut in zip(first.choices, cuts, strict=True)),
        **params,
    )
    for answer, whole, cut in zip(rest.choices, first.choices, cuts, strict=True):
        assert (answer.ids, answer.logprobs) == (whole.ids[cut:], whole.logprobs[cut:])


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_and_computed_again(operations: str, alone: list[Answer], prefix_caching: bool) -> None:
    memory = (1024 + 1) * BYTES_PER_TOKEN
    options: dict[str, Any] = {
        "max_model_len": 512,
        "kv_cache_memory": memory,
        "prefix_caching": prefix_caching,
    }
    with _engine(operations, **options) as engine:
        assert asyncio.run(_among_others(engine, others=26)) == alone
        status = asyncio.run(_kv_cache(engine))
    assert status.total_tokens == 1024
    assert status.preemptions > 0


@pytest.mark.parametrize("budget", [8, 33])
def test_in_chunks_of_any_size(operations: str, alone: list[Answer], budget: int) -> None:
    with _engine(operations, max_batch_tokens=budget, max_batch_size=8) as engine:
        assert asyncio.run(_all(engine)) == alone


@pytest.mark.parametrize("runner", ["fused", "stock"])
def test_in_float32_up_to_near_ties(runner: str) -> None:
    memory = (512 + 1) * BYTES_PER_TOKEN * 2
    prompts = [prompt for prompt, _ in REQUESTS if len(prompt) < 200]
    short = GREEDY | {"max_tokens": 12}
    with running(dtype="float32", runner=runner, prefix_caching=False) as engine:
        alone = [asyncio.run(ask_one(engine, prompt, **short)) for prompt in prompts]
    tally = Tally()

    async def everywhere(engine: LLMEngine) -> None:
        for _ in range(2):  # the second time with prefixes
            together = await asyncio.gather(*(ask_one(engine, prompt, **short) for prompt in prompts))
            for found, expected in zip(together, alone, strict=True):
                tally.compare(found.ids, expected.ids, expected.gaps)
        for prompt, whole in zip(prompts, alone, strict=True):
            rest = await ask(engine, prompt, generated=(whole.ids[:5],), **short)
            tally.compare(rest.choices[0].ids, whole.ids[5:], whole.gaps[5:])

    options: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory": memory, "max_batch_tokens": 40}
    with running(dtype="float32", runner=runner, **options) as engine:
        asyncio.run(everywhere(engine))
        assert asyncio.run(_kv_cache(engine)).preemptions > 0
    tally.report(f"float32, {runner}")
    assert tally.near_ties <= 2
    assert tally.tokens > 120
