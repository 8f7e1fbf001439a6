from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from blaze.config import AVAILABLE_STRATEGIES
from blaze.errors import ConfigError
from blaze.routing.strategies import LeastConnections, RoundRobin, Strategy, make_strategy
from tests.fakes import FakeView
from tests.samples import text_request

REQUEST = text_request()


def views(*ids: str) -> list[FakeView]:
    return [FakeView(id) for id in ids]


def picks(strategy: Strategy, seen: Sequence[FakeView], count: int) -> list[str | None]:
    chosen = (strategy.choose(seen, REQUEST) for _ in range(count))
    return [None if pick is None else pick.replica_id for pick in chosen]


# --- round_robin -------------------------------------------------------------------------------------


def test_round_robin_splits_evenly() -> None:
    assert Counter(picks(RoundRobin(random.Random(1)), views("a", "b"), 20)) == {"a": 10, "b": 10}


def test_round_robin_follows_the_order_of_ids() -> None:
    order = picks(RoundRobin(random.Random(1)), views("a", "b", "c"), 6)
    assert order[:3] == order[3:]
    start = "abc".index(str(order[0]))
    assert order[:3] == list("abcabc"[start : start + 3])


def test_round_robin_routers_start_at_different_places() -> None:
    starts = {picks(RoundRobin(random.Random(seed)), views("a", "b", "c"), 1)[0] for seed in range(50)}
    assert starts == {"a", "b", "c"}


def test_round_robin_order_survives_membership_changes() -> None:
    strategy = RoundRobin(random.Random(0))
    everyone = views("a", "b", "c", "d")
    while picks(strategy, everyone, 1) != ["b"]:
        pass
    # "b" was last: whoever leaves or joins, the next is the one that follows it.
    assert picks(strategy, views("a", "c", "d"), 1) == ["c"]
    assert picks(strategy, views("a", "b", "ca", "d"), 1) == ["ca"]
    assert picks(strategy, views("a", "b"), 1) == ["a"]
    assert picks(strategy, everyone, 3) == ["b", "c", "d"]


def test_round_robin_skips_the_ineligible_and_stays_even_among_the_rest() -> None:
    strategy = RoundRobin(random.Random(3))
    assert Counter(picks(strategy, views("a", "c"), 10)) == {"a": 5, "c": 5}


# --- least_connections -------------------------------------------------------------------------------


def test_least_connections_picks_the_least_loaded() -> None:
    seen = [FakeView("a", 3), FakeView("b", 1), FakeView("c", 2)]
    assert picks(LeastConnections(random.Random(0)), seen, 5) == ["b"] * 5


def test_least_connections_divides_by_the_weight() -> None:
    # (5 + 1) / 4 = 1.5 beats (1 + 1) / 1 = 2
    seen = [FakeView("a", 5, weight=4.0), FakeView("b", 1, weight=1.0)]
    assert picks(LeastConnections(random.Random(0)), seen, 3) == ["a"] * 3


def test_least_connections_breaks_ties_at_random() -> None:
    chosen = Counter(picks(LeastConnections(random.Random(0)), views("a", "b", "c"), 300))
    assert set(chosen) == {"a", "b", "c"}
    assert min(chosen.values()) > 60


@pytest.mark.parametrize("routers", [1, 2])
def test_case_35_weight_0_is_never_chosen(routers: int) -> None:
    strategy = LeastConnections(random.Random(0), routers=routers)
    seen = [FakeView("a", 0, weight=0.0), FakeView("b", 50), FakeView("c", 50), FakeView("d", 50)]
    assert "a" not in picks(strategy, seen, 400)
    assert picks(strategy, [FakeView("a", 0, weight=0.0)], 1) == [None]


def test_several_routers_do_not_herd_onto_the_least_loaded() -> None:
    seen = [FakeView("a", 0), *(FakeView(id, 5) for id in "bcdefgh")]
    alone = picks(LeastConnections(random.Random(0), routers=1), seen, 200)
    assert set(alone) == {"a"}
    chosen = Counter(picks(LeastConnections(random.Random(0), routers=3), seen, 400))
    # Two choices of eight: "a" is among them for a quarter of the picks, and wins then.
    assert 60 < chosen["a"] < 140
    assert len(chosen) == 8


def test_of_two_choices_the_less_loaded_wins() -> None:
    seen = [FakeView("a", 9), FakeView("b", 0), FakeView("c", 9)]
    chosen = Counter(picks(LeastConnections(random.Random(0), routers=2), seen, 300))
    assert chosen["b"] > chosen["a"] + chosen["c"] - 60
    assert chosen["b"] > 150


# --- All of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AVAILABLE_STRATEGIES)
def test_nobody_eligible_is_no_pick(name: str) -> None:
    assert make_strategy(name, rng=random.Random(0)).choose([], REQUEST) is None


@pytest.mark.parametrize("name", AVAILABLE_STRATEGIES)
def test_every_available_strategy_can_be_made_and_knows_its_name(name: str) -> None:
    assert make_strategy(name, rng=random.Random(0), routers=2).name == name


@pytest.mark.parametrize("name", ["", "ROUND_ROBIN", "fastest", "adaptive"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy(name, rng=random.Random(0))
    assert caught.value.param == "strategy"
    assert repr(name) in caught.value.message
    assert all(known in caught.value.message for known in AVAILABLE_STRATEGIES)
