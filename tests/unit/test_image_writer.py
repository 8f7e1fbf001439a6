from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from blaze.engines.channel import Bell, EventChannel
from blaze.engines.diffusion import writer as writer_module
from blaze.engines.diffusion.counter import NonFiniteCounter
from blaze.engines.diffusion.images import Pixels
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.writer import ImageWriter
from blaze.engines.progress import StepCounter
from blaze.reports import DiffusionStatus
from blaze.types import EngineKind, Event, Failed, Finished, ImageReady, PartialImage
from tests.fakes import FakeClock
from tests.samples import collect, image_request
from tests.waiting import until


class WriterBench:
    def __init__(self) -> None:
        self.bell = Bell()
        self.counter = NonFiniteCounter()
        self.progress = StepCounter(FakeClock())
        self.writer = ImageWriter(self.bell, self.counter, self.progress)

    @property
    def cpu_s(self) -> float | None:
        return self.progress.status(EngineKind.DIFFUSION, loaded=True, failed=None).compute_cpu_s

    def job(self, **options: Any) -> Job:
        return Job(image_request(**options), EventChannel(self.bell), FakeClock())


@pytest.fixture
async def bench() -> AsyncIterator[WriterBench]:
    made = WriterBench()
    yield made
    await asyncio.to_thread(made.writer.close)


def grey(level: float = 0.5) -> Pixels:
    return np.full((4, 4, 3), level, dtype=np.float32)


async def events_of(job: Job) -> list[Event]:
    return await collect(job.channel.read())


def kinds(events: list[Event]) -> list[type]:
    return [type(event) for event in events]


async def test_news_is_announced_though_the_compute_thread_holds_the_bell(bench: WriterBench) -> None:
    job = bench.job(seed=3)
    with bench.bell.held():
        bench.writer.finish(job, [grey()])
        events = await asyncio.wait_for(events_of(job), 30)
    assert kinds(events) == [ImageReady, Finished]


async def test_the_image_comes_after_previews_that_take_longer(
    bench: WriterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, go_on, waiting = writer_module.encode, threading.Event(), threading.Event()
    encoded: list[object] = []

    def slow_first(image: Any, image_format: Any, compression: Any = None) -> bytes:
        if not waiting.is_set():
            waiting.set()
            assert go_on.wait(30)
        encoded.append(image)
        return encode(image, image_format, compression)

    monkeypatch.setattr(writer_module, "encode", slow_first)
    job = bench.job(n=2, partial_images=1)
    bench.writer.preview(job, 0, [grey(), grey()])
    await until(waiting.is_set)
    bench.writer.finish(job, [grey(), grey()])
    await until(lambda: len(encoded) == 2)
    assert bench.writer.num_unfinished == 1
    go_on.set()
    events = await events_of(job)
    assert kinds(events) == [PartialImage, PartialImage, ImageReady, ImageReady, Finished]
    await until(lambda: bench.writer.num_unfinished == 0)


async def test_a_slow_image_does_not_hold_up_those_of_others(
    bench: WriterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, go_on = writer_module.encode, threading.Event()

    def slow_webp(image: Any, image_format: Any, compression: Any = None) -> bytes:
        assert image_format != "webp" or go_on.wait(30)
        return encode(image, image_format, compression)

    monkeypatch.setattr(writer_module, "encode", slow_webp)
    slow, quick = bench.job(output_format="webp"), bench.job()
    bench.writer.finish(slow, [grey()])
    bench.writer.finish(quick, [grey()])
    assert kinds(await events_of(quick)) == [ImageReady, Finished]
    go_on.set()
    assert kinds(await events_of(slow)) == [ImageReady, Finished]


async def test_one_image_that_is_no_number_fails_its_request(bench: WriterBench) -> None:
    job = bench.job(n=2)
    bench.writer.finish(job, [grey(), grey(float("nan"))])
    (event,) = await events_of(job)
    assert isinstance(event, Failed)
    assert event.error.code == "non_finite_output"
    assert bench.counter.status() == DiffusionStatus(decoded_again=0, non_finite=1)


async def test_an_encoder_that_fails_fails_the_request(
    bench: WriterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr(writer_module, "encode", fail)
    job = bench.job()
    bench.writer.finish(job, [grey()])
    (event,) = await events_of(job)
    assert bench.counter.status().non_finite == 0
    assert isinstance(event, Failed)
    assert event.error.http_status == 500
    assert "disk" not in event.error.message
    await until(lambda: bench.writer.num_unfinished == 0)


async def test_nothing_is_encoded_for_one_that_has_left(
    bench: WriterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[object] = []
    monkeypatch.setattr(writer_module, "encode", lambda *args: encoded.append(args) or b"")
    job = bench.job()
    job.channel.abandon()
    bench.writer.finish(job, [grey()])
    await until(lambda: bench.writer.num_unfinished == 0)
    assert encoded == []


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no clocks of their own there")
async def test_encoding_is_a_sign_of_progress_and_waiting_to_encode_is_none(
    bench: WriterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compute thread may have nothing to do meanwhile, and the request is pending all the same."""
    encode, waiting, go_on = writer_module.encode, threading.Event(), threading.Event()

    def encode_later(image: Any, image_format: Any, compression: Any = None) -> bytes:
        waiting.set()
        assert go_on.wait(30)
        return encode(image, image_format, compression)

    assert bench.cpu_s is None
    monkeypatch.setattr(writer_module, "encode", encode_later)
    job = bench.job()
    bench.writer.finish(job, [np.random.default_rng(0).random((512, 512, 3), dtype=np.float32)])
    await until(waiting.is_set)
    before = bench.cpu_s
    assert before is not None
    go_on.set()
    assert kinds(await events_of(job)) == [ImageReady, Finished]
    assert (bench.cpu_s or 0.0) - before > 0.005  # what Vitals asks for at least
