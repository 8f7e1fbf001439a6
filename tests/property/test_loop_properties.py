"""The engine's loop, whatever happens in whatever order: every answer ends once, and nothing is left."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch
from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from blaze.engines.channel import EventChannel
from blaze.engines.llm.choice import Choice
from blaze.engines.llm.job import Job
from blaze.engines.llm.loop import EngineBroken, EngineLoop
from blaze.engines.llm.scheduler import Work, rank
from blaze.engines.llm.sequence import Sequence
from blaze.errors import ReplicaStopping
from blaze.sampling_params import SamplingParams
from blaze.types import ChoiceFinished, Event, Failed, Finished, Started
from tests.fake_models import BROKEN, ScriptedRunner, fake_served
from tests.fakes import FakeClock
from tests.samples import terminals, text_of

SCRIPTS = {"a": "abcdefgh", "b": "b" * 30, "c": "", "x": "ok" + chr(BROKEN), "n": "not a number"}
NAN_AFTER = 3  # tokens of "n"


@dataclass(frozen=True)
class Arrival:
    prompt: str
    n: int
    priority: int
    timeout_s: float | None
    echo: bool
    leaves_after: int | None  # steps; None: the reader stays


@dataclass(frozen=True)
class Turn:
    """What happens before a step, and whether the step fails."""

    arrivals: list[Arrival]
    seconds: float
    fails: bool


ARRIVAL = st.builds(
    Arrival,
    prompt=st.builds(lambda first, more: first + "z" * more, st.sampled_from("abcxn"), st.integers(0, 20)),
    n=st.integers(1, 3),
    priority=st.integers(-1, 1),
    timeout_s=st.none() | st.sampled_from([0.0, 2.0, 9.0]),
    echo=st.booleans(),
    leaves_after=st.none() | st.integers(0, 9),
)
TURN = st.builds(
    Turn,
    arrivals=st.lists(ARRIVAL, max_size=2),
    seconds=st.sampled_from([0.0, 0.5, 1.0]),
    fails=st.sampled_from([False, False, False, True]),
)


@dataclass
class Client:
    arrival: Arrival
    job: Job
    leaves_at: int | None
    events: list[Event] = field(default_factory=list)
    left: bool = False


def poison(logits: torch.Tensor, work: Work) -> None:
    sequence = work.sequence
    if chr(sequence.token_ids[0]) == "n" and sequence.num_generated >= NAN_AFTER:
        logits.fill_(float("nan"))


class Bench:
    def __init__(self) -> None:
        self.clock = FakeClock(0.0)
        self.failing = False
        self.runner = ScriptedRunner(SCRIPTS, before_step=self.before_step, shape=poison)
        self.served = fake_served(self.runner, kv_tokens=128)  # two of the longest sequences
        self.loop = EngineLoop(
            self.runner, self.served.cache, self.clock, max_batch_size=4, max_batch_tokens=16
        )
        self.clients: list[Client] = []
        self.turns = 0
        self.broken = False

    def before_step(self) -> None:
        if self.failing:
            raise RuntimeError("the step fails")

    def arrive(self, arrival: Arrival) -> None:
        sampling = SamplingParams(
            n=arrival.n, seed=1, echo=arrival.echo, logprobs=1 if arrival.echo else None, max_tokens=20
        )
        ids = tuple(map(ord, arrival.prompt))
        choices: list[Choice] = []
        for index in range(arrival.n):
            sequence = Sequence(
                ids,
                rank(self.clock.now(), arrival.priority, len(self.clients), index, aging_s=1.0),
                leader=choices[0].sequence if choices else None,
                needs_all_logits=arrival.echo,
            )
            choices.append(Choice(index, sequence, sampling, 20, self.served.model.vocabulary))
        deadline = None if arrival.timeout_s is None else self.clock.now() + arrival.timeout_s
        job = Job(ids, tuple(choices), EventChannel(), deadline)
        leaves_at = None if arrival.leaves_after is None else self.turns + arrival.leaves_after
        self.clients.append(Client(arrival, job, leaves_at))
        self.loop.add(job)

    async def turn(self, turn: Turn) -> None:
        for arrival in turn.arrivals:
            self.arrive(arrival)
        for client in self.clients:
            if client.leaves_at == self.turns and not terminals(client.events):
                await self.leave(client)
        self.clock.advance(turn.seconds)
        step = self.loop.schedule()
        unwanted = {
            choice.sequence for client in self.clients if client.left for choice in client.job.choices
        }
        assert not any(work.sequence in unwanted for work in step.work), "nobody waits for it any more"
        self.failing = turn.fails
        try:
            self.loop.execute(step)
        except EngineBroken:
            self.broken = True
        self.turns += 1
        for client in self.clients:
            await self.read(client)

    async def leave(self, client: Client) -> None:
        batches = client.job.channel.read()
        client.job.channel.put(Started())  # so that there is something to wake up for
        await anext(batches)
        await batches.aclose()
        client.left = True

    async def read(self, client: Client) -> None:
        """All that is there."""
        await asyncio.sleep(0)  # the channel's wake-up
        channel = client.job.channel
        if not client.left and channel._ready.is_set() and not channel.abandoned:
            client.events.extend(await anext(channel))


async def serve(turns: list[Turn]) -> Bench:
    bench = Bench()
    for turn in turns:
        if not bench.broken:
            await bench.turn(turn)
    for _ in range(2000):
        if bench.broken or not bench.loop.num_jobs:
            break
        await bench.turn(Turn([], 0.0, fails=False))
    if bench.broken:
        bench.loop.end(ReplicaStopping("The replica is shutting down."))
        for client in bench.clients:
            await bench.read(client)
    return bench


@settings(max_examples=150)
@given(st.lists(TURN, max_size=25))
def test_every_answer_ends_once_and_nothing_is_left(turns: list[Turn]) -> None:
    bench = asyncio.run(serve(turns))
    note("the engine broke" if bench.broken else "all was served")
    assert bench.loop.num_jobs == bench.loop.num_running_jobs == 0
    assert (bench.loop.scheduler.num_running, bench.loop.scheduler.num_waiting) == (0, 0)
    cache = bench.served.cache
    assert cache.free_tokens + cache.kept_tokens == cache.total_tokens
    for client in bench.clients:
        if not client.left:
            check(client.arrival, client.events)


def check(arrival: Arrival, events: list[Event]) -> None:
    assert terminals(events) == [events[-1]]
    assert sum(isinstance(event, Started) for event in events) <= 1
    script = arrival.prompt * arrival.echo + SCRIPTS[arrival.prompt[0]][:20]
    for index in range(arrival.n):
        assert script.startswith(text_of(events, index))
    if isinstance(events[-1], Finished):
        assert isinstance(events[0], Started)
        ends = [event.index for event in events if isinstance(event, ChoiceFinished)]
        assert sorted(ends) == list(range(arrival.n))
        assert [text_of(events, index) for index in range(arrival.n)] == [script] * arrival.n
        assert arrival.prompt[0] not in "xn"
        assert events[-1].usage.cached_tokens < len(arrival.prompt)
    else:
        assert isinstance(events[-1], Failed)
        reasons = {"deadline_exceeded", "engine_error", "replica_stopping"}
        assert events[-1].error.code in reasons | {"non_finite_output"}
        if events[-1].error.code == "non_finite_output":
            assert arrival.prompt[0] == "n"
