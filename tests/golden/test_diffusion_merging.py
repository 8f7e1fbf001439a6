"""Requests that share denoiser calls are drawn as diffusers alone would draw each of them (fp32)."""

from __future__ import annotations

import asyncio
import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blaze.engines.diffusion.lanes import Fastest, Lanes
from blaze.engines.diffusion.pipelines import Task
from blaze.types import Finished, ImageReady, ImageRequest, Progress
from tests.golden.crowd import CASES, various
from tests.golden.diffusion import Alone, Recorder, engine_of, events_of, levels_of, loaded_by
from tests.golden.pipeline_folders import left_half, picture
from tests.golden.tiny_pipelines import PIPELINES, UNCONDITIONAL

pytestmark = pytest.mark.models

MOST_APART = 1e-4  # of latents, relative


@pytest.mark.parametrize(("name", "task"), CASES, ids=[f"{name}-{task}" for name, task in CASES])
async def test_twelve_at_once_are_drawn_as_each_would_be_alone(
    name: str, task: Task, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each forward on two threads where it has rows enough, whatever is the fastest."""
    recorder, splits = Recorder(monkeypatch), count_splits(monkeypatch)
    monkeypatch.setattr(Fastest, "choose", lambda _self, _key, ways: (ways[-1], False))
    async with engine_of(folders[name], max_batch_size=8, threads=2) as engine:
        loaded = loaded_by(engine)
        assert loaded.whole_because is None
        requests = various(name, task, loaded)
        together = await recorder.draw(engine, requests)
        steps = (await engine.get_health_status()).steps_done
        alone = Alone(folders[name], loaded)
    solo_steps = 0
    for request, drawn in zip(requests, together, strict=True):
        image = picture() if task is not Task.TEXT else None
        reference = alone.draw(request, image=image, mask=left_half() if task is Task.INPAINT else None)
        assert drawn.distance(reference) <= MOST_APART, request
        assert np.abs(drawn.levels - levels_of(reference.pixels)).max() <= 1, request
        progress = [event for event in drawn.events if isinstance(event, Progress)]
        total = progress[-1].total
        assert progress == [Progress(step, total) for step in range(1, total + 1)], request
        assert total >= int((request.num_inference_steps or 0) * (request.strength or 1.0)), request
        solo_steps += total
    assert steps < solo_steps / 2, "they were not merged"
    assert len(splits) > 3


def count_splits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of lanes of forwards that have more than one."""
    splits: list[int] = []
    split = Lanes._split

    def counting(self: Lanes, forward: Any, hands: Any, threads: int) -> object:
        splits.append(len(hands))
        return split(self, forward, hands, threads)

    monkeypatch.setattr(Lanes, "_split", counting)
    return splits


@pytest.mark.parametrize(("name", "task"), CASES, ids=[f"{name}-{task}" for name, task in CASES])
async def test_case_37_each_of_n_images_and_of_a_group_is_drawn_as_it_would_be_alone(
    name: str, task: Task, folders: dict[str, Path]
) -> None:
    alike = {"num_inference_steps": 5, "scheduler": None, "n": 2}
    async with engine_of(folders[name], max_batch_size=8) as engine:
        loaded = loaded_by(engine)
        requests = [
            replace(request, seed=10 * index, guidance_scale=request.guidance_scale and 3.0, **alike)
            for index, request in enumerate(various(name, task, loaded)[:3])
        ]
        answers = await asyncio.gather(*(events_of(engine, request) for request in requests))
        alone = Alone(folders[name], loaded)
    for request, events in zip(requests, answers, strict=True):
        images = [event for event in events if isinstance(event, ImageReady)]
        assert len(images) == 2
        for image in images:
            reference = alone.draw(
                replace(request, seed=image.seed),
                image=picture() if task is not Task.TEXT else None,
                mask=left_half() if task is Task.INPAINT else None,
            )
            levels = np.asarray(Image.open(io.BytesIO(image.data))).astype(np.int64)
            assert np.abs(levels - levels_of(reference.pixels)).max() <= 1


@pytest.mark.parametrize("name", [*PIPELINES, *UNCONDITIONAL])
async def test_16_bit_models_are_merged_too(name: str, folders: dict[str, Path]) -> None:
    async with engine_of(folders[name], max_batch_size=8, dtype="bfloat16") as engine:
        requests = various(name, Task.TEXT, loaded_by(engine))
        answers = await asyncio.gather(*(events_of(engine, request) for request in requests))
        steps = (await engine.get_health_status()).steps_done
    assert all(isinstance(events[-1], Finished) for events in answers)
    assert steps < sum(request.num_inference_steps or 0 for request in requests) / 2


@pytest.mark.parametrize(("name", "threads"), [("sd", 1), ("sd", 2), ("sd3", 1), ("sd3", 2), ("ddim", 1)])
async def test_deterministic_images_have_the_same_bits_whatever_is_beside_them(
    name: str, threads: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    async with engine_of(folders[name], threads=threads, max_batch_size=8, deterministic=True) as engine:
        requests = various(name, Task.TEXT, loaded_by(engine))
        alone = [(await recorder.draw(engine, [request]))[0] for request in requests]
        for company in (requests, requests[::-1], requests[3:9]):
            together = await recorder.draw(engine, company)
            for request, drawn in zip(company, together, strict=True):
                expected = alone[requests.index(request)]
                assert torch.equal(drawn.latents, expected.latents), request
                assert drawn.events[-2] == expected.events[-2], request
        reference = Alone(folders[name], loaded_by(engine))
        for request, drawn in zip(requests, alone, strict=True):
            assert drawn.distance(reference.draw(request)) <= MOST_APART


@pytest.mark.parametrize("deterministic", [False, True])
async def test_cancelling_one_of_eight_frees_it_within_a_step_and_changes_no_other(
    deterministic: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``deterministic`` a pixel may be rounded the other way, as the size of a batch changes."""
    recorder = Recorder(monkeypatch)
    async with engine_of(folders["sd"], max_batch_size=8, deterministic=deterministic) as engine:
        loaded = loaded_by(engine)
        requests = [
            replace(request, num_inference_steps=20 + index, guidance_scale=3.0, scheduler=None)
            for index, request in enumerate(various("sd", Task.TEXT, loaded)[:8])
        ]
        staying = [*requests[:3], *requests[4:]]
        undisturbed = await recorder.draw(engine, staying)
        rest = asyncio.create_task(recorder.draw(engine, staying))
        leaving = engine.run(replace(requests[3], num_inference_steps=200))
        seen = 0
        async for batch in leaving:
            seen += len(batch)
            if seen >= 10:
                break
        assert (await engine.get_health_status()).work_pending == 8
        before = (await engine.get_health_status()).steps_done
        await leaving.aclose()
        assert (await engine.get_health_status()).work_pending == 7
        disturbed = await rest
        assert (await engine.get_health_status()).steps_done - before <= 40, "200 if it were drawn to its end"
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert np.abs(one.levels - other.levels).max() <= (0 if deterministic else 1)


async def test_a_thousand_short_requests_each_get_their_own_prompt(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are encoded where everything of a pipeline is, on the engine's one thread: a fast tokenizer
    that two threads share returns wrong lengths now and then."""
    prompts = [f"{'word ' * (index % 5)}{index}" for index in range(40)]
    recorder = Recorder(monkeypatch)

    def request(index: int) -> ImageRequest:
        return ImageRequest(
            f"r-{index}", "sd", prompts[index % 40], seed=index % 40, num_inference_steps=1, timeout_s=200
        )

    async with engine_of(folders["sd"], max_batch_size=32) as engine:
        alone = [(await recorder.draw(engine, [request(index)]))[0].levels for index in range(40)]
        assert not all(np.array_equal(alone[0], other) for other in alone[1:])
        threads: set[int] = set()
        tokenizer = type(loaded_by(engine).pipeline.tokenizer)
        tokenize = tokenizer.__call__

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            threads.add(threading.get_ident())
            return tokenize(self, *args, **kwargs)

        monkeypatch.setattr(tokenizer, "__call__", watched)
        answers = await recorder.draw(engine, [request(index) for index in range(1000)])
    assert len(threads) == 1
    for index, drawn in enumerate(answers):
        assert np.abs(drawn.levels - alone[index % 40]).max() <= 1, index
