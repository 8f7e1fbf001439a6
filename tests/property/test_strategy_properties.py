"""All strategies over any history of members, numbers and eligibility."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blaze.routing.columns import Columns, stable_hash
from blaze.routing.rendezvous import BALANCE, IPHash
from blaze.routing.strategies import STRATEGY_NAMES, make_strategy
from blaze.routing.strategy import Ask, Pick, Strategy
from blaze.routing.turns import RoundRobin, WeightedRoundRobin
from tests.routing_columns import columns, picks, places

NOW = 1000.0
NAMES = st.sampled_from(STRATEGY_NAMES)
SEEDS = st.integers()
IDS = st.text("abcdef", min_size=1, max_size=3)
NUMBERS = st.fixed_dictionaries(
    {
        "weight": st.sampled_from([0.5, 1.0, 4.0]),
        "ramp": st.sampled_from([0.1, 0.7, 1.0]),
        "in_flight": st.integers(0, 5),
        "in_flight_here": st.integers(0, 5),
        "cost": st.sampled_from([0.0, 3.0, 100.0, 1e9]),
        "drain": st.sampled_from([math.nan, 0.5, 20.0]),
        "success": st.sampled_from([0.0, 0.5, 1.0]),
        "response": st.sampled_from([math.nan, 0.0, 0.1, 60.0]),
        "measured_at": st.sampled_from([-math.inf, NOW - 100, NOW]),
        "waiting_since": st.sampled_from([NOW - 5, NOW, math.inf]),
    }
)

ALL_COLUMNS = (
    "weight",
    "ramp",
    "in_flight",
    "cost",
    "drain",
    "success",
    "response",
    "measured_at",
    "waiting_since",
    "hashes",
)


@dataclass(frozen=True)
class Round:
    """What there is when a request comes."""

    members: dict[str, dict[str, float]]
    ineligible: frozenset[str]
    ask: Ask
    cost_cap: float
    peers_age_s: float

    def take_over(self, seen: Columns) -> list[str]:
        seen.resize(self.members)
        seen.cost_cap, seen.peers_age_s = self.cost_cap, self.peers_age_s
        for replica_id, numbers in self.members.items():
            for name, value in numbers.items():
                getattr(seen, name)[seen.place[replica_id]] = value
        return [replica_id for replica_id in seen.ids if replica_id not in self.ineligible]


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    members = draw(st.dictionaries(IDS, NUMBERS, max_size=6))
    credit = draw(st.none() | st.lists(st.floats(0, 10), min_size=len(members), max_size=len(members)))
    return Round(
        members,
        frozenset(draw(st.sets(st.sampled_from(sorted(members)))) if members else ()),
        Ask(
            NOW + draw(st.floats(0, 20)),
            draw(st.floats(0, 1000)),
            draw(st.none() | st.integers(0, 2**64 - 1)),
            None if credit is None else np.array(credit),
        ),
        draw(st.sampled_from([50.0, 1e6, math.inf])),
        draw(st.sampled_from([0.0, 0.5, 2.0, math.inf])),
    )


HISTORY = st.lists(rounds(), max_size=12)


@given(NAMES, SEEDS, st.integers(1, 3), HISTORY)
def test_a_strategy_picks_one_of_the_eligible_whenever_there_is_one(
    name: str, seed: int, routers: int, history: list[Round]
) -> None:
    seen, strategy = Columns(), make_strategy(name, rng=random.Random(seed), routers=routers)
    for round in history:
        eligible = round.take_over(seen)
        pick = strategy.choose(seen, places(seen, eligible), round.ask)
        assert pick.replica_id in eligible if pick else not eligible


@given(NAMES, SEEDS, st.integers(1, 3), HISTORY)
def test_the_same_seed_gives_the_same_picks(name: str, seed: int, routers: int, history: list[Round]) -> None:
    def all_picks() -> list[Pick | None]:
        seen, strategy = Columns(), make_strategy(name, rng=random.Random(seed), routers=routers)
        return [strategy.choose(seen, places(seen, round.take_over(seen)), round.ask) for round in history]

    assert all_picks() == all_picks()


@given(NAMES, SEEDS, rounds())
def test_a_pick_changes_none_of_the_numbers(name: str, seed: int, round: Round) -> None:
    seen, untouched = Columns(), Columns()
    eligible = places(seen, round.take_over(seen))
    round.take_over(untouched)
    before = eligible.copy()
    make_strategy(name, rng=random.Random(seed)).choose(seen, eligible, round.ask)
    for column in ALL_COLUMNS:
        np.testing.assert_array_equal(getattr(seen, column), getattr(untouched, column))
    np.testing.assert_array_equal(eligible, before)


# --- Turns -------------------------------------------------------------------------------------------


@given(SEEDS, HISTORY, st.sets(IDS, min_size=1, max_size=6), st.integers(1, 4))
def test_round_robin_is_fair_whatever_was_before(
    seed: int, history: list[Round], ids: set[str], turns: int
) -> None:
    seen, strategy = Columns(), RoundRobin(random.Random(seed))
    for round in history:
        strategy.choose(seen, places(seen, round.take_over(seen)), round.ask)
    seen.resize(ids)
    for _ in range(turns):
        assert sorted(map(str, picks(strategy, seen, len(ids)))) == sorted(ids), "each once in a turn"


@given(SEEDS, st.sets(IDS, min_size=2, max_size=6), st.data())
def test_the_order_of_round_robin_survives_membership_changes(
    seed: int, ids: set[str], data: st.DataObject
) -> None:
    seen, strategy = columns(ids), RoundRobin(random.Random(seed))
    (last,) = picks(strategy, seen)
    assert last is not None
    for _ in range(data.draw(st.integers(1, 5))):
        ids = data.draw(st.sets(IDS, min_size=1, max_size=6))
        seen.resize(ids)
        (chosen,) = picks(strategy, seen)
        assert chosen == min((id for id in ids if id > last), default=min(ids))
        last = chosen


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([1.0, 0.25, 0.1, 1 / 3]))
@example([5, 1, 1], 1.0)
def test_the_shares_of_weighted_round_robin_are_exact_over_a_cycle(weights: list[int], unit: float) -> None:
    ids = "abcdef"[: len(weights)]
    seen, strategy = columns(ids, weight=[weight * unit for weight in weights]), WeightedRoundRobin()
    for _ in range(3):
        assert Counter(picks(strategy, seen, sum(weights))) == dict(zip(ids, weights, strict=True))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_with_weighted_round_robin_nobody_is_a_whole_turn_ahead(weights: list[int]) -> None:
    ids = "abcde"[: len(weights)]
    chosen = picks(WeightedRoundRobin(), columns(ids, weight=weights), sum(weights))
    for replica_id, weight in zip(ids, weights, strict=True):
        for count, had in enumerate(accumulate(pick == replica_id for pick in chosen), 1):
            assert had < count * weight / sum(weights) + 1


@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), max_size=30))
def test_weighted_round_robin_soon_forgets_who_was_skipped(eligible: list[set[str]]) -> None:
    seen, strategy = columns("abcd", weight=(4, 3, 2, 1)), WeightedRoundRobin()
    for some in eligible:
        picks(strategy, seen, among=some)
    chosen = Counter(picks(strategy, seen, 50))
    assert all(abs(chosen[id] - 5 * weight) < 4 for id, weight in zip("abcd", (4, 3, 2, 1), strict=True))


# --- Loads -------------------------------------------------------------------------------------------


@given(SEEDS, rounds())
def test_one_router_with_least_connections_never_passes_over_a_less_loaded_replica(
    seed: int, round: Round
) -> None:
    seen = Columns()
    eligible = round.take_over(seen)
    pick = make_strategy("least_connections", rng=random.Random(seed)).choose(
        seen, places(seen, eligible), round.ask
    )
    loads = {
        id: (n["in_flight"] + 1) / (n["weight"] * n["ramp"])
        for id, n in round.members.items()
        if id in eligible
    }
    assert loads[pick.replica_id] == min(loads.values()) if pick else not loads


@pytest.mark.parametrize("name", ["least_connections", "least_response_time", "adaptive"])
@given(seed=SEEDS, ids=st.sets(IDS, min_size=3, max_size=8))
def test_of_two_choices_the_worst_never_wins(name: str, seed: int, ids: set[str]) -> None:
    strategy: Strategy = make_strategy(name, rng=random.Random(seed), routers=2)
    seen = columns(ids, response=1.0, measured_at=NOW, cost=1.0)
    seen.peers_age_s = 2.0
    worst = max(ids)
    seen.in_flight[-1], seen.response[-1], seen.cost[-1] = 1.0, 2.0, 2.0
    assert worst not in picks(strategy, seen, 20, ask=Ask(NOW))


# --- ip_hash -----------------------------------------------------------------------------------------

KEYS = [stable_hash(f"address:10.0.{number // 256}.{number % 256}") for number in range(20_000)]
TEN = tuple(f"replica-{number}" for number in range(10))


@cache
def owners(*ids: str) -> list[str | None]:
    seen, strategy = columns(ids), IPHash(random.Random(0))
    eligible = places(seen)
    chosen = (strategy.choose(seen, eligible, Ask(0.0, key=key)) for key in KEYS)
    return [None if pick is None else pick.replica_id for pick in chosen]


@pytest.mark.parametrize("gone", ["replica-0", "replica-6", "replica-9"])
def test_removing_one_of_ten_replicas_moves_its_own_keys_alone(gone: str) -> None:
    before, after = owners(*TEN), owners(*(id for id in TEN if id != gone))
    assert all(was == gone for was, now in zip(before, after, strict=True) if was != now)
    assert 0.8 / 10 < before.count(gone) / len(KEYS) < 1.2 / 10
    heirs = Counter(now for was, now in zip(before, after, strict=True) if was == gone)
    assert len(heirs) == 9, "they are shared out among all others"


@pytest.mark.parametrize("new", ["replica-10", "a", "replica-00"])
def test_adding_one_to_ten_replicas_moves_its_share_of_the_keys_and_no_more(new: str) -> None:
    before, after = owners(*TEN), owners(*TEN, new)
    moved = [now for was, now in zip(before, after, strict=True) if was != now]
    assert set(moved) == {new}
    assert 0.7 / 11 < len(moved) / len(KEYS) < 1.3 / 11


def test_another_process_gives_the_same_answers() -> None:
    code = (
        "import json; from tests.property.test_strategy_properties import owners, TEN; "
        "print(json.dumps(owners(*TEN)[:2000]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    root = Path(__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(other.stdout) == owners(*TEN)[:2000]


@given(st.randoms(use_true_random=False), st.lists(st.sampled_from([0.5, 1, 1, 4]), min_size=1, max_size=8))
def test_bounded_load_holds_under_popular_keys_and_random_completions(
    rng: random.Random, weights: list[float]
) -> None:
    ids = "abcdefgh"[: len(weights)]
    seen, strategy = columns(ids, weight=weights), IPHash(random.Random(0))
    shares = seen.weight / seen.weight.sum()
    running: list[int] = []
    most = 0
    keys = [rng.getrandbits(64) for _ in range(20)]
    popular = [1 / rank for rank in range(1, 21)]  # Zipf: the first comes every fourth time
    for _ in range(150):
        for _ in range(rng.randrange(3) if len(running) > 40 else rng.randrange(2)):
            if running:
                seen.in_flight_here[running.pop(rng.randrange(len(running)))] -= 1
        (key,) = rng.choices(keys, popular)
        (chosen,) = picks(strategy, seen, ask=Ask(0.0, key=key))
        assert chosen is not None
        place = seen.place[chosen]
        seen.in_flight_here[place] += 1
        running.append(place)
        most = max(most, len(running))
        assert seen.in_flight_here[place] <= BALANCE * len(running) * shares[place] + 1
        assert (seen.in_flight_here <= BALANCE * most * shares + 1).all()
