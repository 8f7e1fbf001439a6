"""Restarts, whatever happens to the replicas: who is never ended, how many at once, and how often."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from blaze.backoff import Backoff
from blaze.health.journal import EVENTS
from blaze.health.settings import HealthSettings
from tests.fakes import FakeClock
from tests.health_watch import HealthWatch

SETTINGS = HealthSettings(
    stall_after_s=5.0,
    replacement_s=20.0,
    max_restarts=3,
    backoff_s=2.0,
    max_backoff_s=16.0,
    forgive_after_s=40.0,
)
FAULTS = ("", "", "frozen", "wedged", "failed", "loading", "dies")

# (seconds until then, which of the replicas, what becomes of it)
happenings = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 5), st.sampled_from(FAULTS)), min_size=1, max_size=15
)


def lived(
    happened: list[tuple[int, int, str]], takes_s: float | None, comes_back: str
) -> tuple[HealthWatch, list[frozenset[str]]]:
    """A cluster of two models after all that, and who was ended while being well."""
    cluster = HealthWatch(SETTINGS, takes_s=takes_s, comes_back=comes_back)
    cluster.add("a", "b", "c")
    cluster.add("x", "y", model="n")
    well: list[frozenset[str]] = []
    for seconds, who, fault in happened:
        for _ in range(seconds):
            fine = frozenset(p.id for p in cluster.patients.values() if not p.fault)
            before = len(cluster.kills)
            cluster.run(1)
            well.extend(fine & {kill.replica_id} for _, kill in cluster.kills[before:])
        ids = sorted(cluster.patients)
        if ids:
            patient = cluster.patients[ids[who % len(ids)]]
            if fault == "dies":
                cluster.end(patient.id)
            else:
                patient.fault = fault
    cluster.run(30)
    return cluster, well


@given(happenings, st.sampled_from([None, 1.0, 8.0]), st.sampled_from(["", "failed", "wedged"]))
def test_nobody_who_is_well_is_ended_and_never_two_of_a_model_at_once(
    happened: list[tuple[int, int, str]], takes_s: float | None, comes_back: str
) -> None:
    cluster, well = lived(happened, takes_s, comes_back)
    assert not any(well)
    by_model: defaultdict[str, list[float]] = defaultdict(list)
    for at, kill in cluster.kills:
        by_model[kill.model].append(at)
    for model, times in by_model.items():
        for sooner, later in pairwise(times):
            came = any(sooner < at <= later for at, arrived in cluster.arrivals if arrived == model)
            assert came or later - sooner >= SETTINGS.replacement_s


@given(happenings, st.sampled_from([1.0, 8.0]), st.sampled_from(["failed", "wedged"]))
def test_what_does_not_help_is_not_repeated_for_ever(
    happened: list[tuple[int, int, str]], takes_s: float, comes_back: str
) -> None:
    cluster, _ = lived(happened, takes_s, comes_back)
    cluster.run(150)  # nobody recovers by itself
    settled = len(cluster.kills)
    cluster.run(100)
    assert len(cluster.kills) == settled


@given(happenings, st.sampled_from([None, 1.0]))
def test_the_log_is_bounded_and_in_order(happened: list[tuple[int, int, str]], takes_s: float | None) -> None:
    events = lived(happened, takes_s, "")[0].supervisor.view().events
    assert len(events) <= EVENTS
    ages = [event.age_s for event in events]
    assert ages == sorted(ages, reverse=True)
    assert all(event.reason for event in events)


@given(st.floats(0.1, 100.0), st.floats(1.0, 1000.0), st.integers(1, 40))
def test_a_pause_never_shrinks_while_attempts_go_on(first_s: float, most_s: float, attempts: int) -> None:
    clock = FakeClock()
    backoff = Backoff(clock, first_s=first_s, most_s=most_s, max_attempts=attempts)
    pauses: list[float] = []
    while not backoff.is_exhausted:
        assert backoff.wait_s == 0.0
        backoff.attempt()
        pauses.append(backoff.pause())
        assert backoff.wait_s > 0.0
        clock.advance(pauses[-1] + 1e-6)
    assert (len(pauses), pauses) == (attempts, sorted(pauses))
    assert max(pauses) <= most_s
