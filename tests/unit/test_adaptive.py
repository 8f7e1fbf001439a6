from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from blaze.routing.adaptive import Adaptive
from blaze.routing.strategy import Ask, Pick
from tests.routing_columns import columns, picks

NAN = math.nan


def chosen(numbers: dict[str, Sequence[float]], *, cost: float = 10.0, credit: Sequence[float] = ()) -> str:
    """All that are picked of "a", "b" and "c", and why they may differ."""
    seen = columns("abc", **({"drain": (1.0, 1.0, 1.0)} | numbers))
    ask = Ask(0.0, cost, credit=np.array(credit) if credit else None)
    return "".join(sorted(map(str, set(picks(Adaptive(random.Random(0)), seen, 60, ask=ask)))))


# --- Among the cold ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "soonest"),
    [
        ({"cost": (30, 10, 20)}, "b"),
        ({"cost": (30, 10, 20), "drain": (5, 1, 1)}, "a"),  # 40 / 5 = 8 beats 20 and 30
        ({"cost": (30, 10, 20), "success": (1, 0.5, 1)}, "c"),  # 20 / 0.25 = 80, but 30 / 1
        ({"cost": (30, 10, 20), "success": (1, 0.9, 1)}, "b"),  # 20 / 0.81 = 24.7
        ({"cost": (30, 10, 20), "success": (1, 0.75, 1)}, "c"),  # 20 / 0.5625 = 35.6: it is squared
        ({"cost": (30, 10, 20), "weight": (1, 0.5, 1)}, "c"),  # 20 / 0.5 = 40, but 30 / 1
        ({"cost": (30, 10, 20), "ramp": (1, 0.1, 1)}, "c"),
        ({"cost": (0, 0, 0)}, "abc"),  # ties at random
        ({"cost": (10, 30, 10), "drain": (1, 2, 1)}, "abc"),
        ({"cost": (30, 10, 20), "in_flight": (3, 3, 3)}, "b"),
        ({"cost": (30, 10, 20), "in_flight": (0, 1, 0)}, "c"),  # 20 * 2 = 40, but 30
        # Who serves four at once in four times the drain is no faster for one of them.
        ({"cost": (10, 10, 10), "drain": (4, 1, 1), "in_flight": (3, 0, 0)}, "abc"),
    ],
)
def test_the_least_cost_for_the_speed(numbers: dict[str, Sequence[float]], soonest: str) -> None:
    assert chosen(numbers) == soonest


@pytest.mark.parametrize(
    ("drain", "soonest"),
    [
        ((NAN, 1.0, 5.0), "c"),  # "a" counts as 3
        ((NAN, 3.0, 3.0), "abc"),
        ((NAN, 2.0, 4.0), "c"),
        ((NAN, 4.0, NAN), "abc"),
        ((NAN, NAN, NAN), "abc"),
    ],
)
def test_who_has_served_nothing_yet_is_as_fast_as_the_median(drain: Sequence[float], soonest: str) -> None:
    assert chosen({"drain": drain}) == soonest


def test_the_first_speed_that_is_measured_counts_for_all_at_once() -> None:
    seen, strategy = columns("ab", drain=(NAN, NAN), cost=(10, 10)), Adaptive(random.Random(0))
    strategy.choose(seen, np.array([0, 1]), Ask(0.0, 10.0))
    seen.drain[0] = 50.0
    asks = [Ask(0.001, 10.0, credit=np.array([0.0, 5.0]))] * 20
    assert {strategy.choose(seen, np.array([0, 1]), ask) for ask in asks} == {Pick("b")}


def test_a_replica_that_always_fails_is_no_division_by_zero() -> None:
    assert chosen({"success": (0, 0.01, 1)}) == "c"
    assert chosen({"success": (0, 0.01, 0.005)}) == "abc", "from 1 % down all are alike"


@pytest.mark.parametrize(
    ("cost", "credit", "soonest"),
    [
        ((20, 10, 10), (0, 0, 0), "bc"),
        ((24, 10, 10), (15, 0, 0), "bc"),  # 24 + 10 - 10, not - 15: a credit is not more than the request
        ((15, 10, 10), (8, 0, 0), "a"),  # 15 + 2
        ((15, 10, 10), (5, 0, 0), "abc"),
        ((15, 10, 10), (10, 0, 9), "c"),  # 15, 20, 11
        ((10, 10, 10), (1, 2, 3), "c"),
    ],
)
def test_a_prefix_that_a_replica_holds_is_credited_to_it(
    cost: Sequence[float], credit: Sequence[float], soonest: str
) -> None:
    assert chosen({"cost": cost}, credit=credit) == soonest


def test_credit_goes_by_place_when_some_are_not_eligible() -> None:
    seen = columns("abc", cost=(0, 10, 10), drain=1.0)
    ask = Ask(0.0, 10.0, credit=np.array([0.0, 0.0, 5.0]))
    assert set(picks(Adaptive(random.Random(0)), seen, 20, among="bc", ask=ask)) == {"c"}


def test_what_is_nearly_as_good_is_taken_for_equal() -> None:
    assert chosen({"cost": (0, 0, 0), "drain": (1.0, 0.96, 0.9)}) == "ab"


def test_who_was_slow_or_failed_is_tried_again_some_time() -> None:
    seen = columns("abc", drain=(1.0, 0.1, 1.0), success=(1.0, 1.0, 0.3), judged_at=0.0)
    found = {
        now: set(picks(Adaptive(random.Random(0)), seen, 60, ask=Ask(now, 10.0)))
        for now in (0.0, 60.0, 300.0)
    }
    assert found == {0.0: {"a"}, 60.0: {"a"}, 300.0: {"a", "b", "c"}}


# --- Hot and cold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "hot"),
    [
        # A nearest-rank quantile of six or fewer is their maximum, which nothing exceeds.
        ((5.0,), ""),
        ((5.0, 0.1), ""),
        ((5.0, 0.1, 0.1, 0.1, 0.1, 0.1), ""),
        # From seven on it is not; then a load has to be above 0.8 as well.
        ((5.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), "a"),
        ((0.81, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), "a"),
        ((0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), ""),
        ((0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1), ""),
        ((5.0, 5.0, 0.1, 0.1, 0.1, 0.1, 0.1), ""),  # the quantile itself is not above the quantile
        ((5.0, 4.0, 0.1, 0.1, 0.1, 0.1, 0.1), "a"),
        ((5.0, 4.0, *[0.1] * 10), "a"),  # twelve: the eleventh of them
        ((5.0, 4.0, *[0.1] * 11), "ab"),  # thirteen: the eleventh
        ((2.0, *[1.0] * 6), "a"),  # when all are above the floor, the quantile decides
        ((2.0,) * 7, ""),
    ],
)
def test_hot_is_above_the_quantile_and_above_80_percent(loads: Sequence[float], hot: str) -> None:
    ids = "abcdefghijklm"[: len(loads)]
    for replica_id in ids:
        seen = columns(ids, cost=[100 * load for load in loads], drain=1.0)
        seen.cost_cap = 100.0
        seen.drain[seen.place[replica_id]] = 1e6  # it would be the soonest by far
        picked = set(picks(Adaptive(random.Random(0)), seen, 10))
        assert (picked == {replica_id}) is (replica_id not in hot)


def test_hot_is_measured_against_the_eligible() -> None:
    seen = columns("abcdefghi", cost=(500, 400, 300, 10, 10, 10, 10, 10, 10), drain=1.0)
    seen.cost_cap = 100.0
    seen.drain[seen.place["c"]] = 1e6
    assert set(picks(Adaptive(random.Random(0)), seen, 10)) == {"c"}, "of nine, only the first is hot"
    assert "c" not in picks(Adaptive(random.Random(0)), seen, 10, among="cdefghi")


def test_before_capacities_are_known_nobody_is_hot() -> None:
    seen = columns("abcdefg", cost=(1e9, 0, 0, 0, 0, 0, 0), drain=(1e12, 1, 1, 1, 1, 1, 1))
    assert set(picks(Adaptive(random.Random(0)), seen, 10)) == {"a"}


# --- Old news ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "herds"), [(0.0, True), (1.0, True), (1.01, False), (math.inf, False)])
def test_on_old_news_of_the_others_it_takes_the_better_of_two(age_s: float, herds: bool) -> None:
    seen = columns("abcdefgh", cost=(0, 50, 50, 50, 50, 50, 50, 90), drain=1.0)
    seen.peers_age_s = age_s
    found = Counter(picks(Adaptive(random.Random(0)), seen, 400))
    if herds:
        assert set(found) == {"a"}
    else:
        assert 60 < found["a"] < 140, "among two of eight for a quarter of the picks"
        assert set(found) == set("abcdefg"), "the costliest wins no comparison"


def test_on_old_news_cost_alone_counts() -> None:
    seen = columns("ab", cost=(50, 60), drain=(1, 1000), success=(0.1, 1))
    assert picks(Adaptive(random.Random(0)), seen) == ["b"]
    seen.peers_age_s = 2.0
    assert set(picks(Adaptive(random.Random(0)), seen, 20)) == {"a"}
    ask = Ask(0.0, 20.0, credit=np.array([0.0, 15.0]))
    assert set(picks(Adaptive(random.Random(0)), seen, 20, ask=ask)) == {"b"}, "60 + 5, not 50 + 20"
    seen.weight[:] = (2, 1)
    assert set(picks(Adaptive(random.Random(0)), seen, 20, ask=ask)) == {"a"}, "70 / 2, not 65"
