"""Schedulers by name: a fresh one for every call, made from the config of the model's own."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from blaze.engines.diffusion.class_source import class_source
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task
from blaze.errors import InvalidRequest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

SCHEDULERS = {
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddpm": "DDPMScheduler",
}
# For models that were trained by flow matching, whose noise and timesteps mean something else.
_FLOW_SCHEDULERS = {
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Those with the noise schedule of DDPM in common. Others (LCM, EDM, consistency models) stand alone.
_EXCHANGEABLE = frozenset(SCHEDULERS.values()) | {
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
}
# They expect that the caller divides the latents by their noise level before every step.
_SCALES_ITS_INPUT = frozenset({"euler", "euler_a", "heun", "lms"})
_TAKES_LEARNED_VARIANCE = frozenset({"dpm", "ddpm"})


@dataclass(frozen=True, slots=True)
class _Known:
    """What has been found out about the schedulers of one pipeline: it is asked for with every request."""

    prototypes: dict[str, SchedulerMixin] = field(default_factory=dict)
    refusals: dict[str, str | None] = field(default_factory=dict)
    refused_steps: dict[tuple[str | None, int], str | None] = field(default_factory=dict)


_known: WeakKeyDictionary[DiffusionPipeline, _Known] = WeakKeyDictionary()  # as long as the pipeline lives


def _known_of(pipeline: DiffusionPipeline) -> _Known:
    return _known.setdefault(pipeline, _Known())


def make_scheduler(loaded: LoadedPipeline, task: Task, name: str | None) -> SchedulerMixin:
    """A scheduler of the call's own: schedulers keep state while they run. None: the model's own kind.

    Raises :class:`InvalidRequest` for a name that is unknown or that this model cannot use.
    """
    pipeline = loaded.pipelines[task]
    if name is None:
        return copy.deepcopy(pipeline.scheduler)
    reason = _refusal(pipeline, name)
    if reason is not None:
        raise _refused(pipeline, name, reason)
    return copy.deepcopy(_prototype(pipeline, name))


def check_scheduler(loaded: LoadedPipeline, task: Task, name: str | None, steps: int) -> None:
    """Raises :class:`InvalidRequest` when ``make_scheduler`` would, or when the scheduler cannot be set to
    so many steps."""
    from diffusers import SchedulerMixin

    pipeline = loaded.pipelines[task]
    known = _known_of(pipeline).refused_steps
    if (name, steps) not in known:
        scheduler = make_scheduler(loaded, task, name)
        # A kind of its own (a pipeline may have one) is not ours to try.
        known[name, steps] = (
            _why_not_steps(scheduler, steps) if isinstance(scheduler, SchedulerMixin) else None
        )
    reason = known[name, steps]
    if reason is not None:
        raise InvalidRequest(
            f"num_inference_steps: not {steps} with this scheduler: {reason}", param="num_inference_steps"
        )


def takes_eta(loaded: LoadedPipeline, task: Task, name: str | None) -> bool:
    """Whether the scheduler's step does anything with ``eta``."""
    return "eta" in inspect.signature(make_scheduler(loaded, task, name).step).parameters


def is_flow_matching(pipeline: DiffusionPipeline) -> bool:
    scheduler = pipeline.scheduler
    return type(scheduler).__name__.startswith("FlowMatch") or (
        scheduler.config.get("prediction_type") == "flow_prediction"
    )


def _refused(pipeline: DiffusionPipeline, name: str, reason: str) -> InvalidRequest:
    usable = [other for other in SCHEDULERS if _refusal(pipeline, other) is None]
    choice = f"this model takes {', '.join(usable)}" if usable else "this model has only its own"
    return InvalidRequest(f"scheduler: {name[:40]!r} {reason}; {choice}.", param="scheduler")


def _refusal(pipeline: DiffusionPipeline, name: str) -> str | None:
    """Why the pipeline cannot draw with this scheduler; None: it can."""
    if name not in SCHEDULERS:
        return "is not known"
    known = _known_of(pipeline).refusals
    if name not in known:
        known[name] = _find_refusal(pipeline, name)
    return known[name]


def _find_refusal(pipeline: DiffusionPipeline, name: str) -> str | None:
    if is_flow_matching(pipeline):
        if name not in _FLOW_SCHEDULERS:
            return "is not for flow-matching models"
    elif type(pipeline.scheduler).__name__ not in _EXCHANGEABLE:
        return f"cannot take the place of {type(pipeline.scheduler).__name__}"
    learns_variance = str(pipeline.scheduler.config.get("variance_type")).startswith("learned")
    if learns_variance and name not in _TAKES_LEARNED_VARIANCE:
        return "does not take the variance that this model predicts"
    return _why_not(_Use.of(pipeline.__class__), name, _prototype(pipeline, name))


def _prototype(pipeline: DiffusionPipeline, name: str) -> SchedulerMixin:
    made = _known_of(pipeline).prototypes
    if name not in made:
        made[name] = _make(pipeline, name)
    return made[name]


def _make(pipeline: DiffusionPipeline, name: str) -> SchedulerMixin:
    import diffusers

    own = pipeline.scheduler
    if not is_flow_matching(pipeline):
        return getattr(diffusers, SCHEDULERS[name]).from_config(own.config)
    kind = getattr(diffusers, _FLOW_SCHEDULERS[name])
    if isinstance(own, kind):
        return kind.from_config(own.config)
    # The same shift of the noise levels has two names.
    shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
    if name in ("euler", "heun"):
        return kind.from_config(own.config, shift=shift)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return kind.from_config(own.config, **flow)


class _Use:
    """What a pipeline class asks of its scheduler, read from its source: no signature tells it."""

    def __init__(self, source: str) -> None:
        guarded = set(re.findall(r"hasattr\(self\.scheduler, \"(\w+)\"\)", source))
        self.uses = frozenset(re.findall(r"self\.scheduler\.(\w+)", source))
        self.needs = self.uses - guarded
        self.gives_sigmas = "sigmas = np.linspace(" in source
        self.gives_mu = "mu=mu" in source
        self.spares_flow_sigmas = "use_flow_sigmas" in source  # gives those schedulers no sigmas
        step = re.search(r"self\.scheduler\.step\(([^()]*(?:\([^()]*\)[^()]*)*)\)", source)
        self.step_keywords = frozenset(re.findall(r"(\w+)=", step[1])) if step else frozenset()

    @staticmethod
    @functools.cache
    def of(pipeline_class: type) -> _Use:
        return _Use(class_source(pipeline_class))


def _why_not(use: _Use, name: str, scheduler: SchedulerMixin) -> str | None:
    missing = sorted(what for what in use.needs if not hasattr(scheduler, what))
    unknown = sorted(use.step_keywords - set(inspect.signature(scheduler.step).parameters))
    gives_sigmas = use.gives_sigmas and not (
        use.spares_flow_sigmas and scheduler.config.get("use_flow_sigmas")
    )
    # A config that asks for a dynamic shift makes a pipeline give one, whatever the scheduler takes.
    gives_mu = use.gives_mu or bool(scheduler.config.get("use_dynamic_shifting"))
    reasons = (
        (bool(missing), f"has no {', '.join(missing)}, which this pipeline uses"),
        (bool(unknown), f"takes no {', '.join(unknown)} in its steps, which this pipeline gives"),
        (
            gives_sigmas and "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters,
            "takes no noise levels from this pipeline",
        ),
        (gives_mu and not _takes_shift(scheduler), "takes no shift from this pipeline"),
        (
            name in _SCALES_ITS_INPUT
            and not type(scheduler).__name__.startswith("FlowMatch")
            and "scale_model_input" not in use.uses,
            "needs its input scaled, which this pipeline does not do",
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _takes_shift(scheduler: SchedulerMixin) -> bool:
    try:
        copy.deepcopy(scheduler).set_timesteps(2, mu=0.5)
    except (TypeError, ValueError, AssertionError):
        return False
    return True


def _why_not_steps(scheduler: SchedulerMixin, steps: int) -> str | None:
    """Sets it up and takes the first step, on a picture of one value."""
    value = torch.zeros(1, 1, 1, 1)
    more: dict[str, Any] = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        scheduler.set_timesteps(steps, **more)
        first = scheduler.timesteps[0]
        scaled = (
            scheduler.scale_model_input(value, first) if hasattr(scheduler, "scale_model_input") else value
        )
        scheduler.step(scaled, first, value)
    except (ValueError, IndexError, ZeroDivisionError, NotImplementedError, RuntimeError) as error:
        return str(error)
    return None
