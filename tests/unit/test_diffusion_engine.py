from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from blaze.engines.diffusion.parameters import seeds
from blaze.reports import DiffusionStatus
from blaze.types import Event, Failed, Finished, ImageReady, PartialImage, Progress, Started, Usage
from tests.drawing_bench import DrawingBench, level, levels
from tests.samples import collect, image_request, terminals, text_request
from tests.waiting import until, until_status


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DrawingBench]:
    made = DrawingBench(monkeypatch)
    await made.engine.start()
    yield made
    await made.engine.stop()


@pytest.fixture
async def whole(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DrawingBench]:
    made = DrawingBench(monkeypatch, whole_because="its unet is shy")
    await made.engine.start()
    yield made
    await made.engine.stop()


# --- One request ---------------------------------------------------------------------------------------


async def test_an_image_comes_with_its_progress_and_usage(bench: DrawingBench) -> None:
    request = image_request(seed=9, num_inference_steps=3, width=16, height=8, progress=True)
    events = await bench.draw(request)
    assert events[:4] == [Started(), Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    image = events[4]
    assert isinstance(image, ImageReady)
    assert (image.width, image.height, image.format, image.seed, level(image)) == (16, 8, "png", 9, 9)
    assert events[5:] == [Finished(Usage(images=1))]


async def test_nobody_hears_of_steps_who_did_not_ask(bench: DrawingBench) -> None:
    events = await bench.draw(image_request(seed=9))
    assert [type(event) for event in events] == [Started, ImageReady, Finished]


async def test_case_37_image_i_is_drawn_with_seed_plus_i_whatever_is_beside_it(bench: DrawingBench) -> None:
    together = [e for e in await bench.draw(image_request(seed=7, n=3)) if isinstance(e, ImageReady)]
    assert [(image.index, image.seed, level(image)) for image in together] == [
        (0, 7, 7),
        (1, 8, 8),
        (2, 9, 9),
    ]
    (alone,) = (e for e in await bench.draw(image_request(seed=9)) if isinstance(e, ImageReady))
    assert alone.data == together[2].data


def test_seeds_stay_within_63_bits() -> None:
    assert seeds(image_request(seed=2**63 - 1, n=2)) == (2**63 - 1, 0)


async def test_case_38_calls_do_not_share_a_schedulers_state(bench: DrawingBench) -> None:
    for steps in (4, 2, 7):  # the fake pipeline fails when its scheduler was left in the middle
        assert isinstance((await bench.draw(image_request(num_inference_steps=steps)))[-1], Finished)
    assert bench.pipeline.scheduler.step_index == 0


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 5}, "n"),
        ({"num_inference_steps": 21}, "num_inference_steps"),
        ({"width": 7}, "size"),
        ({"height": 12}, "size"),
        ({"width": 128, "height": 64}, "size"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"negative_prompt": "x"}, "negative_prompt"),
    ],
)
async def test_what_the_pipeline_cannot_do_is_refused_before_it_is_called(
    bench: DrawingBench, options: dict[str, Any], param: str
) -> None:
    (event,) = await bench.draw(image_request(**options))
    assert isinstance(event, Failed)
    assert (event.error.http_status, event.error.param) == (400, param)
    assert bench.script.calls == []


async def test_a_text_request_is_refused(bench: DrawingBench) -> None:
    (event,) = await collect(bench.engine.run(text_request()))
    assert isinstance(event, Failed)
    assert event.error.http_status == 400


async def test_previews_come_evenly_spread_and_before_the_image(bench: DrawingBench) -> None:
    request = image_request(
        seed=5, n=2, num_inference_steps=8, partial_images=3, progress=True, output_format="webp"
    )
    events = await bench.draw(request)
    previews = [event for event in events if isinstance(event, PartialImage)]
    assert [(each.number, each.index, each.format) for each in previews] == [
        (number, index, "webp") for number in range(3) for index in range(2)
    ]
    assert all((each.width, each.height) == (8, 8) for each in previews)
    images = [event for event in events if isinstance(event, ImageReady)]
    assert events.index(images[0]) > events.index(previews[-1])
    without = image_request(seed=5, n=2, num_inference_steps=8, output_format="webp")
    assert images == [event for event in await bench.draw(without) if isinstance(event, ImageReady)]


async def test_a_drawing_of_few_steps_has_fewer_previews(bench: DrawingBench) -> None:
    events = await bench.draw(image_request(num_inference_steps=2, partial_images=3))
    assert [event.number for event in events if isinstance(event, PartialImage)] == [0]


# --- Requests together ---------------------------------------------------------------------------------


async def test_a_request_joins_the_running_one_at_its_next_step(bench: DrawingBench) -> None:
    with bench.held_at("A", step=1) as held:
        first = bench.begin("A", seed=1, num_inference_steps=5)
        await held.until_reached()
        second = bench.begin("B", seed=2, num_inference_steps=2)
        await bench.queued(1)
        held.release()
        assert levels(await first) == [1]
        assert levels(await second) == [2]
    tried = ["A", "B", "AB"]  # the first time, alone and together: what differs is not joined
    assert bench.batches == ["A", *tried, "AB", "A", "A"]
    assert (await bench.engine.get_health_status()).steps_done == len(bench.batches)


async def test_requests_alike_become_one_call(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=1)
        await held.until_reached()
        alike = [bench.begin(prompt, seed=ord(prompt)) for prompt in "BC"]
        other = bench.begin("D", seed=4, num_inference_steps=3)
        await bench.queued(3)
        held.release()
        assert levels(await first) == [1]
        assert [levels(await each) for each in alike] == [[ord("B")], [ord("C")]]
        assert levels(await other) == [4]
    assert bench.script.calls == [["A"], ["B", "C"], ["D"]]


async def test_images_of_a_group_belong_to_their_requests(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=1)
        await held.until_reached()
        twice = bench.begin("B", seed=20, n=2)
        once = bench.begin("C", seed=30, output_format="jpeg")
        await bench.queued(2)
        held.release()
        assert levels(await first) == [1]
        assert levels(await twice) == [20, 21]
        (image,) = (event for event in await once if isinstance(event, ImageReady))
        assert (image.format, image.index, level(image)) == ("jpeg", 0, 30)
    assert bench.script.calls == [["A"], ["B", "B", "C"]]


async def test_no_more_images_are_drawn_at_once_than_the_limit_and_nobody_is_overtaken(
    bench: DrawingBench,
) -> None:
    with bench.held_at("A") as held:
        tasks = [bench.begin("A", seed=0, num_inference_steps=3)]
        await held.until_reached()
        # Of four at once, A and B leave room for one: C has to wait, and D may not go first.
        tasks += [bench.begin("B", n=2, seed=1), bench.begin("C", n=2, seed=3), bench.begin("D", seed=5)]
        await bench.queued(3)
        with bench.held_at("A", step=2) as held_again:
            held.release()
            await held_again.until_reached()
            assert bench.script.calls == [["A"], ["B", "B"]]
            await until_status(bench.engine, running=2, queued=2)
            held_again.release()
            answers = [levels(await task) for task in tasks]
    assert answers == [[0], [1, 2], [3, 4], [5]]
    assert max(map(len, bench.batches)) <= 4


async def test_case_16_bad_and_cancelled_requests_do_not_touch_the_others(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=1)
        await held.until_reached()
        bad = bench.begin("B", width=7)
        cancelled = bench.begin("C", seed=3)
        last = bench.begin("D", seed=4)
        await until_status(bench.engine, running=1, queued=2)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        held.release()
        assert levels(await first) == [1]
        assert levels(await last) == [4]
    assert [type(event) for event in await bad] == [Failed]
    assert bench.script.calls == [["A"], ["D"]], "no compute for what was refused or given up"
    assert (await bench.engine.get_health_status()).work_pending == 0


async def test_case_16_a_failing_pipeline_fails_its_request_and_the_next_is_served(
    bench: DrawingBench,
) -> None:
    def explode(prompt: str, _step: int) -> None:
        if prompt == "bad":
            raise RuntimeError("no such layer")

    bench.script.before_step = explode
    events = await bench.draw(image_request("bad"))
    assert len(terminals(events)) == 1
    assert isinstance(events[-1], Failed)
    assert events[-1].error.is_failure
    assert "layer" not in events[-1].error.message
    for seed in range(4):
        assert levels(await bench.draw(image_request("good", seed=seed))) == [seed]
    assert (await bench.engine.get_health_status()).state == "idle"


async def test_a_group_that_fails_is_drawn_one_by_one_so_that_only_the_guilty_one_fails(
    bench: DrawingBench,
) -> None:
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=1)
        await held.until_reached()
        group = [bench.begin(prompt, seed=ord(prompt[0])) for prompt in ("B", "bad", "C")]
        await bench.queued(3)

        def explode(prompt: str, _step: int) -> None:
            if prompt == "bad":
                raise RuntimeError("no such layer")

        bench.script.before_step = explode
        held.release()
        assert levels(await first) == [1]
        answers = [await each for each in group]
    assert bench.script.calls[1:] == [["B", "bad", "C"], ["B"], ["bad"], ["C"]]
    assert (levels(answers[0]), levels(answers[2])) == ([ord("B")], [ord("C")])
    assert [type(event) for event in answers[1]] == [Started, Failed]
    assert all(len(terminals(events)) == 1 and events.count(Started()) == 1 for events in answers)


async def test_a_denoiser_that_fails_for_one_of_a_batch_fails_that_one_alone(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=1)
        await held.until_reached()
        others = [bench.begin("X", seed=2, num_inference_steps=3), bench.begin("C", seed=3)]
        await bench.queued(2)

        def explode(letters: str) -> None:
            if "X" in letters:
                raise RuntimeError("no such layer")

        bench.pipeline.unet.before = explode
        held.release()
        assert levels(await first) == [1]
        assert [type(event) for event in await others[0]] == [Started, Failed]
        assert levels(await others[1]) == [3]


async def test_out_of_memory_in_a_step_halves_the_batch_and_goes_on(bench: DrawingBench) -> None:
    def run_out(letters: str) -> None:
        if len(letters) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench.pipeline.unet.before = run_out
    answers = await asyncio.gather(
        bench.draw(image_request("A", seed=1, n=2, num_inference_steps=5)),
        bench.draw(image_request("B", seed=8, n=2, num_inference_steps=6)),
    )
    assert [levels(events) for events in answers] == [[1, 2], [8, 9]]
    assert max(map(len, bench.batches)) == 2


@pytest.mark.parametrize("bad", ["nan", "inf"])
async def test_case_41_latents_that_are_no_numbers_are_an_error_not_a_black_or_white_picture(
    bench: DrawingBench, bad: str
) -> None:
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=0)
        await held.until_reached()
        group = [bench.begin(prompt, seed=0) for prompt in ("black", bad, "good")]
        await bench.queued(3)
        held.release()
        await first
        black, broken, good = [await each for each in group]
    assert isinstance(broken[-1], Failed)
    assert (broken[-1].error.http_status, broken[-1].error.code) == (500, "non_finite_output")
    assert (levels(black), levels(good)) == ([0], [0])
    assert (await bench.engine.get_health_status()).diffusion == DiffusionStatus(0, non_finite=1)


class BreaksAt:
    """A safety checker that cannot look at pictures of this level."""

    def __init__(self, broken: int | None = None) -> None:
        self._broken = broken

    def flags(self, images: Sequence[Image.Image]) -> tuple[bool, ...]:
        if any(image.getextrema()[0][0] == self._broken for image in images):
            raise RuntimeError("no such layer")
        return (False,) * len(images)


async def test_what_is_no_numbers_is_counted_where_the_safety_checker_looks_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = DrawingBench(monkeypatch)
    bench.loaded = replace(bench.loaded, safety_checker=BreaksAt())
    await bench.engine.start()
    last = (await bench.draw(image_request("nan")))[-1]
    status = await bench.engine.get_health_status()
    await bench.engine.stop()
    assert isinstance(last, Failed)
    assert last.error.code == "non_finite_output"
    assert status.diffusion == DiffusionStatus(0, non_finite=1)


async def test_who_is_answered_is_not_drawn_again_when_the_next_of_the_group_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = DrawingBench(monkeypatch)
    bench.loaded = replace(bench.loaded, safety_checker=BreaksAt(ord("C")))
    await bench.engine.start()
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=1)
        await held.until_reached()
        group = [bench.begin(prompt, seed=ord(prompt)) for prompt in "BCD"]
        await bench.queued(3)
        held.release()
        await first
        answers = [await each for each in group]
    await bench.engine.stop()
    assert [levels(events) for events in answers] == [[ord("B")], [], [ord("D")]]
    assert all(len(terminals(events)) == 1 for events in answers)
    assert bench.script.calls[1:] == [["B", "C", "D"], ["C"], ["D"]]


# --- The end of things ---------------------------------------------------------------------------------


async def test_case_43_a_reader_that_leaves_ends_the_drawing_within_a_step(bench: DrawingBench) -> None:
    with bench.held_at("A", step=1) as held:
        leaving = bench.engine.run(image_request("A", num_inference_steps=20))
        await anext(leaving)
        await held.until_reached()
        await leaving.aclose()
        held.release()
        assert isinstance((await bench.draw(image_request("B", seed=5)))[-1], Finished)
    assert bench.batches == ["A"] + ["B"] * 4


@pytest.mark.parametrize("alike", [True, False])
async def test_case_43_one_that_leaves_changes_nothing_for_the_others(
    bench: DrawingBench, alike: bool
) -> None:
    with bench.held_at("A", step=2) as held:
        steps = {"A": 8, "B": 8, "C": 8} if alike else {"A": 8, "B": 9, "C": 10}
        tasks = [bench.begin(name, seed=ord(name), num_inference_steps=n) for name, n in steps.items()]
        await held.until_reached()
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        before = len(bench.batches)
        held.release()
        assert levels(await tasks[0]) == [ord("A")]
        assert levels(await tasks[2]) == [ord("C")]
    if not alike:
        assert not any("B" in batch for batch in bench.batches[before + 1 :])
    assert (await bench.engine.get_health_status()).work_pending == 0


async def test_one_of_a_group_who_leaves_gives_its_place_to_whoever_waits(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        blocker = bench.begin("A", n=4, seed=0, num_inference_steps=1)
        await held.until_reached()
        leaving = bench.begin("B", n=2, seed=1, num_inference_steps=20)
        staying = bench.begin("C", n=2, seed=3, num_inference_steps=20)
        late = bench.begin("D", n=2, seed=5, num_inference_steps=1)
        await bench.queued(3)
        with bench.held_at("C", step=2) as held_group:
            held.release()
            await blocker
            await held_group.until_reached()
            assert bench.script.calls[1:] == [["B", "B", "C", "C"]], "four at once are the most"
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            with bench.held_at("C", step=10) as held_again:
                held_group.release()
                assert levels(await late) == [5, 6], "drawn while the one that stays is in its middle"
                held_again.release()
        assert levels(await staying) == [3, 4]
    assert bench.script.calls[2:] == [["D", "D"]]


async def test_one_of_a_group_who_leaves_is_computed_no_further(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        blocker = bench.begin("A", seed=1, num_inference_steps=1)
        await held.until_reached()
        group = [bench.begin(prompt, seed=ord(prompt), num_inference_steps=4) for prompt in "BCD"]
        await bench.queued(3)
        with bench.held_at("B", step=1) as held_group:
            held.release()
            await blocker
            await held_group.until_reached()
            group[1].cancel()
            await asyncio.gather(group[1], return_exceptions=True)
            held_group.release()
            assert [levels(await group[0]), levels(await group[2])] == [[ord("B")], [ord("D")]]
    tried = ["BCD", "BD"]  # the first time, whole and without: what differs stays whole
    assert bench.batches == ["A", "BCD", *tried, "BD", "BD", "BD"]


async def test_a_group_is_given_up_when_its_last_reader_has_left(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        blocker = bench.begin("A", seed=1, num_inference_steps=1)
        await held.until_reached()
        group = [bench.begin(prompt, num_inference_steps=20) for prompt in "BC"]
        await bench.queued(2)
        with bench.held_at("B", step=2) as held_group:
            held.release()
            await blocker
            await held_group.until_reached()
            for task in group:
                task.cancel()
            await asyncio.gather(*group, return_exceptions=True)
            held_group.release()
            await bench.draw(image_request("D", num_inference_steps=1))
    assert bench.batches == ["A", "BC", "BC", "D"]
    await until_status(bench.engine, running=0, queued=0)


async def test_a_deadline_in_mid_drawing_ends_it_with_504(bench: DrawingBench) -> None:
    bench.script.before_step = lambda _prompt, step: bench.clock.advance(2.0)
    events = await bench.draw(image_request(num_inference_steps=20, timeout_s=5.0))
    assert isinstance(events[-1], Failed)
    assert (events[-1].error.http_status, events[-1].error.is_failure) == (504, False)
    assert (await bench.engine.get_health_status()).steps_done == 2


async def test_a_deadline_ends_waiting_too(bench: DrawingBench) -> None:
    with bench.held_at("A") as held:
        first = bench.begin("A", n=4, num_inference_steps=20)
        await held.until_reached()
        waiting = bench.begin("B", timeout_s=5.0)
        await bench.queued(1)
        bench.clock.advance(6.0)
        held.release()
        events = await waiting
        assert isinstance(events[-1], Failed)
        assert events[-1].error.http_status == 504
        await first
    assert bench.script.calls == [["A"] * 4]


async def test_stopping_ends_what_runs_and_refuses_what_comes(bench: DrawingBench) -> None:
    with bench.held_at("A", step=1) as held:
        tasks = [bench.begin("A", num_inference_steps=20), bench.begin("B", n=4)]
        await until_status(bench.engine, running=1, queued=1)
        await held.until_reached()
        stopping = asyncio.create_task(bench.engine.stop())
        await until(bench.engine._stopping.is_set)
        held.release()
        await stopping
        for events in (await tasks[0], await tasks[1], await bench.draw(image_request())):
            assert len(terminals(events)) == 1
            assert isinstance(events[-1], Failed)
            assert events[-1].error.retryable
    assert len(bench.batches) <= 2


async def test_an_engine_that_fails_says_so_to_everybody(
    bench: DrawingBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blaze.engines.diffusion.hub import Hub

    def fall_over(_hub: Hub) -> None:
        raise RuntimeError("cannot happen")

    monkeypatch.setattr(Hub, "step", fall_over)
    events = await bench.draw(image_request())
    assert isinstance(events[-1], Failed)
    assert events[-1].error.is_failure
    await until_status(bench.engine, state="failed")


# --- Requests that run whole ---------------------------------------------------------------------------


async def test_requests_of_some_classes_run_whole_and_the_status_says_why(whole: DrawingBench) -> None:
    status = await whole.engine.get_health_status()
    assert status.detail == "requests run whole, one after another: its unet is shy"
    assert status.state == "idle"
    with whole.held_at("A", step=1) as held:
        first = whole.begin("A", seed=1, num_inference_steps=3, progress=True)
        await held.until_reached()
        others = [whole.begin(prompt, seed=ord(prompt), num_inference_steps=2) for prompt in "BC"]
        last = whole.begin("D", seed=4)
        await until_status(whole.engine, running=1, queued=3)
        held.release()
        events = await first
        assert [event for event in events if isinstance(event, Progress)] == [
            Progress(step, 3) for step in (1, 2, 3)
        ]
        assert [levels(await each) for each in (*others, last)] == [[ord("B")], [ord("C")], [4]]
    assert whole.script.calls == [["A"], ["B", "C"], ["D"]]
    assert whole.batches == ["A"] * 3 + ["BC"] * 2 + ["D"] * 4
    assert (await whole.engine.get_health_status()).steps_done == 9


async def test_whole_requests_are_cancelled_within_a_step_too(whole: DrawingBench) -> None:
    with whole.held_at("A", step=1) as held:
        leaving = whole.engine.run(image_request("A", num_inference_steps=20))
        await anext(leaving)
        await held.until_reached()
        await leaving.aclose()
        held.release()
        assert levels(await whole.draw(image_request("B", seed=5))) == [5]
    assert whole.batches == ["A"] * 2 + ["B"] * 4


async def test_stopping_ends_a_whole_request_within_a_step(whole: DrawingBench) -> None:
    with whole.held_at("A", step=1) as held:
        running = whole.begin("A", num_inference_steps=20)
        await held.until_reached()
        stopping = asyncio.create_task(whole.engine.stop())
        await until(whole.engine._stopping.is_set)
        held.release()
        await stopping
        events = await running
    assert isinstance(events[-1], Failed)
    assert events[-1].error.code == "replica_stopping"


# --- Deterministic -------------------------------------------------------------------------------------


async def test_deterministic_engines_pad_every_step_to_one_size_and_group_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = DrawingBench(monkeypatch, deterministic=True)
    await bench.engine.start()
    with bench.held_at("A") as held:
        first = bench.begin("A", seed=1)
        await held.until_reached()
        alike = [bench.begin(prompt, seed=ord(prompt)) for prompt in "BC"]
        await bench.queued(2)
        held.release()
        answers: list[list[Event]] = [await first, *[await each for each in alike]]
    await bench.engine.stop()
    assert [levels(events) for events in answers] == [[1], [ord("B")], [ord("C")]]
    assert bench.script.calls == [["A"], ["B"], ["C"]]
    padded = [batch for batch in bench.batches if len(batch) > 1]
    assert {len(batch) for batch in padded} == {4}
    assert any({*batch} == {"A", "B", "C"} for batch in padded)
