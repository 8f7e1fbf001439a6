from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from blaze.routing.columns import Columns, stable_hash
from blaze.routing.rendezvous import IPHash, unit
from blaze.routing.strategy import Ask
from tests.routing_columns import columns, picks

KEYS = [stable_hash(f"session:{number}") for number in range(2000)]
MASK = 2**64 - 1


def asked(strategy: IPHash, seen: Columns, key: int, among: Iterable[str] | None = None) -> str | None:
    return picks(strategy, seen, among=among, ask=Ask(0.0, key=key))[0]


def order(seen: Columns, key: int) -> list[str]:
    """Everybody, as the key prefers them: who is next when all before are not eligible."""
    left, found = list(seen.ids), []
    while left:
        first = asked(IPHash(random.Random(0)), seen, key, among=left)
        assert first is not None
        found.append(first)
        left.remove(first)
    return found


def reference(key: int, replica_id: str, weight: float) -> float:
    """``weight / -ln(h)``, in plain integers."""
    x = ((stable_hash(replica_id) ^ key) + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    x ^= x >> 31
    return weight / -math.log((x + 0.5) / 2**64)


# --- Whose key it is ---------------------------------------------------------------------------------


def test_the_largest_weight_over_minus_the_logarithm_of_the_hash() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}
    seen, strategy = columns("abcd", weight=list(weights.values())), IPHash(random.Random(0))
    for key in KEYS:
        scores = {replica_id: reference(key, replica_id, weight) for replica_id, weight in weights.items()}
        assert asked(strategy, seen, key) == max(scores, key=scores.__getitem__)


def test_the_answers_are_the_same_in_every_release() -> None:
    # Routers of two releases serve at once while one is rolled out.
    seen, strategy = columns(f"replica-{number}" for number in range(10)), IPHash(random.Random(0))
    chosen = [str(asked(strategy, seen, key)).removeprefix("replica-") for key in KEYS[:40]]
    assert "".join(chosen) == "2919368490447116720915427737565572524474"


def test_routers_agree_whatever_their_generators_draw() -> None:
    seen = columns("abcdefgh")
    strategies = [IPHash(random.Random(seed), routers=seed + 1) for seed in range(3)]
    for key in KEYS[:200]:
        assert len({asked(strategy, seen, key) for strategy in strategies}) == 1


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 5.0), (0.1, 0.1, 0.8)])
def test_keys_are_shared_out_by_weight(weights: Sequence[float]) -> None:
    seen, strategy = columns("abc", weight=weights), IPHash(random.Random(0))
    chosen = Counter(asked(strategy, seen, key) for key in KEYS)
    for replica_id, weight in zip("abc", weights, strict=True):
        share = weight / sum(weights)
        # Four standard deviations of 2,000 throws.
        assert abs(chosen[replica_id] / len(KEYS) - share) < 4 * math.sqrt(share * (1 - share) / len(KEYS))


def test_a_heavier_weight_takes_keys_over_and_gives_none_up() -> None:
    lighter, heavier, strategy = columns("abc"), columns("abc", weight=(1, 3, 1)), IPHash(random.Random(0))
    moved = [
        (before, after)
        for key in KEYS
        if (before := asked(strategy, lighter, key)) != (after := asked(strategy, heavier, key))
    ]
    assert moved
    assert {after for _, after in moved} == {"b"}


def test_who_is_not_eligible_loses_its_keys_alone() -> None:
    seen, strategy = columns("abcd"), IPHash(random.Random(0))
    for key in KEYS[:300]:
        before, after = asked(strategy, seen, key), asked(strategy, seen, key, among="abd")
        assert before in (after, "c")


def test_slow_start_moves_no_keys() -> None:
    warm, cold, strategy = columns("abcd"), columns("abcd", ramp=(0.1, 1, 1, 1)), IPHash(random.Random(0))
    assert all(asked(strategy, warm, key) == asked(strategy, cold, key) for key in KEYS[:300])


@pytest.mark.parametrize("hashes", [[0], [1], [2**64 - 1], [2**63], [0, 2**12 - 1, 2**64 - 2**11]])
def test_hashes_become_numbers_between_0_and_1_exclusive(hashes: list[int]) -> None:
    numbers = unit(np.array(hashes, np.uint64))
    assert ((numbers > 0) & (numbers < 1)).all()


# --- Bounded load ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "ranks"),
    [
        (1, "0000000000"),
        (2, "0010010100"),  # rooms ceil(1.25 * (T + 1) / 2): 1 2 2 3 4 4 5 5 6 7
        (4, "0120120120"),  # 1 1 1 2 2 2 3 3 3 4
        (5, "0123012301"),  # 1 1 1 1 2 2 2 2 3 3
    ],
)
def test_a_popular_key_spills_over_in_its_own_order(replicas: int, ranks: str) -> None:
    seen, key = columns("abcde"[:replicas]), KEYS[0]
    preferred, strategy = order(seen, key), IPHash(random.Random(0))
    found = []
    for _ in ranks:
        chosen = asked(strategy, seen, key)
        assert chosen is not None
        seen.in_flight_here[seen.place[chosen]] += 1
        found.append(str(preferred.index(chosen)))
    assert "".join(found) == ranks


@pytest.mark.parametrize(
    ("own", "others", "weight", "other_weights", "has_room"),
    [
        (0, (0, 0, 0, 0), 1, (1, 1, 1, 1), True),
        (1, (1, 1, 0, 0), 1, (1, 1, 1, 1), False),  # ceil(1.25 * 4 / 5) = ceil(1.0) = 1
        (1, (1, 1, 1, 0), 1, (1, 1, 1, 1), True),  # ceil(1.25 * 5 / 5) = ceil(1.25) = 2
        (2, (2, 2, 1, 0), 1, (1, 1, 1, 1), False),  # ceil(1.25 * 8 / 5) = ceil(2.0) = 2
        (2, (2, 2, 2, 0), 1, (1, 1, 1, 1), True),  # ceil(1.25 * 9 / 5) = ceil(2.25) = 3
        (5, (0, 0, 0, 0), 6, (1, 1, 1, 1), False),  # ceil(1.25 * 6 * 6 / 10) = ceil(4.5) = 5
        (5, (1, 0, 0, 0), 6, (1, 1, 1, 1), True),  # ceil(1.25 * 7 * 6 / 10) = ceil(5.25) = 6
        (1, (9, 9, 9, 9), 1, (9, 9, 9, 9), True),  # ceil(1.25 * 38 / 37) = 2
    ],
)
def test_room_is_a_quarter_more_than_the_share_rounded_up(
    own: int, others: Sequence[int], weight: float, other_weights: Sequence[float], has_room: bool
) -> None:
    # A key that prefers "a" whatever the weights of these cases are.
    key = next(key for key in KEYS if order(columns("abcde", weight=(1, 9, 9, 9, 9)), key)[0] == "a")
    seen = columns("abcde", in_flight_here=(own, *others), weight=(weight, *other_weights))
    assert (asked(IPHash(random.Random(0)), seen, key) == "a") is has_room


def test_what_the_ineligible_have_in_flight_makes_no_room() -> None:
    key = next(key for key in KEYS if order(columns("abc"), key)[0] == "a")
    seen = columns("abc", in_flight_here=(2, 0, 100))
    assert asked(IPHash(random.Random(0)), seen, key) == "a", "ceil(1.25 * 103 / 3) = 43"
    assert asked(IPHash(random.Random(0)), seen, key, among="ab") == "b", "ceil(1.25 * 3 / 2) = 2"


@pytest.mark.parametrize(("routers", "chosen"), [(1, {"b"}), (2, {"b", "c"})])
def test_a_request_without_a_key_goes_where_the_fewest_are_in_flight(routers: int, chosen: set[str]) -> None:
    seen = columns("abc", in_flight=(9, 1, 2))
    assert set(picks(IPHash(random.Random(0), routers=routers), seen, 60)) == chosen
