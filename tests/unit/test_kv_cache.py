from __future__ import annotations

from itertools import count

import pytest

from blaze.engines.llm.kv_cache import KVCache, SlotCopy
from blaze.engines.llm.sequence import Sequence
from blaze.engines.llm.slots import Slot

LONGEST, UNIT, BLOCK = 32, 4, 2
_serials = count()


def new_cache(tokens: int = 2 * LONGEST, *, prefix_caching: bool = True, compact: bool = True) -> KVCache:
    return KVCache(
        tokens, longest=LONGEST, prefix_caching=prefix_caching, compact=compact, unit=UNIT, block=BLOCK
    )


def new(*prompt: int, generated: tuple[int, ...] = (), needs_all_logits: bool = False) -> Sequence:
    rank = (0.0, next(_serials), 0)
    return Sequence(prompt, rank, generated=generated, needs_all_logits=needs_all_logits)


def run(cache: KVCache, sequence: Sequence) -> Sequence:
    """Begin, and compute all that it has."""
    assert cache.begin(sequence)
    sequence.num_computed = len(sequence.token_ids)
    cache.computed(sequence)
    return sequence


def keep(cache: KVCache, *tokens: int) -> None:
    """Let a sequence of these tokens come and go."""
    cache.end(run(cache, new(*tokens)), keep=True)


def hit(cache: KVCache, *tokens: int) -> int:
    """How many of these tokens somebody who comes now would not have to compute."""
    probe = new(*tokens)
    assert cache.begin(probe)
    found = probe.num_computed
    cache.end(probe, keep=False)
    return found


def of(letter: int, length: int) -> tuple[int, ...]:
    """A prompt that shares nothing with one of another letter."""
    return tuple(100 * letter + index for index in range(length))


# --- Slots of running sequences -----------------------------------------------------------------------


def test_a_sequence_gets_a_slot_for_its_tokens_and_the_next_one() -> None:
    cache = new_cache()
    three, four = new(1, 2, 3), new(5, 6, 7, 8)
    assert cache.begin(three) and cache.begin(four)
    assert (three.slot, four.slot) == (Slot(0, 4), Slot(8, 8))
    assert cache.free_tokens == cache.total_tokens - 12
    assert (three.num_computed, cache.take_copies()) == (0, ())


def test_memory_for_less_than_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"31 tokens .* 32"):
        new_cache(31)


def test_the_longest_sequence_fits_though_it_has_no_next_token() -> None:
    longest = new(*range(LONGEST))
    assert new_cache(LONGEST).begin(longest)
    assert longest.slot == Slot(0, LONGEST)


def test_without_memory_a_sequence_does_not_begin() -> None:
    cache = new_cache(LONGEST)
    run(cache, new(*of(1, 20)))
    late = new(1)
    assert not cache.begin(late)
    assert (late.slot, late.num_computed, cache.counters.queries) == (None, 0, 20)


def test_a_sequence_that_grows_moves_with_all_that_is_computed() -> None:
    cache = new_cache()
    sequence = run(cache, new(1, 2, 3))
    assert cache.reserve(sequence, 4)
    assert (sequence.slot, cache.take_copies()) == (Slot(0, 4), ())
    assert cache.reserve(sequence, 5)
    assert sequence.slot == Slot(8, 8)
    assert cache.take_copies() == (SlotCopy(Slot(0, 4), Slot(8, 8), length=3),)
    assert cache.take_copies() == (), "they are handed out once"
    assert cache.free_tokens == cache.total_tokens - 8


def test_a_sequence_that_cannot_grow_stays_as_it_is() -> None:
    cache = new_cache(LONGEST)
    sequence = run(cache, new(*of(1, 10)))
    assert not cache.reserve(sequence, 17)
    assert (sequence.slot, sequence.num_computed, cache.take_copies()) == (Slot(0, 16), 10, ())
    assert cache.reserve(sequence, 16)


@pytest.mark.parametrize("keep", [True, False])
def test_a_sequence_that_ends_leaves_its_slot(keep: bool) -> None:
    cache = new_cache()
    sequence = run(cache, new(1, 2, 3))
    cache.end(sequence, keep=keep)
    assert (sequence.slot, sequence.num_computed) == (None, 0)
    assert cache.free_tokens + cache.kept_tokens == cache.total_tokens
    assert cache.kept_tokens == (4 if keep else 0)


# --- Prefix hits ----------------------------------------------------------------------------------------


def test_full_blocks_of_a_running_sequence_are_shared() -> None:
    cache = new_cache()
    run(cache, new(1, 2, 3, 4, 5))
    follower = new(1, 2, 3, 4, 5, 6)
    assert cache.begin(follower)
    assert (follower.num_computed, follower.num_cached) == (4, 4)
    assert cache.take_copies() == (SlotCopy(Slot(0, 8), Slot(8, 8), length=4),)


def test_only_what_is_computed_is_shared() -> None:
    cache = new_cache()
    first = new(1, 2, 3, 4, 5)
    assert cache.begin(first)
    assert hit(cache, 1, 2, 3, 4, 5) == 0
    first.num_computed = 3
    cache.computed(first)
    assert hit(cache, 1, 2, 3, 4, 5) == 2


def test_the_last_token_is_always_computed() -> None:
    cache = new_cache()
    run(cache, new(1, 2, 3, 4))
    assert hit(cache, 1, 2, 3, 4) == 2
    assert hit(cache, 1, 2) == 0
    assert hit(cache, 1, 2, 3, 4, 9) == 4


def test_what_is_shared_can_be_shared_again_at_once() -> None:
    cache = new_cache()
    first = run(cache, new(1, 2, 3))
    assert cache.begin(new(1, 2, 5))
    cache.end(first, keep=False)
    assert hit(cache, 1, 2, 7) == 2
    assert [copy.source for copy in cache.take_copies()] == [Slot(0, 4), Slot(4, 4)]


def test_generated_tokens_are_shared_like_those_of_a_prompt() -> None:
    cache = new_cache()
    cache.end(run(cache, new(1, 2, 3, generated=(4, 5))), keep=True)
    assert hit(cache, 1, 2, 3, 4, 9) == 4


def test_a_move_takes_the_shared_prefix_along() -> None:
    cache = new_cache()
    first = run(cache, new(1, 2, 3))
    assert cache.reserve(first, 9)
    assert hit(cache, 1, 2, 9) == 2
    moved, shared = cache.take_copies()
    assert shared.source == moved.target == first.slot


def test_who_needs_all_logits_computes_everything_and_still_shares_it() -> None:
    cache = new_cache()
    run(cache, new(1, 2, 3))
    scored = new(1, 2, 3, 4, 5, needs_all_logits=True)
    assert cache.begin(scored)
    assert (scored.num_computed, cache.take_copies()) == (0, ())
    scored.num_computed = 5
    cache.computed(scored)
    assert hit(cache, 1, 2, 3, 4, 9) == 4


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    cache = new_cache(prefix_caching=False)
    first = run(cache, new(1, 2, 3))
    assert hit(cache, 1, 2, 3) == 0
    cache.end(first, keep=True)
    assert cache.free_tokens == cache.total_tokens


# --- Counters -------------------------------------------------------------------------------------------


def test_hits_are_counted_in_tokens_of_prompts() -> None:
    cache = new_cache()
    run(cache, new(1, 2, 3))
    run(cache, new(1, 2, 3, 4, 5))
    assert (cache.counters.queries, cache.counters.hits) == (8, 2)


@pytest.mark.parametrize("generated", [0, 1])
def test_who_comes_back_after_a_preemption_is_not_counted_again(generated: int) -> None:
    cache = new_cache()
    sequence = run(cache, new(1, 2, 3))
    sequence.token_ids.extend([7] * generated)
    keep(cache, 1, 2, 3)
    cache.end(sequence, keep=False)
    run(cache, sequence)
    assert sequence.num_cached == 0, "that is what it was spared at first"
    assert (cache.counters.queries, cache.counters.hits) == (6, 2)


def test_who_comes_from_another_replica_was_counted_there() -> None:
    cache = new_cache()
    keep(cache, 1, 2, 3, 4, 5)
    resumed = new(1, 2, 3, generated=(4, 5))
    assert cache.begin(resumed)
    assert (resumed.num_computed, resumed.num_cached) == (4, 0)
    assert (cache.counters.queries, cache.counters.hits) == (5, 0)


def test_who_is_not_looked_up_is_not_counted() -> None:
    cache = new_cache()
    run(cache, new(1, 2, 3, needs_all_logits=True))
    assert cache.counters.queries == 0
    cache = new_cache(prefix_caching=False)
    run(cache, new(1, 2, 3))
    assert cache.counters.queries == 0


# --- Kept prefixes --------------------------------------------------------------------------------------


def test_what_is_kept_moves_up_into_a_slot_of_its_size() -> None:
    cache = new_cache(3 * LONGEST)
    sequence = run(cache, new(1, 2, 3))
    assert cache.reserve(sequence, 20)
    cache.take_copies()
    cache.end(sequence, keep=True)
    assert cache.take_copies() == (SlotCopy(Slot(32, 32), Slot(92, 4), length=3),)
    assert cache.kept_tokens == 4
    assert hit(cache, 1, 2, 9) == 2
    assert cache.take_copies()[0].source == Slot(92, 4)


def test_what_is_kept_does_not_move_down() -> None:
    cache = new_cache()
    sequence = run(cache, new(1, 2, 3))
    assert cache.reserve(sequence, 20)
    cache.take_copies()
    cache.end(sequence, keep=True)
    assert cache.take_copies() == (), "what is free lies lower, where the running ones belong"
    assert (cache.kept_tokens, cache.free_tokens) == (32, 32)


def test_kept_prefixes_do_not_lie_between_running_sequences() -> None:
    cache = new_cache()
    for letter in range(1, 5):
        keep(cache, *of(letter, 3))
    slots = [run(cache, new(*of(letter, 3))).slot for letter in range(5, 9)]
    assert slots == [Slot(start, 4) for start in (32, 36, 40, 44)], "side by side, and below what is kept"


def test_what_is_kept_stays_where_it_is_when_nobody_needs_neighbours() -> None:
    cache = new_cache(compact=False)
    keep(cache, *of(1, 3))
    assert cache.take_copies() == ()
    assert run(cache, new(*of(2, 3))).slot == Slot(4, 4)
    assert hit(cache, *of(1, 3)) == 2


def test_the_place_that_was_of_no_use_for_longest_is_cleared() -> None:
    cache = new_cache(compact=False)
    for letter in range(1, 16):
        keep(cache, *of(letter, 3))  # side by side, and one place is left
    for letter in (*range(1, 9), 13, 14, 15):
        assert hit(cache, *of(letter, 3)) == 2  # used just now
    assert run(cache, new(*of(20, 15))).slot == Slot(32, 16)
    assert [hit(cache, *of(letter, 3)) for letter in range(1, 16)] == [2] * 8 + [0] * 4 + [2] * 3


def test_less_than_a_block_is_not_kept() -> None:
    cache = new_cache()
    keep(cache, 1)
    assert cache.kept_tokens == 0


def test_what_was_not_computed_is_not_kept() -> None:
    cache = new_cache()
    aborted = new(1, 2, 3, 4, 5)
    assert cache.begin(aborted)
    aborted.num_computed = 3
    cache.computed(aborted)
    cache.end(aborted, keep=True)
    assert hit(cache, 1, 2, 3, 4, 5) == 2


def test_the_same_prefix_is_kept_once() -> None:
    cache = new_cache()
    for _ in range(3):
        keep(cache, 1, 2, 3, 4, 5)
    assert cache.kept_tokens == 8
    keep(cache, 1, 2, 3)
    assert cache.kept_tokens == 8, "the longer one contains it"


def test_a_longer_prefix_takes_the_place_of_those_it_contains() -> None:
    cache = new_cache()
    keep(cache, 1, 2)
    keep(cache, 1, 2, 3, 4)
    keep(cache, 1, 2, 9, 9)
    keep(cache, 1, 2, 3, 4, 5, 6)
    assert cache.kept_tokens == 8 + 4
    assert (hit(cache, 1, 2, 3, 4, 5, 6, 7), hit(cache, 1, 2, 9, 9, 9)) == (6, 4)


def test_kept_prefixes_give_way_least_recently_used_first() -> None:
    cache = new_cache()
    for letter in (1, 2, 3):
        keep(cache, *of(letter, 15))
    assert (cache.kept_tokens, cache.free_tokens) == (48, 16)
    assert hit(cache, *of(1, 3)) == 2  # used just now
    run(cache, new(*of(9, 31)))
    assert [hit(cache, *of(letter, 3)) for letter in (1, 2, 3)] == [2, 0, 0]


def test_no_more_than_needed_gives_way() -> None:
    cache = new_cache()
    for letter in (1, 2, 3):
        keep(cache, *of(letter, 15))
    first, second = run(cache, new(*of(8, 15))), run(cache, new(*of(9, 15)))
    assert (cache.kept_tokens, cache.free_tokens) == (32, 0)
    for sequence in (first, second):
        cache.end(sequence, keep=False)
    assert [hit(cache, *of(letter, 3)) for letter in (1, 2, 3)] == [0, 2, 2]


def test_a_prefix_that_is_kept_again_counts_as_used() -> None:
    cache = new_cache()
    for letter in (1, 2, 3, 1):
        keep(cache, *of(letter, 15))
    run(cache, new(*of(9, 31)))
    assert hit(cache, *of(1, 3)) == 2


def test_nothing_is_evicted_when_that_would_not_help() -> None:
    cache = new_cache(LONGEST)
    run(cache, new(*of(1, 3)))
    keep(cache, *of(2, 3))
    assert not cache.begin(new(*of(3, 20)))
    assert not cache.reserve(run(cache, new(*of(4, 3))), 20)
    assert hit(cache, *of(2, 3)) == 2


def test_a_prefix_is_given_up_when_it_is_in_its_users_way() -> None:
    cache = new_cache(LONGEST)
    keep(cache, *of(1, 15))
    longer = new(*of(1, 20))
    assert cache.begin(longer)
    assert (longer.slot, longer.num_computed, cache.kept_tokens) == (Slot(0, 32), 0, 0)


def test_nothing_is_evicted_to_save_a_prefix_that_cannot_be_saved() -> None:
    cache = new_cache()
    running = run(cache, new(*of(1, 15)))
    keep(cache, *of(2, 20))
    keep(cache, *of(3, 3))
    longer = new(*of(2, 25))
    assert cache.begin(longer)
    assert (running.slot, longer.slot) == (Slot(0, 16), Slot(32, 32)), (
        "the one place, and the prefix lay there"
    )
    assert hit(cache, *of(3, 3)) == 2


def test_one_kept_prefix_is_not_worth_many_old_ones() -> None:
    cache = new_cache(3 * LONGEST)
    large = run(cache, new(*of(1, 31)))
    for letter in range(2, 17):
        keep(cache, *of(letter, 3))
    for letter in range(2, 17, 2):  # so that the oldest eight do not lie side by side
        assert hit(cache, *of(letter, 3)) == 2
    assert cache.kept_tokens == 15 * 4
    cache.take_copies()
    cache.end(large, keep=True)
    assert cache.take_copies() == (), "it stays where it is"
    assert cache.kept_tokens == 32 + 7 * 4


def test_all_that_is_kept_can_be_evicted() -> None:
    cache = new_cache()
    keep(cache, 1, 2, 3)
    running = run(cache, new(5, 6, 7))
    cache.evict_all()
    assert (hit(cache, 1, 2, 3), hit(cache, 5, 6, 7)) == (0, 2)
    cache.end(running, keep=False)
    assert cache.free_tokens == cache.total_tokens
