"""A diffusion pipeline that draws what it is told, made like those of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from blaze.engines.diffusion.pipelines import LoadedPipeline, Task


class FakeScheduler:
    """Keeps its place in itself, as those of diffusers do: two calls of one would both fail."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.timesteps = torch.arange(0)
        self.step_index = 0

    def set_timesteps(self, steps: int) -> None:
        assert self.step_index == 0, "another call left this scheduler in the middle"
        self.timesteps = torch.arange(steps).flip(0)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> tuple[Tensor, ...]:
        assert self.timesteps[self.step_index] == timestep, "another call moved this call's scheduler"
        self.step_index += 1
        return (sample + model_output,)


class FakeDenoiser(nn.Module):
    """Changes nothing. ``batches``: of each forward, what its rows' prompts begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[str] = []
        self.before: Callable[[str], None] = lambda _letters: None

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        assert timestep.ndim == 0 or len(timestep) == len(sample) == len(encoder_hidden_states)
        letters = "".join(chr(int(code)) for code in encoder_hidden_states[:, 0])
        self.before(letters)
        self.batches.append(letters)
        return (torch.zeros_like(sample),)


@dataclass
class Script:
    """What happens in a pipeline, for all shells of it."""

    calls: list[list[str]] = field(default_factory=list)  # of each, its prompts
    before_step: Callable[[str, int], None] = lambda _prompt, _step: None


class FakePipeline:
    """An image is one level of grey: its seed. Of a prompt "nan" or "inf", the latents become that, and the
    pixels of infinity look like white."""

    def __init__(self) -> None:
        self.scheduler = FakeScheduler()
        self.unet = FakeDenoiser()
        self.script = Script()
        self.config: Mapping[str, Any] = {}

    @property
    def components(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "unet": self.unet}

    def __call__(
        self,
        prompt: list[str],
        generator: list[torch.Generator],
        output_type: str,
        num_inference_steps: int = 4,
        height: int = 8,
        width: int = 8,
    ) -> SimpleNamespace:
        self.script.calls.append(prompt)
        levels = torch.tensor([each.initial_seed() % 256 / 255 for each in generator])
        latents = levels.view(-1, 1, 1, 1).expand(-1, 3, height, width)
        states = torch.tensor([[float(ord(each[0]))] for each in prompt])
        self.scheduler.set_timesteps(num_inference_steps)
        self._num_timesteps = num_inference_steps
        for step, timestep in enumerate(self.scheduler.timesteps):
            for each in prompt:
                self.script.before_step(each, step)
            noise = self.unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]
            for row, each in enumerate(prompt):
                if each in ("nan", "inf"):
                    noise[row] = float(each)
            latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return SimpleNamespace(images=latents.clamp(0, 1).permute(0, 2, 3, 1).numpy())


def fake_pipeline(pipeline: FakePipeline, *, whole_because: str | None = None) -> LoadedPipeline:
    accepts = {"prompt", "generator", "output_type", "num_inference_steps", "height", "width"}
    return LoadedPipeline(
        pipelines={Task.TEXT: pipeline},
        accepts={Task.TEXT: frozenset(accepts)},
        size_factor=8,
        default_side=8,
        denoiser="unet",
        whole_because=whole_because,
        is_conditional=True,
    )
