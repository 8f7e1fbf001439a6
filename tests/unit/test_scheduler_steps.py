from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from blaze.engines.diffusion.steps import Step, watch


def run(
    scheduler: Any,
    *,
    steps: int = 4,
    begin: int = 0,
    return_dict: bool = False,
    after: Callable[[Step], None] | None = None,
) -> list[Step]:
    """The steps of a model that always finds the same image in the noise."""
    seen: list[Step] = []
    watch(scheduler, after or seen.append)
    scheduler.set_timesteps(steps)
    image = torch.full((1, 4), 0.25)
    latents = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps[begin:]:
        output = perfect_output(scheduler, image, latents, timestep)
        result = scheduler.step(output, timestep, latents, return_dict=return_dict)
        latents = result.prev_sample if return_dict else result[0]
    return seen


def perfect_output(scheduler: Any, image: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
    """What a model would give that knows the image."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        sigma = scheduler.sigmas[scheduler.timesteps.tolist().index(float(timestep))]
        return (latents - image) / sigma
    alpha = scheduler.alphas_cumprod[int(timestep)]
    return (latents - alpha.sqrt() * image) / (1 - alpha).sqrt()


SCHEDULERS = [
    diffusers.DDIMScheduler(clip_sample=False),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.UniPCMultistepScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda each: type(each).__name__)
def test_the_estimate_is_what_the_model_sees_in_the_noise(scheduler: Any) -> None:
    estimates: list[Tensor | None] = []
    run(scheduler, after=lambda step: estimates.append(step.estimate()))
    assert len(estimates) == 4
    for estimate in estimates:
        assert estimate is not None
        assert torch.allclose(estimate, torch.full((1, 4), 0.25), atol=1e-3)


def test_a_scheduler_that_estimates_nothing_leaves_the_latents() -> None:
    (first, *_) = run(diffusers.PNDMScheduler())
    assert first.estimate() is first.latents


@pytest.mark.parametrize("return_dict", [True, False])
def test_steps_are_seen_however_the_result_is_asked_for(return_dict: bool) -> None:
    seen = run(diffusers.DDIMScheduler(clip_sample=False), return_dict=return_dict)
    assert len(seen) == 4
    assert all(step.latents is not None and step.original is not None for step in seen)


@pytest.mark.parametrize("begin", [0, 3])
def test_what_is_left_counts_from_where_the_drawing_begins(begin: int) -> None:
    seen = run(diffusers.DDIMScheduler(), steps=10, begin=begin)
    assert [step.steps_left() for step in seen] == list(range(10 - begin, 0, -1))


def test_the_signature_stays_what_it_was() -> None:
    scheduler = diffusers.DDIMScheduler()
    watch(scheduler, lambda _step: None)
    assert "eta" in inspect.signature(scheduler.step).parameters


def test_what_is_raised_ends_the_step() -> None:
    class Enough(Exception): ...

    def stop(_step: Step) -> None:
        raise Enough

    scheduler = diffusers.DDIMScheduler()
    watch(scheduler, stop)
    scheduler.set_timesteps(2)
    with pytest.raises(Enough):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[0], torch.zeros(1, 4))
