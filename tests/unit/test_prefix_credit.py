"""Prompts as chains, what engines hold of them, and what that is worth to a Router."""

from __future__ import annotations

import asyncio
import random

import pytest

from blaze.engines.llm.held_prompts import HeldPrompts
from blaze.engines.llm.prefix import Prefix, PrefixIndex
from blaze.engines.llm.slots import Slot
from blaze.prompt_chain import LINK_BYTES, MOST_LINKS, packed, prompt_chain, unpacked
from blaze.routing.columns import Columns
from blaze.routing.cost import BYTES_PER_TOKEN, PROMPT_TOKEN
from blaze.routing.prefix_credit import PrefixCredit
from blaze.routing.strategies import STRATEGY_NAMES, make_strategy
from blaze.types import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from tests.fakes import FakePool
from tests.routing_bench import RoutingBench
from tests.samples import text_request
from tests.waiting import until

LINK = PROMPT_TOKEN * LINK_BYTES / BYTES_PER_TOKEN
SYSTEM = ChatMessage("system", "You are a helpful assistant. " * 40)  # four links and a half


def conversation(*turns: str) -> ChatPrompt:
    return ChatPrompt((SYSTEM, *(ChatMessage("user", turn) for turn in turns)))


def text(links: float, letter: str = "x") -> TextPrompt:
    return TextPrompt(letter * int(links * LINK_BYTES))


# --- Chains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "links"),
    [
        (TextPrompt(""), 0),
        (text(0.99), 0),
        (text(1), 1),
        (text(2.5), 2),
        (text(1000), MOST_LINKS),
        (TextPrompt("é" * LINK_BYTES), 2),  # bytes, not characters
        (TokenPrompt(tuple(range(32))), 1),
        (ChatPrompt((ChatMessage("user", None),)), 0),
        (TextPrompt("\udc80" * LINK_BYTES), 3),  # half a pair, from a handle
    ],
)
def test_only_whole_links_count(prompt: Prompt, links: int) -> None:
    assert len(prompt_chain(prompt)) == links


def test_what_begins_alike_has_a_chain_that_begins_alike() -> None:
    one, other = prompt_chain(conversation("a" * 600)), prompt_chain(conversation("b" * 600))
    assert one[:4] == other[:4]
    assert one[5:] and not set(one[5:]) & set(other[5:])


def test_a_link_stands_for_all_before_it() -> None:
    assert not set(prompt_chain(TextPrompt("a" + text(3).text))) & set(prompt_chain(text(3)))


def test_roles_and_tools_count() -> None:
    said = "hello " * 100
    chains = {
        prompt_chain(ChatPrompt((ChatMessage("user", said),))),
        prompt_chain(ChatPrompt((ChatMessage("system", said),))),
        prompt_chain(ChatPrompt((ChatMessage("user", said),), tools="[1]")),
    }
    assert len(chains) == 3


def test_a_digest_survives_the_way() -> None:
    chain = prompt_chain(text(5))
    assert tuple(unpacked(packed(chain))) == chain


# --- What an engine holds -----------------------------------------------------------------------------


@pytest.mark.parametrize(("held", "links"), [(0, 0), (50, 2), (99, 3), (100, 4)])
def test_links_are_held_in_the_measure_that_tokens_are(held: int, links: int) -> None:
    prompts, chain = HeldPrompts(), prompt_chain(text(4))
    prompts.note(chain, tuple(range(100)))
    assert tuple(unpacked(prompts.digest(lambda _ids: held))) == chain[:links]


def test_the_latest_prompts_are_in_the_digest_and_it_has_an_end() -> None:
    prompts = HeldPrompts()
    chains = [prompt_chain(text(60, letter)) for letter in "abcdefgh"]
    for chain in chains:
        prompts.note(chain, (1, 2))
    digest = list(unpacked(prompts.digest(lambda _ids: 2)))
    assert len(digest) == 256
    assert digest[:60] == list(chains[-1])
    assert not set(digest) & set(chains[0])


def test_short_prompts_and_old_ones_are_forgotten() -> None:
    prompts = HeldPrompts()
    prompts.note((), (1,))
    for number in range(70):
        prompts.note((number,), (1,))
    assert set(unpacked(prompts.digest(lambda _ids: 1))) == set(range(6, 70))


def test_the_index_tells_how_much_is_at_hand() -> None:
    index = PrefixIndex(4)
    index.extend(Prefix(list(range(10)), Slot(0, 16)), 10)
    for asked, held in (
        (range(10), 8),
        (range(7), 4),
        ([0, 1, 2, 3, 9, 9, 9, 9], 4),
        ([5, 6, 7, 8], 0),
        ((), 0),
    ):
        assert index.held(list(asked)) == held


# --- What it is worth ----------------------------------------------------------------------------------


def test_credit_is_for_a_chain_without_a_gap() -> None:
    columns, credit, chain = Columns("abcd"), PrefixCredit(), prompt_chain(text(4))
    credit.learn(
        [("a", packed(chain[:2])), ("b", packed(chain)), ("c", packed(chain[1:])), ("gone", packed(chain))]
    )
    found = credit.of(chain, columns, 0.0)
    assert found is not None
    assert found.tolist() == [2 * LINK, 4 * LINK, 0.0, 0.0]
    assert credit.of(prompt_chain(text(4, "y")), columns, 0.0) is None
    assert credit.of((), columns, 0.0) is None


def test_what_replicas_say_replaces_what_they_said() -> None:
    columns, credit, chain = Columns("ab"), PrefixCredit(), prompt_chain(text(2))
    credit.learn([("a", packed(chain))])
    credit.learn([("b", packed(chain))])
    found = credit.of(chain, columns, 0.0)
    assert found is not None and found.tolist() == [0.0, 2 * LINK]


def test_what_was_sent_counts_until_the_replica_can_say_so() -> None:
    columns, credit, chain = Columns("ab"), PrefixCredit(), prompt_chain(text(2))
    credit.sent(chain, "b", now=10.0)
    found = credit.of(chain, columns, 12.9)
    assert found is not None and found.tolist() == [0.0, 2 * LINK]
    assert credit.of(chain, columns, 13.1) is None


def test_what_was_sent_is_bounded() -> None:
    credit = PrefixCredit()
    for number in range(10_000):
        credit.sent((number,), "a", now=0.0)
    assert len(credit._sent) == 4096


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_only_adaptive_looks_at_prefixes(name: str) -> None:
    assert make_strategy(name, rng=random.Random(0)).wants_credit is (name == "adaptive")


async def test_a_conversation_goes_on_where_its_beginning_is_held() -> None:
    bench = RoutingBench(FakePool(tuple("abcdefgh")), strategy="adaptive")
    bench.dispatcher.prefixes.learn([("e", packed(prompt_chain(conversation())))])
    for _ in range(4):
        await bench.ask(text_request(conversation("And now?"), max_tokens=1))
    assert bench.called == ["e"] * 4


async def test_a_popular_beginning_drowns_nobody() -> None:
    bench = RoutingBench(FakePool(tuple("abcd"), held=True), strategy="adaptive", max_in_flight=8)
    bench.dispatcher.prefixes.learn([("a", packed(prompt_chain(conversation())))])
    tasks = [
        asyncio.create_task(bench.ask(text_request(conversation(str(n)), max_tokens=50))) for n in range(16)
    ]
    await until(lambda: len(bench.called) == 16)
    assert max(bench.in_flight.values()) <= 6
    for call in bench.pool.open_calls:
        call.release()
    await asyncio.gather(*tasks)
