from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from blaze.errors import ConfigError
from blaze.routing.columns import Columns, stable_hash
from blaze.routing.least import LeastConnections
from blaze.routing.strategies import STRATEGY_NAMES, make_strategy
from blaze.routing.turns import RoundRobin, WeightedRoundRobin
from tests.routing_columns import columns, picks

# --- round_robin -------------------------------------------------------------------------------------


def test_round_robin_splits_evenly() -> None:
    assert Counter(picks(RoundRobin(random.Random(1)), columns("ab"), 20)) == {"a": 10, "b": 10}


def test_round_robin_follows_the_order_of_ids() -> None:
    order = picks(RoundRobin(random.Random(1)), columns("cab"), 6)
    assert order[:3] == order[3:]
    start = "abc".index(str(order[0]))
    assert order[:3] == list("abcabc"[start : start + 3])


def test_round_robin_routers_start_at_different_places() -> None:
    starts = {picks(RoundRobin(random.Random(seed)), columns("abc"))[0] for seed in range(50)}
    assert starts == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("live", "following"),
    [
        (("a", "b", "c", "d"), ["c", "d", "a"]),
        (("a", "c", "d"), ["c", "d", "a"]),
        (("a", "b", "ca", "d"), ["ca", "d", "a"]),
        (("a", "b", "ba", "c", "d"), ["ba", "c", "d"]),
        (("0", "a", "b", "c", "d"), ["c", "d", "0"]),
        (("a", "b"), ["a", "b", "a"]),
        (("a",), ["a", "a", "a"]),
        (("x", "y"), ["x", "y", "x"]),
    ],
)
def test_the_order_of_round_robin_survives_membership_changes(
    live: tuple[str, ...], following: list[str]
) -> None:
    seen, strategy = columns("abcd"), RoundRobin(random.Random(0))
    while picks(strategy, seen) != ["b"]:
        pass
    seen.resize(live)
    assert picks(strategy, seen, 3) == following, "b was last"


def test_round_robin_skips_the_ineligible_and_stays_even_among_the_rest() -> None:
    seen, strategy = columns("abcd"), RoundRobin(random.Random(3))
    assert Counter(picks(strategy, seen, 10, among="ac")) == {"a": 5, "c": 5}
    while picks(strategy, seen) != ["a"]:
        pass
    assert picks(strategy, seen, 2, among="ad") == ["d", "a"]
    assert picks(strategy, seen, 3) == ["b", "c", "d"]


def test_round_robin_takes_no_notice_of_weights() -> None:
    seen = columns("ab", weight=(5.0, 1.0), in_flight=(9.0, 0.0))
    assert Counter(picks(RoundRobin(random.Random(1)), seen, 10)) == {"a": 5, "b": 5}


# --- weighted_round_robin ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ((5.0, 1.0, 1.0), "aabacaa"),
        ((1.0, 1.0, 1.0), "abc"),
        ((2.0, 1.0), "aba"),
        ((3.0, 2.0, 1.0), "abacba"),
        ((0.5, 0.25, 0.25), "abca"),
        ((7.0,), "a"),
    ],
)
def test_turns_are_spread_out_in_proportion_to_weights(weights: Sequence[float], turns: str) -> None:
    seen = columns("abc"[: len(weights)], weight=weights)
    assert picks(WeightedRoundRobin(), seen, 3 * len(turns)) == list(3 * turns)


def test_credit_belongs_to_a_replica_not_to_a_place() -> None:
    # After a a b of a a b a c a a, somebody joins between them: those that were there go on as before.
    seen, strategy = columns("abc", weight=(5.0, 1.0, 1.0)), WeightedRoundRobin()
    assert picks(strategy, seen, 3) == ["a", "a", "b"]
    seen.resize(("a", "aa", "b", "c"))
    assert picks(strategy, seen, 2) == ["a", "c"]


def test_who_is_skipped_neither_saves_up_turns_nor_loses_them() -> None:
    seen, strategy = columns("abc"), WeightedRoundRobin()
    assert Counter(picks(strategy, seen, 30, among="ab")) == {"a": 15, "b": 15}
    assert picks(strategy, seen, 6) == list("abcabc")


def test_new_weights_count_from_the_next_cycle_on() -> None:
    seen, strategy = columns("ab", weight=(3.0, 1.0)), WeightedRoundRobin()
    assert Counter(picks(strategy, seen, 4)) == {"a": 3, "b": 1}
    seen.weight[:] = (1.0, 3.0)
    assert Counter(picks(strategy, seen, 4)) == {"a": 1, "b": 3}


def test_slow_start_scales_the_weight() -> None:
    seen = columns("ab", weight=(2.0, 1.0), ramp=(0.1, 1.0))
    assert Counter(picks(WeightedRoundRobin(), seen, 12)) == {"a": 2, "b": 10}


# --- least_connections -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_flight", "weights", "ramps", "least"),
    [
        ((3, 1, 2), (1, 1, 1), (1, 1, 1), "b"),
        ((5, 1, 9), (4, 1, 1), (1, 1, 1), "a"),  # (5 + 1) / 4 = 1.5 beats (1 + 1) / 1 = 2
        ((0, 0, 0), (1, 1, 2), (1, 1, 1), "c"),  # with nothing in flight, weights decide
        ((0, 3, 4), (1, 1, 1), (0.1, 1, 1), "b"),  # (0 + 1) / 0.1 = 10: it has just come
        ((0, 3, 4), (1, 1, 1), (0.5, 1, 1), "a"),
        ((2, 5, 8), (1, 2, 3), (1, 1, 1), "abc"),  # all 3
        ((1, 1, 5), (1, 1, 1), (1, 1, 1), "ab"),
    ],
)
def test_the_least_connections_for_the_weight(
    in_flight: Sequence[float], weights: Sequence[float], ramps: Sequence[float], least: str
) -> None:
    seen = columns("abc", in_flight=in_flight, weight=weights, ramp=ramps)
    assert set(picks(LeastConnections(random.Random(0)), seen, 100)) == set(least)


def test_ties_of_least_connections_are_broken_at_random() -> None:
    chosen = Counter(picks(LeastConnections(random.Random(0)), columns("abc"), 300))
    assert set(chosen) == {"a", "b", "c"}
    assert min(chosen.values()) > 60


def test_who_is_not_eligible_is_not_the_least() -> None:
    seen = columns("abcd", in_flight=(5, 0, 1, 0))
    assert set(picks(LeastConnections(random.Random(0)), seen, 20, among="ac")) == {"c"}


def test_several_routers_do_not_herd_onto_the_least_loaded() -> None:
    seen = columns("abcdefgh", in_flight=(0, 5, 5, 5, 5, 5, 5, 5))
    assert set(picks(LeastConnections(random.Random(0), routers=1), seen, 200)) == {"a"}
    chosen = Counter(picks(LeastConnections(random.Random(0), routers=3), seen, 400))
    # Two choices of eight: "a" is among them for a quarter of the picks, and wins then.
    assert 60 < chosen["a"] < 140
    assert len(chosen) == 8


def test_of_two_choices_the_less_loaded_wins() -> None:
    # "b" is among two of three for two thirds of the picks; the two others are never compared with a worse.
    chosen = Counter(
        picks(LeastConnections(random.Random(0), routers=2), columns("abc", in_flight=(9, 0, 9)), 600)
    )
    assert 350 < chosen["b"] < 450


def test_the_most_loaded_never_wins_a_comparison() -> None:
    seen = columns("abcd", in_flight=(1, 1, 1, 2))
    assert set(picks(LeastConnections(random.Random(0), routers=2), seen, 200)) == {"a", "b", "c"}


def test_of_two_replicas_several_routers_take_the_less_loaded() -> None:
    seen = columns("abc", in_flight=(3, 0, 2))
    assert set(picks(LeastConnections(random.Random(0), routers=2), seen, 50, among="ac")) == {"c"}


# --- All of them -------------------------------------------------------------------------------------


def test_there_are_six() -> None:
    assert STRATEGY_NAMES == (
        "adaptive",
        "ip_hash",
        "least_connections",
        "least_response_time",
        "round_robin",
        "weighted_round_robin",
    )


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_nobody_eligible_is_no_pick(name: str) -> None:
    assert picks(make_strategy(name, rng=random.Random(0)), columns("ab"), among=()) == [None]


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_an_empty_pool_is_no_pick_and_its_first_replica_is(name: str) -> None:
    seen, strategy = columns(()), make_strategy(name, rng=random.Random(0))
    assert picks(strategy, seen) == [None]
    seen.resize(["a"])
    assert picks(strategy, seen, 3) == ["a", "a", "a"]


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_every_strategy_can_be_made_and_knows_its_name(name: str) -> None:
    assert make_strategy(name, rng=random.Random(0), routers=2).name == name


@pytest.mark.parametrize("name", ["", "ROUND_ROBIN", "fastest", "round_robin "])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_strategy(name, rng=random.Random(0))
    assert caught.value.param == "strategy"
    assert repr(name) in caught.value.message
    assert all(known in caught.value.message for known in STRATEGY_NAMES)


# --- Columns -----------------------------------------------------------------------------------------


def test_columns_are_in_the_order_of_ids_and_those_that_stay_keep_their_numbers() -> None:
    seen = columns("cab", in_flight=(1, 2, 3), weight=(1, 2, 3))
    assert list(seen.ids) == ["a", "b", "c"]
    seen.resize(("d", "c", "aa", "a"))
    assert list(seen.ids) == ["a", "aa", "c", "d"]
    assert seen.place == {"a": 0, "aa": 1, "c": 2, "d": 3}
    assert seen.in_flight.tolist() == [1, 0, 3, 0]
    assert seen.weight.tolist() == [1, 1, 3, 1]
    assert len(seen) == 4


def test_a_replica_that_has_just_come_has_no_past() -> None:
    seen = Columns(["a"])
    assert (seen.in_flight[0], seen.cost[0], seen.success[0], seen.weight[0]) == (0, 0, 1, 1)
    assert np.isnan([seen.response[0], seen.drain[0]]).all()
    assert (seen.waiting_since[0], seen.measured_at[0]) == (np.inf, -np.inf)


def test_hashes_are_the_same_on_every_machine() -> None:
    assert stable_hash("a") == 0x40F89E395B66422F, "BLAKE2b-64, big endian"
    assert columns("ab").hashes.tolist() == [stable_hash("a"), stable_hash("b")]
    assert stable_hash("\ud800") != stable_hash("\ud801"), "not every id is proper UTF-8"


def test_credit_of_other_weights_is_forgotten() -> None:
    seen, strategy = columns("ab", weight=(1000.0, 1000.0)), WeightedRoundRobin()
    picks(strategy, seen, 1)
    seen.weight[:] = 1.0
    assert picks(strategy, seen, 4) == ["a", "b", "a", "b"]
