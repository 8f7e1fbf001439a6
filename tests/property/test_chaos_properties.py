"""The plan of a chaos run, and whom a fault may hit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.schedule import Kind, SeenReplica, schedule, victim

SEEDS = st.integers(0, 2**32)
KINDS = st.lists(st.sampled_from(list(Kind)), min_size=1, unique=True)
MODELS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True)
REPLICAS = st.lists(
    st.builds(SeenReplica, st.text("abcdef", min_size=1), st.sampled_from(["a", "b"]), st.booleans()),
    unique_by=lambda replica: replica.id,
)


@given(SEEDS, st.floats(5, 300), st.floats(0.5, 20), KINDS, MODELS)
def test_a_plan_is_one_fault_a_period_of_the_kinds_and_models_that_were_asked_for(
    seed: int, seconds: float, period_s: float, kinds: Sequence[Kind], models: Sequence[str]
) -> None:
    planned = schedule(seed, seconds=seconds, period_s=period_s, kinds=kinds, models=models)
    assert planned == schedule(seed, seconds=seconds, period_s=period_s, kinds=kinds, models=models)
    times = [fault.at_s for fault in planned]
    assert all(0 < at < seconds for at in times)
    assert all(later > earlier for earlier, later in pairwise(times))
    assert int(seconds / period_s) - 1 <= len(planned) <= int(seconds / period_s)
    assert {fault.kind for fault in planned} <= set(kinds)
    assert {fault.model for fault in planned} <= set(models)
    assert all(0 <= fault.draw < 1 and fault.lasts_s > 0 for fault in planned)


@given(SEEDS, KINDS)
def test_every_kind_has_its_turn_before_one_comes_again(seed: int, kinds: Sequence[Kind]) -> None:
    planned = schedule(seed, seconds=100 * len(kinds), period_s=1.0, kinds=kinds, models=["a"])
    for begin in range(0, len(planned) - len(kinds), len(kinds)):
        turn = [fault.kind for fault in planned[begin : begin + len(kinds)]]
        assert sorted(turn) == sorted(kinds)


def test_seeds_make_different_plans() -> None:
    plans = {
        schedule(seed, seconds=60, period_s=5, kinds=list(Kind), models=["a", "b"]) for seed in range(20)
    }
    assert len(plans) == 20


@given(REPLICAS, st.sets(st.text("abcdef", min_size=1)), st.floats(0, 1, exclude_max=True))
def test_one_healthy_replica_is_spared(seen: list[SeenReplica], troubled: set[str], draw: float) -> None:
    healthy = {r.id for r in seen if r.model == "a" and r.healthy and r.id not in troubled}
    hit = victim(seen, "a", troubled, draw)
    if hit is None:
        assert len(healthy) < 2
    else:
        assert hit.id in healthy
        assert healthy - {hit.id}


@given(REPLICAS, st.floats(0, 1, exclude_max=True), st.randoms())
def test_whom_it_hits_does_not_depend_on_the_order_of_the_list(
    seen: list[SeenReplica], draw: float, shuffle: object
) -> None:
    assert victim(seen, "a", (), draw) == victim(seen[::-1], "a", (), draw)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=200, max_size=200))
def test_any_of_them_may_be_hit(draws: list[float]) -> None:
    seen = [SeenReplica(name, "a", True) for name in "abc"]
    assert {victim(seen, "a", (), place / 3) for place in range(3)} == set(seen)
