from __future__ import annotations

from itertools import count

import pytest

from blaze.engines.llm.kv_cache import KVCache
from blaze.engines.llm.scheduler import Scheduler, Step, rank
from blaze.engines.llm.sequence import Sequence

LONGEST, UNIT, BLOCK = 32, 4, 2
_serials = count()


class Bench:
    """A scheduler, and a model that yields the token 7 for everybody."""

    def __init__(
        self,
        tokens: int = 8 * LONGEST,
        *,
        size: int = 8,
        budget: int = 64,
        chunk: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.cache = KVCache(tokens, longest=LONGEST, prefix_caching=prefix_caching, unit=UNIT, block=BLOCK)
        self.scheduler = Scheduler(
            self.cache, max_batch_size=size, max_batch_tokens=budget, prefill_chunk=chunk
        )

    def add(
        self, *prompt: int, leader: Sequence | None = None, priority: int = 0, generated: tuple[int, ...] = ()
    ) -> Sequence:
        place = rank(0.0, priority, next(_serials), 0, aging_s=10.0)
        sequence = Sequence(prompt, place, leader=leader, generated=generated)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> dict[Sequence, tuple[int, int]]:
        """What of whom was computed."""
        step = self.scheduler.schedule()
        self.finish(step)
        return {work.sequence: (work.start, work.end) for work in step.work}

    def finish(self, step: Step) -> None:
        self.scheduler.computed(step)
        for work in step.work:
            if work.yields_token and work.sequence.slot is not None:
                work.sequence.token_ids.append(7)


def of(letter: int, length: int) -> tuple[int, ...]:
    """A prompt that shares nothing with one of another letter."""
    return tuple(100 * letter + index for index in range(length))


# --- Computed tokens catch up with tokens --------------------------------------------------------------


def test_a_prompt_is_computed_and_then_a_token_a_step() -> None:
    bench = Bench()
    sequence = bench.add(*of(1, 5))
    assert [bench.step() for _ in range(3)] == [{sequence: (0, 5)}, {sequence: (5, 6)}, {sequence: (6, 7)}]
    assert (sequence.num_generated, sequence.num_pending) == (3, 1)


def test_a_long_prompt_is_taken_in_chunks_and_yields_after_the_last() -> None:
    bench = Bench(budget=4)
    sequence = bench.add(*of(1, 10))
    assert [bench.step() for _ in range(2)] == [{sequence: (0, 4)}, {sequence: (4, 8)}]
    assert sequence.num_generated == 0
    assert bench.step() == {sequence: (8, 10)}
    assert sequence.num_generated == 1


def test_a_prefix_hit_starts_ahead() -> None:
    bench = Bench()
    first = bench.add(*of(1, 5))
    bench.step()
    bench.scheduler.remove(first)
    second = bench.add(*of(1, 5))
    assert bench.step() == {second: (4, 5)}
    assert second.num_cached == 4


def test_who_comes_from_another_replica_is_behind_by_all_it_has() -> None:
    bench = Bench()
    resumed = bench.add(*of(1, 5), generated=(7, 7))
    assert bench.step() == {resumed: (0, 7)}
    assert (resumed.num_generated, bench.step()) == (3, {resumed: (7, 8)})


def test_without_sequences_there_is_nothing_to_do() -> None:
    assert Bench().scheduler.schedule() == Step((), ())


# --- Budgets ----------------------------------------------------------------------------------------------


def test_a_step_has_a_budget_of_tokens() -> None:
    bench = Bench(budget=8)
    first, second, third = (bench.add(*of(letter, 5)) for letter in (1, 2, 3))
    assert bench.step() == {first: (0, 5), second: (0, 3)}
    assert bench.step() == {first: (5, 6), second: (3, 5), third: (0, 5)}


def test_a_decode_does_not_wait_for_a_prompt_of_higher_rank() -> None:
    bench = Bench(budget=4)
    decoding = bench.add(*of(1, 3))
    bench.step()
    urgent = bench.add(*of(2, 20), priority=-1)
    for done in range(6):
        assert bench.step() == {decoding: (3 + done, 4 + done), urgent: (3 * done, 3 * done + 3)}


def test_prompts_are_taken_in_smaller_chunks_while_others_generate() -> None:
    bench = Bench(chunk=4)
    first = bench.add(*of(1, 20))
    assert bench.step() == {first: (0, 20)}, "nobody waits for it"
    second = bench.add(*of(2, 10))
    assert bench.step() == {first: (20, 21), second: (0, 4)}
    assert bench.step() == {first: (21, 22), second: (4, 8)}
    assert bench.step() == {first: (22, 23), second: (8, 10)}


def test_chunks_grow_with_those_who_wait_for_their_first_token() -> None:
    bench = Bench(size=5, chunk=4)
    generating = [bench.add(*of(letter, 3)) for letter in (1, 2)]
    bench.step()
    beginning = [bench.add(*of(letter, 20)) for letter in range(3, 8)]
    found = bench.step()
    assert [found[sequence] for sequence in generating] == [(3, 4), (3, 4)]
    assert {sequence: found.get(sequence) for sequence in beginning[:2]} == {
        beginning[0]: (0, 6),  # 4 x 3 / 2: of the five, two find no place in the batch anyway
        beginning[1]: None,
    }
    bench.scheduler.remove(generating[0])
    found = bench.step()
    assert (found[beginning[0]], found[beginning[1]]) == ((6, 20), (0, 2)), "4 x 4 / 1"


def test_choices_that_wait_for_their_prompt_do_not_make_chunks_grow() -> None:
    bench = Bench(chunk=4)
    generating = bench.add(*of(1, 3))
    bench.step()
    leader = bench.add(*of(2, 20))
    for _ in range(3):
        bench.add(*of(2, 20), leader=leader)
    assert bench.step() == {generating: (3, 4), leader: (0, 4)}


def test_chunks_grow_with_those_who_generate() -> None:
    bench = Bench(size=31, chunk=4)
    for letter in range(1, 31):
        bench.add(*of(letter, 2))
    bench.step()
    late = bench.add(*of(40, 20))
    assert bench.step()[late] == (0, 10), "4 x 30 / 12"


def test_a_batch_has_a_size() -> None:
    bench = Bench(size=2)
    first, second, third = (bench.add(*of(letter, 3)) for letter in (1, 2, 3))
    assert set(bench.step()) == {first, second}
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    bench.scheduler.remove(first)
    assert set(bench.step()) == {second, third}


# --- Order ------------------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    bench = Bench(size=1)
    first, second = bench.add(*of(1, 3)), bench.add(*of(2, 3))
    assert list(bench.step()) == [first]
    bench.scheduler.remove(first)
    assert list(bench.step()) == [second]


def test_lower_priority_numbers_come_first() -> None:
    bench = Bench(size=1)
    sequences = {priority: bench.add(*of(priority, 3), priority=priority) for priority in (2, 0, 1)}
    for priority in (0, 1, 2):
        assert list(bench.step()) == [sequences[priority]]
        bench.scheduler.remove(sequences[priority])


def test_nobody_overtakes_a_long_prompt_that_waits_for_memory() -> None:
    bench = Bench(LONGEST)
    running = bench.add(*of(1, 3))
    bench.step()
    long, short = bench.add(*of(2, 20)), bench.add(*of(3, 3))
    assert list(bench.step()) == [running]
    bench.scheduler.remove(running)
    assert list(bench.step()) == [long]
    bench.scheduler.remove(long)
    assert list(bench.step()) == [short]


def test_a_level_of_priority_is_worth_a_time_of_waiting() -> None:
    waiting = rank(0.0, 2, 0, 0, aging_s=10.0)
    assert rank(19.0, 0, 1, 0, aging_s=10.0) < waiting
    assert waiting < rank(20.0, 0, 1, 0, aging_s=10.0)
    assert rank(0.0, 2, 0, 1, aging_s=10.0) > waiting


def test_nobody_starves() -> None:
    """Somebody of low priority, and a stream of others before him that never ends."""
    bench = Bench(size=1)
    low = Sequence(of(1, 3), rank(0.0, 3, 0, 0, aging_s=10.0))
    bench.scheduler.add(low)
    for now in range(100):
        bench.scheduler.add(Sequence(of(2, 3), rank(float(now), 0, now + 1, 0, aging_s=10.0)))
        (served,) = bench.step()
        bench.scheduler.remove(served)
        if served is low:
            break
    assert now == 30


# --- Choices of one request -------------------------------------------------------------------------------


def test_choices_wait_for_the_first_and_share_its_prompt() -> None:
    bench = Bench(budget=8)
    leader = bench.add(*of(1, 11))
    second, third = (bench.add(*of(1, 11), leader=leader) for _ in range(2))
    other = bench.add(*of(2, 3))
    assert bench.step() == {leader: (0, 8)}
    assert bench.step() == {leader: (8, 11), other: (0, 3)}, "others need not wait"
    assert bench.step() == {leader: (11, 12), other: (3, 4), second: (10, 11), third: (10, 11)}


@pytest.mark.parametrize("steps", [0, 1])
def test_choices_do_not_wait_for_a_first_one_that_left(steps: int) -> None:
    bench = Bench(budget=8)
    leader = bench.add(*of(1, 11))
    follower = bench.add(*of(1, 11), leader=leader)
    for _ in range(steps):
        bench.step()
    bench.scheduler.remove(leader)
    assert bench.step() == {follower: (8, 11) if steps else (0, 8)}


# --- Preemption -------------------------------------------------------------------------------------------


def short_of_memory() -> tuple[Bench, Sequence, Sequence]:
    """Two sequences fill the memory, and the next step needs more for both."""
    bench = Bench(LONGEST)
    first, second = bench.add(*of(1, 14)), bench.add(*of(2, 14))
    for _ in range(3):
        assert set(bench.step()) == {first, second}
    return bench, first, second


def test_who_ranks_last_gives_way() -> None:
    bench = Bench(2 * LONGEST)
    first, second, third, last = (bench.add(*of(letter, 14)) for letter in (1, 2, 3, 4))
    for _ in range(3):
        assert len(bench.step()) == 4
    before = list(last.token_ids)
    # The first gets what the last two leave; the second could only grow to where it lies itself.
    assert bench.step() == {first: (16, 17)}
    assert bench.scheduler.preemptions == 3
    assert [(s.slot, s.num_computed) for s in (second, third, last)] == [(None, 0)] * 3
    assert last.token_ids == before
    assert bench.cache.kept_tokens == 0, "or the next growth would first have to evict that"
    assert set(bench.step()) == {first, second}


def test_who_is_preempted_computes_its_tokens_again_and_yields_the_next() -> None:
    bench, first, second = short_of_memory()
    tokens = list(second.token_ids)
    while second.slot is not None:
        bench.step()
    assert second.token_ids == tokens
    bench.scheduler.remove(first, keep=False)
    assert bench.step() == {second: (0, 17)}
    assert second.token_ids == [*tokens, 7]


def test_who_is_alone_makes_room_for_itself() -> None:
    bench, first, second = short_of_memory()
    assert bench.step() == {first: (0, 17)}, "its own slot was in the way: it begins again in a larger one"
    assert (bench.scheduler.preemptions, second.slot) == (2, None)
    assert bench.step() == {first: (17, 18)}


def test_who_is_preempted_comes_back_before_later_arrivals() -> None:
    bench, first, second = short_of_memory()
    bench.step()
    late = bench.add(*of(3, 3))
    assert set(bench.step()) == {first}
    bench.scheduler.remove(first)
    assert list(bench.step()) == [second]
    assert late.slot is None


def test_what_was_taken_from_one_is_not_given_away_in_the_same_step() -> None:
    bench = Bench(3 * LONGEST)
    first, second, third = (bench.add(*of(letter, length)) for letter, length in ((1, 14), (2, 18), (3, 18)))
    for _ in range(3):
        assert set(bench.step()) == {first, second, third}
    # The first moves to where the third was, and leaves enough for it.
    assert set(bench.step()) == {first, second}
    assert bench.scheduler.preemptions == 1
    assert set(bench.step()) == {first, second, third}


# --- The end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_who_leaves_is_gone_with_the_next_step(steps: int) -> None:
    bench = Bench(budget=4)
    sequence = bench.add(*of(1, 6))
    for _ in range(steps):
        bench.step()
    bench.scheduler.remove(sequence, keep=False)
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (0, 0)
    assert bench.cache.free_tokens == bench.cache.total_tokens
    assert bench.step() == {}


def test_who_leaves_in_the_middle_of_a_step_does_not_harm_the_others() -> None:
    bench = Bench()
    leaving, staying = bench.add(*of(1, 3)), bench.add(*of(2, 3))
    step = bench.scheduler.schedule()
    bench.scheduler.remove(leaving, keep=False)
    bench.finish(step)
    assert (leaving.num_computed, staying.num_computed) == (0, 3)
    assert bench.step() == {staying: (3, 4)}


def test_what_is_wrong_is_not_kept() -> None:
    bench = Bench()
    broken = bench.add(*of(1, 5))
    bench.step()
    bench.scheduler.remove(broken, keep=False)
    again = bench.add(*of(1, 5))
    assert bench.step() == {again: (0, 5)}


def test_copies_wait_for_a_step_that_is_carried_out() -> None:
    bench = Bench()
    gone = bench.add(*of(1, 5))
    bench.step()
    bench.scheduler.remove(gone)
    assert bench.scheduler.schedule() == Step((), ()), "an engine with nothing to do need not look at it"
    bench.add(*of(1, 5))
    moved, shared = bench.scheduler.schedule().copies
    assert shared.source == moved.target
