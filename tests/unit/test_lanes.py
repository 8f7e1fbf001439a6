"""One forward on several threads: rows are dealt out and come back in order, and the faster way is kept."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blaze.engines.diffusion.arguments import Arguments, Signature, join
from blaze.engines.diffusion.lanes import ROWS_IN_A_LANE, Fastest, Lanes, deal
from blaze.engines.diffusion.merger import Merger
from tests.fakes import FakeClock
from tests.unit.test_merger import Bench, MixesRows, values

SIGNATURE = Signature(("sample", "timestep", "names"), {"names": None})


def part(*numbers: float) -> Arguments:
    sample = torch.tensor(numbers, dtype=torch.float32).view(-1, 1)
    found = Arguments.read(SIGNATURE, (sample, torch.tensor(7)), {"names": [(str(n),) for n in numbers]})
    assert found is not None
    return found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 5))
def test_rows_are_dealt_in_order_and_evenly(sizes: list[int], hands: int) -> None:
    total = sum(sizes)
    hands = min(hands, total)
    numbers = iter(range(total))
    dealt = deal([part(*(next(numbers) for _ in range(size))) for size in sizes], hands)
    joined: list[dict[str, Any]] = [join(hand) for hand in dealt]
    assert [n for hand in joined for n in hand["sample"].flatten().tolist()] == list(range(total))
    assert [name for hand in joined for (name,) in hand["names"]] == [str(n) for n in range(total)]
    counts = [len(hand["sample"]) for hand in joined]
    assert len(counts) == hands
    assert max(counts) - min(counts) <= 1
    assert all(hand["timestep"].tolist() == [7] * len(hand["sample"]) for hand in joined)


# --- The choice ----------------------------------------------------------------------------------------


def used(fastest: Fastest, key: str, ways: dict[int, float], times: int) -> list[int]:
    """``ways``: what each takes."""
    found = []
    for _ in range(times):
        way, is_trial = fastest.choose(key, list(ways))
        found.append(way)
        if is_trial:
            fastest.note(key, way, ways[way])
    return found


def test_each_way_is_tried_and_the_fastest_kept() -> None:
    found = used(Fastest(), "a", {1: 0.03, 2: 0.01, 4: 0.02}, 100)
    assert Counter(found[:9]) == {1: 3, 2: 3, 4: 3}
    assert set(found[9:]) == {2}


def test_other_keys_are_measured_by_themselves() -> None:
    fastest = Fastest()
    assert used(fastest, "a", {1: 0.2, 2: 0.1}, 20)[-1] == 2
    assert used(fastest, "b", {1: 0.1, 2: 0.2}, 20)[-1] == 1
    assert used(fastest, "a", {1: 0.0, 2: 0.0}, 1) == [2], "what it has found before"


def test_a_machine_that_has_become_busy_is_noticed_in_the_end() -> None:
    fastest = Fastest()
    assert used(fastest, "a", {1: 0.2, 2: 0.1}, 1000)[-1] == 2
    assert used(fastest, "a", {1: 0.2, 2: 0.3}, 1100)[-1] == 1


def test_where_the_first_way_takes_long_no_other_is_tried() -> None:
    assert used(Fastest(), "a", {2: 0.3, 1: 0.1}, 100) == [2] * 100


def test_one_slow_trial_of_the_first_way_settles_nothing() -> None:
    fastest = Fastest()
    assert used(fastest, "a", {2: 0.3, 1: 0.1}, 1) == [2]
    assert used(fastest, "a", {2: 0.02, 1: 0.01}, 20)[-1] == 1


def test_one_way_is_not_tried() -> None:
    assert Fastest().choose("a", [3]) == (3, False)


# --- The lanes -----------------------------------------------------------------------------------------


THREADS = 2
TRIALS_OF_THREADS, TRIALS = 6, 12  # three for each number of math threads; then the same for the lanes


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    before = torch.get_num_threads()
    found = Lanes(THREADS, FakeClock())
    yield found
    found.close()
    torch.set_num_threads(before)


@dataclass
class Recorder:
    """A forward that doubles; ``clock`` says what it takes, by rows and math threads."""

    clock: FakeClock | None = None
    takes: Callable[[int, int], float] = lambda _rows, _threads: 0.0
    seen: list[tuple[int, int]] = field(default_factory=list)  # rows, math threads

    def __call__(self, sample: Tensor, timestep: Tensor, names: object = None) -> Tensor:
        self.seen.append((len(sample), torch.get_num_threads()))
        if self.clock is not None:
            self.clock.advance(self.takes(*self.seen[-1]))
        return sample * 2


def in_lanes(lanes: Lanes, forward: Callable[..., object], rows: int, *, times: int = 1) -> object:
    for _ in range(times):
        output = lanes.run(forward, [part(*range(rows))], "key")
    return output


def test_two_threads_compute_a_half_each(lanes: Lanes) -> None:
    meet = threading.Barrier(2, timeout=10)
    modes: list[bool] = []

    def forward(sample: Tensor, timestep: Tensor, names: object) -> tuple[Tensor]:
        if len(sample) == 8:
            meet.wait()  # at the same time
        modes.append(torch.is_inference_mode_enabled())
        return (sample * 2,)

    with torch.inference_mode():
        output = in_lanes(lanes, forward, 16, times=TRIALS)
    assert isinstance(output, tuple)
    assert output[0].flatten().tolist() == [2.0 * number for number in range(16)]
    assert set(modes) == {True}
    assert len(modes) == TRIALS + 3, "three trials of two lanes"


def test_first_the_number_of_math_threads_is_tried_then_that_of_lanes() -> None:
    clock = FakeClock()
    lanes, before = Lanes(THREADS, clock), torch.get_num_threads()
    forward = Recorder(clock, lambda rows, threads: rows * (0.03 if threads == 2 else 0.01))
    in_lanes(lanes, forward, 7, times=20)
    assert Counter(forward.seen[:TRIALS_OF_THREADS]) == {(7, 1): 3, (7, 2): 3}
    assert set(forward.seen[TRIALS_OF_THREADS:]) == {(7, 1)}
    assert torch.get_num_threads() == 1, "for what is computed beside it, too"
    forward.seen.clear()
    in_lanes(lanes, forward, 5, times=1)
    assert forward.seen == [(5, 1)], "about as many rows"
    lanes.close()
    torch.set_num_threads(before)


def test_where_math_threads_help_lanes_share_them() -> None:
    clock = FakeClock()
    lanes, before = Lanes(4, clock), torch.get_num_threads()
    forward = Recorder(clock, lambda rows, threads: rows / threads / 100)
    in_lanes(lanes, forward, 16, times=20)
    assert {seen for seen in forward.seen if seen[0] < 16} == {(8, 2), (4, 1)}
    assert torch.get_num_threads() == 4
    lanes.close()
    torch.set_num_threads(before)


def test_a_call_that_is_not_split_has_its_number_of_math_threads_too(lanes: Lanes) -> None:
    seen = []
    for _ in range(TRIALS_OF_THREADS):
        lanes.one(lambda: seen.append(torch.get_num_threads()), 2, "key")
    assert Counter(seen) == {1: 3, 2: 3}


def test_few_rows_are_never_split(lanes: Lanes) -> None:
    forward = Recorder()
    in_lanes(lanes, forward, 2 * ROWS_IN_A_LANE - 1, times=30)
    assert {rows for rows, _threads in forward.seen} == {2 * ROWS_IN_A_LANE - 1}


@pytest.mark.parametrize("broken", [0.0, 8.0])
def test_an_error_in_any_lane_is_that_of_the_call_and_comes_when_all_have_ended(
    lanes: Lanes, broken: float
) -> None:
    meet = threading.Barrier(2, timeout=10)
    ended: list[float] = []

    def forward(sample: Tensor, timestep: Tensor, names: object) -> Tensor:
        if len(sample) == 8:
            meet.wait()
            ended.append(float(sample[0]))
            if float(sample[0]) == broken:
                raise RuntimeError("broken")
        return sample

    with pytest.raises(RuntimeError, match="broken"):
        in_lanes(lanes, forward, 16, times=TRIALS)
    assert sorted(ended) == [0.0, 8.0]
    output = in_lanes(lanes, Recorder(), 16)
    assert isinstance(output, Tensor)
    assert output.flatten().tolist() == [2.0 * number for number in range(16)]


# --- In the merger -------------------------------------------------------------------------------------


def test_a_large_call_is_compared_in_halves_before_it_is_split(lanes: Lanes) -> None:
    bench = Bench()
    bench.merger = Merger(max_images=32, lanes=lanes)
    numbers = [float(number) for number in range(14)]
    sizes = []
    for _ in range(TRIALS):
        bench.module.batches.clear()
        (result,) = bench.merger.run([bench.call(*numbers)])
        assert values(result) == [2 * number for number in numbers]
        sizes.append(bench.module.sizes)
    assert sizes[0] == [14, 7, 7], "compared"
    assert all(size in ([14], [7, 7]) for size in sizes[1:])
    assert sizes.count([7, 7]) == 3


def test_a_large_call_whose_rows_depend_on_each_other_is_never_split(lanes: Lanes) -> None:
    bench = Bench(MixesRows())
    bench.merger = Merger(max_images=32, lanes=lanes)
    numbers = [float(number) for number in range(14)]
    for _ in range(TRIALS):
        (result,) = bench.merger.run([bench.call(*numbers)])
        assert values(result) == [2 * number + 6.5 for number in numbers]


def test_small_calls_are_not_compared(lanes: Lanes) -> None:
    bench = Bench()
    bench.merger = Merger(max_images=32, lanes=lanes)
    bench.merger.run([bench.call(1.0)])
    assert bench.module.sizes == [1]
