"""Pipeline calls without a pipeline: each asks the denoiser so many times and remembers how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blaze.engines.diffusion.hub import Hub
from blaze.engines.diffusion.merger import Denoiser, Merger
from blaze.errors import BlazeError


class CountingDenoiser(nn.Module):
    """Gives every row back, one more. ``batches``: the callers' numbers, of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        self.before: Callable[[list[int]], None] = lambda _numbers: None

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        numbers = [int(row.flatten()[0]) for row in sample]
        self.before(numbers)
        self.batches.append(numbers)
        return (sample + 0.25,)


class Caller:
    """A pipeline call of ``steps`` denoiser calls. Its rows begin with its number."""

    def __init__(
        self, number: int, steps: int, *, images: int = 1, side: int = 1, adapters: Any = ()
    ) -> None:
        self.number = number
        self.images = images
        self.adapters = adapters
        self.reason: BlazeError | None = None
        self.waits: list[int] = []  # of each denoiser call, how many forwards it took
        self.ends: list[BaseException | None] = []
        self._steps = steps
        self._side = side
        self.denoiser: nn.Module | None = None
        self.now: Callable[[], int] = lambda: 0

    def unwanted(self) -> BlazeError | None:
        return self.reason

    def run(self) -> None:
        try:
            for step in range(self._steps):
                sample = torch.full((self.images, self._side), float(self.number))
                since = self.now()
                assert self.denoiser is not None
                (output,) = self.denoiser(sample, torch.tensor(step), return_dict=False)
                self.waits.append(self.now() - since)
                assert torch.equal(output, sample + 0.25)
        except Exception as error:
            self.ends.append(error)
        else:
            self.ends.append(None)


class HubBench:
    def __init__(self, *, max_images: int = 8, fixed_rows: int | None = None) -> None:
        self.module = CountingDenoiser()
        self.turns = 0
        self.hub = Hub(Merger(max_images=max_images, fixed_rows=fixed_rows))
        self._denoiser = Denoiser(self.module)

    @property
    def batches(self) -> list[list[int]]:
        return self.module.batches

    def start(self, *callers: Caller) -> None:
        for caller in callers:
            caller.denoiser = self.hub.stand_in(self._denoiser)
            caller.now = lambda: self.turns
            self.hub.start(caller)

    def step(self) -> None:
        self.turns += 1
        self.hub.step()

    def finish(self) -> None:
        while self.hub.num_waiting:
            self.step()

    def trust(self) -> None:
        """Past the first calls, which run alone as well."""
        self.start(Caller(0, 1), Caller(0, 1))
        self.finish()
        self.batches.clear()
        self.turns = 0
