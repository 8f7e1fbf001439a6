"""The table under any interleaving of requests, answers, failures, cancels and membership changes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blaze.reports import PeerLoad
from blaze.routing.orders import Orders
from blaze.routing.outcome import Outcome
from blaze.routing.replica import Lease
from tests.routing_columns import TableBench

IDS = "abcd"
CAP = 3
ANY = st.integers(0, 30)
SOME = st.sets(st.sampled_from(IDS))
COSTS = st.sampled_from([0.1, 0.2, 0.3, 7.7, 1e6, 1e-9])  # whose sums are not exact


class Table(RuleBasedStateMachine):
    """A table beside the list of what is really in flight."""

    @initialize(slow_start_s=st.sampled_from([0.0, 30.0]))
    def begin(self, slow_start_s: float) -> None:
        self.bench = TableBench(*IDS[:3], cap=CAP, slow_start_s=slow_start_s)
        self.live = set(IDS[:3])
        self.leases: list[Lease] = []
        self.peers: dict[str, int] = {}
        self.drained: set[str] = set()

    # --- What happens ------------------------------------------------------------------------------------

    @rule(ids=SOME)
    def sync(self, ids: set[str]) -> None:
        for gone in self.live - ids:
            self.peers.pop(gone, None)
        self.live = set(ids)
        self.bench.sync(*ids)

    @rule(which=ANY, cost=COSTS)
    def send(self, which: int, cost: float) -> None:
        eligible = self.bench.eligible()
        if eligible:
            replica_id = eligible[which % len(eligible)]
            lease = self.bench.table.lease(replica_id, cost=cost, expires_at=self.bench.clock.now() + 5.0)
            self.leases.append(lease)

    @rule(which=ANY, outcome=st.sampled_from(Outcome), times=st.integers(1, 2))
    def end(self, which: int, outcome: Outcome, times: int) -> None:
        if self.leases:
            lease = self.leases.pop(which % len(self.leases))
            assert [lease.release(outcome) for _ in range(times)] == [True, False][:times]

    @rule(which=ANY, cost=COSTS)
    def learn(self, which: int, cost: float) -> None:
        if self.leases:
            lease = self.leases[which % len(self.leases)]
            lease.recost(cost)
            lease.first_content(cost)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.bench.clock.advance(seconds)

    @rule(which=st.sampled_from(IDS))
    def suspend(self, which: str) -> None:
        self.bench.table.suspend(which, 2.0)

    @rule(drained=SOME, weights=st.dictionaries(st.sampled_from(IDS), st.sampled_from([0.0, 1.0, 2.0])))
    def follow(self, drained: set[str], weights: dict[str, float]) -> None:
        self.drained = drained
        self.bench.table.follow(Orders(weights, dict.fromkeys(drained, 0.0)))

    @rule(loads=st.dictionaries(st.sampled_from(IDS), st.integers(0, 9)))
    def hear_of_peers(self, loads: dict[str, int]) -> None:
        self.peers = {id: count for id, count in loads.items() if id in self.live}
        self.bench.table.set_peers({id: PeerLoad(count, float(count)) for id, count in loads.items()})

    # --- What always holds -------------------------------------------------------------------------------

    @invariant()
    def the_account_is_right(self) -> None:
        table, in_flight, cost = self.bench.table, self.bench.column("in_flight"), self.bench.column("cost")
        assert list(table.columns.ids) == sorted(self.live)
        for replica_id in self.live:
            running = [lease for lease in self.leases if lease.replica.id == replica_id]
            peers = self.peers.get(replica_id, 0)
            assert in_flight[replica_id] == len(running) + peers
            assert abs(cost[replica_id] - sum(lease.cost for lease in running) - peers) < 1e-6
            if not running:
                assert cost[replica_id] == peers, "exactly"
                assert self.bench.column("waiting_since")[replica_id] == float("inf")
        assert table.in_flight == len(self.leases)

    @invariant()
    def nobody_is_over_the_cap_or_picked_while_draining(self) -> None:
        eligible, available = self.bench.eligible(), self.bench.available()
        assert eligible == sorted(eligible)
        assert set(eligible) <= set(available) <= self.live
        assert not set(available) & self.drained
        for found in self.bench.table.counters("m"):
            assert 0 <= found.in_flight <= CAP
            assert found.replica_id not in available or found.weight > 0
            assert (found.replica_id in eligible) == (found.replica_id in available and found.in_flight < CAP)

    def teardown(self) -> None:
        """Everything ends, some of it on replicas that are gone."""
        for lease in self.leases:
            lease.release(Outcome.NEUTRAL)
        self.bench.table.set_peers({})
        assert self.bench.table.in_flight == 0
        assert not self.bench.table.columns.in_flight.any()
        assert not self.bench.table.columns.cost.any()


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=150, stateful_step_count=50)
