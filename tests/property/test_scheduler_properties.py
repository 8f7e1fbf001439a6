"""Scheduler and KV cache against a model of the KV memory: whatever happens, in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blaze.engines.llm.kv_cache import KVCache
from blaze.engines.llm.layout import split
from blaze.engines.llm.prefix import Prefix, PrefixIndex
from blaze.engines.llm.scheduler import Scheduler, Step, Work, rank
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.slots import Slot, SlotAllocator

UNIT, BLOCK, LONGEST = 4, 2, 32
SIZES = [4, 8, 16, 32]
AGING_S = 3.0
TOKEN = st.integers(0, 1)  # few, so that prefixes are often shared
GARBAGE = -1


# --- A model of the model ---------------------------------------------------------------------------------


def next_token(tokens: list[int], choice: int) -> int:
    """What the model says after these tokens; it differs between the choices of a request."""
    return (sum(tokens) + len(tokens) * (choice + 1) + tokens[-1]) // 2 % 2


def generate(prompt: list[int], choice: int, length: int) -> list[int]:
    """What a client gets who is alone, on a machine that has all the memory in the world."""
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append(next_token(tokens, choice))
    return tokens


class Memory:
    """The KV memory: which token's keys and values lie where."""

    def __init__(self, tokens: int) -> None:
        self._cells = [GARBAGE] * tokens

    def read(self, slot: Slot, length: int) -> list[int]:
        return self._cells[slot.start : slot.start + length]

    def write(self, slot: Slot, start: int, tokens: list[int]) -> None:
        assert start + len(tokens) <= slot.capacity
        self._cells[slot.start + start : slot.start + start + len(tokens)] = tokens

    def copy(self, step: Step) -> None:
        for copy in step.copies:
            assert not overlap(copy.source, copy.target)
            assert 0 < copy.length <= copy.source.capacity
            self.write(copy.target, 0, self.read(copy.source, copy.length))


def overlap(left: Slot, right: Slot) -> bool:
    return left.start < right.start + right.capacity and right.start < left.start + left.capacity


def overlaps(slots: list[Slot]) -> bool:
    return any(overlap(left, right) for left, right in pairwise(sorted(slots)))


@dataclass(eq=False)
class Client:
    sequence: Sequence
    choice: int
    length: int  # of all tokens, when it is over


# --- Scheduler and KV cache -------------------------------------------------------------------------------


class SchedulerMachine(RuleBasedStateMachine):
    cache: KVCache

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []  # who is not served yet
        self.conversations: list[list[int]] = [[0, 1] * 8]
        self.now = 0.0
        self.serial = 0

    @initialize(
        tokens=st.one_of(st.just(LONGEST), st.integers(LONGEST, 4 * LONGEST)),
        size=st.integers(1, 6),
        budget=st.one_of(st.integers(1, 8), st.integers(8, 100)),
        caching=st.sampled_from([True, True, True, False]),
        compact=st.booleans(),
        chunk=st.one_of(st.none(), st.integers(1, 8)),
    )
    def start(
        self, *, tokens: int, size: int, budget: int, caching: bool, compact: bool, chunk: int | None
    ) -> None:
        self.size, self.budget, self.chunk = size, budget, chunk
        self.cache = KVCache(
            tokens, longest=LONGEST, prefix_caching=caching, compact=compact, unit=UNIT, block=BLOCK
        )
        self.scheduler = Scheduler(
            self.cache, max_batch_size=size, max_batch_tokens=budget, prefill_chunk=chunk
        )
        self.memory = Memory(self.cache.total_tokens)

    # What happens

    @precondition(lambda self: len(self.clients) < 12)
    @rule(
        former=st.integers(0, 30),
        cut=st.integers(0, LONGEST),
        rest=st.lists(TOKEN, max_size=12),
        limit=st.integers(1, LONGEST),
        resumed=st.integers(0, 5),
        choices=st.sampled_from([1, 1, 2, 3]),
        priority=st.integers(-1, 2),
        scored=st.sampled_from([False, False, False, True]),
        waits_s=st.integers(0, 3),
    )
    def arrive(
        self,
        *,
        former: int,
        cut: int,
        rest: list[int],
        limit: int,
        resumed: int,
        choices: int,
        priority: int,
        scored: bool,
        waits_s: int,
    ) -> None:
        """A request comes, or comes back, that goes on from a former one."""
        prompt = (self.conversations[former % len(self.conversations)][:cut] + rest)[: LONGEST - 1] or [0]
        length = min(LONGEST, len(prompt) + limit)
        leader = None
        for choice in range(choices):
            generated = generate(prompt, choice, min(len(prompt) + resumed, length - 1))[len(prompt) :]
            place = rank(self.now, priority, self.serial, choice, aging_s=AGING_S)
            sequence = Sequence(
                prompt, place, generated=generated, leader=leader, needs_all_logits=scored and not choice
            )
            leader = leader or sequence
            self.scheduler.add(sequence)
            self.clients.append(Client(sequence, choice, length))
        self.serial += 1
        self.now += waits_s

    @rule(leaving=st.lists(st.integers(0, 20), max_size=1), broken=st.lists(st.integers(0, 20), max_size=1))
    def step(self, leaving: list[int], broken: list[int]) -> None:
        """A step; meanwhile somebody may leave, and somebody's numbers may be no numbers."""
        step = self.schedule()
        self.execute(step)
        lost = [step.work[index % len(step.work)] for index in broken[: len(step.work)]]
        for work in lost:
            self.poison(work)
        for index in leaving[: len(self.clients)]:
            self.leave(self.clients[index % len(self.clients)], keep=False)
        self.scheduler.computed(step)
        for work in step.work:
            if work.sequence.slot is None:
                continue
            if work in lost:
                self.leave(self.client_of(work.sequence), keep=False)
            elif work.yields_token:
                self.answer(work)

    @rule(steps=st.integers(2, 12))
    def some_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.step([], [])

    @rule(copied=st.booleans(), cautious=st.booleans())
    def step_fails(self, copied: bool, cautious: bool) -> None:
        step = self.schedule()
        if copied:
            self.memory.copy(step)
        for work in step.work:
            self.poison(work)
        for work in step.work:
            self.leave(self.client_of(work.sequence), keep=False)
        if cautious or not copied:
            self.cache.evict_all()

    @precondition(lambda self: self.clients)
    @rule(index=st.integers(0, 20), keep=st.booleans())
    def abort(self, index: int, keep: bool) -> None:
        self.leave(self.clients[index % len(self.clients)], keep=keep)

    # How

    @property
    def running(self) -> list[Sequence]:
        sequences = [client.sequence for client in self.clients if client.sequence.slot is not None]
        return sorted(sequences, key=lambda sequence: sequence.rank)

    @property
    def waiting(self) -> list[Sequence]:
        sequences = [client.sequence for client in self.clients if client.sequence.slot is None]
        return sorted(sequences, key=lambda sequence: sequence.rank)

    def client_of(self, sequence: Sequence) -> Client:
        (found,) = (client for client in self.clients if client.sequence is sequence)
        return found

    def leave(self, client: Client, *, keep: bool) -> None:
        self.clients.remove(client)
        self.conversations.append(client.sequence.token_ids)
        self.scheduler.remove(client.sequence, keep=keep)
        assert client.sequence.slot is None

    def poison(self, work: Work) -> None:
        assert work.sequence.slot is not None
        self.memory.write(work.sequence.slot, work.start, [GARBAGE] * work.count)

    def answer(self, work: Work) -> None:
        """The token follows from what lies in the memory, as with a real model."""
        sequence, client = work.sequence, self.client_of(work.sequence)
        assert sequence.slot is not None
        sequence.token_ids.append(next_token(self.memory.read(sequence.slot, work.end), client.choice))
        if len(sequence.token_ids) == client.length:
            prompt = sequence.token_ids[: sequence.prompt_len]
            assert sequence.token_ids == generate(prompt, client.choice, client.length)
            self.leave(client, keep=True)

    def execute(self, step: Step) -> None:
        self.memory.copy(step)
        if step.work:
            self.check_what_is_shared()
        for work in step.work:
            sequence = work.sequence
            assert sequence.slot is not None
            self.memory.write(sequence.slot, work.start, sequence.token_ids[work.start : work.end])
        for work in step.work:
            sequence = work.sequence
            assert sequence.slot is not None
            assert self.memory.read(sequence.slot, work.end) == sequence.token_ids[: work.end]

    def schedule(self) -> Step:
        ran, waited = self.running, self.waiting
        decoding = [sequence for sequence in ran if sequence.num_pending == 1]
        growing = [s for s in decoding if s.slot is not None and s.num_computed == s.slot.capacity]
        preempted_before = self.scheduler.preemptions
        step = self.scheduler.schedule()
        self.check_work(step)
        assert step.work or not step.copies
        preempted = [sequence for sequence in ran if sequence.slot is None]
        # Preempted, and begun again in a larger slot, for its own was in the way.
        again = self.scheduler.preemptions - preempted_before - len(preempted)
        admitted = [sequence for sequence in waited if sequence.slot is not None]
        self.check_nobody_stands_still(step, decoding)
        if preempted or again:
            assert growing, "nobody needed memory"
        if admitted or again:
            everybody = len(preempted) + again == len(ran)
            assert everybody or not preempted, "what was taken from one was given to another at once"
        if not again:
            staying = [sequence for sequence in ran if sequence.slot is not None]
            assert all(stays.rank < gone.rank for stays in staying for gone in preempted)
        self.check_order(admitted)
        prompts = sum(work.count for work in step.work if work.sequence not in decoding)
        generating = sum(work.sequence in decoding for work in step.work)
        left = self.budget - prompts - generating
        if self.chunk is not None and generating:
            waiting = len(waited) + sum(sequence not in decoding for sequence in ran)
            assert prompts <= self.chunk * max(1, waiting / generating)
            left = min(left, self.chunk - prompts)  # more may be allowed, and this much has to be used
        if not preempted and not again:
            self.check_nobody_waits_for_nothing(left)
        return step

    # What always holds

    def check_work(self, step: Step) -> None:
        assert bool(step.work) == bool(self.clients), "with somebody to serve there is something to do"
        assert sum(work.count for work in step.work) <= self.budget
        assert len({work.sequence for work in step.work}) == len(step.work) <= self.size
        for work in step.work:
            assert work.sequence.slot is not None
            assert work.start == work.sequence.num_computed
            assert 1 <= work.count <= work.sequence.num_pending
            assert work.end <= work.sequence.slot.capacity
            assert not work.sequence.needs_all_logits or work.sequence.num_cached == 0
        runs, chunks = split(step.work)
        rows = {
            work: Slot(run.start + index * run.capacity, run.capacity)
            for run in runs
            for index, work in enumerate(run.rows)
            if work is not None
        }
        assert sum(row is not None for run in runs for row in run.rows) == len(rows)
        assert {*rows, *chunks} == set(step.work) and len(rows) + len(chunks) == len(step.work)
        for work, slot in rows.items():
            assert (work.count, work.sequence.slot) == (1, slot)
        for run in runs:
            assert all(row is None or row.end <= run.length for row in run.rows)
            assert run.length <= run.capacity

    def check_nobody_stands_still(self, step: Step, decoding: list[Sequence]) -> None:
        """Only memory keeps a decode from its token, never somebody's prompt."""
        scheduled = {work.sequence for work in step.work}
        assert scheduled >= {sequence for sequence in decoding if sequence.slot is not None}
        assert scheduled == set(self.running), "who holds memory and a place gets further"

    def check_order(self, admitted: list[Sequence]) -> None:
        for early in self.waiting:
            overtaken = any(early.rank < late.rank for late in admitted)
            assert not overtaken or waits_for_its_leader(early), "somebody was overtaken"

    def check_nobody_waits_for_nothing(self, left: int) -> None:
        ready = [sequence for sequence in self.waiting if not waits_for_its_leader(sequence)]
        if not ready or left <= 0 or len(self.running) == self.size:
            return
        needed = min(len(ready[0].token_ids) + 1, LONGEST)
        capacity = next(size for size in SIZES if size >= needed)
        used = [sequence.slot for sequence in self.running if sequence.slot is not None]
        for start in range(0, self.cache.total_tokens - capacity + 1, capacity):
            assert any(overlap(Slot(start, capacity), slot) for slot in used), "there is memory for it"

    def check_what_is_shared(self) -> None:
        for prefix in (*self.cache._held.values(), *self.cache._kept):
            assert self.memory.read(prefix.slot, prefix.length) == prefix.token_ids[: prefix.length]

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "cache"):
            return
        running = [sequence.slot for sequence in self.running if sequence.slot is not None]
        kept = [prefix.slot for prefix in self.cache._kept]
        assert not overlaps(running + kept)
        assert all(slot.start + slot.capacity <= self.cache.total_tokens for slot in running + kept)
        assert self.cache.kept_tokens == sum(slot.capacity for slot in kept)
        used = sum(slot.capacity for slot in running + kept)
        assert used + self.cache.free_tokens == self.cache.total_tokens
        assert self.scheduler.num_running == len(running) <= self.size
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.clients)
        counters = self.cache.counters
        assert 0 <= counters.hits <= counters.queries

    def teardown(self) -> None:
        """Without arrivals everybody is served in time, and then nothing is left."""
        if not hasattr(self, "cache"):
            return
        # A sequence grows at most three times, and each time the others may have to begin again.
        served = LONGEST * len(self.clients)
        for _ in range(served * (1 + len(SIZES) * len(self.clients))):
            if not self.clients:
                break
            self.step([], [])
            self.everything_is_accounted_for()
        assert not self.clients, "somebody is never served"
        assert self.scheduler.schedule() == Step((), ())
        assert self.cache.free_tokens + self.cache.kept_tokens == self.cache.total_tokens
        self.cache.evict_all()
        assert len(self.cache._index) == 0
        assert self.cache.free_tokens == self.cache.total_tokens
        fresh = SlotAllocator(self.cache.total_tokens, unit=UNIT, longest=LONGEST)
        assert self.cache._slots._free == fresh._free, "the memory is as whole as it was"


def waits_for_its_leader(sequence: Sequence) -> bool:
    leader = sequence.leader
    return leader is not None and leader.slot is not None and leader.num_computed < leader.prompt_len


SchedulerMachine.TestCase.settings = settings(max_examples=500, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(-3, 3)), min_size=2, max_size=8),
    st.sampled_from([0.5, 1.0, 4.0]),
)
def test_ranks_are_fair(arrivals: list[tuple[int, int]], aging_s: float) -> None:
    """Lower numbers first, first come first served, and a level is worth so much waiting and no more."""
    ranks = [
        rank(float(at), priority, serial, 0, aging_s=aging_s)
        for serial, (at, priority) in enumerate(sorted(arrivals))
    ]
    ordered = sorted(arrivals)
    for early in range(len(ordered)):
        for late in range(early + 1, len(ordered)):
            (came, priority), (came_later, other) = ordered[early], ordered[late]
            overtaken = ranks[late] < ranks[early]
            assert overtaken == (came_later - came < (priority - other) * aging_s)


# --- Slots ------------------------------------------------------------------------------------------------


class SlotMachine(RuleBasedStateMachine):
    """Against a search of the whole memory."""

    @initialize(units=st.integers(1, 40))
    def start(self, units: int) -> None:
        self.slots = SlotAllocator(units * UNIT + units % UNIT, unit=UNIT, longest=LONGEST)
        self.total = units * UNIT
        self.taken: list[Slot] = []

    def holes(self) -> list[Slot]:
        """The largest free places, at multiples of their sizes."""
        found: list[Slot] = []
        for capacity in reversed(SIZES):
            for start in range(0, self.total - capacity + 1, capacity):
                place = Slot(start, capacity)
                if not any(overlap(place, other) for other in (*self.taken, *found)):
                    found.append(place)
        return found

    @rule(capacity=st.sampled_from(SIZES), high=st.booleans())
    def allocate(self, capacity: int, high: bool) -> None:
        holes = [hole for hole in self.holes() if hole.capacity >= capacity]
        slot = self.slots.allocate(capacity, high=high)
        if not holes:
            assert slot is None
            return
        if high:
            highest = max(hole.start + hole.capacity for hole in holes)
            assert slot == Slot(highest - capacity, capacity)
        else:
            best = min(holes, key=lambda hole: (hole.capacity, hole.start))
            assert slot == Slot(best.start, capacity)
        self.taken.append(slot)

    @precondition(lambda self: self.taken)
    @rule(index=st.integers(0, 100))
    def free(self, index: int) -> None:
        self.slots.free(self.taken.pop(index % len(self.taken)))

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "slots"):
            assert self.slots.total == self.total
            assert self.slots.free_tokens == self.total - sum(slot.capacity for slot in self.taken)
            assert not overlaps(self.taken)

    def teardown(self) -> None:
        if hasattr(self, "slots"):
            while self.taken:
                self.free(7)
            assert self.slots._free == SlotAllocator(self.total, unit=UNIT, longest=LONGEST)._free


SlotMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestSlots = SlotMachine.TestCase


# --- Prefixes ---------------------------------------------------------------------------------------------


class Colliding(PrefixIndex):
    """Half of all prefixes have the same hash as any other."""

    values = 2

    def _hash(self, token_ids: list[int], block: int, before: int) -> int:
        return super()._hash(token_ids, block, before) % self.values


class AllTheSame(Colliding):
    values = 1


def shared_blocks(left: list[int], right: list[int]) -> int:
    """Full blocks at the beginning that are equal."""
    blocks = 0
    while (end := (blocks + 1) * BLOCK) <= min(len(left), len(right)) and left[:end] == right[:end]:
        blocks += 1
    return blocks


ENTRY = st.tuples(st.lists(TOKEN, max_size=9), st.integers(0, 9), st.integers(0, 9), st.booleans())


@pytest.mark.parametrize("make", [PrefixIndex, Colliding, AllTheSame])
@given(entries=st.lists(ENTRY, max_size=8), wanted=st.lists(TOKEN, max_size=9), limit=st.integers(0, 9))
def test_prefixes_are_found_by_their_tokens_alone(
    make: Callable[[int], PrefixIndex],
    entries: list[tuple[list[int], int, int, bool]],
    wanted: list[int],
    limit: int,
) -> None:
    index = make(BLOCK)
    prefixes: list[Prefix] = []
    for tokens, *lengths, removed in entries:
        prefix = Prefix(tokens, Slot(0, 16))
        for length in sorted(lengths):
            index.extend(prefix, min(length, len(tokens)))
        if removed:
            index.remove(prefix)
        else:
            prefixes.append(prefix)
    computed = {prefix: prefix.token_ids[: prefix.length] for prefix in prefixes}
    limit = min(limit, len(wanted))

    best = max((shared_blocks(tokens, wanted[:limit]) for tokens in computed.values()), default=0)
    found = index.longest(wanted, limit)
    if found is None:
        assert best == 0
    else:
        prefix, length = found
        assert length == best * BLOCK > 0
        assert computed[prefix][:length] == wanted[:length]

    for prefix, tokens in computed.items():
        blocks = len(tokens) // BLOCK
        shared = {
            other: shared_blocks(tokens, others)
            for other, others in computed.items()
            if other is not prefix and blocks
        }
        assert set(index.covers(prefix)) == {other for other, count in shared.items() if count == blocks}
        covered = list(index.covered_by(prefix))
        assert len(covered) == len(set(covered))
        assert set(covered) == {
            other for other, count in shared.items() if count == other.length // BLOCK > 0
        }
    for prefix in prefixes:
        index.remove(prefix)
    assert len(index) == 0
