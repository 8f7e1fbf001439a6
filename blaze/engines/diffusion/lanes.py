"""How a forward is shared among the cores of a CPU: among math threads, or as several forwards at once.

The operators of a small denoiser are too short to be shared among math threads: on two cores, a UNet of a
million parameters takes as long with two of them as with one, and several times as long where idle ones
sleep. Two forwards of half the rows each, on a thread each, take half as long from some number of rows on;
below it they get into each other's way. Which way is the fastest is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from blaze.clock import Clock, SystemClock
from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.arguments import Arguments, join
from blaze.engines.diffusion.outputs import join_outputs

if TYPE_CHECKING:
    from blaze.engines.diffusion.pipelines import LoadedPipeline

ROWS_IN_A_LANE = 4  # at least: with fewer, no denoiser gains
_TRIALS = 3  # of each way; the first one also allocates
_USES = 2_000  # what was measured is forgotten after so many, for the machine may be busy with something else
_MOST_KEYS = 1_000
_LONG_S = 0.25  # of a forward: its operators are long enough to be shared, and trials would cost too much

Forward = Callable[[], object]


@dataclass
class _Measured:
    uses: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)  # by way


class Fastest:
    """Which of some ways takes least, by what each has taken when it was tried."""

    def __init__(self) -> None:
        self._measured: dict[Hashable, _Measured] = {}

    def choose(self, key: Hashable, ways: Sequence[int]) -> tuple[int, bool]:
        """The way to go, and whether that is a trial. ``key``: what the time depends on; the ways too.

        The first way is tried first; where it takes long, no other is.
        """
        if len(ways) == 1:
            return ways[0], False
        measured = self._measured.get(key)
        if measured is None or measured.uses >= _USES:
            if len(self._measured) >= _MOST_KEYS:
                self._measured.clear()
            measured = self._measured[key] = _Measured(seconds={way: [] for way in ways})
        measured.uses += 1
        seconds = measured.seconds
        untried = [way for way in ways if len(seconds[way]) < _TRIALS]
        if len(seconds[ways[0]]) > 1 and min(seconds[ways[0]]) > _LONG_S:
            return ways[0], False
        if untried:
            return untried[0], True
        return min(ways, key=lambda way: min(seconds[way])), False

    def note(self, key: Hashable, way: int, seconds: float) -> None:
        """Of a trial."""
        measured = self._measured.get(key)
        if measured is not None:
            measured.seconds[way].append(seconds)


class Lanes:
    """Belongs to the compute thread, which makes it and runs the first lane itself.

    What else that thread computes (text encoders, VAE) is shared among as many math threads as was best for
    the latest forward in one lane.
    """

    def __init__(self, threads: int, clock: Clock | None = None) -> None:
        self._threads = threads
        self._lane_counts = sorted({min(1 << power, threads) for power in range(threads.bit_length() + 1)})
        self._fastest_threads, self._fastest_lanes = Fastest(), Fastest()
        self._clock = clock or SystemClock()
        self._others = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="denoiser-lane")

    def may_split(self, rows: int) -> bool:
        return rows >= 2 * ROWS_IN_A_LANE

    def one(self, forward: Forward, rows: int, key: Hashable) -> object:
        """A call that is not split. ``key``: what its time depends on beside the number of rows."""
        return self._in_one(forward, *self._math_threads(rows, key))

    def run(self, forward: Callable[..., object], parts: Sequence[Arguments], key: Hashable) -> object:
        """The output of one call with the rows of all parts, which go with each other.

        Raises what ``forward`` raises, when no lane runs any more.
        """
        rows = sum(part.rows for part in parts)

        def whole() -> object:
            return forward(**join(parts))

        threads, trial = self._math_threads(rows, key)
        if trial is not None:
            return self._in_one(whole, threads, trial)
        counts = [count for count in self._lane_counts if count == 1 or rows >= ROWS_IN_A_LANE * count]
        lanes, is_trial = self._fastest_lanes.choose((key, rows), counts)
        began = self._clock.now()
        if lanes == 1:
            output = self._in_one(whole, threads)
        else:
            output = self._split(forward, deal(parts, lanes), 1 if threads == 1 else self._threads // lanes)
        if is_trial:
            self._fastest_lanes.note((key, rows), lanes, self._clock.now() - began)
        return output

    def close(self) -> None:
        self._others.shutdown()

    def _math_threads(self, rows: int, key: Hashable) -> tuple[int, Hashable | None]:
        """How many in one lane, and what they are tried for."""
        about = (key, rows.bit_length())
        threads, is_trial = self._fastest_threads.choose(about, (self._threads, 1))
        return threads, about if is_trial else None

    def _in_one(self, forward: Forward, threads: int, trial: Hashable | None = None) -> object:
        _set_math_threads(threads)
        began = self._clock.now()
        output = forward()
        if trial is not None:
            self._fastest_threads.note(trial, threads, self._clock.now() - began)
        return output

    def _split(
        self, forward: Callable[..., object], hands: Sequence[Sequence[Arguments]], threads: int
    ) -> object:
        mode, before = torch.is_inference_mode_enabled(), torch.get_num_threads()  # every thread has its own

        def lane(hand: Sequence[Arguments]) -> object:
            _set_math_threads(threads)
            with torch.inference_mode(mode):
                return forward(**join(hand))

        others = [self._others.submit(lane, hand) for hand in hands[1:]]
        try:
            first = lane(hands[0])
        finally:
            for other in others:
                other.exception()  # waits for its end, whatever that is
            _set_math_threads(before)
        return join_outputs([first, *(other.result() for other in others)])


def lanes_for(loaded: LoadedPipeline, options: DiffusionConfig, threads: int) -> Lanes | None:
    """None where forwards cannot run at once, or would gain nothing by it.

    Hooks that cast or move weights do so for all lanes, a compiled forward is no code of diffusers any more,
    and on a GPU one forward fills the device. With ``deterministic`` the number of rows is fixed.
    """
    module = None if loaded.denoiser is None else getattr(loaded.pipeline, loaded.denoiser)
    if threads < 2 or not isinstance(module, torch.nn.Module) or options.deterministic or options.compile:
        return None
    if options.layerwise_casting is not None or options.quantization is not None or options.offload != "none":
        return None
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    return Lanes(threads) if on_cpu and type(module).__module__.startswith("diffusers.") else None


def deal(parts: Sequence[Arguments], hands: int) -> list[list[Arguments]]:
    """Their rows in order, in so many hands of the same size, give or take one; there are enough of them."""
    total = sum(part.rows for part in parts)
    ends = [total * number // hands for number in range(1, hands + 1)]
    dealt: list[list[Arguments]] = [[]]
    at = 0
    for part in parts:
        start = 0
        while start < part.rows:
            if at == ends[len(dealt) - 1]:
                dealt.append([])
            stop = min(part.rows, start + ends[len(dealt) - 1] - at)
            dealt[-1].append(part if stop - start == part.rows else part.cut(start, stop))
            start, at = stop, at + stop - start
    return dealt


def _set_math_threads(count: int) -> None:
    """Of this thread only."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
