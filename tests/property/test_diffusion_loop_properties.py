"""The diffusion engine's loop, whatever comes, leaves and fails: every answer ends once, in bounds."""

from __future__ import annotations

import asyncio
import io
import threading
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blaze.engine_config import DiffusionConfig
from blaze.engines.channel import Bell, EventChannel
from blaze.engines.diffusion.counter import NonFiniteCounter
from blaze.engines.diffusion.job import Job
from blaze.engines.diffusion.loop import DiffusionLoop
from blaze.engines.diffusion.writer import ImageWriter
from blaze.engines.progress import StepCounter
from blaze.errors import ReplicaStopping
from blaze.types import Event, Failed, Finished, ImageReady, Started
from tests.fake_pipeline import FakePipeline, fake_pipeline
from tests.fakes import FakeClock
from tests.samples import image_request, terminals

MAX_IMAGES = 4


@dataclass(frozen=True)
class Arrival:
    prompt: str  # "bad" fails in the pipeline, "xen" in the denoiser, "nan" draws no numbers
    n: int
    steps: int
    width: int
    timeout_s: float | None
    leaves_after: int | None  # turns


@dataclass
class Client:
    arrival: Arrival
    job: Job
    seed: int
    leaves_at: int | None
    left: bool = False
    events: list[Event] = field(default_factory=list)


ARRIVAL = st.builds(
    Arrival,
    prompt=st.sampled_from(["good", "fine", "bad", "xen", "nan"]),
    n=st.integers(1, 3),
    steps=st.integers(1, 4),
    width=st.sampled_from([8, 16]),
    timeout_s=st.none() | st.sampled_from([0.0, 3.0]),
    leaves_after=st.none() | st.integers(0, 5),
)


class Bench:
    def __init__(self, *, deterministic: bool, whole: bool) -> None:
        self.clock = FakeClock(0.0)
        self.pipeline = FakePipeline()
        self.pipeline.script.before_step = self.before_step
        self.pipeline.unet.before = self.before_forward
        self.bell = Bell()
        counter = NonFiniteCounter()
        self.progress = StepCounter(self.clock)
        self.writer = ImageWriter(self.bell, counter, self.progress)
        self.loop = DiffusionLoop(
            fake_pipeline(self.pipeline, whole_because="the test says so" if whole else None),
            DiffusionConfig(max_batch_size=MAX_IMAGES, deterministic=deterministic),
            writer=self.writer,
            progress=self.progress,
            counter=counter,
            stopping=threading.Event(),
        )
        self.clients: list[Client] = []
        self.turns = 0

    def before_step(self, prompt: str, step: int) -> None:
        if prompt == "bad" and step == 1:
            raise RuntimeError("the pipeline fails")

    def before_forward(self, letters: str) -> None:
        if "x" in letters:
            raise RuntimeError("the denoiser fails")

    def arrive(self, arrival: Arrival) -> None:
        seed = len(self.clients)
        request = image_request(
            arrival.prompt, n=arrival.n, num_inference_steps=arrival.steps, width=arrival.width, seed=seed
        )
        deadline = None if arrival.timeout_s is None else self.clock.now() + arrival.timeout_s
        job = Job(request, EventChannel(self.bell), self.clock, deadline)
        leaves_at = None if arrival.leaves_after is None else self.turns + arrival.leaves_after
        self.clients.append(Client(arrival, job, seed, leaves_at))
        self.loop.add(job)

    def turn(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            self.arrive(arrival)
        for client in self.clients:
            if client.leaves_at == self.turns:
                client.job.channel.abandon()
                client.left = True
        self.loop.step()
        self.clock.advance(0.5)
        self.turns += 1

    async def read(self, client: Client) -> None:
        async for events in client.job.channel:
            client.events += events


async def serve(turns: list[list[Arrival]], *, deterministic: bool, whole: bool, stops: bool) -> Bench:
    bench = Bench(deterministic=deterministic, whole=whole)
    for arrivals in turns:
        bench.turn(arrivals)
    for _ in range(0 if stops else 500):
        if bench.loop.is_idle:
            break
        bench.turn([])
    assert stops or bench.loop.is_idle
    bench.loop.end(ReplicaStopping("The replica is shutting down."))
    bench.writer.close()
    for client in bench.clients:
        if not client.left:
            await bench.read(client)
    return bench


@settings(max_examples=120)
@given(st.lists(st.lists(ARRIVAL, max_size=3), max_size=8), st.booleans(), st.booleans(), st.booleans())
def test_every_answer_ends_once_and_no_batch_is_too_large(
    turns: list[list[Arrival]], deterministic: bool, whole: bool, stops: bool
) -> None:
    bench = asyncio.run(serve(turns, deterministic=deterministic, whole=whole, stops=stops))
    assert all(len(batch) <= MAX_IMAGES for batch in bench.pipeline.unet.batches)
    assert all(len(call) <= MAX_IMAGES for call in bench.pipeline.script.calls)
    assert bench.writer.num_unfinished == 0
    for client in bench.clients:
        if not client.left:
            check(client, stops=stops)


def check(client: Client, *, stops: bool) -> None:
    arrival, events = client.arrival, client.events
    assert terminals(events) == [events[-1]]
    assert events.count(Started()) <= 1
    if isinstance(events[-1], Finished):
        images = [event for event in events if isinstance(event, ImageReady)]
        assert [image.seed for image in images] == list(range(client.seed, client.seed + arrival.n))
        assert [grey(image.data) for image in images] == [image.seed for image in images]
        assert {image.width for image in images} == {arrival.width}
        assert arrival.prompt in ("good", "fine") or (arrival.prompt == "bad" and arrival.steps == 1)
        return
    assert isinstance(events[-1], Failed)
    reasons = {"deadline_exceeded"} if arrival.timeout_s is not None else set()
    reasons |= {"replica_stopping"} if stops else set()
    reasons |= {"engine_error"} if arrival.prompt in ("bad", "xen") else set()
    reasons |= {"non_finite_output"} if arrival.prompt == "nan" else set()
    assert events[-1].error.code in reasons


def grey(data: bytes) -> int:
    levels = np.asarray(Image.open(io.BytesIO(data)))
    assert levels.min() == levels.max()
    return int(levels.max())
