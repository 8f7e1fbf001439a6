from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from blaze.types import (
    ChoiceFinished,
    Failed,
    Finished,
    Started,
    TextDelta,
    TextPrompt,
    Usage,
)
from tests.llm_bench import VARIANT, EngineBench
from tests.samples import collect, image_request, text_of, text_request


async def test_a_request_is_answered_with_all_its_parts(bench: EngineBench) -> None:
    events = await collect(bench.engine.run(text_request(TextPrompt("cc"))))
    assert events[0] == Started((99, 99), VARIANT)
    assert text_of(events) == "endings"
    assert events[-2:] == [ChoiceFinished(0, "stop"), Finished(Usage(prompt_tokens=2, completion_tokens=8))]


@pytest.mark.parametrize("order", list(itertools.permutations("abcd"))[::5])
async def test_case_20_every_row_ends_by_its_own_rule_in_any_order(
    bench: EngineBench, order: tuple[str, ...]
) -> None:
    requests = {
        "a": text_request(TextPrompt("a"), stop=("X",), temperature=0.0),
        "b": text_request(TextPrompt("b"), max_tokens=5, temperature=0.7, seed=1),
        "c": text_request(TextPrompt("c"), temperature=0.0, top_k=3),
        "d": text_request(TextPrompt("d"), max_tokens=20, temperature=1.5, seed=2),
    }
    answers = await bench.together(*(requests[key] for key in order))
    assert bench.runner.batch_sizes[2] == 4, "they must share a batch"
    found = {key: (text_of(events), events[-2]) for key, events in zip(order, answers, strict=True)}
    assert found == {
        "a": ("abc", ChoiceFinished(0, "stop")),
        "b": ("bbbbb", ChoiceFinished(0, "length")),
        "c": ("endings", ChoiceFinished(0, "stop")),
        "d": ("d" * 20, ChoiceFinished(0, "length")),
    }


async def test_case_20_a_stop_string_never_matches_across_rows(bench: EngineBench) -> None:
    requests = [text_request(TextPrompt(key), stop=("ABC",)) for key in "ef"]
    first, second = await bench.together(*requests)
    assert (text_of(first), text_of(second)) == ("AB", "C")


async def test_choices_of_one_request_are_rows_of_one_batch(bench: EngineBench) -> None:
    events = await collect(bench.engine.run(text_request(TextPrompt("e"), n=3)))
    assert [text_of(events, index) for index in range(3)] == ["AB"] * 3
    assert {e.index for e in events if isinstance(e, ChoiceFinished)} == {0, 1, 2}
    assert events[-1] == Finished(Usage(prompt_tokens=1, completion_tokens=9))
    assert max(bench.runner.batch_sizes) == 3


async def test_a_batch_never_has_more_rows_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBench(monkeypatch, max_batch_size=4)
    await bench.engine.start()
    requests = [text_request(TextPrompt("e"), n=n) for n in (3, 2, 1, 4)]
    answers = await bench.together(*requests)
    assert [len({e.index for e in events if isinstance(e, ChoiceFinished)}) for events in answers] == [
        3,
        2,
        1,
        4,
    ]
    assert max(bench.runner.batch_sizes) <= 4
    (refused,) = await collect(bench.engine.run(text_request(TextPrompt("e"), n=5)))
    assert isinstance(refused, Failed)
    assert (refused.error.http_status, refused.error.param) == (400, "n")
    await bench.engine.stop()


async def test_an_image_request_is_refused(bench: EngineBench) -> None:
    (event,) = await collect(bench.engine.run(image_request()))
    assert isinstance(event, Failed)
    assert event.error.http_status == 400


async def test_case_28_the_same_seed_gives_the_same_answer_whatever_else_is_in_the_batch(
    bench: EngineBench,
) -> None:
    bench.runner.shape = lambda logits, _work: logits.zero_()
    request = text_request(TextPrompt("d"), seed=99, max_tokens=8, n=2)
    (alone,) = await bench.together(request)
    other = text_request(TextPrompt("d"), seed=1, max_tokens=8)
    _, beside = await bench.together(other, request)
    ids = [[(e.index, e.token_ids) for e in events if isinstance(e, TextDelta)] for events in (alone, beside)]
    assert ids[0] == ids[1]
    assert text_of(alone, 0) != text_of(alone, 1)


async def test_a_request_that_arrives_joins_the_running_batch(bench: EngineBench) -> None:
    long, short = await bench.together(text_request(TextPrompt("d")), text_request(TextPrompt("e")))
    assert (text_of(long), text_of(short)) == ("d" * 60, "AB")
    assert bench.runner.batch_sizes[0] == 1
    assert bench.runner.batch_sizes[1] == 3, "both join at the step after their arrival"


async def test_the_prompt_comes_back_with_its_log_probabilities(bench: EngineBench) -> None:
    request = text_request(TextPrompt("cab"), echo=True, logprobs=1, max_tokens=2, temperature=0.0)
    events = await collect(bench.engine.run(request))
    echo = events[1]
    assert isinstance(echo, TextDelta)
    assert (echo.text, echo.token_ids, echo.echo) == ("cab", (99, 97, 98), True)
    assert echo.logprobs is not None
    assert [token.logprob for token in echo.logprobs] == [None, 0.0, 0.0]
    assert text_of(events[2:]) == "en"
    assert events[-1] == Finished(Usage(prompt_tokens=3, completion_tokens=2))


async def test_the_prompt_alone_can_be_asked_for(bench: EngineBench) -> None:
    events = await collect(bench.engine.run(text_request(TextPrompt("cab"), echo=True, max_tokens=0)))
    assert [type(event) for event in events] == [Started, TextDelta, ChoiceFinished, Finished]
    assert events[-1] == Finished(Usage(prompt_tokens=3, completion_tokens=0))


async def test_lower_priority_numbers_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBench(monkeypatch, max_batch_size=1)
    await bench.engine.start()
    order: list[str] = []
    bench.runner.shape = lambda _logits, work: order.append(chr(work.sequence.token_ids[0]))
    late, early = text_request(TextPrompt("c")), replace(text_request(TextPrompt("e")), priority=-1)
    await bench.together(late, early)
    assert "".join(dict.fromkeys(order)) == "fec"
    await bench.engine.stop()


async def test_an_answer_of_another_variant_is_not_gone_on_with(bench: EngineBench) -> None:
    request = text_request(TextPrompt("c"), temperature=0.0)
    mine = replace(request, generated=((101,),), variant=VARIANT)
    assert text_of(await bench.ask(mine)) == "ndings"
    (event,) = await bench.ask(replace(mine, variant="org/model@None/torch.bfloat16/none/scripted"))
    assert isinstance(event, Failed)
    assert (event.error.code, event.error.retryable, event.error.is_failure) == ("other_variant", True, False)
