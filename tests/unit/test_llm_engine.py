from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blaze.engine_config import LLMConfig
from blaze.engines.llm import engine as engine_module
from blaze.engines.llm import loop as loop_module
from blaze.engines.llm.engine import LLMEngine
from blaze.engines.llm.scheduler import Work
from blaze.errors import EngineFailure, ErrorInfo, ReplicaStopping
from blaze.models.sources import HubSource
from blaze.types import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    Request,
    Started,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from tests.fake_models import BROKEN, ScriptedRunner, fake_served
from tests.fakes import FakeClock
from tests.samples import collect, image_request, terminals, text_of, text_request
from tests.waiting import until, until_status

SCRIPTS = {
    "a": "abcX tail",
    "b": "bbbbbbbbbb",
    "c": "endings",
    "d": "d" * 60,
    "e": "AB",
    "f": "C",
    "g": "ok" + chr(BROKEN),
}


class Gate:
    """Holds the compute thread before a step until the test opens it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()

    def __call__(self) -> None:
        assert self.open.wait(30), "the test never opened the gate"


class EngineBench:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, max_batch_size: int = 8, kv_tokens: int = 4096
    ) -> None:
        self.gate = Gate()
        self.clock = FakeClock()
        self.runner = ScriptedRunner(SCRIPTS, before_step=self.gate)
        self.served = fake_served(self.runner, kv_tokens=kv_tokens)
        monkeypatch.setattr(engine_module, "load", lambda *_args: self.served)
        self.engine = LLMEngine(
            HubSource("org/model"),
            LLMConfig(max_batch_size=max_batch_size),
            threads=1,
            cache=Path("/nonexistent"),
            clock=self.clock,
        )

    async def together(self, *requests: Request) -> list[list[Event]]:
        """All requests in one batch: they pile up behind one that is held."""
        self.gate.open.clear()
        first = asyncio.create_task(collect(self.engine.run(text_request(TextPrompt("f")))))
        await until_status(self.engine, running=1)
        tasks = []
        for request in requests:  # one after another, so that the rows have this order
            tasks.append(asyncio.create_task(self.ask(request)))
            await until_status(self.engine, queued=len(tasks))
        self.gate.open.set()
        await first
        return list(await asyncio.gather(*tasks))

    async def ask(self, request: Request) -> list[Event]:
        return await collect(self.engine.run(request))


def failure(events: list[Event]) -> ErrorInfo:
    """Of an answer that ends with one."""
    assert terminals(events) == [events[-1]]
    assert isinstance(events[-1], Failed)
    return events[-1].error


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineBench]:
    made = EngineBench(monkeypatch)
    await made.engine.start()
    yield made
    made.gate.open.set()
    await made.engine.stop()


async def test_a_request_is_answered_with_all_its_parts(bench: EngineBench) -> None:
    events = await collect(bench.engine.run(text_request(TextPrompt("cc"))))
    assert events[0] == Started((99, 99))
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


# --- Case 16: one request's trouble is its own ---------------------------------------------------------


async def test_case_16_a_bad_request_does_not_touch_the_batch(bench: EngineBench) -> None:
    answers = await bench.together(
        text_request(TextPrompt("c")), text_request(TextPrompt("e"), timeout_s=3600.0)
    )
    (refused,) = await collect(bench.engine.run(text_request(TokenPrompt((999,)))))
    assert isinstance(refused, Failed)
    assert refused.error.http_status == 400
    assert [text_of(events) for events in answers] == ["endings", "AB"]
    assert text_of(await collect(bench.engine.run(text_request(TextPrompt("c"))))) == "endings"


async def test_case_16_a_request_cancelled_while_it_waits_is_never_computed(bench: EngineBench) -> None:
    bench.gate.open.clear()
    running = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("e")))))
    await until_status(bench.engine, running=1)
    waiting = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("d")))))
    await until_status(bench.engine, queued=1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    bench.gate.open.set()
    assert text_of(await running) == "AB"
    assert text_of(await collect(bench.engine.run(text_request(TextPrompt("c"))))) == "endings"
    assert sum(bench.runner.batch_sizes) == len("AB") + 1 + len("endings") + 1


async def test_case_16_a_failing_step_fails_its_requests_and_the_next_one_is_served(
    bench: EngineBench,
) -> None:
    def explode() -> None:
        bench.runner.before_step = bench.gate
        raise RuntimeError("out of memory")

    bench.runner.before_step = explode
    (failed,) = (e for e in await collect(bench.engine.run(text_request(TextPrompt("c")))) if terminals([e]))
    assert isinstance(failed, Failed)
    assert failed.error.is_failure
    assert "RuntimeError" in failed.error.message
    assert "out of memory" not in failed.error.message, "foreign text is for the log"
    assert text_of(await collect(bench.engine.run(text_request(TextPrompt("c"))))) == "endings"
    status = await bench.engine.get_health_status()
    assert (status.state, status.work_pending) == ("idle", 0)


async def test_case_15_a_reader_that_leaves_ends_its_rows_within_a_step(bench: EngineBench) -> None:
    steps = itertools.count()
    held = threading.Event()

    def hold_the_second() -> None:
        if next(steps) == 1:
            bench.gate.open.clear()
            held.set()
        bench.gate()

    bench.runner.before_step = hold_the_second
    leaving = bench.engine.run(text_request(TextPrompt("d")))
    assert isinstance((await anext(leaving))[0], Started)
    await until(held.is_set)
    await leaving.aclose()
    assert (await bench.engine.get_health_status()).work_pending == 0
    bench.gate.open.set()
    assert text_of(await collect(bench.engine.run(text_request(TextPrompt("e"))))) == "AB"
    two_of_the_left, three_of_the_next = 2, 3
    assert (await bench.engine.get_health_status()).steps_done == two_of_the_left + three_of_the_next


# --- Deadlines and the end -----------------------------------------------------------------------------


async def in_mid_answer(bench: EngineBench, then: Callable[[], None]) -> list[Event]:
    """Answer "d" until its third step, do something, and go on."""
    steps = itertools.count()

    def before_step() -> None:
        if next(steps) == 2:
            then()

    bench.runner.before_step = before_step
    return await collect(bench.engine.run(text_request(TextPrompt("d"), timeout_s=60.0)))


async def test_a_deadline_that_passes_ends_the_answer_with_504(bench: EngineBench) -> None:
    events = await in_mid_answer(bench, lambda: bench.clock.advance(61.0))
    assert text_of(events) == "ddd"
    assert len(terminals(events)) == 1
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.is_failure) == (504, False)


async def test_a_request_whose_deadline_passed_in_the_queue_is_dropped_not_run(bench: EngineBench) -> None:
    bench.gate.open.clear()
    running = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("e")))))
    await until_status(bench.engine, running=1)
    late = asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("c"), timeout_s=5.0))))
    await until_status(bench.engine, queued=1)
    bench.clock.advance(6.0)
    bench.gate.open.set()
    await running
    assert [type(event) for event in await late] == [Failed]
    assert sum(bench.runner.batch_sizes) == 3


async def test_stopping_ends_what_runs_and_what_waits(bench: EngineBench) -> None:
    bench.gate.open.clear()
    tasks = [asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("d")))))]
    await until_status(bench.engine, running=1)
    tasks.append(asyncio.create_task(collect(bench.engine.run(text_request(TextPrompt("c"))))))
    await until_status(bench.engine, queued=1)
    stopping = asyncio.create_task(bench.engine.stop())
    await asyncio.sleep(0)
    bench.gate.open.set()
    await stopping
    for events in await asyncio.gather(*tasks):
        assert len(terminals(events)) == 1
        assert isinstance(events[-1], Failed)
        assert events[-1].error.retryable
    (after,) = await collect(bench.engine.run(text_request(TextPrompt("c"))))
    assert isinstance(after, Failed)


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


# --- Continuous batching -------------------------------------------------------------------------------


async def test_a_request_that_arrives_joins_the_running_batch(bench: EngineBench) -> None:
    long, short = await bench.together(text_request(TextPrompt("d")), text_request(TextPrompt("e")))
    assert (text_of(long), text_of(short)) == ("d" * 60, "AB")
    assert bench.runner.batch_sizes[0] == 1
    assert bench.runner.batch_sizes[1] == 3, "both join at the step after their arrival"


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


async def test_a_row_that_is_no_number_fails_alone_and_leaves_nothing_behind(bench: EngineBench) -> None:
    def poison(logits: torch.Tensor, work: Work) -> None:
        if chr(work.sequence.token_ids[0]) == "b" and work.sequence.num_generated == 2:
            logits.fill_(float("nan"))

    bench.runner.shape = poison
    bad, good = await bench.together(text_request(TextPrompt("b")), text_request(TextPrompt("c")))
    assert isinstance(bad[-1], Failed)
    assert bad[-1].error.code == "non_finite_output"
    assert text_of(good) == "endings"
    assert len(bench.runner.store.cleared) == 1


async def test_an_engine_whose_steps_all_fail_says_so(bench: EngineBench) -> None:
    def explode() -> None:
        raise RuntimeError("the device is gone")

    bench.runner.before_step = explode
    for _ in range(3):
        events = await collect(bench.engine.run(text_request(TextPrompt("c"))))
        assert isinstance(events[-1], Failed)
        assert events[-1].error.retryable
    await until_status(bench.engine, state="failed")
    (refused,) = await collect(bench.engine.run(text_request(TextPrompt("c"))))
    assert isinstance(refused, Failed)
    assert refused.error.replica_gone


async def test_lower_priority_numbers_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBench(monkeypatch, max_batch_size=1)
    await bench.engine.start()
    order: list[str] = []
    bench.runner.shape = lambda _logits, work: order.append(chr(work.sequence.token_ids[0]))
    late, early = text_request(TextPrompt("c")), replace(text_request(TextPrompt("e")), priority=-1)
    await bench.together(late, early)
    assert "".join(dict.fromkeys(order)) == "fec"
    await bench.engine.stop()


async def test_an_answer_that_was_complete_already_ends_at_once(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e"), max_tokens=2), generated=((65, 66),))
    events = await collect(bench.engine.run(request))
    assert events == [
        Started((101,)),
        ChoiceFinished(0, "length"),
        Finished(Usage(prompt_tokens=1, completion_tokens=2)),
    ]
    assert bench.runner.batch_sizes == []


async def test_tokens_from_elsewhere_must_be_tokens(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e")), generated=((999,),))
    (refused,) = await collect(bench.engine.run(request))
    assert isinstance(refused, Failed)
    assert (refused.error.http_status, refused.error.param) == (400, "generated")


@pytest.mark.parametrize("echo", [False, True])
async def test_choices_that_fail_in_one_step_fail_their_request_once(bench: EngineBench, echo: bool) -> None:
    def poison(logits: torch.Tensor, work: Work) -> None:
        if chr(work.sequence.token_ids[0]) == "b":
            logits.fill_(float("nan"))

    bench.runner.shape = poison
    request = text_request(TextPrompt("bb"), n=3, echo=echo, logprobs=0 if echo else None)
    bad, good = await bench.together(request, text_request(TextPrompt("c")))
    assert len(terminals(bad)) == 1
    assert isinstance(bad[-1], Failed)
    assert text_of(good) == "endings"
    status = await bench.engine.get_health_status()
    assert (status.state, status.work_pending) == ("idle", 0)


async def test_after_a_failed_step_no_prefix_is_trusted(bench: EngineBench) -> None:
    prompt = TextPrompt("c" + "x" * 20)
    await collect(bench.engine.run(text_request(prompt)))

    def explode() -> None:
        bench.runner.before_step = bench.gate
        raise RuntimeError("out of memory")

    bench.runner.before_step = explode
    await collect(bench.engine.run(text_request(prompt)))
    again = await collect(bench.engine.run(text_request(prompt)))
    assert isinstance(again[-1], Finished)
    assert again[-1].usage.cached_tokens == 0


# --- What goes wrong, and whom it concerns --------------------------------------------------------------


async def test_an_exception_in_one_request_s_text_fails_that_one_alone(bench: EngineBench) -> None:
    bad, good = await bench.together(text_request(TextPrompt("gg"), n=2), text_request(TextPrompt("c")))
    error = failure(bad)
    assert (error.code, error.retryable) == (EngineFailure.code, True)
    assert text_of(bad) == "ok"
    assert text_of(good) == "endings"
    assert text_of(await bench.ask(text_request(TextPrompt("c")))) == "endings"


async def test_a_failing_step_spares_those_who_are_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBench(monkeypatch, max_batch_size=2)
    await bench.engine.start()
    steps = itertools.count()

    def explode_once() -> None:
        bench.gate()
        if next(steps) == 1:
            raise RuntimeError("out of memory")

    bench.runner.before_step = explode_once
    answers = await bench.together(*[text_request(TextPrompt(key)) for key in "dce"])
    assert failure(answers[0]).code == EngineFailure.code
    assert [text_of(events) for events in answers[1:]] == ["endings", "AB"]
    await bench.engine.stop()


async def test_what_fails_only_when_tokens_are_drawn_is_a_failed_step_too(
    bench: EngineBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, errors of the model come to light when its numbers are first looked at."""

    def explode(*_args: object) -> None:
        raise RuntimeError("illegal memory access")

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "sample", explode)
        error = failure(await bench.ask(text_request(TextPrompt("c"))))
        assert (error.code, error.is_failure) == (EngineFailure.code, True)
    assert text_of(await bench.ask(text_request(TextPrompt("c")))) == "endings"


async def test_single_failures_do_not_add_up(bench: EngineBench) -> None:
    steps = itertools.count()

    def explode_every_other_time() -> None:
        if next(steps) % 2 == 0:
            raise RuntimeError("now and then")

    bench.runner.before_step = explode_every_other_time
    for _ in range(5):
        failure(await bench.ask(text_request(TextPrompt("c"))))
        # The next step succeeds, the one after it does not.
        failure(await bench.ask(text_request(TextPrompt("c"))))
        next(steps)
    bench.runner.before_step = bench.gate
    assert text_of(await bench.ask(text_request(TextPrompt("c")))) == "endings"


async def test_of_a_request_that_is_no_number_no_slot_keeps_anything(bench: EngineBench) -> None:
    def poison(logits: torch.Tensor, work: Work) -> None:
        third_step = len(bench.runner.batch_sizes) == 3  # the first in which all three choices run
        if third_step and chr(work.sequence.token_ids[0]) == "b":
            logits.fill_(float("nan"))

    bench.runner.shape = poison
    bad, _ = await bench.together(text_request(TextPrompt("b"), n=3), text_request(TextPrompt("c")))
    assert failure(bad).code == "non_finite_output"
    assert len(set(bench.runner.store.cleared)) == 3, "any of them may have computed it"


async def test_stopping_tells_that_the_request_belongs_elsewhere(bench: EngineBench) -> None:
    bench.gate.open.clear()
    running = asyncio.create_task(bench.ask(text_request(TextPrompt("d"))))
    await until_status(bench.engine, running=1)
    stopping = asyncio.create_task(bench.engine.stop())
    await asyncio.sleep(0)
    bench.gate.open.set()
    await stopping
    error = failure(await running)
    assert (error.code, error.replica_gone, error.is_failure) == (ReplicaStopping.code, True, False)


# --- Readers -------------------------------------------------------------------------------------------


async def test_a_slow_reader_stalls_nobody_and_gets_what_piled_up_at_once(bench: EngineBench) -> None:
    slow = bench.engine.run(text_request(TextPrompt("d")))
    first = await anext(slow)
    assert text_of(await bench.ask(text_request(TextPrompt("c")))) == "endings"
    await until_status(bench.engine, running=0)
    (rest,) = [batch async for batch in slow]
    assert text_of([*first, *rest]) == "d" * 60
    assert terminals(rest) == [rest[-1]]


async def test_the_place_of_a_reader_that_leaves_goes_to_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = EngineBench(monkeypatch, max_batch_size=1)
    await bench.engine.start()
    served: list[str] = []
    bench.runner.shape = lambda _logits, work: served.append(chr(work.sequence.token_ids[0]))
    steps = itertools.count()

    def hold_the_third() -> None:
        if next(steps) == 2:
            bench.gate.open.clear()
        bench.gate()

    bench.runner.before_step = hold_the_third
    leaving = bench.engine.run(text_request(TextPrompt("d")))
    await anext(leaving)
    await until_status(bench.engine, steps_done=2)
    waiting = asyncio.create_task(bench.ask(text_request(TextPrompt("e"))))
    await until_status(bench.engine, queued=1)
    await leaving.aclose()
    bench.gate.open.set()
    assert text_of(await waiting) == "AB"
    assert "".join(served) == "dddeee", "the step that was under way, and not one more"
    await bench.engine.stop()


# --- Taking up where another engine left off -----------------------------------------------------------


async def test_choices_that_were_complete_already_all_end(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e"), n=2, max_tokens=2), generated=((65, 66), (65, 0)))
    events = await bench.ask(request)
    assert events == [
        Started((101,)),
        ChoiceFinished(0, "length"),
        ChoiceFinished(1, "stop"),
        Finished(Usage(prompt_tokens=1, completion_tokens=4)),
    ]


async def test_a_choice_that_was_complete_does_not_keep_the_other_from_going_on(bench: EngineBench) -> None:
    request = replace(text_request(TextPrompt("e"), n=2, max_tokens=2), generated=((65,), (65, 66)))
    events = await bench.ask(request)
    assert events == [
        Started((101,)),
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


# --- Memory --------------------------------------------------------------------------------------------


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
