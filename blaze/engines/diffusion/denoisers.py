"""Which module of a pipeline is the denoiser, and whether the calls of several requests may be merged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.class_source import class_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_DENOISERS = ("unet", "transformer")
# They compute before the first step or after the last one.
_BESIDE = re.compile(r"text_encoder(_\d)?|image_encoder|vae|vqvae|movq|bert|safety_checker")


def denoiser_name(pipeline: DiffusionPipeline) -> str | None:
    """The attribute; None for a pipeline with no UNet and no transformer, or with both."""
    found = [name for name in _DENOISERS if isinstance(pipeline.components.get(name), torch.nn.Module)]
    return found[0] if len(found) == 1 else None


def why_whole(pipeline: DiffusionPipeline, options: DiffusionConfig) -> str | None:
    """Why requests of this pipeline run whole, one after another; None: their steps may be merged."""
    modules = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    denoisers = [name for name in _DENOISERS if name in modules]
    if not denoisers:
        return "it has no UNet and no transformer"
    if len(denoisers) > 1:
        return "it has two denoisers"
    others = [name for name in modules if name not in denoisers and not _BESIDE.fullmatch(name)]
    if others:
        return f"its {others[0]} may compute in every step too"
    if _changes_its_modules(pipeline.__class__):
        return f"{type(pipeline).__name__} changes its denoiser while it draws"
    if options.offload != "none":
        return f"offload {options.offload} moves the modules while a request is drawn"
    return None


def _changes_its_modules(pipeline_class: type) -> bool:
    """Attention processors or hooks that one call sets would be in the way of the others."""
    source = class_source(pipeline_class)
    return re.search(r"set_\w*attn_processor|register_forward_\w*hook", source) is not None
