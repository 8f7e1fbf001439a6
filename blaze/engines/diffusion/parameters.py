"""What a request may ask of the pipeline that is loaded: everything wrong is found before any work."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping

from blaze.checks import SEED_BOUND
from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task, task_of
from blaze.engines.diffusion.schedulers import check_scheduler, is_flow_matching, takes_eta
from blaze.engines.diffusion.sizing import check_format
from blaze.errors import InvalidRequest
from blaze.types import ImageRequest

# Fields of a request that are parameters of a pipeline's __call__ under the same name.
_PARAMETERS = ("negative_prompt", "num_inference_steps", "guidance_scale", "strength", "eta", "clip_skip")


def check_request(request: ImageRequest, loaded: LoadedPipeline, options: DiffusionConfig) -> None:
    """Everything that this pipeline cannot do as asked. Raises :class:`InvalidRequest` naming the field."""
    task = task_of(request)
    _check_task(task, loaded)
    _check_accepted(request, task, loaded)
    if request.n > options.max_batch_size:
        raise InvalidRequest(f"n: at most {options.max_batch_size} images for this model.", param="n")
    _check_size(request, task, loaded, options)
    _check_steps(request, task, loaded, options)
    _check_extras(request, task, loaded)
    _check_adapters(request, options)


def seeds(request: ImageRequest) -> tuple[int, ...]:
    """Image ``i`` is drawn with ``seed + i`` (mod 2**63)."""
    first = request.seed or 0
    return tuple((first + index) % SEED_BOUND for index in range(request.n))


def _check_task(task: Task, loaded: LoadedPipeline) -> None:
    if task in loaded.pipelines:
        return
    if task is Task.INPAINT:
        raise InvalidRequest("mask: this model edits no parts of images.", param="mask")
    if task is Task.IMAGE:
        raise InvalidRequest("image: this model begins with no image alone.", param="image")
    needed = "an image and a mask" if Task.IMAGE not in loaded.pipelines else "an image"
    raise InvalidRequest(f"image: this model needs {needed} to begin with.", param="image")


def _check_accepted(request: ImageRequest, task: Task, loaded: LoadedPipeline) -> None:
    accepts = loaded.accepts[task]
    for name in _PARAMETERS:
        if getattr(request, name) is not None and name not in accepts:
            raise InvalidRequest(f"{name}: this pipeline has no such parameter.", param=name)
    # OpenAI's clients must send a prompt: an empty one says that nothing is lost by ignoring it.
    if request.prompt and not loaded.is_conditional:
        raise InvalidRequest("prompt: this model takes none; send an empty one.", param="prompt")
    guidance = _defaults(loaded.pipelines[task].__class__).get("true_cfg_scale")
    if request.negative_prompt is not None and isinstance(guidance, int | float) and guidance <= 1:
        raise InvalidRequest(
            "negative_prompt: this model is distilled and takes none.", param="negative_prompt"
        )


def _check_size(request: ImageRequest, task: Task, loaded: LoadedPipeline, options: DiffusionConfig) -> None:
    """A given image is brought to the size that is asked for, so that every pipeline that begins with one
    takes a size; without one it is the image's own, and bounded where it is read."""
    sides = {"width": request.width, "height": request.height}
    given = {name for name, side in sides.items() if side is not None}
    if task is Task.TEXT and not given <= loaded.accepts[task]:
        raise InvalidRequest("size: this pipeline has one size of its own.", param="size")
    if given and _upscales(loaded.pipelines[task]):
        raise InvalidRequest("size: this pipeline makes one of the given image's.", param="size")
    for side in sides.values():
        if side is not None and side % loaded.size_factor:
            raise InvalidRequest(f"size: sides must be multiples of {loaded.size_factor}.", param="size")
    if task is not Task.TEXT and not given:
        return
    if (request.width or loaded.default_side) * (request.height or loaded.default_side) > options.max_pixels:
        raise InvalidRequest(f"size: at most {options.max_pixels} pixels.", param="size")
    size = (request.width or loaded.default_side, request.height or loaded.default_side)
    check_format(request, size)
    if loaded.longest_side is not None and max(size) > loaded.longest_side:
        raise InvalidRequest(f"size: at most {loaded.longest_side} pixels a side.", param="size")


def _upscales(pipeline: object) -> bool:
    return re.search("Upscale|SuperResolution", type(pipeline).__name__) is not None


def _check_steps(request: ImageRequest, task: Task, loaded: LoadedPipeline, options: DiffusionConfig) -> None:
    """The pipeline's own default counts too: DDPM's is a thousand steps."""
    defaults = _defaults(loaded.pipelines[task].__class__)
    steps = request.num_inference_steps
    default = defaults.get("num_inference_steps")
    wanted = default if steps is None and isinstance(default, int) else steps
    if wanted is None:
        return
    if wanted > options.max_steps:
        also = f"; this pipeline's own number is {wanted}" if steps is None else ""
        raise InvalidRequest(
            f"num_inference_steps: at most {options.max_steps}{also}.", param="num_inference_steps"
        )
    check_scheduler(loaded, task, request.scheduler, wanted)
    strength = defaults.get("strength") if request.strength is None else request.strength
    if not isinstance(strength, int | float) or isinstance(strength, bool):
        return
    # Flow-matching pipelines round the number of steps up, the others down.
    left = strength > 0 if is_flow_matching(loaded.pipelines[task]) else int(wanted * strength) >= 1
    if not left:
        raise InvalidRequest(
            f"strength: {strength:g} of {wanted} steps leaves none to draw.", param="strength"
        )


def _check_extras(request: ImageRequest, task: Task, loaded: LoadedPipeline) -> None:
    if request.eta is not None and not takes_eta(loaded, task, request.scheduler):
        raise InvalidRequest("eta: only the ddim scheduler takes it.", param="eta")
    if request.clip_skip is not None:
        layers = _clip_layers(loaded)
        if request.clip_skip >= layers:
            raise InvalidRequest(
                f"clip_skip: must be below the {layers} layers of the text encoder.", param="clip_skip"
            )


def _check_adapters(request: ImageRequest, options: DiffusionConfig) -> None:
    names = [name for name, _scale in request.adapters]
    for name in names:
        if name not in options.loras:
            known = ", ".join(options.loras) or "none"
            raise InvalidRequest(
                f"adapters: {name[:80]!r} is not one of this model's: {known}.", param="adapters"
            )
    if len(set(names)) < len(names):
        raise InvalidRequest("adapters: each name may be given once.", param="adapters")


def _clip_layers(loaded: LoadedPipeline) -> int:
    """Of the CLIP text encoder that has the fewest: ``clip_skip`` counts back from the last one of each."""
    layers = [
        component.config.num_hidden_layers
        for name, component in loaded.pipeline.components.items()
        if name.startswith("text_encoder")
        and component is not None
        and component.config.model_type.startswith("clip")
    ]
    return min(layers, default=0)


@functools.cache
def _defaults(pipeline_class: type) -> Mapping[str, object]:
    """Default values of the parameters of ``__call__``."""
    parameters = inspect.signature(pipeline_class.__call__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}
