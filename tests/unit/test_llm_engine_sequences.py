from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blaze.engines.llm.scheduler import Work
from blaze.types import (
    ChoiceFinished,
    Failed,
    Finished,
    Started,
    TextDelta,
    TextPrompt,
    Usage,
)
from tests.fake_models import BROKEN
from tests.llm_bench import VARIANT, EngineBench
from tests.samples import collect, terminals, text_of, text_request


async def test_a_prompt_that_begins_alike_is_not_computed_again(bench: EngineBench) -> None:
    prompt = TextPrompt("c" + "x" * 20)
    first = await collect(bench.engine.run(text_request(prompt)))
    again = await collect(bench.engine.run(text_request(prompt)))
    assert text_of(first) == text_of(again) == "endings"
    assert isinstance(first[-1], Finished)
    assert isinstance(again[-1], Finished)
    assert (first[-1].usage.cached_tokens, again[-1].usage.cached_tokens) == (0, 20)
    cache = (await bench.engine.get_health_status()).kv_cache
    assert cache is not None
    assert (cache.prefix_queries, cache.prefix_hits) == (42, 20)


async def test_a_preemption_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBench(monkeypatch, kv_tokens=128)  # two of the longest sequences
    await bench.engine.start()
    answers = await bench.together(*[text_request(TextPrompt("d"), seed=seed) for seed in range(5)])
    assert [text_of(events) for events in answers] == ["d" * 60] * 5
    assert [len(terminals(events)) for events in answers] == [1] * 5
    cache = (await bench.engine.get_health_status()).kv_cache
    assert cache is not None
    assert cache.preemptions > 0
    await bench.engine.stop()


@pytest.mark.parametrize("cut", [0, 1, 3, 9])
async def test_an_answer_goes_on_from_the_tokens_that_it_has(bench: EngineBench, cut: int) -> None:
    sampling = text_request(TextPrompt("a"), stop=("X t",), max_tokens=8)
    whole = await collect(bench.engine.run(sampling))
    ids = [token for event in whole if isinstance(event, TextDelta) for token in event.token_ids]
    cut = min(cut, len(ids) - 1)
    resumed = await collect(bench.engine.run(replace(sampling, generated=(tuple(ids[:cut]),))))
    deltas = [event for event in whole if isinstance(event, TextDelta)]
    assert [event for event in resumed if isinstance(event, TextDelta)] == deltas[cut:]
    assert resumed[-2:] == whole[-2:], "the same end, and usage that counts all of the output"


async def test_an_answer_that_was_complete_already_ends_at_once(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e"), max_tokens=2), generated=((65, 66),))
    events = await collect(bench.engine.run(request))
    assert events == [
        Started((101,), VARIANT),
        ChoiceFinished(0, "length"),
        Finished(Usage(prompt_tokens=1, completion_tokens=2)),
    ]
    assert bench.runner.batch_sizes == []


async def test_tokens_from_elsewhere_must_be_tokens(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e")), generated=((999,),))
    (refused,) = await collect(bench.engine.run(request))
    assert isinstance(refused, Failed)
    assert (refused.error.http_status, refused.error.param) == (400, "generated")


async def test_choices_that_were_complete_already_all_end(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e"), n=2, max_tokens=2), generated=((65, 66), (65, 0)))
    events = await bench.ask(request)
    assert events == [
        Started((101,), VARIANT),
        ChoiceFinished(0, "length"),
        ChoiceFinished(1, "stop"),
        Finished(Usage(prompt_tokens=1, completion_tokens=4)),
    ]


async def test_a_choice_that_was_complete_does_not_keep_the_other_from_going_on(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e"), n=2, max_tokens=2), generated=((65,), (65, 66)))
    events = await bench.ask(request)
    assert events == [
        Started((101,), VARIANT),
        ChoiceFinished(1, "length"),
        TextDelta(0, "B", (66,)),
        ChoiceFinished(0, "length"),
        Finished(Usage(prompt_tokens=1, completion_tokens=4)),
    ]


async def test_a_prompt_that_was_given_back_is_not_given_back_again(bench: EngineBench) -> None:
    request = text_request(TextPrompt("ee"), echo=True, logprobs=0, max_tokens=2)
    whole = await bench.ask(request)
    resumed = await bench.ask(replace(request, generated=((65,),)))
    assert [event.echo for event in whole if isinstance(event, TextDelta)] == [True, False, False]
    assert resumed[1:] == whole[3:]


def follow_the_tokens(logits: torch.Tensor, work: Work) -> None:
    """Logits that depend on all tokens before, as a model's do, and never end."""
    seed = hash(tuple(work.sequence.token_ids)) & 0xFFFF
    logits.copy_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)))
    logits[[0, BROKEN]] = -torch.inf


async def test_a_preemption_does_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [text_request(TextPrompt("b" * (seed + 1)), seed=seed, max_tokens=40) for seed in range(5)]
    answers = []
    for kv_tokens in (4096, 64):
        bench = EngineBench(monkeypatch, kv_tokens=kv_tokens)
        await bench.engine.start()
        bench.runner.shape = follow_the_tokens
        answers.append([text_of(events) for events in await bench.together(*requests)])
        cache = (await bench.engine.get_health_status()).kv_cache
        assert cache is not None
        assert (cache.preemptions > 0) == (kv_tokens == 64)
        await bench.engine.stop()
    assert answers[0] == answers[1]
    assert [len(text) for text in answers[0]] == [40] * 5


async def test_the_memory_is_accounted_for_once_all_is_over(bench: EngineBench) -> None:
    await bench.together(*[text_request(TextPrompt(key * 9), n=2) for key in "abcg"])
    await bench.engine.stop()
    cache = bench.served.cache
    assert cache.free_tokens + cache.kept_tokens == cache.total_tokens == 4096


async def test_choices_share_the_prompt_and_the_first_pays_for_it(bench: EngineBench) -> None:
    events = await bench.ask(text_request(TextPrompt("c" + "x" * 20), n=3))
    assert events[-1] == Finished(Usage(prompt_tokens=21, completion_tokens=24, cached_tokens=0))
    cache = (await bench.engine.get_health_status()).kv_cache
    assert cache is not None
    assert (cache.prefix_queries, cache.prefix_hits) == (63, 40)
