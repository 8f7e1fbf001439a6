"""The model's safety checker, where the config turns it on.

It is taken out of the pipeline, which would blacken what it flags and call that a success.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from blaze.engine_config import DiffusionConfig
from blaze.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    from blaze.engines.diffusion.pipelines import LoadedPipeline


@dataclass(frozen=True, slots=True)
class SafetyChecker:
    model: StableDiffusionSafetyChecker
    processor: CLIPImageProcessor

    def flags(self, images: Sequence[Image.Image]) -> tuple[bool, ...]:
        """Whether the checker finds each of the images unsafe."""
        rgb = [image.convert("RGB") for image in images]
        pixels = self.processor(rgb, return_tensors="pt").pixel_values
        with torch.inference_mode():
            # It blackens what it flags in the arrays it is given: ours are not the pictures.
            scratch = [np.zeros((1, 1, 3), dtype=np.float32) for _ in rgb]
            _, flagged = self.model(images=scratch, clip_input=pixels.to(self.model.device, self.model.dtype))
        return tuple(bool(flag) for flag in flagged)


def check_safety(loaded: LoadedPipeline, images: Sequence[Image.Image]) -> tuple[bool, ...]:
    """Whether each image is flagged; none is where the config does not ask for the checker."""
    if loaded.safety_checker is None:
        return (False,) * len(images)
    return loaded.safety_checker.flags(images)


def take_safety_checker(pipeline: DiffusionPipeline, options: DiffusionConfig) -> SafetyChecker | None:
    """Out of the pipeline. Raises :class:`ConfigError` when the config asks for one and there is none."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    if not options.safety_checker:
        return None
    model = pipeline.components.get("safety_checker")
    processor = pipeline.components.get("feature_extractor")
    if model is None or processor is None:
        raise ConfigError("diffusion.safety_checker: this model has none", param="diffusion")
    if not isinstance(model, StableDiffusionSafetyChecker):
        raise ConfigError(
            f"diffusion.safety_checker: {type(model).__name__} is not a kind that is understood",
            param="diffusion",
        )
    pipeline.register_modules(safety_checker=None)
    pipeline.register_to_config(requires_safety_checker=False)
    return SafetyChecker(model.eval(), processor)
