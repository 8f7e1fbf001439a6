"""Breakers under any schedule of requests, outcomes, time, membership changes and operators."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blaze.routing.breaker import BreakerBoard, BreakerState, Permit, Transition
from blaze.routing.outcome import Outcome
from blaze.routing.trip import BreakerSettings, TripPolicy, open_for_s
from tests.fakes import FakeClock

IDS = "abcde"
SETTINGS = BreakerSettings(failure_threshold=3, min_outcomes=6)  # so that few steps are enough
LEASE_S = 4.0
ANY = st.integers(0, 30)
MOSTLY_FAILURES = st.sampled_from([Outcome.FAILURE, Outcome.FAILURE, Outcome.SUCCESS, Outcome.NEUTRAL])


@dataclass(eq=False)
class Sent:
    permit: Permit
    epoch: int  # of its breaker, when it was sent
    expires_at: float


class Breakers(RuleBasedStateMachine):
    """The board beside a model that knows what was sent, what came back, and what operators did."""

    @initialize(seed=ANY, count=st.integers(1, len(IDS)))
    def begin(self, seed: int, count: int) -> None:
        self.clock = FakeClock()
        self.board = BreakerBoard(SETTINGS, self.clock, random.Random(seed), self.changed)
        self.states: dict[str, BreakerState] = {}
        self.epochs: Counter[str] = Counter()
        self.in_a_row: Counter[str] = Counter()  # failures while closed
        self.probes_passed: Counter[str] = Counter()  # while half open
        self.refused_until: dict[str, float] = {}
        self.by_hand: set[str] = set()  # opened
        self.sent: list[Sent] = []
        self.excuse: str | None = None  # for a transition that the rules alone do not allow
        self.sync(set(IDS[:count]))

    def changed(self, change: Transition) -> None:
        replica_id, before, after = change.replica_id, change.before, change.after
        assert self.states[replica_id] is before is not after
        self.states[replica_id] = after
        if after is BreakerState.CLOSED:
            assert self.excuse == "operator" or (
                before is BreakerState.HALF_OPEN and self.probes_passed[replica_id] >= 2
            ), change
        elif after is BreakerState.HALF_OPEN:
            assert before is BreakerState.OPEN
            assert replica_id not in self.by_hand
            assert self.excuse == "health" or self.clock.now() >= self.refused_until[replica_id]
        elif self.excuse != "operator" or replica_id not in self.by_hand:
            if before is BreakerState.CLOSED:
                ejected = sum(state is not BreakerState.CLOSED for state in self.states.values())
                assert ejected <= max(1, len(self.states) // 2)
                assert ejected < len(self.states), "never the last one"
            self.refused_until[replica_id] = self.clock.now() + SETTINGS.recovery_timeout_s
        self.anew(replica_id)

    def anew(self, replica_id: str) -> None:
        self.epochs[replica_id] += 1
        self.in_a_row[replica_id] = self.probes_passed[replica_id] = 0

    # --- What happens ------------------------------------------------------------------------------------

    @rule(ids=st.sets(st.sampled_from(IDS), min_size=1))
    def sync(self, ids: set[str]) -> None:
        for gone in self.states.keys() - ids:
            del self.states[gone]
            self.anew(gone)
            self.by_hand.discard(gone)
        self.states |= dict.fromkeys(ids - self.states.keys(), BreakerState.CLOSED)
        self.board.sync(sorted(ids))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 1.5, 3.0, 10.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(which=ANY, count=st.integers(1, 4))
    def send_where_it_is_admitted(self, which: int, count: int) -> None:
        for _ in range(count):
            admitted = [replica_id for replica_id in sorted(self.states) if self.board.admits(replica_id)]
            if admitted:
                self.take(admitted[which % len(admitted)])

    @rule(which=ANY)
    def send_in_a_panic(self, which: int) -> None:
        ids = sorted(self.states)
        replica_id = ids[which % len(ids)]
        self.board.admits(replica_id)
        self.take(replica_id)

    def take(self, replica_id: str) -> None:
        expires_at = self.clock.now() + LEASE_S
        permit = self.board.take(replica_id, expires_at)
        self.sent.append(Sent(permit, self.epochs[replica_id], expires_at))

    @rule(which=ANY, outcome=MOSTLY_FAILURES, count=st.integers(1, 4))
    def settle(self, which: int, outcome: Outcome, count: int) -> None:
        for _ in range(min(count, len(self.sent))):
            sent = self.sent.pop(which % len(self.sent))
            replica_id = sent.permit.replica_id
            if sent.epoch == self.epochs[replica_id]:
                self.count(replica_id, sent.permit, outcome)
            before = dict(self.states)
            self.board.settle(sent.permit, outcome)
            assert outcome is not Outcome.NEUTRAL or self.states == before

    def count(self, replica_id: str, permit: Permit, outcome: Outcome) -> None:
        state = self.states[replica_id]
        if state is BreakerState.CLOSED and outcome is not Outcome.NEUTRAL:
            self.in_a_row[replica_id] = self.in_a_row[replica_id] + 1 if outcome is Outcome.FAILURE else 0
        elif state is BreakerState.HALF_OPEN and outcome is Outcome.SUCCESS:
            self.probes_passed[replica_id] += permit.probe
        elif state is BreakerState.OPEN and outcome is Outcome.FAILURE:
            self.refused_until[replica_id] = self.clock.now() + SETTINGS.recovery_timeout_s

    @rule(which=ANY, action=st.sampled_from(["open", "close", "reset"]))
    def act(self, which: int, action: str) -> None:
        ids = sorted(self.states)
        replica_id = ids[which % len(ids)]
        self.anew(replica_id)
        (self.by_hand.add if action == "open" else self.by_hand.discard)(replica_id)
        self.excuse = "operator"
        self.board.act(replica_id, action)
        self.excuse = None
        assert self.states[replica_id] is (BreakerState.OPEN if action == "open" else BreakerState.CLOSED)

    @rule(which=ANY)
    def pass_a_health_check(self, which: int) -> None:
        self.excuse = "health"
        self.board.health_passed(IDS[which % len(IDS)])
        self.excuse = None

    # --- What always holds -------------------------------------------------------------------------------

    @invariant()
    def one_probe_at_a_time(self) -> None:
        now = self.clock.now()
        out = Counter(
            sent.permit.replica_id
            for sent in self.sent
            if sent.permit.probe
            and sent.expires_at > now
            and sent.epoch == self.epochs[sent.permit.replica_id]
        )
        assert max(out.values(), default=0) <= 1
        for replica_id, state in list(self.states.items()):
            if state is BreakerState.HALF_OPEN:
                assert self.board.admits(replica_id) is (out[replica_id] == 0)

    @invariant()
    def closed_breakers_admit_and_open_ones_do_not(self) -> None:
        now = self.clock.now()
        for replica_id in list(self.states):
            admitted = self.board.admits(replica_id)
            if self.states[replica_id] is BreakerState.CLOSED:
                assert admitted
            elif self.states[replica_id] is BreakerState.OPEN:
                assert not admitted
                assert replica_id in self.by_hand or now < self.board.next_change()
            assert self.board.state(replica_id) is self.states[replica_id]

    @invariant()
    def who_fails_is_out_as_far_as_may_be(self) -> None:
        ejected = sum(state is not BreakerState.CLOSED for state in self.states.values())
        room = ejected < max(1, len(self.states) // 2) and ejected < len(self.states) - 1
        for replica_id, state in self.states.items():
            if state is BreakerState.CLOSED and self.in_a_row[replica_id] >= SETTINGS.failure_threshold:
                assert not room


TestBreakers = Breakers.TestCase
TestBreakers.settings = settings(max_examples=200, stateful_step_count=50)


@given(st.integers(), st.integers(1, 2000), st.floats(0.01, 10), st.floats(10, 600))
def test_open_times_stay_within_their_bounds(seed: int, trips: int, first_s: float, longest_s: float) -> None:
    policy = BreakerSettings(recovery_timeout_s=first_s, max_timeout_s=longest_s)
    rng = random.Random(seed)
    this, following = open_for_s(trips, policy, rng), open_for_s(trips + 1, policy, rng)
    assert first_s <= this <= 1.5 * longest_s
    assert this <= 1.5 * following, "the following base is no shorter"
    assert open_for_s(trips, policy, random.Random(seed)) == this


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0, 4.0, 12.0]), st.booleans()), max_size=60))
def test_a_policy_trips_by_the_outcomes_of_the_last_ten_buckets(outcomes: list[tuple[float, bool]]) -> None:
    policy, now, seen = TripPolicy(BreakerSettings()), 1000.0, []
    for after_s, failed in outcomes:
        now += after_s
        seen.append((int(now), failed))
        if not failed:
            policy.success(now)
            continue
        recent = [failure for second, failure in seen if second > int(now) - 10]
        trips = all(failure for _, failure in seen[-5:]) and len(seen) >= 5
        trips |= len(recent) >= 10 and 2 * sum(recent) >= len(recent)
        assert (policy.failure(now) is not None) is trips
