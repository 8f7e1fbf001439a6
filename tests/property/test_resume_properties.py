"""An answer that goes on elsewhere is the answer that was never broken off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blaze.engines.channel import EventChannel
from blaze.engines.llm.choice import Choice
from blaze.engines.llm.job import Job
from blaze.engines.llm.loop import EngineLoop
from blaze.engines.llm.sampling import SampledToken
from blaze.engines.llm.scheduler import Work, rank
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.vocabulary import Vocabulary
from blaze.sampling_params import SamplingParams
from blaze.types import ChoiceFinished, Event, Failed, Finished, Started, TextDelta
from tests.fake_models import EOS, VOCABULARY_SIZE, CharacterNames, ScriptedRunner, fake_served
from tests.fakes import ByteDecoder, FakeClock
from tests.samples import collect

# Tokens that cut characters and stop strings in two, with an end token drawn now and then.
PIECES = [b"", b"a", b"b", b"ab", b"\xe2\x82", b"\xac", b"\xf0", b"\x9f\x9a", b"\x80", b" "]
STOPS = st.lists(st.sampled_from(["ab", "bb", "a a", "€", "€b", "b€a", "\ufffd"]), max_size=3)


@st.composite
def samplings(draw: st.DrawFn, options: dict[str, Any]) -> SamplingParams:
    max_tokens = draw(st.integers(1, 16))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop=tuple(draw(STOPS)),
        stop_token_ids=tuple(draw(st.lists(st.integers(1, len(PIECES) - 1), max_size=1))),
        ignore_eos=draw(st.booleans()),
        **options,
    )


def events_by_token(choice: Choice, tokens: Iterable[int]) -> list[tuple[Event, ...]]:
    """Of each token up to the end of the choice."""
    events: list[tuple[Event, ...]] = []
    for token in tokens:
        if choice.finish_reason is None:
            events.append(choice.append(SampledToken(token, None, ())))
    return events


@given(samplings({}), st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=16), st.data())
def test_from_any_cut_on_the_events_are_those_of_the_unbroken_answer(
    sampling: SamplingParams, script: list[int], data: st.DataObject
) -> None:
    vocabulary = Vocabulary(ByteDecoder(PIECES), CharacterNames(), frozenset({EOS}))

    def begun(generated: list[int]) -> Choice:
        sequence = Sequence((1, 2), (0.0, 0, 0), generated=generated)
        return Choice(0, sequence, sampling, sampling.max_tokens or 0, vocabulary)

    unbroken = begun([])
    expected = events_by_token(unbroken, script)
    cut = data.draw(st.integers(0, len(expected)))
    resumed = begun(script[:cut])
    found = events_by_token(resumed, script[cut:])
    assert found == expected[cut:]
    assert resumed.finish_reason == unbroken.finish_reason
    assert resumed.num_generated == unbroken.num_generated


# --- The same through the engine's loop: with draws, penalties, choices and what memory does -------------


def like_a_model(logits: torch.Tensor, work: Work) -> None:
    """Some of the letters, depending on all the tokens before; now and then the end."""
    seed = hash(tuple(work.sequence.token_ids)) & 0xFFFF
    letters = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    logits.fill_(-torch.inf)
    logits[[EOS, *map(ord, "abc")]] = letters - torch.tensor([1.0, 0.0, 0.0, 0.0])


def answer(
    prompt: str, sampling: SamplingParams, generated: tuple[tuple[int, ...], ...], crowd: int
) -> list[Event]:
    """With a few others beside it that take memory away from it."""

    async def serve() -> list[Event]:
        served = fake_served(ScriptedRunner({"p": ""}, shape=like_a_model), kv_tokens=64)
        loop = EngineLoop(
            served.runner, served.cache, FakeClock(), max_batch_size=4, max_batch_tokens=VOCABULARY_SIZE
        )

        def job(serial: int, sampling: SamplingParams, generated: tuple[tuple[int, ...], ...]) -> Job:
            ids = tuple(map(ord, prompt))
            choices = tuple(
                Choice(
                    index,
                    Sequence(
                        ids,
                        rank(0.0, 0, serial, index, aging_s=1.0),
                        generated=generated[index] if generated else (),
                    ),
                    sampling,
                    sampling.max_tokens or 0,
                    served.model.vocabulary,
                )
                for index in range(sampling.n)
            )
            return Job(ids, choices, EventChannel(), None)

        for serial in range(crowd):
            loop.add(job(serial, replace(sampling, seed=serial, n=1), ()))
        asked = job(crowd, sampling, generated)
        loop.add(asked)
        for _ in range(1000):
            loop.execute(loop.schedule())
        assert loop.num_jobs == 0, "it is never served"
        return await collect(asked.channel.read())

    return asyncio.run(serve())


def of_choice(events: Iterable[Event], index: int) -> list[Event]:
    return [e for e in events if isinstance(e, TextDelta | ChoiceFinished) and e.index == index]


@settings(max_examples=60)
@given(
    samplings({"n": 2, "seed": 7, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "logprobs": 2}),
    st.integers(1, 12),
    st.integers(0, 4),
    st.data(),
)
def test_draws_and_usage_go_on_from_any_cut_whoever_else_is_served(
    sampling: SamplingParams, length: int, crowd: int, data: st.DataObject
) -> None:
    prompt = "p" * length
    whole = answer(prompt, sampling, (), 0)
    tokens = [
        [token for e in of_choice(whole, index) if isinstance(e, TextDelta) for token in e.token_ids]
        for index in range(2)
    ]
    cuts = [data.draw(st.integers(0, len(ids))) for ids in tokens]
    generated = tuple(tuple(ids[:cut]) for ids, cut in zip(tokens, cuts, strict=True))
    resumed = answer(prompt, sampling, generated, crowd)
    for index, cut in enumerate(cuts):
        assert of_choice(resumed, index) == of_choice(whole, index)[cut:]
    assert isinstance(resumed[0], Started)
    assert [event for event in resumed if isinstance(event, Finished | Failed)] == [resumed[-1]]
    assert isinstance(whole[-1], Finished)
    assert isinstance(resumed[-1], Finished)
    spared = {"cached_tokens": 0}  # that depends on who was there before
    assert replace(resumed[-1].usage, **spared) == replace(whole[-1].usage, **spared)
