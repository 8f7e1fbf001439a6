"""Pipelines of other classes, made of the parts of `digits` and of small random ones, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from blaze.engine_config import DiffusionConfig
from blaze.engines.diffusion.pipelines import LoadedPipeline, Task, load_pipeline
from blaze.models.sources import FolderSource, package_path

DIGITS = package_path("blaze/assets/digits")
PROMPT = "a red seven on white"

Pixels = npt.NDArray[np.float32]


def digits() -> Any:
    """Diffusers by itself: a fresh pipeline, with nothing of an engine but its number of threads."""
    torch.set_num_threads(1)
    return quiet(
        diffusers.DiffusionPipeline.from_pretrained(DIGITS, dtype=torch.float32, use_safetensors=True)
    )


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(folder: Path = DIGITS, **options: Any) -> LoadedPipeline:
    config = DiffusionConfig.model_validate({"dtype": "float32", "device": "cpu"} | options)
    return load_pipeline(FolderSource(folder), config, 1, folder / "cache")


def draw(
    pipeline: Any, *, seed: int = 3, steps: int = 6, prompt: str | None = PROMPT, **given: Any
) -> Pixels:
    """One image, [height, width, 3] in 0..1."""
    given = {"num_inference_steps": steps, "output_type": "np"} | given
    if prompt is not None:
        given = {"prompt": prompt, "guidance_scale": 3.0} | given
    with torch.inference_mode():
        generator = torch.Generator("cpu").manual_seed(seed)
        image: Pixels = pipeline(generator=generator, **given).images[0]
    return image


def levels_apart(one: Pixels, other: Pixels) -> float:
    """The largest difference, in 8-bit levels."""
    return float(np.abs(one - other).max()) * 255


def picture(side: int = 32) -> Image.Image:
    ramp = np.linspace(0, 255, side * side * 3).reshape(side, side, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def left_half(side: int = 32) -> Image.Image:
    """A mask: the left half is drawn anew."""
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[:, : side // 2] = 255
    return Image.fromarray(mask)


# What each task is given beside its prompt.
INPUTS: dict[Task, dict[str, Any]] = {
    Task.TEXT: {},
    Task.IMAGE: {"image": picture(), "strength": 0.7},
    Task.INPAINT: {"image": picture(), "mask_image": left_half(), "width": 32, "height": 32},
}


# --- Folders ------------------------------------------------------------------------------------------


def save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def of_class(name: str, folder: Path, **parts: Any) -> Path:
    """A pipeline of this class, of the parts of `digits` except those that are given."""
    kind = getattr(diffusers, name)
    own = {key: value for key, value in digits().components.items() if value is not None}
    expected = kind._get_signature_keys(kind)[0]
    parts = {key: value for key, value in (own | parts).items() if key in expected}
    more = {"requires_safety_checker": False} if "safety_checker" not in parts else {}
    return save(kind(**_none_for_the_rest(kind, parts), **_accepted(kind, more)), folder)


def _none_for_the_rest(kind: Any, parts: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(kind._get_signature_keys(kind)[0]) | parts


def _accepted(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in kind._get_signature_keys(kind)[1]}


def unet_with(**changes: Any) -> Any:
    """Of the shape of `digits`' UNet but for the changes, with random weights."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel.from_config(digits().unet.config, **changes).eval()


def four_channels(**changes: Any) -> dict[str, Any]:
    """UNet and VAE with four channels of latents, as most models have and `digits` has not."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL.from_config(digits().vae.config, latent_channels=4).eval()
    return {"unet": unet_with(**{"in_channels": 4, "out_channels": 4} | changes), "vae": vae}


def unconditional(folder: Path, scheduler: Any) -> Path:
    """A DDPM or DDIM pipeline: no text, no VAE, 8 x 8 pixels."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    kind = getattr(diffusers, type(scheduler).__name__.replace("Scheduler", "Pipeline"))
    return save(kind(unet=unet, scheduler=scheduler), folder)


def with_safety_checker(folder: Path, *, threshold: float) -> Path:
    """`digits` with a checker that flags what is closer than ``threshold`` (a cosine, less itself)."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = small | {"image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    )
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(threshold)
        checker.special_care_embeds_weights.fill_(2.0)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return of_class(
        "StableDiffusionPipeline", folder, safety_checker=checker.eval(), feature_extractor=processor
    )
