"""Loading a diffusers pipeline, and its variants for images and masks: one set of modules for all."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.adapters import AdapterSwitch, load_adapters
from blaze.engines.diffusion.class_source import checked_side_factors
from blaze.engines.diffusion.denoisers import denoiser_name, why_whole
from blaze.engines.diffusion.files import check_fits, local_folder, read_index
from blaze.engines.diffusion.memory import apply_options, check_hardware, quantization_config
from blaze.engines.diffusion.safety import SafetyChecker, take_safety_checker
from blaze.engines.torch_setup import choose_device, choose_dtype, free_bytes, set_threads
from blaze.errors import ModelSourceError
from blaze.models.sources import ModelSource
from blaze.types import ImageRequest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

FreeBytes = Callable[[torch.device], int]

# What requests can give to a pipeline's __call__. One that cannot do without anything else is refused.
_GIVEN = frozenset({"self", "prompt", "image", "mask_image"})


class Task(StrEnum):
    """What a request gives beside its prompt; unconditional pipelines count as TEXT."""

    TEXT = "text"
    IMAGE = "image"
    INPAINT = "inpaint"


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPipeline:
    """A pipeline and its variants: they share every module, and each has a scheduler that calls copy."""

    pipelines: Mapping[Task, DiffusionPipeline]  # the one that was loaded comes first
    accepts: Mapping[Task, frozenset[str]]  # parameters of each one's __call__
    size_factor: int  # width and height are multiples of it
    default_side: int  # pixels; 0 where the pipeline does not say
    denoiser: str | None  # the attribute: "unet" or "transformer"
    whole_because: str | None  # why requests run whole, one after another; None: their steps are merged
    is_conditional: bool  # by a prompt
    longest_side: int | None = None  # pixels, where the denoiser has positions for no more
    adapters: AdapterSwitch | None = None  # None: the config names none
    safety_checker: SafetyChecker | None = None  # None: the config does not ask for it
    shells: Mapping[Task, type[DiffusionPipeline]] = field(default_factory=dict)  # that calls are made on

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The one that was loaded."""
        return next(iter(self.pipelines.values()))


def task_of(request: ImageRequest) -> Task:
    if request.mask is not None:
        return Task.INPAINT
    return Task.TEXT if request.image is None else Task.IMAGE


def load_pipeline(
    source: ModelSource,
    options: DiffusionConfig,
    threads: int,
    cache: Path,  # noqa: ARG001 (engines are all loaded alike)
    *,
    free: FreeBytes = free_bytes,
) -> LoadedPipeline:
    """Blocking. ``free``: bytes of memory that the weights may take.

    Raises :class:`ModelSourceError` when the files cannot be loaded, :class:`ConfigError` when the options
    ask for what the pipeline or the hardware lacks, and :class:`EnvironmentProblem` when the weights would
    not fit.
    """
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    set_threads(threads)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    check_hardware(options, device, dtype)
    folder = local_folder(source)
    index = read_index(folder)
    where = device if options.offload == "none" else torch.device("cpu")
    check_fits(folder, options, str(dtype).removeprefix("torch."), free(where))
    pipeline = _read(folder, index, options, dtype)
    _check_kind(pipeline)
    safety_checker = take_safety_checker(pipeline, options)
    adapters = load_adapters(pipeline, options.loras)
    apply_options(pipeline, options, device)
    if safety_checker is not None:
        safety_checker.model.to(device)
    pipelines = _variants(pipeline)
    for variant in pipelines.values():
        variant.set_progress_bar_config(disable=True)
    accepts = {task: frozenset(_parameters(variant)) for task, variant in pipelines.items()}
    reasons = (why_whole(variant, options) for variant in pipelines.values())
    return LoadedPipeline(
        pipelines=pipelines,
        accepts=accepts,
        size_factor=_size_factor(pipeline, {each.__class__ for each in pipelines.values()}),
        default_side=_default_side(pipeline),
        longest_side=_longest_side(pipeline),
        denoiser=denoiser_name(pipeline),
        whole_because=next((reason for reason in reasons if reason is not None), None),
        is_conditional=any("prompt" in names for names in accepts.values()),
        adapters=adapters,
        safety_checker=safety_checker,
        shells={task: _shell_of(variant) for task, variant in pipelines.items()},
    )


def _read(
    folder: Path, index: Mapping[str, Any], options: DiffusionConfig, dtype: torch.dtype
) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    more: dict[str, Any] = {}
    quantization = quantization_config(options, index)
    if quantization is not None:
        more["quantization_config"] = quantization
    if "safety_checker" in index and not options.safety_checker:
        more |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        return DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, **more
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ModelSourceError(f"source {str(folder)!r} cannot be loaded: {error}", param="source") from error


# --- Variants ---------------------------------------------------------------------------------------


def _check_kind(pipeline: DiffusionPipeline) -> None:
    """Raises :class:`ModelSourceError` for a pipeline that no request could be drawn with."""
    parameters = _parameters(pipeline)
    required = {name for name, each in parameters.items() if each.default is each.empty and each.kind < 2}
    kind = type(pipeline).__name__
    lacks = sorted(required - _GIVEN)
    if {"num_frames", "video", "video_length"} & set(parameters):
        raise ModelSourceError(f"source: {kind} makes videos, not images", param="source")
    if any(name.startswith("audio") for name in parameters):
        raise ModelSourceError(f"source: {kind} makes sound, not images", param="source")
    if lacks:
        raise ModelSourceError(
            f"source: {kind} cannot do without {lacks[0]}, which requests have no field for", param="source"
        )
    if "control_image" in parameters or any("controlnet" in name for name in pipeline.components):
        raise ModelSourceError(
            f"source: {kind} needs a control image, which requests have no field for", param="source"
        )


def _variants(pipeline: DiffusionPipeline) -> dict[Task, DiffusionPipeline]:
    """The pipeline for each task that it or a class beside it can do."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

    pipelines = dict.fromkeys(_own_tasks(type(pipeline)), pipeline)
    for task, auto in (
        (Task.TEXT, AutoPipelineForText2Image),
        (Task.IMAGE, AutoPipelineForImage2Image),
        (Task.INPAINT, AutoPipelineForInpainting),
    ):
        if task in pipelines or not _serves(pipeline, task):
            continue
        try:
            # Constructors mend what they find outdated in a scheduler's config: not in the one of the others.
            pipelines[task] = auto.from_pipe(pipeline, scheduler=copy.deepcopy(pipeline.scheduler))
        except ValueError:
            continue  # there is no such class, or it needs modules that this pipeline lacks
    return pipelines


def _shell_of(pipeline: DiffusionPipeline) -> type[DiffusionPipeline]:
    """Its class, but for the search through all modules for the device, which costs every call milliseconds
    and always finds the same."""
    kind = type(pipeline)
    return type(kind.__name__, (kind,), {"_execution_device": pipeline._execution_device})


def _own_tasks(kind: type) -> list[Task]:
    from diffusers.pipelines.auto_pipeline import (
        AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        AUTO_INPAINT_PIPELINES_MAPPING,
        AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    )

    mappings = {
        Task.TEXT: AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        Task.IMAGE: AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        Task.INPAINT: AUTO_INPAINT_PIPELINES_MAPPING,
    }
    listed = [task for task, mapping in mappings.items() if kind in mapping.values()]
    if listed:
        return listed
    parameters = inspect.signature(kind.__call__).parameters
    if "mask_image" in parameters:
        return [Task.INPAINT]
    return [Task.IMAGE if "image" in parameters else Task.TEXT]  # upscaling begins with an image too


def _serves(pipeline: DiffusionPipeline, task: Task) -> bool:
    """Whether these weights can do what the class of the variant would make them do."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    denoiser, vae = _denoiser(pipeline), pipeline.components.get("vae")
    if pipeline.config.get("requires_aesthetics_score") and task is Task.TEXT:
        return False  # a refiner: it has learned the last steps only
    if not isinstance(denoiser, UNet2DConditionModel | SD3Transformer2DModel) or vae is None:
        return True
    latents, seen = vae.config.latent_channels, denoiser.config.in_channels
    if (
        task is Task.INPAINT
    ):  # with the mask and what is masked, or without; the classes count on these numbers
        usual = 4 if isinstance(denoiser, UNet2DConditionModel) else 16
        return latents == usual and seen in (latents, 2 * latents + 1)
    return bool(seen == latents)


def _parameters(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline.__call__).parameters


# --- Sizes ------------------------------------------------------------------------------------------


def _size_factor(pipeline: DiffusionPipeline, kinds: Iterable[type]) -> int:
    """Sides that are no multiple of it would be refused by some pipelines and rounded by others.

    Transformers take latents in patches: their sides are multiples of a whole patch. ``kinds``: the classes
    of the pipeline and its variants.
    """
    factor = int(getattr(pipeline, "vae_scale_factor", 1))
    denoiser = _denoiser(pipeline)
    patch = getattr(getattr(denoiser, "config", None), "patch_size", None)
    processor = getattr(getattr(pipeline, "image_processor", None), "config", {})
    return math.lcm(
        factor * patch if isinstance(patch, int) else factor,
        int(processor.get("vae_scale_factor") or 1),
        *(number for kind in kinds for number in checked_side_factors(kind)),
    )


def _default_side(pipeline: DiffusionPipeline) -> int:
    """Pixels of what is drawn without a size; 0 where the pipeline does not say."""
    factor = int(getattr(pipeline, "vae_scale_factor", 1))
    sample = getattr(pipeline, "default_sample_size", None)
    if sample is None:
        sample = getattr(getattr(_denoiser(pipeline), "config", None), "sample_size", None)
    return factor * sample if isinstance(sample, int) else 0


def _longest_side(pipeline: DiffusionPipeline) -> int | None:
    config = getattr(_denoiser(pipeline), "config", None)
    most, patch = getattr(config, "pos_embed_max_size", None), getattr(config, "patch_size", None)
    if not isinstance(most, int) or not isinstance(patch, int):
        return None
    return most * patch * int(getattr(pipeline, "vae_scale_factor", 1))


def _denoiser(pipeline: DiffusionPipeline) -> torch.nn.Module | None:
    name = denoiser_name(pipeline)
    return None if name is None else getattr(pipeline, name)
