from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blaze.engines.channel import EventChannel
from blaze.engines.diffusion.batching import WaitingLine, alike
from blaze.engines.diffusion.job import Job
from blaze.errors import Cancelled, DeadlineExceeded
from blaze.types import Caller
from tests.fakes import FakeClock
from tests.samples import image_request

Make = Callable[..., Job]


@pytest.fixture
async def make() -> Make:
    """Jobs by name; channels need a loop."""
    clock = FakeClock(0.0)

    def make_job(prompt: str = "A", *, deadline: float | None = None, **options: Any) -> Job:
        return Job(image_request(prompt, **options), EventChannel(), clock, deadline)

    return make_job


def line_of(*jobs: Job, grouped: bool = True) -> WaitingLine:
    line = WaitingLine(grouped=grouped)
    for job in jobs:
        line.add(job)
    return line


def names(calls: list[tuple[Job, ...]]) -> list[str]:
    return ["".join(job.request.prompt for job in jobs) for jobs in calls]


async def test_those_alike_are_one_call_wherever_they_wait(make: Make) -> None:
    line = line_of(make("A"), make("B", num_inference_steps=3), make("C"), make("D", num_inference_steps=3))
    assert names(line.take(8)) == ["AC", "BD"]
    assert len(line) == 0


async def test_nobody_is_overtaken_by_one_that_would_fit(make: Make) -> None:
    line = line_of(make("A"), make("B", n=3), make("C"))
    assert names(line.take(3)) == ["A"]
    assert names(line.take(2)) == []
    assert names(line.take(4)) == ["BC"]


async def test_as_many_calls_as_asked_for(make: Make) -> None:
    line = line_of(make("A"), make("B"), make("C", num_inference_steps=3), make("D"))
    assert names(line.take(8, most_calls=1)) == ["AB"]
    assert names(line.take(8, most_calls=1)) == ["C"]


async def test_where_nothing_is_grouped_each_is_a_call(make: Make) -> None:
    assert names(line_of(make("A"), make("B"), grouped=False).take(8)) == ["A", "B"]


async def test_those_put_back_come_first_and_singly(make: Make) -> None:
    line = line_of(make("A"), make("B"), make("C"))
    (group,) = line.take(2)
    line.put_back(group)
    assert names(line.take(8)) == ["A", "B", "C"]


async def test_the_unwanted_are_taken_out_with_the_reason(make: Make) -> None:
    jobs = [make("A"), make("B", deadline=0.0), make("C"), make("D")]
    line = line_of(*jobs)
    line.put_back([make("E", deadline=0.0)])
    jobs[2].channel.abandon()
    gone = line.remove_unwanted()
    assert [(job.request.prompt, type(reason)) for job, reason in gone] == [
        ("E", DeadlineExceeded),
        ("B", DeadlineExceeded),
        ("C", Cancelled),
    ]
    assert names(line.take(8)) == ["AD"]
    assert line.remove_unwanted() == []


async def test_clearing_gives_all_that_wait(make: Make) -> None:
    line = line_of(make("A"), make("B"))
    line.put_back([make("C")])
    assert [job.request.prompt for job in line.clear()] == ["C", "A", "B"]
    assert len(line) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"negative_prompt": "x"},
        {"width": 16},
        {"num_inference_steps": 3},
        {"guidance_scale": 2.0},
        {"image": b"other"},
        {"mask": b"m"},
        {"strength": 0.5},
        {"scheduler": "euler"},
        {"eta": 0.5},
        {"clip_skip": 1},
        {"adapters": (("a", 1.0),)},
    ],
)
def test_what_the_pipeline_is_told_makes_requests_different(other: dict[str, Any]) -> None:
    assert alike(image_request(image=b"i")) != alike(image_request(**({"image": b"i"} | other)))


def test_what_the_pipeline_is_not_told_does_not() -> None:
    other = image_request(
        "two",
        seed=5,
        n=3,
        output_format="webp",
        output_compression=50,
        partial_images=2,
        progress=True,
        timeout_s=3.0,
        caller=Caller(user="somebody"),
    )
    assert alike(other) == alike(image_request())
