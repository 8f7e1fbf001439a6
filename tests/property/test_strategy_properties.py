from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from blaze.config import AVAILABLE_STRATEGIES
from blaze.routing.strategies import RoundRobin, make_strategy
from tests.fakes import FakeView
from tests.samples import text_request

REQUEST = text_request()
IDS = st.text("abcdef", min_size=1, max_size=3)
VIEW = st.builds(FakeView, IDS, st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0, 4.0]))
VIEWS = st.lists(VIEW, max_size=6, unique_by=lambda view: view.id).map(
    lambda views: sorted(views, key=lambda view: view.id)
)
NAMES = st.sampled_from(AVAILABLE_STRATEGIES)


@given(NAMES, st.integers(), st.integers(1, 3), st.lists(VIEWS, max_size=20))
def test_a_strategy_picks_only_from_the_views_it_was_given(
    name: str, seed: int, routers: int, rounds: list[list[FakeView]]
) -> None:
    strategy = make_strategy(name, rng=random.Random(seed), routers=routers)
    for views in rounds:
        pick = strategy.choose(views, REQUEST)
        assert pick is None or pick.replica_id in {view.id for view in views}
        if any(view.weight > 0 for view in views):
            assert pick is not None


@given(NAMES, st.integers(), st.integers(1, 3), st.lists(VIEWS, max_size=20))
def test_the_same_seed_gives_the_same_picks(
    name: str, seed: int, routers: int, rounds: list[list[FakeView]]
) -> None:
    first, second = (make_strategy(name, rng=random.Random(seed), routers=routers) for _ in range(2))
    for views in rounds:
        assert first.choose(views, REQUEST) == second.choose(views, REQUEST)


@given(st.integers(), VIEWS.filter(len), st.integers(1, 60))
def test_round_robin_over_stable_views_is_fair(seed: int, views: list[FakeView], picks: int) -> None:
    strategy = RoundRobin(random.Random(seed))
    counts = Counter({view.id: 0 for view in views})
    for _ in range(picks):
        pick = strategy.choose(views, REQUEST)
        assert pick is not None
        counts[pick.replica_id] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


@given(st.integers(), st.lists(VIEWS.filter(len), min_size=1, max_size=20), VIEWS.filter(len))
def test_round_robin_is_fair_whatever_the_membership_was_before(
    seed: int, before: list[list[FakeView]], views: list[FakeView]
) -> None:
    strategy = RoundRobin(random.Random(seed))
    for earlier in before:
        strategy.choose(earlier, REQUEST)
    picked = [pick.replica_id for _ in views if (pick := strategy.choose(views, REQUEST)) is not None]
    assert sorted(picked) == [view.id for view in views]


@given(st.integers(), VIEWS)
def test_one_router_with_least_connections_never_passes_over_a_less_loaded_replica(
    seed: int, views: list[FakeView]
) -> None:
    pick = make_strategy("least_connections", rng=random.Random(seed)).choose(views, REQUEST)
    weighed = {view.id: (view.in_flight + 1) / view.weight for view in views if view.weight > 0}
    if pick is None:
        assert not weighed
    else:
        assert weighed[pick.replica_id] == min(weighed.values())
