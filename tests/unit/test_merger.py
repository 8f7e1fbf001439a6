from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blaze.engines.diffusion.merger import Denoiser, DenoiserCall, Merger, Result, is_out_of_memory


class Doubling(nn.Module):
    """Gives twice its rows. ``batches``: the first number of each row, of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[float]] = []
        self.before: Callable[[Tensor], None] = lambda _sample: None

    def forward(self, sample: Tensor, timestep: Tensor, scale: float = 2.0) -> tuple[Tensor]:
        self.before(sample)
        self.batches.append(sample.flatten(1)[:, 0].tolist())
        return (sample * scale,)

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class MixesRows(Doubling):
    """What no denoiser may do: a row's result depends on the others."""

    def forward(self, sample: Tensor, timestep: Tensor, scale: float = 2.0) -> tuple[Tensor]:
        (output,) = super().forward(sample, timestep, scale)
        return (output + sample.mean(),)


class DependsOnPlace(Doubling):
    """As kernels do that take the last rows of a batch in blocks of another size."""

    def forward(self, sample: Tensor, timestep: Tensor, scale: float = 2.0) -> tuple[Tensor]:
        (output,) = super().forward(sample, timestep, scale)
        output[3:] += 1e-6
        return (output,)


class Bench:
    def __init__(self, module: Doubling | None = None, **options: Any) -> None:
        self.module = module or Doubling()
        self.denoiser = Denoiser(self.module)
        self.steps = 0
        self.active: list[Any] = []
        self.merger = Merger(
            on_step=self._count, activate=self.active.append, **({"max_images": 8} | options)
        )

    def _count(self) -> None:
        self.steps += 1

    def call(self, *values: float, side: int = 2, adapters: Any = (), **kwargs: Any) -> DenoiserCall:
        sample = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, side, side)
        return self.denoiser.call((sample, torch.tensor(1)), kwargs, images=len(values), adapters=adapters)

    def trusting(self) -> Bench:
        """Past the first calls, which run alone as well."""
        self.merger.run([self.call(0.0), self.call(1.0)])
        self.module.batches.clear()
        self.steps = 0
        return self


def values(result: Result) -> list[float]:
    assert result.error is None
    assert isinstance(result.output, tuple)
    return list(result.output[0].flatten(1)[:, 0].tolist())


# --- Which run next ------------------------------------------------------------------------------------


def test_the_longest_waiting_call_runs_next_with_all_that_go_with_it() -> None:
    bench = Bench()
    waiting = [bench.call(1), bench.call(2, side=4), bench.call(3), bench.call(4, side=4), bench.call(5)]
    assert bench.merger.choose(waiting) == [0, 2, 4]
    assert bench.merger.choose(waiting[1:]) == [0, 2]


def test_when_more_wait_than_fit_the_longest_waiting_run() -> None:
    bench = Bench(max_images=4)
    waiting = [bench.call(1), bench.call(2, 3), bench.call(4, 5), bench.call(6)]
    assert bench.merger.choose(waiting) == [0, 1, 3]


def test_a_call_larger_than_the_limit_runs_all_the_same() -> None:
    bench = Bench(max_images=2)
    assert bench.merger.choose([bench.call(1, 2, 3), bench.call(4)]) == [0]


def test_other_adapters_and_other_denoisers_run_apart() -> None:
    bench, other = Bench(), Bench()
    waiting = [bench.call(1), bench.call(2, adapters=(("a", 1.0),)), other.call(3), bench.call(4)]
    assert bench.merger.choose(waiting) == [0, 3]


def test_adapters_are_on_before_their_calls_run() -> None:
    bench = Bench()
    bench.merger.run([bench.call(1, adapters=(("a", 0.5),))])
    assert bench.active == [(("a", 0.5),)]


# --- One forward ---------------------------------------------------------------------------------------


def test_calls_run_as_one_and_each_gets_its_rows() -> None:
    bench = Bench().trusting()
    results = bench.merger.run([bench.call(1, 2), bench.call(3), bench.call(4, 5)])
    assert [values(result) for result in results] == [[2, 4], [6], [8, 10]]
    assert bench.module.batches == [[1, 2, 3, 4, 5]]
    assert bench.steps == 1


def test_a_call_alone_is_made_as_the_pipeline_made_it() -> None:
    seen: list[Any] = []

    class Looking(Doubling):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            return super().forward(*args, **kwargs)

    bench = Bench(Looking())
    sample, timestep = torch.zeros(2, 1, 2, 2), torch.tensor(1)
    (result,) = bench.merger.run([bench.denoiser.call((sample, timestep), {"scale": 3.0})])
    assert values(result) == [0, 0]
    assert seen[0][0][1] is timestep
    assert seen[0][1] == {"scale": 3.0}


def test_the_first_calls_run_alone_as_well_and_are_compared() -> None:
    bench = Bench()
    results = bench.merger.run([bench.call(1), bench.call(2)])
    assert [values(result) for result in results] == [[2], [4]]
    assert bench.module.batches == [[1], [2], [1, 2]]
    assert bench.steps == 3, "every forward is a step"
    bench.merger.run([bench.call(1, side=6), bench.call(2, side=6)])
    assert bench.module.batches[3:] == [[1, 2]], "another size is no other way of joining"


def test_calls_that_joining_changes_are_not_joined() -> None:
    bench = Bench(MixesRows())
    for _ in range(3):
        results = bench.merger.run([bench.call(1), bench.call(5)])
        assert [values(result) for result in results] == [[3], [15]]
    assert bench.module.sizes == [1, 1, 2, 1, 1, 1, 1]


def test_infinite_results_are_no_reason_to_join_nothing_any_more() -> None:
    bench = Bench()
    bench.merger.run([bench.call(float("inf")), bench.call(1)])
    bench.trusting()
    bench.merger.run([bench.call(1), bench.call(2)])
    assert bench.module.sizes == [2]


def test_a_denoiser_that_cannot_take_joined_rows_gets_them_one_by_one() -> None:
    def one_row_only(sample: Tensor) -> None:
        if len(sample) > 1:
            raise ValueError("one at a time")

    bench = Bench()
    bench.module.before = one_row_only
    for _ in range(2):
        results = bench.merger.run([bench.call(1), bench.call(2)])
        assert [values(result) for result in results] == [[2], [4]]


def test_a_signature_that_hides_its_arguments_is_never_joined() -> None:
    class Hidden(Doubling):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    bench = Bench(Hidden())
    calls = [bench.call(1), bench.call(2)]
    assert bench.merger.choose(calls) == [0]
    assert values(bench.merger.run(calls[:1])[0]) == [2]


# --- Failures ------------------------------------------------------------------------------------------


def test_a_failure_is_of_the_call_that_causes_it_alone() -> None:
    def fail_at_3(sample: Tensor) -> None:
        if (sample == 3).any():
            raise ValueError("three")

    bench = Bench().trusting()
    bench.module.before = fail_at_3
    results = bench.merger.run([bench.call(1), bench.call(2, 3), bench.call(4)])
    assert (values(results[0]), values(results[2])) == ([2], [8])
    assert isinstance(results[1].error, ValueError)
    bench.module.batches.clear()
    bench.merger.run([bench.call(1), bench.call(2)])
    assert bench.module.sizes == [2], "what failed once is joined again"


def out_of_memory_above(rows: int, error: Callable[[], Exception]) -> Callable[[Tensor], None]:
    def check(sample: Tensor) -> None:
        if len(sample) > rows:
            raise error()

    return check


ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory"),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError,
]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_halves_the_rows_until_they_fit_and_that_is_remembered(
    error: Callable[[], Exception],
) -> None:
    bench = Bench(max_images=16).trusting()
    bench.module.before = out_of_memory_above(3, error)
    calls = [bench.call(index) for index in range(8)]
    results = bench.merger.run(calls)
    assert [values(result) for result in results] == [[2 * index] for index in range(8)]
    assert bench.module.sizes == [2, 2, 2, 2]
    bench.module.batches.clear()
    bench.merger.run([bench.call(index) for index in range(5)])
    assert bench.module.sizes == [2, 2, 1]
    bench.module.batches.clear()
    bench.module.before = lambda _sample: None
    bench.merger.run([bench.call(index, side=1) for index in range(5)])
    assert bench.module.sizes == [5], "smaller images have a limit of their own"


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("fixed_rows", [None, 4, 2])
def test_one_call_too_large_for_the_memory_is_cut_into_pieces(is_first: bool, fixed_rows: int | None) -> None:
    bench = Bench(fixed_rows=fixed_rows)
    if not is_first:
        bench.trusting()
    bench.module.before = out_of_memory_above(2, ERRORS[0])
    for _ in range(2):
        (result,) = bench.merger.run([bench.call(1, 2, 3, 4, 5)])
        assert values(result) == [2, 4, 6, 8, 10]
    assert max(bench.module.sizes) == 2


def test_a_call_that_cannot_be_cut_fails_when_it_does_not_fit() -> None:
    bench = Bench(MixesRows())
    bench.module.before = out_of_memory_above(2, ERRORS[0])
    (result,) = bench.merger.run([bench.call(1, 2, 3, 4, 9)])
    assert isinstance(result.error, torch.OutOfMemoryError)


def test_not_even_one_row_fits() -> None:
    bench = Bench().trusting()
    bench.module.before = out_of_memory_above(0, ERRORS[0])
    results = bench.merger.run([bench.call(1), bench.call(2)])
    assert all(isinstance(result.error, torch.OutOfMemoryError) for result in results)


def test_other_errors_are_no_shortage_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


# --- Fixed numbers of rows -----------------------------------------------------------------------------


def test_fixed_rows_pad_every_forward_and_cut_what_is_larger() -> None:
    bench = Bench(fixed_rows=4).trusting()
    results = bench.merger.run([bench.call(1), bench.call(2, 3)])
    results += bench.merger.run([bench.call(4)])
    results += bench.merger.run([bench.call(5, 6), bench.call(7, 8), bench.call(9)])
    assert [values(result) for result in results] == [[2], [4, 6], [8], [10, 12], [14, 16], [18]]
    assert bench.module.batches == [[1, 2, 3, 1], [4, 4, 4, 4], [5, 6, 7, 8], [9, 9, 9, 9]]
    (large,) = bench.merger.run([bench.call(*range(10))])
    assert values(large) == [2 * value for value in range(10)]
    assert bench.module.sizes[4:] == [4, 4, 4]


def test_where_the_place_in_the_batch_changes_bits_fixed_rows_join_nothing() -> None:
    bench = Bench(DependsOnPlace(), fixed_rows=4)
    for _ in range(2):
        results = bench.merger.run([bench.call(1), bench.call(2), bench.call(3), bench.call(4)])
        assert [values(result) for result in results] == [[2], [4], [6], [8]]
    assert bench.module.sizes[-4:] == [1, 1, 1, 1]


def test_fixed_rows_that_do_not_fit_become_fewer_fixed_rows() -> None:
    bench = Bench(fixed_rows=8).trusting()
    bench.module.before = out_of_memory_above(4, ERRORS[0])
    results = bench.merger.run([bench.call(1), bench.call(2)])
    assert [values(result) for result in results] == [[2], [4]]
    bench.module.batches.clear()
    bench.merger.run([bench.call(1)])
    assert bench.module.sizes == [4]
