from __future__ import annotations

import itertools

import pytest
import torch

from blaze.engines.llm import loop as loop_module
from blaze.engines.llm.loop import EngineLoop
from blaze.engines.llm.scheduler import Work
from blaze.errors import EngineFailure
from blaze.types import (
    Failed,
    Finished,
    TextPrompt,
    TokenPrompt,
)
from tests.llm_bench import EngineBench, failure
from tests.samples import collect, terminals, text_of, text_request
from tests.waiting import until_status


async def test_case_16_a_bad_request_does_not_touch_the_batch(bench: EngineBench) -> None:
    answers = await bench.together(
        text_request(TextPrompt("c")), text_request(TextPrompt("e"), timeout_s=3600.0)
    )
    (refused,) = await collect(bench.engine.run(text_request(TokenPrompt((999,)))))
    assert isinstance(refused, Failed)
    assert refused.error.http_status == 400
    assert [text_of(events) for events in answers] == ["endings", "AB"]
    assert text_of(await collect(bench.engine.run(text_request(TextPrompt("c"))))) == "endings"


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


async def test_a_fault_of_the_engine_s_own_is_told_as_its_failure(
    bench: EngineBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(_loop: EngineLoop) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(EngineLoop, "schedule", break_down)
    error = failure(await collect(bench.engine.run(text_request(TextPrompt("c")))))
    assert (error.code, error.retryable, error.is_failure) == ("engine_error", True, True)
    await until_status(bench.engine, state="failed")
