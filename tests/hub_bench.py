"""Pipeline calls without a pipeline: each asks the denoiser so many times and remembers how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blaze.engines.diffusion.hub import Hub
from blaze.engines.diffusion.merger import Denoiser, Merger
from blaze.errors import BlazeError

STEP = 1 / 64  # between the images of a call; sums of it are exact


class CountingDenoiser(nn.Module):
    """Gives every row back, a quarter more. ``batches``: the callers' numbers, of each forward; ``images``:
    which of their images."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        self.images: list[list[int]] = []
        self.before: Callable[[list[int]], None] = lambda _numbers: None

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        numbers = [int(row.flatten()[0]) for row in sample]
        self.before(numbers)
        self.batches.append(numbers)
        self.images.append([round(float(row.flatten()[0]) % 1 / STEP) for row in sample])
        return (sample + 0.25,)


class Caller:
    """A pipeline call of ``steps`` denoiser calls. Its rows begin with its number.

    ``blocks``: so many times all images, as guidance asks for. ``interleaved``: image by image instead.
    """

    def __init__(
        self,
        number: int,
        steps: int,
        *,
        images: int = 1,
        side: int = 1,
        adapters: Any = (),
        blocks: int = 1,
        interleaved: bool = False,
        distinct: bool = True,
    ) -> None:
        self.number = number
        self.images = images
        self.adapters = adapters
        self.reason: BlazeError | None = None
        self.left: set[int] = set()  # of the images
        self.gain = 0.25
        self.spoils = False  # what is denoised of the images that have left becomes NaN
        self.waits: list[int] = []  # of each denoiser call, how many forwards it took
        self.ends: list[BaseException | None] = []
        self._steps = steps
        latents = number + STEP * torch.arange(images if distinct else 1).expand(images)
        order = torch.arange(images)
        order = order.repeat_interleave(blocks) if interleaved else order.repeat(blocks)
        self._image_of_row: list[int] = order.tolist()
        self._sample = latents[order].unsqueeze(1).expand(-1, side)
        self.denoiser: nn.Module | None = None
        self.now: Callable[[], int] = lambda: 0

    @property
    def wanted(self) -> list[int]:
        return [image for image in range(self.images) if image not in self.left]

    def unwanted(self) -> BlazeError | None:
        return self.reason

    def run(self) -> None:
        try:
            for step in range(self._steps):
                sample = self._sample.clone()
                if self.spoils:
                    sample[[image in self.left for image in self._image_of_row]] = float("nan")
                since = self.now()
                assert self.denoiser is not None
                (output,) = self.denoiser(sample, torch.tensor(step), return_dict=False)
                self.waits.append(self.now() - since)
                assert output.isfinite().all()
                assert output.shape == sample.shape
                kept = [image not in self.left for image in self._image_of_row]
                assert torch.equal(output[kept], self._sample[kept] + self.gain)
        except Exception as error:
            self.ends.append(error)
        else:
            self.ends.append(None)


class HubBench:
    def __init__(
        self, *, max_images: int = 8, fixed_rows: int | None = None, module: CountingDenoiser | None = None
    ) -> None:
        self.module = module or CountingDenoiser()
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
        self.forget()

    def trust_narrow(self, blocks: int = 1) -> None:
        """The same for rows that are left out."""
        caller = Caller(0, 1, images=2, blocks=blocks)
        caller.left = {0}
        self.start(caller)
        self.finish()
        self.forget()

    def forget(self) -> None:
        self.batches.clear()
        self.module.images.clear()
        self.turns = 0
