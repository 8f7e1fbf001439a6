"""What happens at a scheduler's step: every pipeline has one, whatever callbacks its class knows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One ``scheduler.step``: at ``timestep``, to ``latents``. None: the scheduler works on something else.

    ``original``: the scheduler's own estimate of the final latents, where it returns one.
    """

    scheduler: SchedulerMixin
    timestep: object
    model_output: Tensor | None
    latents: Tensor | None
    original: Tensor | None

    def estimate(self) -> Tensor | None:
        """The best estimate of the final latents that is to be had, as long as no further step is taken."""
        if self.original is not None or self.latents is None:
            return self.original
        predicted = self._predicted_by_a_solver()
        return self.latents if predicted is None else predicted

    def steps_left(self) -> int:
        """Steps from this one to the last, this one included; 0 where the scheduler does not say."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or not isinstance(self.timestep, Tensor | int | float):
            return 0
        first = self.timestep.flatten()[0] if isinstance(self.timestep, Tensor) else self.timestep
        at = (timesteps == first).nonzero()
        return len(timesteps) - int(at[0]) if len(at) else 0

    def _predicted_by_a_solver(self) -> Tensor | None:
        """Flow matching predicts noise - image; multistep solvers keep what they take the image to be."""
        scheduler = self.scheduler
        if "FlowMatchEuler" in type(scheduler).__name__:
            if self.latents is None or self.model_output is None or scheduler.step_index is None:
                return None
            sigma: Tensor = scheduler.sigmas[scheduler.step_index]
            return self.latents - sigma * self.model_output
        config = scheduler.config
        if config.get("predict_x0") or "++" in str(config.get("algorithm_type")):
            predicted = scheduler.model_outputs[-1]
            return predicted if isinstance(predicted, Tensor) else None
        return None


def watch(scheduler: SchedulerMixin, after: Callable[[Step], None]) -> None:
    """Have ``after`` called after every step of this scheduler; what it raises ends the pipeline's call."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature to see what it takes
    def watched(*args: object, **kwargs: object) -> object:
        result = step(*args, **kwargs)
        given = dict(zip(("model_output", "timestep"), args, strict=False)) | kwargs
        model_output = given.get("model_output")
        if isinstance(result, tuple):
            latents, original = result[0], result[1] if len(result) > 1 else None
        else:
            latents = getattr(result, "prev_sample", None)
            original = getattr(result, "pred_original_sample", None)
        after(
            Step(
                scheduler,
                given.get("timestep"),
                model_output if isinstance(model_output, Tensor) else None,
                latents if isinstance(latents, Tensor) else None,
                original if _fits(original, latents) else None,
            )
        )
        return result

    scheduler.step = watched


def unwatch(scheduler: SchedulerMixin) -> None:
    """Break the cycle: what the call has held would live until the next full garbage collection."""
    vars(scheduler).pop("step", None)


def _fits(original: object, latents: object) -> bool:
    return isinstance(original, Tensor) and isinstance(latents, Tensor) and original.shape == latents.shape
