"""Loading a diffusers pipeline, and calling it for one request without touching shared state."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blaze.checks import SEED_BOUND
from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.images import Pixels
from blaze.engines.torch_setup import choose_device, choose_dtype, set_threads
from blaze.errors import InvalidRequest, ModelSourceError
from blaze.models.cache import local_model
from blaze.models.sources import GGUFSource, HubSource, ModelSource
from blaze.types import ImageRequest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

StepDone = Callable[[int, int], None]  # (steps done, of how many); raising ends the call


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    pipeline: DiffusionPipeline
    accepts: frozenset[str]  # parameters of the pipeline's __call__
    size_factor: int  # width and height are multiples of it
    default_side: int  # pixels; 0 where the pipeline does not say


def load_pipeline(source: ModelSource, options: DiffusionConfig, threads: int, cache: Path) -> LoadedPipeline:
    """Blocking. Raises :class:`ModelSourceError` when the files cannot be loaded."""
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    from diffusers import DiffusionPipeline

    if isinstance(source, GGUFSource):
        raise ModelSourceError(
            "source: a diffusion model is a folder or a hub id, not a GGUF file", param="source"
        )
    set_threads(threads)
    device = choose_device(options.device)
    where = local_model(source, cache)
    pinned = {"revision": source.revision} if isinstance(source, HubSource) and source.revision else {}
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            where,
            dtype=choose_dtype(options.dtype, device),
            use_safetensors=True,
            trust_remote_code=False,
            **pinned,
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelSourceError(f"source {where!r} cannot be loaded: {error}", param="source") from error
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(
        pipeline=pipeline.to(device),
        accepts=frozenset(inspect.signature(pipeline.__call__).parameters),
        size_factor=int(getattr(pipeline, "vae_scale_factor", 1)),
        default_side=_default_side(pipeline),
    )


def _default_side(pipeline: DiffusionPipeline) -> int:
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    sample_size = getattr(getattr(denoiser, "config", None), "sample_size", None)
    return int(getattr(pipeline, "vae_scale_factor", 1)) * sample_size if isinstance(sample_size, int) else 0


def check_request(request: ImageRequest, loaded: LoadedPipeline, options: DiffusionConfig) -> None:
    """Everything that this pipeline cannot do as asked. Raises :class:`InvalidRequest` naming the field."""
    if request.n > options.max_batch_size:
        raise InvalidRequest(f"n: at most {options.max_batch_size} images for this model.", param="n")
    steps = request.num_inference_steps
    if steps is not None and steps > options.max_steps:
        raise InvalidRequest(
            f"num_inference_steps: at most {options.max_steps}.", param="num_inference_steps"
        )
    for side in (request.width, request.height):
        if side is not None and side % loaded.size_factor:
            raise InvalidRequest(f"size: sides must be multiples of {loaded.size_factor}.", param="size")
    if (request.width or loaded.default_side) * (request.height or loaded.default_side) > options.max_pixels:
        raise InvalidRequest(f"size: at most {options.max_pixels} pixels.", param="size")
    for name in ("negative_prompt", "guidance_scale", "num_inference_steps", "width", "height"):
        if getattr(request, name) is not None and name not in loaded.accepts:
            raise InvalidRequest(f"{name}: this pipeline has no such parameter.", param=name)


def seeds(request: ImageRequest) -> tuple[int, ...]:
    """Image ``i`` is drawn with ``seed + i`` (mod 2**63)."""
    first = request.seed or 0
    return tuple((first + index) % SEED_BOUND for index in range(request.n))


def call_pipeline(loaded: LoadedPipeline, request: ImageRequest, step_done: StepDone) -> list[Pixels]:
    """The request's images, each [height, width, channels] in 0..1.

    The call gets a pipeline shell and a scheduler of its own (both keep state while they run), and one
    CPU generator per image, so that image ``i`` is the same whatever is drawn beside it.
    """
    shell = copy.copy(loaded.pipeline)
    shell.scheduler = copy.deepcopy(loaded.pipeline.scheduler)

    def after_step(pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step_done(step + 1, int(pipeline.num_timesteps))
        return tensors

    wanted: dict[str, Any] = {
        "prompt": [request.prompt] * request.n,
        "negative_prompt": None if request.negative_prompt is None else [request.negative_prompt] * request.n,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "width": request.width,
        "height": request.height,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds(request)],
        "batch_size": request.n if "prompt" not in loaded.accepts else None,
        "callback_on_step_end": after_step,
        "output_type": "np",
    }
    given = {name: value for name, value in wanted.items() if value is not None and name in loaded.accepts}
    with torch.inference_mode():
        images = shell(**given).images
    return list(images)
